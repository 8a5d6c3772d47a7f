"""Noise layer by layer: what the consumer reads against what the original computes there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from edgewise.calibration.noise import decibels
from edgewise.optimizer import files, jobs, layers
from edgewise.optimizer.comparison import differences
from edgewise.optimizer.layers import LayerNoise, layer_noise
from edgewise.optimizer.pipeline import Reference, run_passes
from edgewise.optimizer.probe import probe_feeds
from edgewise.optimizer.recipe import Recipe
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator, Feed

PLAIN = "g (float[N, 64] x) => (float[N, 64] y) { a = Neg (x) b = Relu (a) y = Sqrt (b) }"

QDQ = """
    g (float[N, 64] x) => (float[N, 64] y) <float s = {0.05}, uint8 z = {128}>
    {
        xq = QuantizeLinear (x, s, z)
        xd = DequantizeLinear (xq, s, z)
        a = Neg (xd)
        aq = QuantizeLinear (a, s, z)
        ad = DequantizeLinear (aq, s, z)
        b = Relu (ad)
        y = Sqrt (b)
    }"""


def parse(text: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}'))
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
    return model


def feeds(count: int = 3, size: int = 64) -> list[Feed]:
    rng = np.random.default_rng(5)
    return [{"x": rng.standard_normal((1 + i, size)).astype(np.float32)} for i in range(count)]


def rounded(array: Any) -> Any:
    """What the grid of QDQ leaves of it."""
    return ((np.rint(array / np.float32(0.05)) + 128).clip(0, 255) - 128) * np.float32(0.05)


def snr(expected: Sequence[Any], actual: Sequence[Any]) -> float:
    e, a = (np.concatenate([x.ravel() for x in arrays]).astype(float) for arrays in (expected, actual))
    return decibels(float((e**2).sum()), float(((e - a) ** 2).sum()))


def by_value(found: Sequence[LayerNoise]) -> dict[str, float]:
    return {layer.value: layer.snr_db for layer in found}


class TestValues:
    def test_the_same_model_has_no_noise(self) -> None:
        found = layer_noise(parse(PLAIN), parse(PLAIN), feeds())
        assert found == (
            LayerNoise("a", "Neg", "node_a", math.inf, 0),
            LayerNoise("b", "Relu", "node_b", math.inf, 1),
            LayerNoise("y", "Sqrt", "node_y", math.inf, 2),
        )

    def test_is_the_ratio_over_all_inputs_together(self) -> None:
        noisy = parse(
            "g (float[N, 64] x) => (float[N, 64] y) <float e = {0.1}> "
            "{ n = Neg (x) a = Add (n, e) b = Relu (a) y = Sqrt (b) }"
        )
        found = layer_noise(parse(PLAIN), noisy, feeds())
        a = [-feed["x"] for feed in feeds()]
        assert [layer.value for layer in found] == ["a", "b", "y"]
        assert found[0].snr_db == pytest.approx(snr(a, [v + np.float32(0.1) for v in a]), rel=1e-5)
        assert found[0].op_type == "Add"
        assert found[0].position == 1

    def test_of_a_quantized_one_counts_what_is_read(self) -> None:
        """Neg yields floats on the grid of its input already; what Relu reads is rounded once more."""
        model = parse(QDQ)
        model.graph.node("node_aq").replace_input_with(1, coarse := ir.Value(name="coarse"))
        coarse.const_value = ir.tensor(np.array(0.5, np.float32), name="coarse")
        model.graph.register_initializer(coarse)
        model.graph.node("node_ad").replace_input_with(1, coarse)
        found = {layer.value: layer for layer in layer_noise(parse(PLAIN), model, feeds())}
        a = [-feed["x"] for feed in feeds()]
        coarsely = [(np.rint(rounded(v) / 0.5) * 0.5) for v in a]
        assert found["a"].snr_db == pytest.approx(snr(a, coarsely), rel=1e-3)
        assert (found["a"].op_type, found["a"].node) == ("Neg", "node_a")
        assert list(found) == ["a", "b", "y"]

    @pytest.mark.parametrize("name", ["y", "y.dequantized", "y.dequantized_1"])
    def test_of_a_result_on_integers_goes_by_its_name(self, name: str) -> None:
        """The node yields integers; only the name of what is read tells the value it stands for."""
        plain = parse(
            """g (float[1, 2, 4, 4] x) => (float[1, 2, 2, 2] z)
            { y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x) z = Neg (y) }"""
        )
        pooled = parse(
            """g (float[1, 2, 4, 4] x) => (float[1, 2, 2, 2] z) <float s = {0.05}, uint8 q = {128}>
            {
                xq = QuantizeLinear (x, s, q)
                yq = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (xq)
                y = DequantizeLinear (yq, s, q)
                z = Neg (y)
            }"""
        )
        pooled.graph.node("node_y").outputs[0].name = name
        x = np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype(np.float32)
        found = layer_noise(plain, pooled, [{"x": x}])
        y = x.reshape(1, 2, 2, 2, 2, 2).max((3, 5))
        assert [(layer.value, layer.op_type, layer.position) for layer in found] == [
            ("y", "MaxPool", 1),
            ("z", "Neg", 3),
        ]
        assert found[0].snr_db == pytest.approx(snr([y], [rounded(y)]), rel=1e-3)

    def test_of_an_output_that_kept_its_name(self) -> None:
        """The float before is called otherwise; the node named is the one that computes it."""
        model = parse(
            """g (float[N, 64] x) => (float[N, 64] y) <float s = {0.05}, uint8 z = {128}>
            {
                a = Neg (x)
                b = Relu (a)
                f = Sqrt (b)
                yq = QuantizeLinear (f, s, z)
                y = DequantizeLinear (yq, s, z)
            }"""
        )
        *_, last = layer_noise(parse(PLAIN), model, feeds())
        assert (last.value, last.op_type, last.node, last.position) == ("y", "Sqrt", "node_f", 2)
        assert 20 < last.snr_db < 60

    def test_constants_and_inputs_on_a_grid_are_no_layers(self) -> None:
        model = parse(
            """g (float[N, 64] x) => (float[N, 64] y) <int8[64] w = {1}, float s = {0.05}, int8 z = {0}>
            { xq = QuantizeLinear (x, s, z) a = DequantizeLinear (xq, s, z) y = Neg (a) }"""
        )
        assert by_value(layer_noise(parse(PLAIN), model, feeds())).keys() == {"y"}


class TestWhatCannotBeCompared:
    def test_other_names(self) -> None:
        other = parse("g (float[N, 64] x) => (float[N, 64] q) { p = Neg (x) q = Relu (p) }")
        assert layer_noise(parse(PLAIN), other, feeds()) == ()

    def test_other_shapes(self) -> None:
        other = parse(
            """g (float[N, 64] x) => (float[N, 64] y) <int64[1] axis = {0}>
            { a = Unsqueeze (x, axis) c = Neg (x) b = Relu (c) y = Sqrt (b) }"""
        )
        assert by_value(layer_noise(parse(PLAIN), other, feeds())) == {"b": math.inf, "y": math.inf}

    def test_integers(self) -> None:
        text = "g (float[N, 64] x) => (float[N, 64] y) { a = Cast <to = 7> (x) y = Cast <to = 1> (a) }"
        assert by_value(layer_noise(parse(text), parse(text), feeds())).keys() == {"y"}

    def test_without_inputs(self) -> None:
        assert layer_noise(parse(PLAIN), parse(PLAIN), []) == ()

    def test_inputs_that_do_not_fit(self) -> None:
        with pytest.raises(InputError, match="does not run on these inputs"):
            layer_noise(parse(PLAIN), parse(PLAIN), feeds(size=3))


class TestNumbers:
    def test_nan_and_infinity_in_the_same_places_do_not_count(self) -> None:
        """The logarithm of negative numbers is NaN, of zero minus infinity."""
        text = "g (float[4] x) => (float[4] y) { y = Log (x) }"
        x = np.array([-1, 0, 1, 4], np.float32)
        assert by_value(layer_noise(parse(text), parse(text), [{"x": x}])) == {"y": math.inf}
        moved = parse("g (float[4] x) => (float[4] y) <float e = {1}> { a = Add (x, e) y = Log (a) }")
        assert by_value(layer_noise(parse(text), moved, [{"x": x}])) == {"y": -math.inf}

    def test_nothing_but_zeros(self) -> None:
        ones = parse("g (float[4] x) => (float[4] y) <float e = {1}> { a = Mul (x, x) y = Add (a, e) }")
        text = "g (float[4] x) => (float[4] y) { y = Mul (x, x) }"
        x = np.zeros(4, np.float32)
        assert by_value(layer_noise(parse(text), parse(text), [{"x": x}])) == {"y": math.inf}
        assert by_value(layer_noise(parse(text), ones, [{"x": x}])) == {"y": -math.inf}

    def test_half_precision(self) -> None:
        """Squares of float16 would overflow: sums are kept in float64."""
        text = "g (float16[N, 64] x) => (float16[N, 64] y) { a = Neg (x) y = Relu (a) }"
        large = [{"x": (1000 * feed["x"]).astype(np.float16)} for feed in feeds()]
        assert set(by_value(layer_noise(parse(text), parse(text), large)).values()) == {math.inf}


class TestMemory:
    @pytest.mark.parametrize(("memory", "parts"), [(1 << 28, 1), (2 * 8 * 64, 2), (8 * 64, 3), (1, 3)])
    def test_is_bounded_by_running_in_parts(
        self, monkeypatch: pytest.MonkeyPatch, memory: int, parts: int
    ) -> None:
        """Three values of 64 floats, for which 8 bytes each are held; one alone may pass the bound."""
        asked: list[Sequence[str]] = []

        class Counted(Evaluator):
            def __init__(self, *arguments: Any, outputs: Sequence[str], **options: Any) -> None:
                asked.append(outputs)
                super().__init__(*arguments, outputs=outputs, **options)

        monkeypatch.setattr(layers, "Evaluator", Counted)
        found = layer_noise(parse(PLAIN), parse(QDQ), feeds(1), memory=memory)
        assert len(asked) == 2 * parts
        assert found == layer_noise(parse(PLAIN), parse(QDQ), feeds(1))


def test_the_models_are_left_as_they_were() -> None:
    pair = parse(PLAIN), parse(QDQ)
    before = [ir.to_proto(model).SerializeToString() for model in pair]
    layer_noise(*pair, feeds())
    assert [ir.to_proto(model).SerializeToString() for model in pair] == before


def test_the_last_layer_agrees_with_the_outputs(corpus: Path, tmp_path: Path) -> None:
    """An int8 ResNet, against the float model after the same exact passes and against the original."""
    source, output = corpus / "models" / "cifar_resnet20.onnx", tmp_path / "int8.onnx"
    recipe = Recipe(benchmark=None, threads=1).fast()
    jobs.quantize(source, output, data="random:8", recipe=recipe)
    original, result = files.load(source), files.load(output)
    inputs = probe_feeds(original, None, seed=3)
    exact, _ = run_passes(original, recipe.chain, Reference(original, inputs, threads=1))
    outputs = [[Evaluator(m, threads=1).run(feed) for feed in inputs] for m in (original, result)]
    (difference,) = differences(*outputs)
    for reference in (original, exact):
        *_, last = layer_noise(reference, result, inputs, threads=1)
        assert (last.value, last.op_type) == ("logits", "Gemm")
        # int8 kernels round what the graph computes in float: half a dB at the most
        assert last.snr_db == pytest.approx(difference.snr_db, abs=0.5)
    found = layer_noise(exact, result, inputs, threads=1)
    assert len(found) > 50
    assert all(15 < layer.snr_db < 60 for layer in found[1:])
