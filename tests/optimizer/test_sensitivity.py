"""What single roundings cost the outputs, against models with just these roundings."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from quantized import planned
from rewrites import build

from edgewise.calibration.noise import decibels
from edgewise.calibration.target import X86, X86_VNNI
from edgewise.optimizer import files, sensitivity
from edgewise.optimizer.pipeline import Reference, run_passes
from edgewise.optimizer.recipe import Recipe
from edgewise.optimizer.rounded_model import RoundedModel
from edgewise.optimizer.sensitivity import (
    NodeSensitivity,
    sensitivities,
)
from edgewise.passes.infer_shapes import infer_shapes
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.passes.quant_plan import QuantPlan
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Array, Evaluator, Feed, input_specs, seeded_feed

BODY = """
    {
        a0 = Conv <pads = [1, 1, 1, 1]> (x, wa, ba)
        a = Relu (a0)
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)
        b0 = Conv <pads = [1, 1, 1, 1]> (p, wb)
        b = Relu (b0)
        c = Conv (p, wc)
        j = Concat <axis = 1> (b, c)
        d = Conv (j, wd)
        s = Add (d, p)
        g = GlobalAveragePool (s)
        f = Flatten (g)
        y = Gemm (f, wf, bf)
        z = Exp (y)
    }"""
SHAPES = {
    "wa": (16, 16, 3, 3),
    "ba": (16,),
    "wb": (16, 16, 3, 3),
    "wc": (16, 16, 1, 1),
    "wd": (16, 32, 1, 1),
    "wf": (16, 8),
    "bf": (8,),
}


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for every test."""
    monkeypatch.setenv("EDGEWISE_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def weights() -> dict[str, Array]:
    rng = np.random.default_rng(3)
    fan = {n: max(math.prod(s[1:]) if len(s) == 4 else s[0], 8) for n, s in SHAPES.items()}
    return {n: (rng.standard_normal(s) / fan[n] ** 0.5).astype(np.float32) for n, s in SHAPES.items()}


@pytest.fixture(scope="module")
def net() -> ir.Model:
    return build(f"g (float[N, 16, 12, 12] x) => (float[N, 8] z) {BODY}", 17, **weights())


def feeds_for(count: int, seed: int = 5) -> list[Feed]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((16, 16, 12, 12)).astype(np.float32)} for _ in range(count)]


@pytest.fixture(scope="module")
def feeds() -> list[Feed]:
    return feeds_for(3)


@pytest.fixture(scope="module")
def plan(net: ir.Model) -> QuantPlan:
    return planned(net, X86_VNNI, feeds_for(2, 9))


def only(plan: QuantPlan, *outputs: str) -> QuantPlan:
    """The plan with these nodes alone in int8."""
    return dataclasses.replace(plan, nodes=tuple(n for n in plan.nodes if n.output in outputs))


def noise(model: ir.Model, plan: QuantPlan, feeds: Sequence[Feed], *, optimize: bool = False) -> float:
    """The slow truth: the whole model with Q and DQ, run node by node as it is written, or on integers."""
    made = model.clone()
    InsertQdq(plan).apply(made)
    signal = error = 0.0
    float_model, int8_model = (Evaluator(m, threads=1, optimize=optimize) for m in (model, made))
    for feed in feeds:
        (e,), (a,) = float_model.run(feed).values(), int8_model.run(feed).values()
        signal += float(np.sum(e.astype(float) ** 2))
        error += float(np.sum((e.astype(float) - a) ** 2))
    return error / signal


def share_of(
    expected: Sequence[Mapping[str, Array]], actual: Sequence[Mapping[str, Array]], name: str
) -> float:
    """The same of outputs that are at hand."""
    e, a = (np.concatenate([s[name] for s in states]).astype(float) for states in (expected, actual))
    return float(np.sum((e - a) ** 2) / np.sum(e**2))


def by_output(found: Sequence[NodeSensitivity]) -> dict[str, float]:
    return {n.output: n.noise_share for n in found}


