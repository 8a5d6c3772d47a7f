"""From ranges to a plan: for every value its grid of integers, and for every node whether it uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.calibration.kernels import (
    activations,
    biased_by,
    cut_bounds,
    numbers,
    weights_of,
)
from edgewise.calibration.regions import Regions, find_regions
from edgewise.calibration.table import CalibrationTable
from edgewise.calibration.target import TARGETS, Target
from edgewise.calibration.weight_scales import float32_scale, weight_plan, wider
from edgewise.passes.graph import constant_of
from edgewise.passes.movers import CUTS
from edgewise.passes.quant_plan import LIMITS, NodePlan, QuantPlan, ValuePlan

Array = npt.NDArray[Any]
Range = tuple[float, float]

ANALYTIC: Mapping[str, Range] = MappingProxyType(
    {"Sigmoid": (0.0, 1.0), "HardSigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0), "Tanh": (-1.0, 1.0)}
)
"""Operators that fill a range that is known without a sample."""


@dataclass(frozen=True)
class QuantOptions:
    """What a user chooses. `method` is one of `edgewise.calibration.ranges.METHODS`.

    `per_channel` gives every output channel of a weight its own scale. `exclude` holds names or operator
    types of nodes that stay in float. `activations` is the type of activations, the target's by default;
    those of 16 bits are multiplied in float.
    """

    method: str = "minmax"
    per_channel: bool = True
    exclude: tuple[str, ...] = ()
    activations: Literal["uint8", "int8", "uint16", "int16"] | None = None


def observed_values(
    model: ir.Model, options: QuantOptions | None = None, target: Target | None = None
) -> tuple[str, ...]:
    """The values whose range a plan for `target` may need; for any target by default.

    Values that only move data share their source's range and are left out, as are ranges that are known
    without samples. Values that share a scale by choice are all in, so that one table serves every
    `exclude`.
    """
    exclude = () if options is None else options.exclude
    names: dict[str, None] = {}
    every = (*TARGETS.values(), *(t.measured() for t in TARGETS.values()))
    for one in every if target is None else (target,):
        regions = find_regions(model, one, exclude)
        seen = (v for v in regions.sources if _analytic(v) is None and not _is_moved(v, regions, one))
        names |= dict.fromkeys(v.name or "" for v in seen)
    return tuple(names)


def _is_moved(value: ir.Value, regions: Regions, target: Target) -> bool:
    producer = value.producer()
    if producer is None or producer not in regions.forms:
        return False
    return producer.op_type in target.movers or (
        producer.op_type in CUTS and regions.forms[producer] != "folded"
    )


def plan(
    model: ir.Model,
    table: CalibrationTable,
    options: QuantOptions,
    target: Target,
    *,
    floats: Mapping[str, str] = MappingProxyType({}),
) -> QuantPlan:
    """Every value's integers and every node's form, with reasons. A pure function.

    `floats` are nodes that stay in float, by their first output, and why. Raises `InputError` if `table`
    was taken from another model or `options.method` is not known.
    """
    table.check(model)
    target = target.with_activations(options.activations)
    bits = np.iinfo(target.activation).bits
    found = table.ranges(options.method, bits=bits, symmetric=target.symmetric)
    ranges = _Ranges(found, _unusable(table), options.method)
    barred = {n: floats[v.name or ""] for n in model.graph for v in n.outputs[:1] if v.name in floats}
    while True:
        regions = find_regions(model, target, options.exclude, barred)
        failed = {v: ranges.problem(v) for v in set(regions.sources.values()) if ranges.problem(v)}
        if not failed:
            break
        barred |= _touching(regions, failed)
    values = _activations(regions, ranges, target)
    values |= _weights(regions, values, options, target)
    values |= _numbers(regions, target)
    values |= _biases(regions) if target.int32_bias else {}
    return QuantPlan(target.name, tuple(values.values()), _nodes(model, regions))


def _unusable(table: CalibrationTable) -> frozenset[str]:
    return frozenset(name for name, sketch in table.sketches.items() if sketch.nans or sketch.infs)


def _touching(regions: Regions, failed: Mapping[ir.Value, str]) -> dict[ir.Node, str]:
    """The nodes that would need the grid of a value that has none."""
    values = {v: failed[s] for v, s in regions.sources.items() if s in failed}
    return {
        node: values[value]
        for node in regions.forms
        for value in (*activations(node), *node.outputs)
        if value in values
    }


def _nodes(model: ir.Model, regions: Regions) -> tuple[NodePlan, ...]:
    return tuple(
        NodePlan(
            n.outputs[0].name or "", n.op_type, regions.forms.get(n, "float"), regions.reasons.get(n, "")
        )
        for n in model.graph
        if n.outputs and n.op_type != "Constant"
    )


@dataclass(frozen=True)
class _Ranges:
    """What is known of the ranges of values, from samples or without."""

    seen: Mapping[str, Range]
    unusable: frozenset[str]
    method: str

    def problem(self, value: ir.Value) -> str:
        """Why `value` has no range; empty if it has one."""
        if _analytic(value) is not None:
            return ""
        if value.name in self.unusable:
            return "NaN or infinity was seen"
        return "" if value.name in self.seen else "range unknown"

    def of(self, value: ir.Value) -> tuple[Range, str]:
        """The range of `value`, zero inside, and where it comes from."""
        known = _analytic(value)
        if known is not None:
            return known, f"range of {_op_type(value)}"
        low, high = self.seen[value.name or ""]
        producer = value.producer()
        if producer is None or producer.op_type not in CUTS:
            return (low, high), f"{self.method} of what was seen"
        bounds = cut_bounds(producer)
        return (max(low, bounds[0]), min(high, bounds[1])), f"{self.method} behind {producer.op_type}"


def _analytic(value: ir.Value) -> Range | None:
    return ANALYTIC.get(_op_type(value))


def _op_type(value: ir.Value) -> str:
    producer = value.producer()
    return "" if producer is None else producer.op_type


def _activations(regions: Regions, ranges: _Ranges, target: Target) -> dict[ir.Value, ValuePlan]:
    grids: dict[ir.Value, ValuePlan] = {}
    for source in regions.sources.values():
        if source not in grids:
            grids[source] = _grid(source, *ranges.of(source), target)
    return {
        v: grids[s] if v is s else replace(grids[s], name=v.name or "", why=f"as {s.name}")
        for v, s in regions.sources.items()
    }


def _grid(value: ir.Value, span: Range, why: str, target: Target) -> ValuePlan:
    """All levels over `span`, one of them zero; symmetric: all but one around zero."""
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    first, last = LIMITS[target.activation]
    if target.symmetric:
        scale, zero_point = float32_scale(max(-low, high) / last), 0
    else:
        scale = float32_scale((high - low) / (last - first))
        zero_point = int(np.clip(first + np.rint(-low / scale), first, last))
    return ValuePlan(value.name or "", target.activation, (scale,), zero_point, why=why)


def _weights(
    regions: Regions, values: Mapping[ir.Value, ValuePlan], options: QuantOptions, target: Target
) -> dict[ir.Value, ValuePlan]:
    """A plan for every weight, wide enough for all nodes that share it."""
    plans: dict[ir.Value, ValuePlan] = {}
    for node in regions.forms:
        weights = weights_of(node)
        if weights is None:
            continue
        input_scale = values[activations(node)[0]].scale[0]
        made = weight_plan(node, weights, input_scale, options.per_channel, target.saturates)
        other = plans.get(weights.value)
        plans[weights.value] = made if other is None else wider(other, made)
    return plans


def _numbers(regions: Regions, target: Target) -> dict[ir.Value, ValuePlan]:
    """The grid of a constant number c ends at c."""
    plans: dict[ir.Value, ValuePlan] = {}
    for node in regions.forms:
        for value in numbers(node) if biased_by(node) is None else ():
            number = float(np.asarray(constant_of(value)).reshape(()))
            plans[value] = _grid(value, (number, number), "a constant", target)
    return plans


def _biases(regions: Regions) -> dict[ir.Value, ValuePlan]:
    """A bias is stored in units of the products it is added to, whichever node adds it."""
    plans: dict[ir.Value, ValuePlan] = {}
    for node in regions.forms:
        weights = None if node.op_type == "MatMul" else weights_of(node)
        bias = biased_by(node) if weights is None else weights.bias_value
        if bias is not None:
            plans[bias] = ValuePlan(bias.name or "", "int32", why="input scale x weight scale")
    return plans
