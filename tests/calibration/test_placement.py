"""The placement of least time, held against all placements of small graphs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.calibration.placement import Costs, place
from edgewise.passes.graph import constant_of

CHAIN = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[1, 4] x) => (float[1, 4] c) {
  a = Relu(x)
  b = Sigmoid(a)
  c = Relu(b)
}
"""
DIAMOND = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[1, 4] x) => (float[1, 4] e, float[1, 4] c) {
  a = Relu(x)
  b = Sigmoid(a)
  c = Tanh(a)
  d = Add(b, c)
  e = Relu(d)
}
"""


def time_of(model: ir.Model, costs: Costs, in_int8: frozenset[str]) -> float:
    """The time of one placement, by its definition."""
    total = 0.0
    for node in model.graph:
        name = node.outputs[0].name or ""
        total += (costs.in_int8 if name in in_int8 else costs.in_float).get(name, 0.0)
    for (first, later), extra in costs.apart.items():
        total += extra if first in in_int8 and later not in in_int8 else 0.0
    for value in (*model.graph.inputs, *(n.outputs[0] for n in model.graph)):
        if constant_of(value) is not None:
            continue
        made = value.producer() is not None and (value.name or "") in in_int8
        sides = {(use.node.outputs[0].name or "") in in_int8 for use in value.uses()}
        sides |= {False} if value.is_graph_output() else set()
        if made and False in sides:
            total += costs.conversion(value.name or "", costs.dequantize)
        if not made and True in sides:
            total += costs.conversion(value.name or "", costs.quantize)
    return total


def model_of(text: str) -> ir.Model:
    return ir.from_onnx_text(text)


def test_all_in_int8_where_that_is_faster() -> None:
    found = place(model_of(CHAIN), {"a", "b", "c"}, Costs({"a": 1.0, "b": 1.0, "c": 1.0}, {}))
    assert not found.floats
    assert found.ms == pytest.approx(2 * 0.002, rel=1e-2)  # x is quantized, c dequantized: two calls


def test_nothing_in_int8_where_conversions_cost_more_than_it_saves() -> None:
    costs = Costs({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.9, "b": 0.9, "c": 0.9}, border=0.2)
    found = place(model_of(CHAIN), {"a", "b", "c"}, costs)
    assert set(found.floats) == {"a", "b", "c"}
    assert "conversions cost more" in found.floats["a"]


def test_a_slow_node_in_the_middle_is_left_in_int8_where_leaving_it_costs_more() -> None:
    slow = {"a": 0.1, "b": 1.3, "c": 0.1}
    cheap = place(model_of(CHAIN), {"a", "b", "c"}, Costs(dict.fromkeys(slow, 1.0), slow))
    dear = place(model_of(CHAIN), {"a", "b", "c"}, Costs(dict.fromkeys(slow, 1.0), slow, border=0.2))
    assert list(cheap.floats) == ["b"]
    assert cheap.floats["b"] == "1300 us in int8, 1000 us in float"
    assert not dear.floats


def test_a_node_without_a_kernel_stays_in_float() -> None:
    found = place(model_of(CHAIN), {"a", "c"}, Costs({"a": 1.0, "c": 1.0}, {}))
    assert not found.floats  # of those that could be int8 all are
    assert found.ms == pytest.approx(4 * 0.002, rel=1e-2)


def test_what_is_fused_in_float_costs_where_it_is_torn_apart() -> None:
    costs = Costs({"a": 1.0}, {"a": 0.5}, apart={("a", "b"): 0.6})
    assert list(place(model_of(CHAIN), {"a"}, costs).floats) == ["a"]


def test_noise_has_its_price() -> None:
    costs = Costs({"a": 1.0, "b": 1.0, "c": 1.0}, {})
    noise = {"a": 0.001, "b": 0.1, "c": 0.001}
    free = place(model_of(CHAIN), noise, costs, noise, price=0.0)
    dear = place(model_of(CHAIN), noise, costs, noise, price=100.0)
    assert free.noise == pytest.approx(0.102)
    assert list(dear.floats) == ["b"]
    assert dear.floats["b"] == "adds noise of -10 dB to the outputs"
    assert dear.noise == pytest.approx(0.002)


times = st.integers(0, 8).map(lambda n: n / 4)
node_times = st.fixed_dictionaries(dict.fromkeys("abcde", times))


@settings(max_examples=60, deadline=None)
@given(node_times, node_times, node_times, node_times, st.sets(st.sampled_from("abcde")), times)
def test_no_placement_is_faster(
    in_float: Mapping[str, float],
    in_int8: Mapping[str, float],
    quantize: Mapping[str, float],
    dequantize: Mapping[str, float],
    able: set[str],
    apart: float,
) -> None:
    model = model_of(DIAMOND)
    costs = Costs(in_float, in_int8, {**quantize, "x": 0.25}, dequantize, apart={("d", "e"): apart})
    subsets = itertools.chain.from_iterable(
        itertools.combinations(sorted(able), n) for n in range(len(able) + 1)
    )
    least = min((time_of(model, costs, frozenset(s)) for s in subsets), default=math.inf)
    found = place(model, able, costs)
    assert found.ms == pytest.approx(least)
    assert time_of(model, costs, frozenset(able - found.floats.keys())) == pytest.approx(least)
