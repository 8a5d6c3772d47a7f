"""Taps: what computes the values asked for and nothing else, and how much of it fits in memory."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewrites import build, operators

from edgewise.calibration.taps import in_groups, reduction, sizes_on, tapped
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator

TEXT = """g (float[N, 4] x, int64[2] shape) => (float[a, b] z)
    { n = Neg (x) r = Relu (n) z = Reshape (r, shape) m = Abs (z) }"""


def net() -> ir.Model:
    return build(TEXT, shapes=False)


def test_only_what_the_values_need_is_left() -> None:
    part = tapped(net(), ["r", "n"])
    assert operators(part) == ["Neg", "Relu"]
    assert [v.name for v in part.graph.outputs] == ["r", "n"]


def test_a_value_that_nothing_computes() -> None:
    with pytest.raises(InputError, match="no value named 'x'"):
        tapped(net(), ["r", "x"])


def test_sizes_follow_from_the_feed_and_unknown_ones_are_the_largest_known() -> None:
    feed = {"x": np.zeros((3, 4), np.float32), "shape": np.array([2, 6])}
    assert sizes_on(net(), ["n", "m"], feed) == {"n": 48, "m": 48}
    assert sizes_on(net(), ["m"], feed) == {"m": 0}


@given(st.lists(st.integers(0, 9)), st.integers(0, 20))
def test_groups_keep_the_order_and_the_bound(sizes: list[int], memory: int) -> None:
    named = {str(i): size for i, size in enumerate(sizes)}
    groups = in_groups(named, memory)
    assert [name for group in groups for name in group] == list(named)
    assert all(len(group) == 1 or sum(named[n] for n in group) <= memory for group in groups)
    for one, other in itertools.pairwise(groups):
        assert sum(named[n] for n in one) + named[other[0]] > memory


@pytest.mark.parametrize("version", [17, 18])
@pytest.mark.parametrize("keepdims", [False, True])
def test_a_reduction_in_both_forms(version: int, keepdims: bool) -> None:
    model = build("g (float[2, 3, 4] x) => (float[2, 3, 4] y) { y = Neg (x) }", version)
    (y,) = model.graph.outputs
    node = reduction(model.graph, "ReduceMean", y, [0, 2], keepdims=keepdims, version=version)
    node.outputs[0].name = "mean"
    model.graph.append(node)
    model.graph.outputs[:] = node.outputs
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    (mean,) = Evaluator(model).run({"x": x}).values()
    assert np.allclose(mean, -x.mean(axis=(0, 2), keepdims=keepdims))
