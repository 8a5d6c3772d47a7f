"""The search for int8: what is kept, what is given up for the bound, and what was measured to be slower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgewise.calibration.data import Samples, from_arrays
from edgewise.optimizer import int8, placing
from edgewise.optimizer.int8 import find_int8, split
from edgewise.optimizer.judge import Judge
from edgewise.optimizer.pipeline import BreachError, Reference
from edgewise.optimizer.recipe import Benchmark, Quantize, Recipe
from edgewise.optimizer.yardstick import Yardstick
from edgewise.passes.infer_shapes import infer_shapes
from edgewise.runtime.evaluate import input_specs
from edgewise.runtime.profile import NodeTime, Profile
from edgewise.runtime.session import Grant

NET = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[N, 32, 8, 8] x) => (float[N, 32, 8, 8] y) {
  [first] a = Conv <pads = [1, 1, 1, 1]> (x, u, b)
  [cut] r = Relu(a)
  [second] c = Conv <pads = [1, 1, 1, 1]> (r, v, b)
  [bent] s = Softplus(c)
  [third] y = Conv(s, w, b)
}
"""
RULES = Recipe(benchmark=None, threads=1, quantize=Quantize(search=False, ladder=(), methods=("minmax",)))
TIMED = RULES.model_copy(
    update={"benchmark": Benchmark(), "quantize": Quantize(ladder=(), methods=("minmax",))}
)


