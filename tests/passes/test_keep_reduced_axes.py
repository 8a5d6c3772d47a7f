"""keep-reduced-axes: reductions keep and drop their axes by themselves."""

import numpy as np
import pytest
from rewrites import build, operators, refusal, rewritten

from edgewise.passes.keep_reduced_axes import KeepReducedAxes


def reduced(reduction: str, mover: str, shape: str, outputs: str = "") -> str:
    return f"agraph (float[N, 3, 4, 5] x) => (float[{shape}] y{outputs}) {{ m = {reduction} y = {mover} }}"


AXES = {
    "ax": np.array([2, 3]),
    "negative": np.array([-1, -2]),
    "last": np.array([3]),
    "other": np.array([1, 2]),
}


@pytest.mark.parametrize("axes", ["ax", "negative"])
@pytest.mark.parametrize(
    ("opset", "reduction"),
    [
        (18, "ReduceMean<keepdims = {}>(x, ax)"),
        (16, "ReduceSum<keepdims = {}>(x, ax)"),
        (16, "ReduceMax<axes = [2, 3], keepdims = {}>(x)"),
    ],
)
def test_a_reduction_moves_its_own_axes(opset: int, reduction: str, axes: str) -> None:
    for keeps, mover, shape in ((0, "Unsqueeze", "N, 3, 1, 1"), (1, "Squeeze", "N, 3")):
        text = reduced(reduction.format(keeps), f"{mover}(m, {axes})", shape)
        model, outcome = rewritten(build(text, opset, **AXES), KeepReducedAxes())
        assert outcome.edits == 1
        assert operators(model) == [reduction.split("<")[0]]
        assert str(model.graph.outputs[0].shape) == f"[{shape.replace(', ', ',')}]"


def test_keepdims_is_the_default() -> None:
    text = reduced("ReduceSum(x, ax)", "Squeeze(m, ax)", "N, 3")
    assert rewritten(build(text, **AXES), KeepReducedAxes())[1].edits == 1


def test_the_axis_of_an_arg_max() -> None:
    body = "m = ArgMax<axis = -1>(x) s = Squeeze(m, last) y = Cast<to = 1>(s)"
    text = f"agraph (float[N, 3, 4, 5] x) => (float[N, 3, 4] y) {{ {body} }}"
    model, outcome = rewritten(build(text, **AXES), KeepReducedAxes())
    assert outcome.edits == 1
    assert operators(model) == ["ArgMax", "Cast"]


@pytest.mark.parametrize(
    "text",
    [
        reduced("ReduceSum<keepdims = 0>(x, ax)", "Unsqueeze(m, other)", "N, 1, 1, 3"),
        reduced("ReduceSum(x, ax)", "Squeeze(m, last)", "N, 3, 1"),
        reduced("ReduceSum(x, ax)", "Unsqueeze(m, last)", "N, 3, 1, 1, 1"),
        "agraph (float[N, 1, 1, 1] x) => (float[N] y) { m = ReduceSum(x, ax) y = Squeeze(m) }",
    ],
)
def test_other_axes_stay(text: str) -> None:
    assert rewritten(build(text, **AXES), KeepReducedAxes())[1].edits == 0


def test_axes_that_are_computed_stay() -> None:
    text = "agraph (float[4, 5] x, int64[1] k) => (float[N] y) { m = ReduceSum(x, k) y = Squeeze(m, k) }"
    assert KeepReducedAxes().apply(build(text)).edits == 0


def test_axes_from_both_ends_differ_where_the_rank_is_not_known() -> None:
    body = "e = Exp(x) m = ReduceSum(e, ax) y = Squeeze(m, negative)"
    text = f"agraph (float[N, 3, 4, 5] x) => (float[N, 3] y) {{ {body} }}"
    assert rewritten(build(text, shapes=False, **AXES), KeepReducedAxes())[1].edits == 0


def test_refuses_a_reduction_that_is_read_elsewhere() -> None:
    text = reduced("ReduceSum(x, ax)", "Squeeze(m, ax)", "N, 3", ", float[N, 3, 1, 1] m")
    assert refusal(build(text, **AXES), KeepReducedAxes()) == "what the reduction gives has another user"
