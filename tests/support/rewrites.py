"""Small graphs with their weights, and what every exact rewrite of one has to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx_ir.passes.common import ShapeInferencePass

from edgewise.passes.base import Outcome, Pass
from edgewise.passes.verify import Signature, check
from edgewise.runtime.evaluate import Array, Evaluator, input_specs, seeded_feed
from edgewise.runtime.session import serialize

# Relative to the largest output. float32: sums of some hundred products, whose terms a fold rescales, each
# rounded to 6e-8. float16: onnxruntime computes most layers in float32 and rounds every result to 5e-4.
TOLERANCES = {"float16": 5e-3, "float32": 1e-5, "float64": 1e-13}


def build(graph: str, opset: int = 17, *, shapes: bool = True, **weights: Array) -> ir.Model:
    """The model of `graph`, in onnx's text form, with `weights` as its initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {graph}')
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in weights.items())
    built = ir.from_proto(model)
    return ShapeInferencePass()(built).model if shapes else built


def operators(model: ir.Model) -> list[str]:
    """The operators of the main graph in order."""
    return [node.op_type for node in model.graph]


def constants(model: ir.Model) -> dict[str, Array]:
    """The initializers of the main graph by name."""
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def settled(model: ir.Model, rule: Pass) -> tuple[ir.Model, Outcome]:
    """`model` after `rule`, checked to be sound, with nothing left to do, the original being untouched."""
    before, after = serialize(model), model.clone()
    outcome = rule.apply(after)
    if rule.keeps_signature:
        check(after, Signature.of(model))
    if all(node.domain == "" for node in after.graph.all_nodes()) and outcome.edits:
        onnx.checker.check_model(ir.to_proto(after), full_check=True)  # which knows no other operators
    assert rule.apply(after.clone()).edits == 0
    assert serialize(model) == before
    assert (serialize(after) != before) == (outcome.edits > 0)
    return after, outcome


def decibels_kept(model: ir.Model, after: ir.Model, feed: Mapping[str, Array] | None = None) -> float:
    """Signal over noise of the first output of `after`, in dB."""
    feed = feed or seeded_feed(input_specs(model), size=3)
    x, y = (next(iter(Evaluator(m).run(feed).values())) for m in (model, after))
    return float(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()))


def rewritten(
    model: ir.Model, rule: Pass, feed: Mapping[str, Array] | None = None
) -> tuple[ir.Model, Outcome]:
    """`model` after `rule`, `settled` and equal."""
    after, outcome = settled(model, rule)
    if outcome.edits:
        feed = feed or seeded_feed(input_specs(model), size=3)
        assert_equal(Evaluator(model, optimize=False).run(feed), Evaluator(after, optimize=False).run(feed))
    return after, outcome


def refusal(model: ir.Model, rule: Pass) -> str:
    """The one reason for which `rule` leaves `model` as it is; empty where it finds nothing to do."""
    _, outcome = rewritten(model, rule)
    assert outcome.edits == 0
    (reason, *more) = outcome.refused or [""]
    assert not more
    return reason


def assert_equal(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
    for name, array in expected.items():
        assert array.dtype == actual[name].dtype
        assert array.shape == actual[name].shape
        scale = np.abs(array).max(initial=0)
        difference = np.abs(array.astype(np.float64) - actual[name]).max(initial=0)
        assert difference <= TOLERANCES[str(array.dtype)] * scale, (name, difference, scale)


@dataclass(frozen=True)
class ConvCase:
    """A Conv or ConvTranspose `c = Conv(x, w, b)` of any kind, its weights and the shape of its input."""

    operator: str
    text: str
    weights: Mapping[str, Array]
    inputs: int
    outputs: int
    dims: int

    def channel_shape(self, size: int) -> tuple[int, ...]:
        return (1, size, *(1,) * self.dims)

    def declared(self, channels: int) -> str:
        """The type of the input, of 3 samples and 6 positions an axis."""
        return f"float[3, {channels}{', 6' * self.dims}]"


@st.composite
def convolutions(draw: st.DrawFn, padded: bool = True, transposed: bool | None = None) -> ConvCase:
    """Convolutions of one to three spatial axes; strides, dilations, groups, bias and padding vary."""
    dims = draw(st.integers(1, 3))
    transpose = draw(st.booleans()) if transposed is None else transposed
    groups, wide, deep = (draw(st.integers(1, 3)) for _ in range(3))
    inputs, outputs = groups * wide, groups * deep
    per_axis = st.lists(st.integers(1, 2), min_size=dims, max_size=dims)
    kernel, strides, dilations = draw(per_axis), draw(per_axis), draw(per_axis)
    pads = (
        draw(st.lists(st.integers(0, 1), min_size=2 * dims, max_size=2 * dims)) if padded else [0] * 2 * dims
    )
    if transpose:  # padding of a transposed convolution crops
        pads = [min(p, kernel[i % dims] - 1) for i, p in enumerate(pads)]
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    shape = (inputs, deep, *kernel) if transpose else (outputs, wide, *kernel)
    weights = {"w": rng.standard_normal(shape).astype(np.float32)}
    if draw(st.booleans()):
        weights["b"] = rng.standard_normal(outputs).astype(np.float32)
    operator = "ConvTranspose" if transpose else "Conv"
    attributes = f"group = {groups}, strides = {strides}, dilations = {dilations}, pads = {pads}"
    text = f"{operator}<{attributes}>({{}}, {', '.join(weights)})"
    return ConvCase(operator, text, weights, inputs, outputs, dims)