class TestNodes:
    def test_are_those_that_compute(self, net: ir.Model, plan: QuantPlan, feeds: list[Feed]) -> None:
        found = sensitivities(net, plan, feeds, threads=1)
        kinds = [(n.output, n.op_type) for n in found]
        assert kinds == [
            ("a0", "Conv"),
            ("b0", "Conv"),
            ("c", "Conv"),
            ("j", "Concat"),
            ("d", "Conv"),
            ("s", "Add"),
            ("g", "GlobalAveragePool"),
            ("y", "Gemm"),
        ]
        assert {n.form for n in found} == {"int8"}

    def test_each_is_the_noise_of_what_it_rounds_alone(
        self, net: ir.Model, plan: QuantPlan, feeds: list[Feed]
    ) -> None:
        """What is moved on its grid (p and f), and a bias, is nobody's."""
        found = by_output(sensitivities(net, plan, feeds, threads=1))
        rounded = {
            "a0": {"x", "wa", "a"},
            "b0": {"wb", "b"},
            "c": {"wc", "c"},
            "j": {"j"},
            "d": {"wd", "d"},
            "s": {"s"},
            "g": {"g"},
            "y": {"wf"},  # what it gives is read in float
        }
        surrounded = tuple(dataclasses.replace(n, form="int8") for n in plan.quantized)
        for name, values in rounded.items():
            alone = tuple(v for v in plan.values if v.name in values)
            truth = noise(net, dataclasses.replace(plan, values=alone, nodes=surrounded), feeds)
            assert found[name] == pytest.approx(truth, rel=0.01), name

    def test_sum_up_to_the_noise_of_the_plan(self, net: ir.Model, plan: QuantPlan, feeds: list[Feed]) -> None:
        """Errors of single roundings are nearly independent: within 1 dB here."""
        found = by_output(sensitivities(net, plan, feeds, threads=1))
        assert abs(decibels(noise(net, plan, feeds), sum(found.values()))) < 1

    def test_the_worst_output_counts(self, plan: QuantPlan, feeds: list[Feed]) -> None:
        """An output without noise beside one with noise changes nothing."""
        text = f"g (float[N, 16, 12, 12] x) => (float[N, 8] z, float[N, 16, 12, 12] i) {BODY}"
        both = build(text.replace("z = Exp (y)", "z = Exp (y) i = Neg (x)"), 17, **weights())
        alone = build(f"g (float[N, 16, 12, 12] x) => (float[N, 8] z) {BODY}", 17, **weights())
        got, expected = (by_output(sensitivities(m, plan, feeds, threads=1)) for m in (both, alone))
        assert got == pytest.approx(expected, rel=0.01)

    def test_progress_comes_to_an_end(self, net: ir.Model, plan: QuantPlan, feeds: list[Feed]) -> None:
        said: list[tuple[str, int, int]] = []
        sensitivities(net, plan, feeds, threads=1, progress=lambda *args: said.append(args))
        assert [done for _, done, _ in said] == list(range(1, len(said) + 1))
        assert said[-1][1] == said[-1][2]

    def test_of_an_empty_plan_there_are_none(self, net: ir.Model, feeds: list[Feed]) -> None:
        assert sensitivities(net, QuantPlan(), feeds) == ()

    def test_decibels(self) -> None:
        assert NodeSensitivity("a", "Conv", 0.01).snr_db == pytest.approx(20)
        assert NodeSensitivity("a", "Conv", 0.0).snr_db == math.inf
        assert NodeSensitivity("a", "Conv", math.inf).snr_db == -math.inf


class TestBadInput:
    def test_no_feed(self, net: ir.Model, plan: QuantPlan) -> None:
        with pytest.raises(InputError, match="pass at least one"):
            sensitivities(net, plan, [])

    def test_feeds_that_do_not_fit(self, net: ir.Model, plan: QuantPlan) -> None:
        with pytest.raises(InputError, match="does not run on these inputs"):
            sensitivities(net, plan, [{"x": np.zeros((1, 3, 12, 12), np.float32)}])

    def test_no_output_of_floats(self, plan: QuantPlan, feeds: list[Feed]) -> None:
        text = f"g (float[N, 16, 12, 12] x) => (int64[N, 1] z) {BODY}"
        counting = build(text.replace("Exp (y)", "ArgMax <axis = 1> (y)"), 17, **weights())
        with pytest.raises(InputError, match="outputs of floats"):
            sensitivities(counting, plan, feeds)


