"""What the runtime and the processor that will run an int8 model can do with it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from edgewise.passes.movers import MOVERS
from edgewise.runtime.errors import InputError

SHRINKING = frozenset({"Gather", "GatherElements", "MaxPool", "ReduceMax", "ReduceMin", "Slice"})
"""Movers that hand on less than they read: what comes out of float is better quantized behind them."""

AVERAGES = frozenset({"AveragePool", "GlobalAveragePool"})
"""Followers whose result has more digits than 8 bits hold: where floats read it, floats compute it."""

_ANCHORS = frozenset({"Conv", "Gemm", "MatMul"})
_CPU_FOLLOWERS = frozenset(
    {"Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid"}
)
_CPU_SLOW = frozenset({"AveragePool", "Softmax"})


@dataclass(frozen=True)
class Target:
    """The rules an int8 graph has to follow to run in integers.

    `activation` is the type of activations, "uint8", "int8", "uint16" or "int16"; `symmetric` says that
    every zero point has to be 0. `anchors` are the operators worth quantizing for themselves, `followers`
    those that join where their neighbours are in int8. `float_outputs` may hand float to a reader in
    float at no extra cost. `integer_movers` are not fused between DequantizeLinear and QuantizeLinear, but
    run on integers when they are written so. `saturates` says that two products are added in 16 bits
    before they are widened, `int32_bias` that the kernels want the bias in int32, `products` that a MatMul
    of two activations pays. `slow` are operators whose int8 kernel takes longer than DequantizeLinear,
    float and QuantizeLinear (an AveragePool over everything is none of them); `narrow_is_slow` says so of
    convolutions with few channels.
    """

    name: str
    activation: str = "uint8"
    symmetric: bool = False
    anchors: frozenset[str] = _ANCHORS
    followers: frozenset[str] = _CPU_FOLLOWERS
    movers: frozenset[str] = MOVERS
    float_outputs: frozenset[str] = frozenset({"Gemm", "MatMul"})
    integer_movers: frozenset[str] = frozenset({"Clip", "Pad", "Relu", "SpaceToDepth"})
    saturates: bool = False
    int32_bias: bool = True
    products: bool = False
    slow: frozenset[str] = _CPU_SLOW
    narrow_is_slow: bool = True

    def with_activations(self, activation: str | None) -> Target:
        """The rules for activations of another type. Raises `InputError` on one that does not run.

        What multiplies 16 bits computes in float between DequantizeLinear and QuantizeLinear, so that
        nothing saturates; operators that are given the integers themselves are made for 8.
        """
        if activation is None or activation == self.activation:
            return self
        if self.symmetric:
            raise InputError(f"{self.name} takes activations in {self.activation} only, not in {activation}")
        if activation.endswith("8"):
            return replace(self, activation=activation)
        return replace(self, activation=activation, integer_movers=frozenset(), saturates=False)

    def measured(self) -> Target:
        """These rules without what they say of speed: for those who measure it."""
        return replace(self, slow=frozenset(), narrow_is_slow=False, products=True)


X86 = Target("x86", saturates=True)
"""Any x86 processor. Without VNNI, u8 x s8 kernels add pairs of products in saturating 16-bit integers."""

X86_VNNI = Target("x86-vnni")
"""x86 processors with AVX-VNNI or AVX-512 VNNI only: products are added in 32 bits."""

ARM = Target("arm", products=True)

TENSORRT = Target(
    "tensorrt",
    activation="int8",
    symmetric=True,
    followers=frozenset({"Add", "AveragePool", "Concat", "GlobalAveragePool"}),
    float_outputs=frozenset(_ANCHORS | {"Add", "AveragePool", "Concat", "GlobalAveragePool"}),
    integer_movers=frozenset(),
    int32_bias=False,
    products=True,
    slow=frozenset(),
    narrow_is_slow=False,
)
"""NVIDIA TensorRT, explicit quantization: symmetric int8, bias in float."""

OPENVINO = Target(
    "openvino", saturates=True, integer_movers=frozenset(), slow=frozenset(), narrow_is_slow=False
)

CUDA = Target("cuda", anchors=frozenset(), followers=frozenset(), movers=frozenset())
"""onnxruntime's CUDA provider has no int8 kernels for convolutions: nothing is quantized for it."""

TARGETS: Mapping[str, Target] = MappingProxyType(
    {t.name: t for t in (X86, X86_VNNI, ARM, TENSORRT, OPENVINO, CUDA)}
)


def target_of(name: str, machine: str | None = None) -> Target:
    """The target called `name`; "cpu" is the processor family of `machine` (default: of this machine).

    Raises `InputError` on a name that is not known.
    """
    if name == "cpu":
        machine = (machine or platform.machine()).lower()
        return ARM if machine.startswith(("arm", "aarch")) else X86
    if name not in TARGETS:
        raise InputError(f"unknown target {name!r}: choose from cpu, {', '.join(TARGETS)}")
    return TARGETS[name]