@pytest.fixture(scope="module")
def model() -> ir.Model:
    rng = np.random.default_rng(0)
    shapes = {"u": (32, 32, 3, 3), "v": (32, 32, 3, 3), "w": (32, 32, 1, 1), "b": (32,)}
    proto = onnx.parser.parse_model(NET)
    for name, shape in shapes.items():
        array = rng.normal(0, 0.05, shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    made = ir.from_proto(proto)
    infer_shapes(made)
    return made


@pytest.fixture(scope="module")
def samples(model: ir.Model) -> Samples:
    x = np.random.default_rng(1).normal(size=(96, 32, 8, 8)).astype(np.float32)
    return from_arrays({"x": x}, input_specs(model))


def search(model: ir.Model, samples: Samples, judge: Any, recipe: Recipe = RULES) -> int8.Int8:
    reference = Reference(model, [samples[0]], threads=1)
    return find_int8(model, split(samples, 64, 0), reference, judge, recipe)


def anchors_in_int8(found: int8.Int8) -> set[str]:
    return {n.output for n in found.plan.quantized if n.op_type == "Conv"}


def test_samples_that_choose_and_judge_did_not_calibrate(samples: Samples) -> None:
    parts = split(samples, 64, 0)
    assert [len(parts.calibrate), len(parts.choose), len(parts.judge)] == [48, 16, 32]
    seen = [feed["x"].tobytes() for part in (parts.calibrate, parts.choose, parts.judge) for feed in part]
    assert len(set(seen)) == len(samples)


def test_those_for_validation_judge(samples: Samples) -> None:
    parts = split(samples.take(range(64)), 64, 0, samples.take(range(64, 96)))
    assert [len(parts.calibrate), len(parts.choose)] == [48, 16]
    assert [feed["x"].tobytes() for feed in parts.judge] == [samples[i]["x"].tobytes() for i in range(64, 96)]


def test_few_samples_do_everything(samples: Samples) -> None:
    parts = split(samples.take(range(12)), 64, 0)
    assert len(parts.calibrate) == len(parts.choose) == len(parts.judge) == 12


def test_all_that_can_be_int8_is(model: ir.Model, samples: Samples) -> None:
    judge = Judge(model, split(samples, 64, 0).judge, "fidelity", 0.01, 1)
    found = search(model, samples, judge)
    assert found.model is not None
    assert anchors_in_int8(found) == {"a", "c", "y"}
    assert Yardstick(model, samples, threads=1).decibels(found.model) > 25  # 8 bits in three layers
    assert found.sensitivity == ()  # nobody had to ask


def test_the_ladder_only_climbs(model: ir.Model, samples: Samples) -> None:
    judge = Judge(model, split(samples, 64, 0).judge, "fidelity", 0.01, 1)
    climbing = RULES.model_copy(
        update={"quantize": Quantize(search=False, ladder=("round", "bias"), methods=("minmax", "mse"))}
    )
    ruler = Yardstick(model, split(samples, 64, 0).choose, threads=1)
    plain, better = search(model, samples, judge), search(model, samples, judge, climbing)
    assert plain.model is not None
    assert better.model is not None
    assert ruler.decibels(better.model) > ruler.decibels(plain.model) + 0.1
    assert {"learned rounding", "bias correction"} <= {step.step for step in better.steps}


def test_the_noisiest_nodes_are_given_up_for_the_bound(model: ir.Model, samples: Samples) -> None:
    """A bound that three convolutions in int8 break, and two keep."""

    def judge(candidate: ir.Model) -> float:
        quantized = sum(n.op_type == "QuantizeLinear" for n in candidate.graph)
        if quantized > 3:
            raise BreachError(f"{quantized} are too many")
        return 1.0

    found = search(model, samples, judge)
    assert found.model is not None
    assert next(s.status for s in found.steps if s.step.startswith("insert-qdq")) == "rolled back"
    left = {"a", "c", "y"} - anchors_in_int8(found)
    noise = {n.output: n.noise_share for n in found.sensitivity}
    assert left
    assert max(noise, key=noise.__getitem__) in left
    reasons = {n.output: n.why for n in found.plan.nodes}
    assert all("adds noise" in reasons[name] for name in left)


def test_a_bound_that_nothing_keeps(model: ir.Model, samples: Samples) -> None:
    def judge(_: ir.Model) -> float:
        raise BreachError("never good enough")

    found = search(model, samples, judge)
    assert found.model is None
    assert found.why == "never good enough"


def test_a_model_without_an_operator_for_int8(samples: Samples) -> None:
    text = NET.split("{")[0] + "{ y = Softplus(x) }"
    found = search(ir.from_onnx_text(text), samples, lambda _: 1.0)
    assert found.model is None
    assert "none of its operators" in found.why


Clock = Callable[[ir.Node, bool], float]


def profiled(clock: Clock) -> Callable[..., tuple[Profile, ...]]:
    """A profiler by which every node takes what `clock` says of it, and whether it reads int8."""

    def profile(paths: Sequence[Path], *_: object, **__: object) -> tuple[Profile, ...]:
        return tuple(map(one, paths))

    def one(path: Path) -> Profile:
        nodes = tuple(time_of(node) for node in ir.load(path).graph)
        return Profile(str(path), "cpu", 1, 2, 1.0, nodes, Grant("cpu", {}, ()), None)

    def time_of(node: ir.Node) -> NodeTime:
        source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        reads_int8 = source is not None and source.op_type == "DequantizeLinear"
        name = node.name or ""
        ms = 0.0 if node.op_type.endswith("Linear") else clock(node, reads_int8)
        return NodeTime(
            ms, 0.0, None, 0, name, node.op_type, "other", "float32", "CPUExecutionProvider", 1, (name,)
        )

    return profile


def measured(clock: Clock) -> Callable[..., SimpleNamespace]:
    """A benchmark by which a file takes what its nodes take."""

    def measure(paths: Mapping[str, Path], **_: object) -> SimpleNamespace:
        profiles = profiled(clock)(list(paths.values()))
        times = {name: p.nodes_ms for name, p in zip(paths, profiles, strict=True)}
        first = next(iter(times.values()))
        return SimpleNamespace(ratios=[SimpleNamespace(name=n, speedup=first / t) for n, t in times.items()])

    return measure


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clock], None]:
    def tick(by: Clock) -> None:
        monkeypatch.setattr(placing, "profile_in_turns", profiled(by))
        monkeypatch.setattr(placing, "measure", measured(by))

    return tick


def test_what_is_slower_in_int8_stays_in_float(
    model: ir.Model, samples: Samples, clock: Callable[[Clock], None]
) -> None:
    clock(lambda node, in_int8: (9.0 if node.name == "third" else 1.0) if in_int8 else 2.0)
    found = search(model, samples, lambda _: 1.0, TIMED)
    assert found.model is not None
    assert anchors_in_int8(found) == {"a", "c"}
    why = {n.output: n.why for n in found.plan.nodes}
    assert why["y"] == "9000 us in int8, 2000 us in float"


def test_nothing_is_int8_where_all_of_it_is_slower(
    model: ir.Model, samples: Samples, clock: Callable[[Clock], None]
) -> None:
    clock(lambda _, in_int8: 9.0 if in_int8 else 1.0)
    found = search(model, samples, lambda _: 1.0, TIMED)
    assert found.model is None
    assert "faster in float" in found.why
