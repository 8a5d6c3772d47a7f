"""Matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from edgewise.runtime.errors import InputError
from edgewise.training.operators.call import Call, Operator, described


def matmul(call: Call) -> Tensor:
    a, b = call.input(0), call.input(1)
    if a.is_floating_point():
        return torch.matmul(a, b)
    return torch.matmul(a.long(), b.long()).to(a.dtype)


def gemm(call: Call) -> Tensor:
    """alpha * A' B' + beta * C, where C broadcasts."""
    a, b, c = call.input(0), call.input(1), call.optional(2)
    a = a.t() if call.attr("transA", 0) else a
    b = b.t() if call.attr("transB", 0) else b
    alpha: float = call.attr("alpha", 1.0)
    beta: float = call.attr("beta", 1.0)
    if not a.is_floating_point():
        y = torch.matmul(a.long(), b.long()) * alpha
        return (y if c is None else y + beta * c).to(a.dtype)
    if c is not None:
        return torch.addmm(c, a, b, alpha=alpha, beta=beta)
    y = torch.mm(a, b)
    return y if alpha == 1.0 else alpha * y


def fused_matmul(call: Call) -> Tensor:
    """alpha * A' B' of stacks of matrices, each transposed if its attribute says so."""
    a, b = call.input(0), call.input(1)
    alpha: float = call.attr("alpha", 1.0)
    if call.attr("transBatchA", 0) or call.attr("transBatchB", 0):
        raise InputError(f"{described(call.node)} transposes its batch, which is not supported")
    a = a.mT if call.attr("transA", 0) and a.dim() > 1 else a
    b = b.mT if call.attr("transB", 0) and b.dim() > 1 else b
    return alpha * torch.matmul(a, b)


def matmul_integer(call: Call) -> Tensor:
    """Eight-bit matrices less their zero points, multiplied in int32.

    float64 holds every sum exactly and has fast kernels. A vector of zero points goes with the rows of
    the first matrix and with the columns of the second.
    """
    a, b = call.input(0).double(), call.input(1).double()
    a_zero, b_zero = call.optional(2), call.optional(3)
    if a_zero is not None:
        a = a - (a_zero if a_zero.dim() != 1 else a_zero.reshape(-1, 1)).double()
    if b_zero is not None:
        b = b - b_zero.double()
    return torch.matmul(a, b).to(torch.int32)


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "Gemm": gemm,
        "MatMul": matmul,
        "MatMulInteger": matmul_integer,
        "com.microsoft.FusedMatMul": fused_matmul,
    }
)