class TestCache:
    def test_the_second_time_nothing_runs(
        self, net: ir.Model, plan: QuantPlan, feeds: list[Feed], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = sensitivities(net, plan, feeds, threads=1)
        monkeypatch.setattr(sensitivity, "RoundedModel", None)
        assert sensitivities(net, plan, feeds, threads=1) == first

    def test_another_question_is_asked_anew(
        self, net: ir.Model, plan: QuantPlan, feeds: list[Feed], kept: Path
    ) -> None:
        sensitivities(net, plan, feeds, threads=1)
        coarser = tuple(
            dataclasses.replace(v, scale=(2 * v.scale[0],)) if v.name == "x" else v for v in plan.values
        )
        other = dataclasses.replace(plan, values=coarser)
        assert sensitivities(net, other, feeds, threads=1) != sensitivities(net, plan, feeds, threads=1)
        assert sensitivities(net, plan, feeds[:2], threads=1) != sensitivities(net, plan, feeds, threads=1)
        assert len(list(kept.iterdir())) == 3

    @pytest.mark.parametrize("damage", ["{}", '{"shares": 3}', '{"shares": {"a": 1.0}}', "no JSON"])
    def test_a_damaged_file_is_written_anew(
        self, net: ir.Model, plan: QuantPlan, feeds: list[Feed], kept: Path, damage: str
    ) -> None:
        first = sensitivities(net, plan, feeds, threads=1)
        (file,) = kept.iterdir()
        text = file.read_text()
        file.write_text(damage)
        assert by_output(sensitivities(net, plan, feeds, threads=1)) == pytest.approx(by_output(first))
        assert json.loads(file.read_text()).keys() == json.loads(text).keys()


def images(seed: int, shape: tuple[int, ...]) -> Array:
    """Waves of random colours."""
    rng = np.random.default_rng(seed)
    waves = np.sin(np.linspace(0, 6, math.prod(shape[1:])) * rng.uniform(1, 9, (shape[0], 1)))
    return (2 * waves.reshape(shape) + 0.3 * rng.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "shape"), [("cifar_resnet20", (4, 3, 32, 32)), ("mlperftiny_ic_resnet8", (4, 32, 32, 3))]
)
def test_agrees_with_integer_kernels_on_trained_models(
    corpus: Path, name: str, shape: tuple[int, ...]
) -> None:
    """The whole plan and every fifth node alone, run by onnxruntime on integers: within 1 dB.

    Of a node alone every input counts, of which its neighbours answer for some in a whole plan.
    """
    model = files.load(corpus / "models" / f"{name}.onnx")
    feed = seeded_feed(input_specs(model))
    model, _ = run_passes(model, Recipe().chain, Reference(model, [feed], threads=1))
    infer_shapes(model)
    (spec,) = input_specs(model)
    feeds = [{spec.name: images(seed, shape)} for seed in range(3)]
    plan = planned(model, X86, feeds)
    total = sum(by_output(sensitivities(model, plan, feeds, threads=1)).values())
    assert abs(decibels(noise(model, plan, feeds, optimize=True), total)) < 1.5
    anchors = [n.output for n in plan.quantized if n.op_type in ("Conv", "Gemm")]
    rounded = RoundedModel(model, [(n,) for n in anchors], threads=1)
    plans = {n: only(plan, n) for n in anchors[::5]}
    expected = rounded.outputs(QuantPlan(), feeds)
    for output, states in rounded.answers(QuantPlan(), plans, feeds):
        got = share_of(expected, states, model.graph.outputs[0].name or "")
        truth = noise(model, plans[output], feeds, optimize=True)
        assert abs(decibels(truth, got)) < 1, output
