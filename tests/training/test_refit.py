"""Least squares gives a pruned model back what the channels that stay can tell."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build, constants, normal, operators

from edgewise.calibration.data import Samples, from_arrays
from edgewise.passes.channels import ChannelGraph
from edgewise.passes.graph import opset
from edgewise.passes.remove_channels import PrunePlan, RemoveChannels
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Array, Evaluator, input_specs
from edgewise.training.refit import recover_closed_form, reestimate


def samples_of(model: ir.Model, count: int = 64, seed: int = 5) -> Samples:
    (spec,) = input_specs(model)
    shape = [d if isinstance(d, int) else count for d in spec.shape]
    array = np.random.default_rng(seed).standard_normal((count, *shape[1:])).astype(np.float32)
    return from_arrays({spec.name: array}, [spec])


def plan_for(model: ir.Model, value: str, leaving: tuple[int, ...]) -> PrunePlan:
    """The plan that takes these channels of `value`."""
    graph = ChannelGraph.of(model.graph, opset(model))
    group = next(g for g in graph.groups if any(s.value.name == value and s.use is None for s in g.members))
    slot = next(s for s in group.members if s.value.name == value)
    return PrunePlan({group.name: tuple(sorted(int(group.members[slot][i]) for i in leaving))})


def error(model: ir.Model, other: ir.Model, samples: Samples) -> float:
    """The share of the variance of the first output that is lost."""
    feed = next(iter(samples.batches(len(samples))))
    x, y = (next(iter(Evaluator(m, threads=1).run(feed).values())).astype(np.float64) for m in (model, other))
    return float(((x - y) ** 2).sum() / ((x - x.mean()) ** 2).sum())


def twins(weight: Array) -> Array:
    """Output channels 2 and 3 are combinations of 0 and 1."""
    made = weight.copy()
    made[2], made[3] = made[0] - 2 * made[1], 0.5 * made[0] + made[1]
    return made


LAYERS = {
    "Conv": ("h = Conv <pads = [1, 1, 1, 1]> (x, w) y = Conv <pads = [1, 1, 1, 1]> (h, v)", (8, 8, 3, 3)),
    "strided": ("h = Conv (x, w) y = Conv <strides = [2, 2], dilations = [2, 1]> (h, v)", (8, 8, 2, 3)),
    "SAME": ('h = Conv (x, w) y = Conv <auto_pad = "SAME_LOWER", strides = [2, 2]> (h, v)', (8, 8, 3, 3)),
    "transposed": (
        "h = Conv (x, w) y = ConvTranspose <strides = [2, 2], pads = [1, 0, 1, 1], output_padding = [1, 0]> "
        "(h, v)",
        (8, 8, 3, 3),
    ),
    "transposed to a shape": (
        "h = Conv (x, w) y = ConvTranspose <strides = [3, 2], output_shape = [15, 13]> (h, v)",
        (8, 8, 3, 3),
    ),
    "with a bias": ("h = Conv (x, w, b) y = Conv (h, v, b)", (8, 8, 1, 1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_the_others_tell_is_rebuilt(name: str) -> None:
    """Channels that are sums of others leave no trace but rounding and the pull of the weakest ridge."""
    body, shape = LAYERS[name]
    weights = {"w": twins(normal(8, 3, 3, 3)), "v": normal(*shape, seed=1)}
    if "b" in body.split("(x, w")[1][:3]:
        weights["b"] = normal(8, seed=2)
    model = build(f"g (float[N, 3, 8, 8] x) => (float[N, 8, a, c] y) {{ {body} }}", **weights)
    plan = plan_for(model, "h", (2, 3))
    samples, fresh = samples_of(model), samples_of(model, seed=6)
    assert error(model, RemoveChannels(plan).on(model), fresh) > 0.05
    assert error(model, recover_closed_form(model, plan, samples, threads=1), fresh) < 1e-5


def test_groups_of_a_conv_are_fitted_apart() -> None:
    weight = normal(8, 3, 3, 3)
    weight[3], weight[7] = weight[0] + weight[1], weight[5] - weight[6]
    model = build(
        "g (float[N, 3, 8, 8] x) => (float[N, 8, 4, 4] y) { h = Conv (x, w) y = Conv <group = 2> (h, v) }",
        w=weight,
        v=normal(8, 4, 3, 3, seed=1),
    )
    fitted = recover_closed_form(model, plan_for(model, "h", (3, 7)), samples_of(model), threads=1)
    assert constants(fitted)["v"].shape == (8, 3, 3, 3)
    assert error(model, fitted, samples_of(model, seed=6)) < 1e-5


RESIDUAL = """g (float[N, 3, 8, 8] x) => (float[N, 5] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w0) t = Relu (a)
    b = Conv <pads = [1, 1, 1, 1]> (t, w1) n = BatchNormalization (b, s, o, m, r) c = Relu (n)
    d = Conv <pads = [1, 1, 1, 1]> (c, w2) e = BatchNormalization (d, s, o, m, r)
    f = Add (e, t) u = Relu (f)
    p = GlobalAveragePool (u) q = Flatten (p) z = MatMul (q, k) y = Add (z, l) }"""


def residual() -> ir.Model:
    rng = np.random.default_rng(3)
    weights = {f"w{i}": normal(16, 16 if i else 3, 3, 3, seed=i) / 12 for i in range(3)}
    scale, offset, mean, variance = rng.uniform(0.5, 1.5, (4, 16)).astype(np.float32)
    head = {"k": normal(16, 5), "l": normal(5, seed=9)}
    return build(RESIDUAL, **weights, **head, s=scale, o=offset, m=mean, r=variance)


def test_the_recovered_model_is_nearer_on_new_samples() -> None:
    """Through BatchNormalization, a residual sum and a MatMul; with the weights nearer than without."""
    model = residual()
    leaving = {**plan_for(model, "a", (0, 3, 5, 6)).leaving, **plan_for(model, "b", (1, 2, 7, 11)).leaving}
    plan = PrunePlan(leaving)
    samples, fresh = samples_of(model, 96), samples_of(model, 96, seed=6)
    cut = error(model, RemoveChannels(plan).on(model), fresh)
    scaled = error(model, reestimate(model, plan, samples, threads=1), fresh)
    fitted = error(model, recover_closed_form(model, plan, samples, threads=1), fresh)
    assert fitted < 0.9 * scaled < 0.9 * 0.5 * cut


def test_only_numbers_change() -> None:
    """The intercept lands in the mean behind, so that no node and no initializer is added."""
    model = residual()
    plan = plan_for(model, "b", (0, 1, 2, 3))
    fitted = recover_closed_form(model, plan, samples_of(model), threads=1)
    cut = RemoveChannels(plan).on(model)
    assert operators(fitted) == operators(model)
    after, before = constants(fitted), constants(cut)
    shapes = {name: array.shape for name, array in after.items()}
    kept = {name: shape for name, shape in shapes.items() if name in before}
    assert kept == {name: before[name].shape for name in kept}
    assert (after["w0"] == constants(model)["w0"]).all()
    assert (after["w1"] == before["w1"]).all()  # what it reads has not changed
    assert (after["w2"] != before["w2"]).any()


def test_what_a_branch_told_is_rebuilt_by_later_layers() -> None:
    """The branch is linear in the stream, so the layer behind the sum can stand in for it."""
    model = build(
        "g (float[N, 4] x) => (float[N, 2] y) { c = Gemm(x, v, s) h = Add(x, c) y = MatMul(h, w) }",
        v=normal(4, 4, seed=1),
        s=normal(4, seed=2),
        w=normal(4, 2, seed=3),
    )
    samples, plan = samples_of(model), PrunePlan({}, ("h",))
    assert error(model, RemoveChannels(plan).on(model), samples) > 0.1
    rebuilt = recover_closed_form(model, plan, samples, threads=1)
    assert error(model, rebuilt, samples) < 1e-7  # squared, of moments in float32


def test_an_empty_plan_changes_nothing() -> None:
    model = residual()
    fitted = recover_closed_form(model, PrunePlan(), samples_of(model), threads=1)
    assert all((array == constants(model)[name]).all() for name, array in constants(fitted).items())


def test_memory_and_threads_do_not_change_the_result() -> None:
    """Values that do not fit are computed anew for each layer."""
    model, plan = residual(), plan_for(residual(), "a", (0, 3, 5, 6))
    samples = samples_of(model)
    plenty = recover_closed_form(model, plan, samples, threads=1)
    little = recover_closed_form(model, plan, samples, threads=1, memory=1_500_000)
    assert error(plenty, little, samples) < 1e-9


@pytest.mark.parametrize("count", [1, 3, 9])
def test_few_samples_do_no_harm(count: int) -> None:
    """Fewer patches than weights: the ridge holds on to what was there."""
    model = residual()
    plan, fresh = plan_for(model, "a", (0, 3, 5, 6)), samples_of(model, 128, seed=6)
    fitted = recover_closed_form(model, plan, samples_of(model, count), threads=1)
    assert all(np.isfinite(array).all() for array in constants(fitted).values())
    assert error(model, fitted, fresh) < error(model, RemoveChannels(plan).on(model), fresh)


def test_constant_and_zero_channels() -> None:
    """A channel that is zero and one that never changes make the moments singular."""
    weight, bias = normal(8, 3, 3, 3), normal(8, seed=2)
    weight[4:6] = 0
    bias[4:6] = 0, 3
    model = build(
        "g (float[N, 3, 8, 8] x) => (float[N, 8, 4, 4] y) { h = Conv (x, w, b) y = Conv (h, v) }",
        w=weight,
        b=bias,
        v=normal(8, 8, 3, 3, seed=1),
    )
    fitted = recover_closed_form(model, plan_for(model, "h", (5,)), samples_of(model), threads=1)
    assert error(model, fitted, samples_of(model, seed=6)) < 1e-5  # a constant goes into the bias


def test_a_fixed_batch() -> None:
    model = build(
        "g (float[1, 3, 8, 8] x) => (float[1, 8, 4, 4] y) { h = Conv (x, w) y = Conv (h, v) }",
        w=twins(normal(8, 3, 3, 3)),
        v=normal(8, 8, 3, 3, seed=1),
    )
    samples = from_arrays({"x": normal(40, 3, 8, 8)}, input_specs(model))
    fitted = recover_closed_form(model, plan_for(model, "h", (2, 3)), samples, threads=1)
    assert error(model, fitted, samples.take([3])) < 1e-5


def test_tokens() -> None:
    """A MatMul of rank 3 has no bias, and gets none."""
    weight = normal(6, 8)
    weight[:, 2] = weight[:, 0] + weight[:, 1]
    model = build(
        "g (float[N, 5, 6] x) => (float[N, 5, 4] y) { h = MatMul (x, w) y = MatMul (h, v) }",
        w=weight,
        v=normal(8, 4, seed=1),
    )
    fitted = recover_closed_form(model, plan_for(model, "h", (2,)), samples_of(model), threads=1)
    assert operators(fitted) == ["MatMul", "MatMul"]
    assert error(model, fitted, samples_of(model, seed=6)) < 1e-5


def test_progress_and_no_samples() -> None:
    model = residual()
    plan, heard = plan_for(model, "b", (0, 1)), list[tuple[int, int]]()
    recover_closed_form(model, plan, samples_of(model), threads=1, progress=lambda *n: heard.append(n))
    assert heard == [(1, 2), (2, 2)]
    with pytest.raises(InputError, match="no samples"):
        recover_closed_form(model, plan, samples_of(model).take([]), threads=1)
