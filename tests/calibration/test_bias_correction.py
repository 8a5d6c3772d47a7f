"""Corrected biases: the mean of every layer's output is the float model's again."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from quantized import inserted, planned
from rewrites import build

from edgewise.calibration.bias_correction import correct_biases, shrunk
from edgewise.calibration.edits import with_weights
from edgewise.calibration.moments import collect_moments
from edgewise.calibration.rounding import round_weights
from edgewise.calibration.target import TENSORRT, X86, X86_VNNI, Target
from edgewise.passes.graph import unique_name
from edgewise.passes.quant_plan import QuantPlan
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Array, Evaluator, Feed
from edgewise.runtime.session import serialize

CHAIN = """g (float[N, 32, 6, 6] x) => (float[N, 16] y) {
    c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) r = Relu (c)
    d = Conv <group = 32, pads = [1, 1, 1, 1]> (r, w2, b2) s = Relu (d)
    p = GlobalAveragePool (s) f = Flatten (p) m = MatMul (f, w3) y = Add (m, b3) }"""


def constants_of_chain(seed: int = 3) -> dict[str, Array]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int, size: float = 1.0) -> Array:
        return (rng.standard_normal(shape) * size).astype(np.float32)

    weights = {"w1": normal(32, 32, 3, 3, size=0.1), "w2": normal(32, 1, 3, 3), "w3": normal(32, 16)}
    return weights | {"b1": normal(32), "b2": normal(32), "b3": normal(16)}


def chain(opset: int = 17) -> ir.Model:
    return build(CHAIN, opset, **constants_of_chain())


def feeds(count: int, seed: int) -> list[Feed]:
    rng = np.random.default_rng(seed)
    return [{"x": np.abs(rng.standard_normal((1, 32, 6, 6))).astype(np.float32)} for _ in range(count)]


def coarse(plan: QuantPlan) -> QuantPlan:
    """Weights on 4 bits, which shift means for all to see."""
    values = [
        dataclasses.replace(v, scale=tuple(16 * s for s in v.scale)) if v.dtype == "int8" else v
        for v in plan.values
    ]
    return dataclasses.replace(plan, values=tuple(values))


def shift(model: ir.Model, edited: ir.Model, made: QuantPlan, samples: list[Feed]) -> float:
    """The largest mean error of an output, over the spread of that output."""
    before, after = Evaluator(model), Evaluator(inserted(edited, made))
    truth = np.concatenate([before.run(f)["y"] for f in samples])
    said = np.concatenate([after.run(f)["y"] for f in samples])
    return float((np.abs((said - truth).mean(axis=0)) / truth.std(axis=0)).max())


@pytest.mark.parametrize("opset", [13, 17, 18])
@pytest.mark.parametrize("kind", ["moments", "samples"])
def test_the_mean_comes_back_on_samples_not_seen(kind: str, opset: int) -> None:
    model, seen, fresh = chain(opset), feeds(48, seed=0), feeds(48, seed=1)
    made = coarse(planned(model, X86_VNNI, seen))
    evidence = collect_moments(model, seen, made, threads=1) if kind == "moments" else seen
    edits = correct_biases(model, made, evidence, threads=1)
    assert set(edits) == {"b1", "b2", "b3"}
    before, after = shift(model, model, made, fresh), shift(model, with_weights(model, edits), made, fresh)
    assert before > 1
    assert after < (0.5 if kind == "samples" else 0.8) * before


def test_samples_correct_what_they_show_to_the_last_step() -> None:
    """One layer, every sample the same: nothing but the rounding of the bias is left."""
    model = build(
        "g (float[N, 32] x) => (float[N, 16] y) { y = Gemm (x, w, b) }",
        w=constants_of_chain()["w3"],
        b=constants_of_chain()["b3"],
    )
    feed = {"x": feeds(1, seed=0)[0]["x"][:, :, 0, 0]}
    made = coarse(planned(model, X86_VNNI, [feed]))
    edits = correct_biases(model, made, [feed, feed], threads=1)
    truth = Evaluator(model).run(feed)["y"]
    assert np.abs(Evaluator(inserted(model, made)).run(feed)["y"] - truth).max() > 0.1
    assert np.abs(Evaluator(inserted(with_weights(model, edits), made)).run(feed)["y"] - truth).max() < 0.01


def test_what_differs_from_sample_to_sample_is_shrunk() -> None:
    """A mean of 1 known up to a variance of 1 counts half; one that all samples share counts in full."""
    mean, square = np.array([1.0, 1.0, 0.0]), np.array([4.0, 1.0, 4.0])
    assert shrunk(mean, square, 4).tolist() == [0.5, 1.0, 0.0]
    assert shrunk(mean, square, 1)[0] < 1


def test_rounded_weights_stay_and_their_biases_are_replaced() -> None:
    model, seen = chain(), feeds(16, seed=0)
    made = coarse(planned(model, X86_VNNI, seen))
    moments = collect_moments(model, seen, made, threads=1)
    rounded = round_weights(model, made, moments)
    analytic = correct_biases(model, made, moments, edits=rounded)
    empirical = correct_biases(model, made, seen, edits=rounded, threads=1)
    for name in ("w1", "w2", "w3"):
        assert (analytic[name] == rounded[name]).all()
        assert (empirical[name] == rounded[name]).all()
    for name in ("b1", "b2", "b3"):  # rounding corrects the mean in the same way
        assert np.allclose(analytic[name], rounded[name], atol=1e-5)
        assert not np.allclose(empirical[name], rounded[name], atol=1e-5)


@pytest.mark.parametrize("target", [X86, TENSORRT])
def test_every_target(target: Target) -> None:
    model, seen = chain(), feeds(16, seed=0)
    made = planned(model, target, seen)
    assert correct_biases(model, made, seen, threads=1)


def test_layers_without_a_bias_of_their_own_are_left_alone() -> None:
    weights = {"w": constants_of_chain()["w3"][:, :, None, None].transpose(1, 0, 2, 3)}
    weights["v"] = np.ascontiguousarray(weights["w"].transpose(1, 0, 2, 3))
    body = "a = Conv (x, w) r = Relu (a) y = Conv (r, v)"
    model = build(f"g (float[N, 32, 6, 6] x) => (float[N, c, h, k] y) {{ {body} }}", **weights)
    seen = feeds(2, seed=0)
    made = planned(model, X86_VNNI, seen)
    assert correct_biases(model, made, seen, threads=1) == {}
    assert correct_biases(model, made, collect_moments(model, seen, made, threads=1)) == {}


def test_a_bias_that_two_layers_share_is_left_alone() -> None:
    w = np.random.default_rng(0).standard_normal((32, 32, 1, 1)).astype(np.float32)
    body = "a = Conv (x, w, b) r = Relu (a) y = Conv (r, v, b)"
    text = f"g (float[N, 32, 6, 6] x) => (float[N, c, h, k] y) {{ {body} }}"
    model = build(text, w=w, v=w[::-1].copy(), b=np.ones(32, np.float32))
    seen = feeds(2, seed=0)
    assert correct_biases(model, planned(model, X86_VNNI, seen), seen, threads=1) == {}


def test_the_model_is_not_touched() -> None:
    model, seen = chain(), feeds(3, seed=0)
    before = serialize(model)
    made = planned(model, X86_VNNI, seen)
    heard: list[int] = []
    correct_biases(model, made, seen, threads=1, progress=heard.append)
    assert heard == [1, 2, 3]
    assert serialize(model) == before


def test_an_output_that_is_quantized_and_a_name_that_was_asked_for_before() -> None:
    """What the plan leaves of the output in float is not what the twin calls its own."""
    text = CHAIN.replace("p = GlobalAveragePool (s) f = Flatten (p) m = MatMul (f, w3) y = Add (m, b3)", "")
    constants = constants_of_chain()
    model = build(
        text.replace("[N, 16] y", "[N, 32, 6, 6] y").replace("s = Relu", "y = Relu"),
        **{name: constants[name] for name in ("w1", "b1", "w2", "b2")},
    )
    unique_name(model.graph, "any")  # names are known from here on
    samples = feeds(4, seed=1)
    made = planned(model, X86_VNNI, samples)
    assert "y" in {v.name for v in made.values}
    assert {"b1", "b2"} <= correct_biases(model, made, samples, threads=1).keys()


def test_no_samples_and_moments_of_another_model() -> None:
    model, seen = chain(), feeds(2, seed=0)
    made = planned(model, X86_VNNI, seen)
    with pytest.raises(InputError, match="no samples"):
        correct_biases(model, made, [], threads=1)
    other = build(CHAIN, **constants_of_chain(seed=4))
    with pytest.raises(InputError, match="another model"):
        correct_biases(model, made, collect_moments(other, seen, made, threads=1))
