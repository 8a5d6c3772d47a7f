"""What a plan names leaves, with everything that is coupled to it, and nothing else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from channel_nets import nets
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build

from edgewise.passes.base import Contract, PassError
from edgewise.passes.channels import ChannelGraph
from edgewise.passes.graph import opset
from edgewise.passes.infer_shapes import InferShapes
from edgewise.passes.remove_channels import PrunePlan, RemoveChannels, survivors
from edgewise.passes.verify import Signature, check
from edgewise.runtime.evaluate import Evaluator, input_specs, seeded_feed

_NET = """net (float[N, 3, 6, 6] x) => (float[N, 2, 4, 4] y) {
    a = Conv(x, w1)
    r = Relu(a)
    y = Conv<pads = [0, 0, 0, 0]>(r, w2)
}"""


def two_convs() -> ir.Model:
    rng = np.random.default_rng(0)
    w1 = rng.standard_normal((8, 3, 3, 3)).astype(np.float32)
    w2 = rng.standard_normal((2, 8, 1, 1)).astype(np.float32)
    model = build(_NET, 18, w1=w1, w2=w2)
    InferShapes().apply(model)
    return model


def weight(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def test_the_channels_leave_from_both_layers() -> None:
    model = two_convs()
    cut = RemoveChannels(PrunePlan({"a[1]": (1, 5)})).on(model)
    stay = [0, 2, 3, 4, 6, 7]
    np.testing.assert_array_equal(weight(cut, "w1"), weight(model, "w1")[stay])
    np.testing.assert_array_equal(weight(cut, "w2"), weight(model, "w2")[:, stay])
    assert cut.graph.node(0).outputs[0].shape == ir.Shape(["N", 6, 4, 4])


def test_what_is_left_computes_with_what_is_left() -> None:
    """As if the channels that leave held zeros."""
    model = two_convs()
    silenced = model.clone()
    zeroed = weight(model, "w1").copy()
    zeroed[[1, 5]] = 0
    silenced.graph.initializers["w1"].const_value = ir.Tensor(zeroed, name="w1")
    cut = RemoveChannels(PrunePlan({"a[1]": (1, 5)})).on(model)
    feed = seeded_feed(input_specs(model))
    expected = Evaluator(silenced).run(feed)["y"]
    np.testing.assert_allclose(Evaluator(cut).run(feed)["y"], expected, rtol=1e-5, atol=1e-5)


def test_survivors_are_what_is_left_of_every_value() -> None:
    found = survivors(two_convs(), PrunePlan({"a[1]": (1, 5)}))
    assert {name for name, _ in found} == {"a", "r"}
    assert all(indices.tolist() == [0, 2, 3, 4, 6, 7] for indices in found.values())


def test_an_empty_plan_edits_nothing() -> None:
    model = two_convs()
    assert RemoveChannels().apply(model).edits == 0
    assert RemoveChannels().spec == "remove-channels"
    assert RemoveChannels.contract is Contract.LOSSY


@pytest.mark.parametrize(
    ("leaving", "words"),
    [
        ({"b[1]": (0,)}, "does not have"),
        ({"a[1]": (8,)}, "does not have"),
        ({"a[1]": tuple(range(8))}, "cannot leave"),
        ({"y[1]": (0,)}, "cannot leave"),
        ({"x[1]": (0,)}, "cannot leave"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_whole(leaving: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(PassError, match=words):
        RemoveChannels(PrunePlan(leaving)).on(two_convs())


@settings(deadline=None, max_examples=30)
@given(net=nets(), seed=st.integers(0, 2**16))
def test_what_can_leave_leaves_a_sound_model(net: ir.Model, seed: int) -> None:
    """The plan of any cuts that `settle` agrees to survives being told, and the model runs after it."""
    model = net.clone()
    InferShapes().apply(model)
    graph, rng = ChannelGraph.of(model.graph, opset(model)), np.random.default_rng(seed)
    plan = PrunePlan.of(graph.settle({group: rng.random(group.size) < 0.5 for group in graph.groups}))
    cut = RemoveChannels(plan).on(model)
    check(cut, Signature.of(model))
    feed = seeded_feed(input_specs(model))
    before, after = Evaluator(model).run(feed), Evaluator(cut).run(feed)
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}


def residual() -> ir.Model:
    text = """net (float[N, 3, 6, 6] x) => (float[N, 2, 6, 6] y) {
        a = Conv(x, w0)
        c = Conv(a, w1)
        f = Conv(c, w2)
        h = Add(a, f)
        y = Conv(h, w3)
    }"""
    shapes = {"w0": (8, 3), "w1": (6, 8), "w2": (8, 6), "w3": (2, 8)}
    weights = {
        name: np.random.default_rng(i).standard_normal((*shape, 1, 1)).astype(np.float32)
        for i, (name, shape) in enumerate(shapes.items())
    }
    model = build(text, 18, **weights)
    InferShapes().apply(model)
    return model


def test_a_branch_leaves_beside_channels_of_its_stream() -> None:
    model = residual()
    plan = PrunePlan({"a[1]": (0, 7)}, ("h",))
    cut = RemoveChannels(plan).on(model)
    assert [n.op_type for n in cut.graph] == ["Conv", "Identity", "Conv"]
    assert set(cut.graph.initializers) == {"w0", "w3"}
    x = seeded_feed(input_specs(model))["x"]
    first, last = weight(model, "w0")[1:7, :, 0, 0], weight(model, "w3")[:, 1:7, 0, 0]
    expected = np.einsum("oc,ci,nihw->nohw", last, first, x)
    found = Evaluator(cut).run({"x": x})["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # float32, other order of sums
    assert RemoveChannels(plan).label == "remove-channels: 2 of 1 groups, 1 branch"
    assert "branches: [h]" in RemoveChannels(plan).spec
    assert len(plan) == 3


def test_a_branch_that_is_none_is_refused() -> None:
    with pytest.raises(PassError, match="removes the branch of c"):
        RemoveChannels(PrunePlan({}, ("c",))).on(residual())
