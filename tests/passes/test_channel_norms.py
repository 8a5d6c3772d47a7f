"""Channels that are zero leave sums and norms over all channels, which go on as if they were there."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import assert_equal, build, constants, operators, refusal, rewritten

from edgewise.passes.graph import attribute
from edgewise.passes.merge_channels import MergeChannels
from edgewise.passes.prune_channels import PruneChannels
from edgewise.runtime.evaluate import Array, Evaluator, input_specs, seeded_feed

PASS = PruneChannels()
RNG = np.random.default_rng(0)
DEAD = [1, 4, 5]  # of eight
LIVE = [0, 2, 3, 6, 7]
FEW = "too few channels to be worth the nodes that it takes"


def floats(*shape: int, dead: list[int] | None = None) -> Array:
    """Numbers, zero at `dead` of the last axis."""
    array = RNG.uniform(0.2, 1.0, shape).astype(np.float32)
    array[..., dead or []] = 0
    return array


def net(norm: str, opset: int = 20, last: str = "y = MatMul(b, w2)", **weights: Array) -> ir.Model:
    """x -> five live neurons of eight -> `norm`, from a to b -> a layer that reads all eight."""
    held = {
        "w1": floats(6, 8, dead=DEAD), "b1": floats(8, dead=DEAD), "w2": floats(8, 4),
        "g": floats(8), "s": floats(8), **weights,
    }  # fmt: skip
    text = f"m = MatMul(x, w1) a = Add(m, b1) {norm} {last}"
    read = {name: array for name, array in held.items() if any(f" {name}{end}" in text for end in ",)")}
    return build(f"g (float[N, T, 6] x) => (float[] y) {{ {text} }}", opset, **read)


def widths(model: ir.Model) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in constants(model).items()}


def by(operator: str, model: ir.Model) -> ir.Node:
    (node,) = [n for n in model.graph if n.op_type == operator]
    return node


NORM = "b = LayerNormalization<epsilon = 0.1>(a, g, s)"


def test_zeros_leave_what_is_normalized() -> None:
    """Every channel of the result is live, so all are put back in their places."""
    after, outcome = rewritten(net(NORM), PASS)
    assert outcome.edits == 3
    assert not outcome.refused
    assert operators(after) == ["MatMul", "Add", "Pad", "LayerNormalization", "Gather", "MatMul"]
    assert widths(after) | {"w1": (6, 5), "b1": (5,), "g": (8,), "s": (8,), "w2": (8, 4)} == widths(after)
    assert attribute(by("LayerNormalization", after), "epsilon") == pytest.approx(0.1)


def test_the_same_channels_on_both_sides() -> None:
    """What is neither scaled nor shifted is zero behind the norm as well."""
    after, outcome = rewritten(net(NORM, g=floats(8, dead=DEAD), s=floats(8, dead=DEAD)), PASS)
    assert outcome.edits == 6
    assert operators(after) == ["MatMul", "Add", "Pad", "LayerNormalization", "Slice", "MatMul"]
    assert widths(after) | {"w1": (6, 5), "w2": (5, 4)} == widths(after)


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_results_leave_on_their_own(shift: float) -> None:
    """All inputs are live. Results are zero or a constant, which goes into the bias of the next layer."""
    held = {"w1": floats(6, 8), "b1": floats(8), "g": floats(8, dead=DEAD), "s": floats(8)}
    held["s"][DEAD] = shift
    after, outcome = rewritten(net(NORM, **held), PASS)
    assert outcome.edits == 3
    behind = ["Add"] if shift else []
    assert operators(after) == ["MatMul", "Add", "LayerNormalization", "Gather", "MatMul", *behind]
    assert widths(after) | {"w1": (6, 8), "w2": (5, 4)} == widths(after)


@pytest.mark.parametrize(
    "norm",
    [
        "b = LayerNormalization<axis = 2>(a, g, s)",
        "b = LayerNormalization<axis = -1>(a, g)",
        "b = LayerNormalization(a, g, g)",
        "c = LayerNormalization(a, g, s) d = LayerNormalization(a, g, s) b = Sub(c, d)",
        "c = LayerNormalization(a, g) d = Relu(a) b = Mul(c, d)",
        "t = Transpose<perm = [1, 0, 2]>(a) b = LayerNormalization(t, g, s)",
    ],
)
def test_forms(norm: str) -> None:
    after, outcome = rewritten(net(norm), PASS)
    assert outcome.edits >= 3
    assert widths(after)["w1"] == (6, 5)


def test_results_that_nobody_reads() -> None:
    last = floats(8, 4)
    last[DEAD] = 0
    after, _ = rewritten(net(NORM, w2=last), PASS)
    assert operators(after) == ["MatMul", "Add", "Pad", "LayerNormalization", "Slice", "MatMul"]


def test_an_output_of_the_graph_keeps_its_shape() -> None:
    after, _ = rewritten(net("y = LayerNormalization(a, g, s)", last=""), PASS)
    assert operators(after) == ["MatMul", "Add", "Pad", "LayerNormalization", "Gather"]
    assert after.graph.outputs[0].shape == ("N", "T", 8)


BLOCK = """n{0} = LayerNormalization(v{0}, g{0}, s{0}) i{0} = MatMul(n{0}, e{0}) h{0} = Relu(i{0})
    o{0} = MatMul(h{0}, l{0}) v{1} = Add({2}, o{0}) """
SPARSE = {f"{k}{i}": floats(8, dead=DEAD) for k in "gs" for i in (0, 1)}
SPARSE |= {f"e{i}": floats(8, 12) for i in (0, 1)} | {f"l{i}": floats(12, 8, dead=DEAD) for i in (0, 1)}


@pytest.mark.parametrize("first", [True, False])
def test_the_width_of_a_model(first: bool) -> None:
    """A residual stream with norms before or behind its branches loses the same channels all along."""
    blocks = [BLOCK.format(i, i + 1, f"v{i}" if first else f"n{i}") for i in (0, 1)]
    norm = "v0 = Identity(a) " + "".join(blocks) + "b = Identity(v2)"
    after, outcome = rewritten(net(norm, **SPARSE), PASS)
    assert not outcome.refused
    assert widths(after) | {"w1": (6, 5), "e0": (5, 12), "l1": (12, 5), "w2": (5, 4)} == widths(after)
    assert operators(after).count("Slice") == 2
    assert "Gather" not in operators(after)


WIDE = {"w1": floats(6, 16), "b1": floats(16), "g": floats(16), "s": floats(16), "w2": floats(16, 4)}


@pytest.mark.parametrize("names", [("w1", "b1"), ("g", "s")])
def test_few_channels_are_not_worth_it(names: tuple[str, ...]) -> None:
    """One of sixteen, before the norm or behind it: more nodes would cost more than it saves."""
    few, more = (
        WIDE
        | {name: np.where(np.isin(np.arange(16), dead), 0, WIDE[name]).astype(np.float32) for name in names}
        for dead in ([4], [4, 9])
    )
    assert refusal(net(NORM, **few), PASS) == FEW
    assert PASS.apply(net(NORM, **more)).edits == 2


def test_constants_stay() -> None:
    """A neuron that is always one takes part in the mean."""
    bias = floats(8, dead=DEAD)
    bias[1] = 1
    after, outcome = rewritten(net(NORM, b1=bias), PASS)
    assert dict(outcome.refused) == {"a sum would miss a constant": 1}
    assert widths(after)["w1"] == (6, 6)


def test_widths_that_kernels_like() -> None:
    after, _ = rewritten(net(NORM, g=floats(8, dead=DEAD), s=floats(8, dead=DEAD)), PruneChannels(2))
    assert widths(after) | {"w1": (6, 6), "w2": (6, 4)} == widths(after)


def test_copies_are_not_zeros() -> None:
    """Two neurons that are alike count twice in the mean."""
    weight = floats(6, 8)
    weight[:, 4:] = weight[:, :4]
    bias = np.tile(floats(4), 2)
    assert refusal(
        net(NORM, w1=weight, b1=bias, g=np.ones(8, np.float32), s=np.ones(8, np.float32)), MergeChannels()
    )


STAYS = {
    "parameters for several axes": ("b = LayerNormalization<axis = 1>(a, k)", {"k": floats(5, 8)}),
    "one scale for all": ("b = LayerNormalization(a, k)", {"k": floats(1)}),
    "a norm of tokens": ("t = Transpose<perm = [0, 2, 1]>(a) b = LayerNormalization(t, k)", {"k": floats(5)}),
}


@pytest.mark.parametrize("name", STAYS)
def test_norms_that_stay_whole(name: str) -> None:
    norm, weights = STAYS[name]
    model = net(norm, last="y = Relu(b)", **weights)
    feed = {"x": floats(2, 5, 6)}
    after, _ = rewritten(model, PASS, feed)
    assert "Pad" not in operators(after)


def test_a_computed_scale() -> None:
    text = "m = MatMul(x, w1) b = LayerNormalization(m, k) y = MatMul(b, w2)"
    model = build(
        f"g (float[N, T, 6] x, float[8] k) => (float[] y) {{ {text} }}",
        w1=floats(6, 8, dead=DEAD),
        w2=floats(8, 4),
    )
    assert refusal(model, PASS) == "LayerNormalization"


RMS = "b = RMSNormalization<epsilon = 0.1>(a, g)"


def test_rms_norm() -> None:
    """The mean is over fewer numbers, which epsilon and scale make up for; no node is added."""
    after, outcome = rewritten(net(RMS, 23), PASS)
    assert outcome.edits == 3
    assert operators(after) == ["MatMul", "Add", "RMSNormalization", "MatMul"]
    assert widths(after) == {"w1": (6, 5), "b1": (5,), "g": (5,), "w2": (5, 4)}
    assert attribute(by("RMSNormalization", after), "epsilon") == pytest.approx(0.1 * 8 / 5)


def test_rms_norm_that_scales_by_zero() -> None:
    """A channel that is scaled by zero behind the mean still counts in it."""
    model = net(RMS, 23, w1=floats(6, 8), b1=floats(8), g=floats(8, dead=DEAD))
    assert refusal(model, PASS) == ""


def test_rms_norm_of_onnxruntime() -> None:
    """It stands in the default domain, where the checker does not know it."""
    model = net(RMS, 23)
    model.graph.opset_imports[""] = 20
    by("RMSNormalization", model).op_type = "SimplifiedLayerNormalization"
    after, feed = model.clone(), seeded_feed(input_specs(model), size=3)
    assert PASS.apply(after).edits == 3
    assert_equal(Evaluator(model, optimize=False).run(feed), Evaluator(after, optimize=False).run(feed))


def test_rms_norm_written_out() -> None:
    norm = """q = Mul(a, a) m2 = ReduceMean(q, k) e = Add(m2, o) r = Sqrt(e) i = Reciprocal(r)
        d = Mul(a, i) b = Mul(d, g)"""
    after, outcome = rewritten(net(norm, k=np.array([-1]), o=np.float32(0.1)), PASS)
    assert outcome.edits == 3
    assert operators(after).count("Mul") == 4
    assert widths(after)["w2"] == (5, 4)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("operator", ["ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare"])
def test_sums_over_channels(operator: str, keep: int) -> None:
    model = net(f"b = {operator}<keepdims = {keep}>(a, k)", last="y = Relu(b)", k=np.array([2]))
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 3
    assert operators(after) == ["MatMul", "Add", operator, *["Mul"] * (operator == "ReduceMean"), "Relu"]
    assert widths(after)["w1"] == (6, 5)


def test_a_mean_over_several_axes() -> None:
    """Two of four columns are zero: the mean counts half as many numbers."""
    text = "a = Gemm(x, w) r = Reshape(a, s) b = ReduceMean(r, k) y = Relu(b)"
    weights = {"w": floats(6, 8, dead=[2, 3, 6, 7]), "s": np.array([0, 2, 4]), "k": np.array([1, 2])}
    model = build(f"g (float[N, 6] x) => (float[] y) {{ {text} }}", 20, **weights)
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 2
    assert widths(after)["w"] == (6, 4)


@given(st.data(), st.integers(0, 2**16))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_any_norm(data: st.DataObject, seed: int) -> None:
    """Any inputs zero, any results neither scaled nor shifted, any columns unread."""
    rng, size = np.random.default_rng(seed), data.draw(st.integers(2, 12))
    operator = data.draw(
        st.sampled_from(["LayerNormalization(a, g, s)", "LayerNormalization(a, g)", RMS[4:]])
    )
    gone = [rng.random(size) < data.draw(st.sampled_from([0.0, 0.3, 0.7])) for _ in range(4)]
    held = {
        "w1": np.where(gone[0], 0, rng.standard_normal((6, size))),
        "b1": np.where(gone[0], 0, rng.standard_normal(size)),
        "g": np.where(gone[1], 0, rng.standard_normal(size)),
        "s": np.where(gone[2], 0, rng.standard_normal(size)),
        "w2": np.where(gone[3], 0, rng.standard_normal((4, size))).T.copy(),
    }
    last = (
        "c = MatMul(b, w2) y = Add(c, far)"  # outputs that cancel have rounding errors as large as themselves
    )
    weights = {name: array.astype(np.float32) for name, array in held.items()}
    model = net(f"b = {operator}", 23, last, far=np.full(4, 5, np.float32), **weights)
    rewritten(model, PruneChannels(data.draw(st.integers(1, 4))))
