"""Write a matrix product with a bias as one Gemm."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgewise.passes.base import Refused, Rule
from edgewise.passes.graph import Array, constant_of, only_user, replace
from edgewise.passes.linear import FLOATS, constant_input, rank_of, set_constant


@dataclass(frozen=True)
class FuseMatmulAdd(Rule):
    """Turn MatMul and the Add of its bias into Gemm.

    Given:   y = Add(MatMul(x, W), b)    with x [M, K], constant W [K, N], constant b [N] or [1, N]
    Result:  y = Gemm(x, W, b)           with b [N]
    In float this saves one sweep over y. In int8 it saves rounding it twice: onnxruntime runs a quantized
    Gemm in one kernel that adds an int32 bias to its int32 sums, whereas a quantized MatMul rounds its
    sums to 8 bits before a second kernel adds the bias and rounds again.
    Gemm takes matrices only, so a product of another rank is left as it is.
    """

    name = "fuse-matmul-add"
    op_types = ("Add",)

    def rewrite(self, node: ir.Node) -> bool:
        index = constant_input(node)
        product = None if index is None else node.inputs[1 - index]
        matmul = None if product is None else product.producer()
        if index is None or product is None or matmul is None:
            return False
        if matmul.op_type != "MatMul" or matmul.domain != "":
            return False
        if only_user(product) is not node:
            raise Refused("MatMul output has another user")
        if matmul.graph is not node.graph:
            raise Refused("MatMul is in another graph")
        bias = _bias(matmul, constant_of(node.inputs[index]))
        matmul.op_type = "Gemm"
        matmul.resize_inputs(3)
        matmul.replace_input_with(2, node.inputs[index])
        replace(node.outputs[0], product)
        set_constant(matmul, 2, bias, "bias")
        return True


def _bias(matmul: ir.Node, added: Array | None) -> Array:
    """What is added as [N]; `Refused` where the sum is no Gemm."""
    if rank_of(matmul.inputs[0]) != 2:
        raise Refused("MatMul is not known to be of rank 2")
    weight = constant_of(matmul.inputs[1])
    if weight is None or weight.ndim != 2:
        raise Refused("weight is not a constant matrix")
    if weight.dtype not in FLOATS:
        raise Refused("weight is not of a float type")
    columns = weight.shape[1]
    if added is None or added.shape not in ((columns,), (1, columns)):
        raise Refused("bias is not one number per column")
    return added.reshape(columns)
