"""What operators compute from one number an operand, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.passes.channel_links import Array
from edgewise.passes.graph import attribute

Floats = npt.NDArray[np.float64]
"""One number an index of a slot, NaN where it is not one and the same everywhere."""


def extent(array: Array, axis: int | None) -> tuple[Floats, Floats]:
    """The least and the greatest number of each slice of `array` along `axis`, or of all of it.

    NaN where there is none.
    """
    if not array.size:
        nothing = np.full(1 if axis is None else array.shape[axis], np.nan)
        return nothing, nothing
    others = tuple(a for a in range(array.ndim) if a != axis)
    ends = (np.atleast_1d(array.min(others)), np.atleast_1d(array.max(others)))
    return ends[0].astype(np.float64), ends[1].astype(np.float64)


def uniform(array: Array, axis: int | None) -> Floats:
    """The number that each slice of `array` along `axis` (or all of it) holds throughout."""
    low, high = extent(array, axis)
    return np.where(low == high, low, np.nan)


def product(a: Floats, b: Floats) -> Floats:
    """Zero times anything is zero, also what is not known, or infinite as the end of a range."""
    return np.where((a == 0) | (b == 0), 0.0, a * b)


def _clip(node: ir.Node, x: Floats, *limits: Floats) -> Floats:
    """Limits are inputs, or attributes in old opsets; one that is left out is none."""
    bounds = [attribute(node, "min", -np.inf), attribute(node, "max", np.inf)]
    for i, limit in enumerate(limits):
        bounds[i] = bounds[i] if node.inputs[i + 1] is None else limit
    clipped: Floats = np.minimum(np.maximum(x, bounds[0]), bounds[1])
    return clipped


def _gelu(node: ir.Node, x: Floats) -> Floats:
    if attribute(node, "approximate", "none") == "tanh":
        gate = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    else:
        gate = _erf(x / math.sqrt(2))
    return product(0.5 * x, 1 + gate)


def _erf(x: Floats) -> Floats:
    return np.array([math.erf(v) for v in x])


def _sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def _elu(x: Floats, alpha: float, scale: float = 1.0) -> Floats:
    return np.where(x < 0, scale * alpha * np.expm1(x), scale * x)


def _celu(node: ir.Node, x: Floats) -> Floats:
    alpha = float(attribute(node, "alpha", 1.0))
    return np.maximum(x, 0) + np.minimum(alpha * np.expm1(x / alpha), 0)


def _hard_sigmoid(x: Floats, alpha: float, beta: float) -> Floats:
    return np.clip(alpha * x + beta, 0, 1)


def _where(node: ir.Node, condition: Floats, a: Floats, b: Floats) -> Floats:
    chosen = np.where(condition != 0, a, b)
    return np.where(a == b, a, np.where(np.isnan(condition), np.nan, chosen))


_SELU_ALPHA, _SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875

FUNCTIONS: Mapping[str, Callable[..., Floats]] = MappingProxyType(
    {
        "Abs": lambda n, x: np.abs(x),
        "Add": lambda n, a, b: a + b,
        "Celu": _celu,
        "Clip": _clip,
        "Div": lambda n, a, b: a / b,
        "Elu": lambda n, x: _elu(x, attribute(n, "alpha", 1.0)),
        "Erf": lambda n, x: _erf(x),
        "Exp": lambda n, x: np.exp(x),
        "Gelu": _gelu,
        "HardSigmoid": lambda n, x: _hard_sigmoid(x, attribute(n, "alpha", 0.2), attribute(n, "beta", 0.5)),
        "HardSwish": lambda n, x: product(x, _hard_sigmoid(x, 1 / 6, 0.5)),
        "LeakyRelu": lambda n, x: np.where(x < 0, attribute(n, "alpha", 0.01) * x, x),
        "Log": lambda n, x: np.log(x),
        "Max": lambda n, *x: np.maximum.reduce(np.broadcast_arrays(*x)),
        "Mean": lambda n, *x: np.add.reduce(np.broadcast_arrays(*x)) / len(x),
        "Min": lambda n, *x: np.minimum.reduce(np.broadcast_arrays(*x)),
        "Mish": lambda n, x: product(x, np.tanh(np.logaddexp(0, x))),
        "Mul": lambda n, a, b: product(a, b),
        "Neg": lambda n, x: -x,
        "PRelu": lambda n, x, slope: np.where(x < 0, slope * x, x),
        "Pow": lambda n, x, y: np.power(x, y),
        "Reciprocal": lambda n, x: 1 / x,
        "Relu": lambda n, x: np.maximum(x, 0),
        "Selu": lambda n, x: _elu(x, attribute(n, "alpha", _SELU_ALPHA), attribute(n, "gamma", _SELU_GAMMA)),
        "Sigmoid": lambda n, x: _sigmoid(x),
        "Softplus": lambda n, x: np.logaddexp(0, x),
        "Softsign": lambda n, x: x / (1 + np.abs(x)),
        "Sqrt": lambda n, x: np.sqrt(x),
        "Sub": lambda n, a, b: a - b,
        "Sum": lambda n, *x: np.add.reduce(np.broadcast_arrays(*x)),
        "Swish": lambda n, x: x * _sigmoid(attribute(n, "alpha", 1.0) * x),
        "Tanh": lambda n, x: np.tanh(x),
        "Where": _where,
    }
)
"""float64 functions of (node, *operands) in which NaN stands for a number that is not known."""
