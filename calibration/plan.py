"""From ranges to a plan: for every value its grid of integers, and for every node whether it uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.calibration.kernels import (
    Weights,
    activations,
    biased_by,
    cut_bounds,
    is_depthwise,
    kernel_rows,
    numbers,
    weights_of,
)
from edgewise.calibration.regions import Regions, find_regions
from edgewise.calibration.table import CalibrationTable
from edgewise.calibration.target import CUTS, TARGETS, Target
from edgewise.passes.graph import constant_of
from edgewise.passes.quant_plan import LIMITS, NodePlan, QuantPlan, ValuePlan

Array = npt.NDArray[Any]
Range = tuple[float, float]

ANALYTIC: Mapping[str, Range] = MappingProxyType(
    {"Sigmoid": (0.0, 1.0), "HardSigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0)}
)
"""Operators that fill a range that is known without a sample."""

_WEIGHT_LIMIT = 127
_BIAS_LIMIT = 2**30  # half of int32 for the bias, half for the products
_SMALLEST = 2.0**-100  # a scale that stays normal when it is multiplied by another


@dataclass(frozen=True)
class QuantOptions:
    """What a user chooses. `method` is one of `edgewise.calibration.ranges.METHODS`.

    `per_channel` gives every output channel of a weight its own scale. `exclude` holds names or operator
    types of nodes that stay in float.
    """

    method: str = "mse"
    per_channel: bool = True
    exclude: tuple[str, ...] = ()


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
    for one in TARGETS.values() if target is None else (target,):
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


def plan(model: ir.Model, table: CalibrationTable, options: QuantOptions, target: Target) -> QuantPlan:
    """Every value's integers and every node's form, with reasons. A pure function.

    Raises `InputError` if `table` was taken from another model or `options.method` is not known.
    """
    table.check(model)
    ranges = _Ranges(
        table.ranges(options.method, symmetric=target.symmetric), _unusable(table), options.method
    )
    barred: dict[ir.Node, str] = {}
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
    """256 levels over `span`, one of them zero; symmetric: 255 levels around zero."""
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    first, last = LIMITS[target.activation]
    if target.symmetric:
        scale, zero_point = _float32(max(-low, high) / last), 0
    else:
        scale = _float32((high - low) / (last - first))
        zero_point = int(np.clip(first + np.rint(-low / scale), first, last))
    return ValuePlan(value.name or "", target.activation, (scale,), zero_point, why=why)


def _float32(scale: float) -> float:
    """`scale` as the runtime will see it; a value that is always zero gets scale 1."""
    return float(np.float32(scale)) if scale > _SMALLEST else 1.0


def _weights(
    regions: Regions, values: Mapping[ir.Value, ValuePlan], options: QuantOptions, target: Target
) -> dict[ir.Value, ValuePlan]:
    """A plan for every weight, wide enough for all nodes that share it."""
    plans: dict[ir.Value, ValuePlan] = {}
    for node in regions.forms:
        weights = weights_of(node)
        if weights is None:
            continue
        rows = kernel_rows(node, weights.array.astype(np.float64))
        in_pairs = target.saturates and not is_depthwise(node, weights.array)
        input_scale = values[activations(node)[0]].scale[0]
        plan = _weight_plan(weights, rows, input_scale, options.per_channel, in_pairs)
        other = plans.get(weights.value)
        plans[weights.value] = plan if other is None else _wider(other, plan)
    return plans


def _weight_plan(
    weights: Weights, rows: Array, input_scale: float, per_channel: bool, in_pairs: bool
) -> ValuePlan:
    """Symmetric int8 for `rows` (channels, k): the largest magnitude becomes 127, or less.

    Where products are added in pairs in saturating 16 bits, 255 * |q0 + q1| has to stay below 2**15 for
    neighbours q0, q1 along k: |q0 + q1| <= 128, which the scale max |w0 + w1| / 127 grants (rounding
    moves a sum by 1 at most). A sum of opposite signs is never the largest. A channel's worst pair costs
    it less than a bit, and nothing where large weights are not side by side.
    """
    magnitude = np.abs(rows).max(axis=1)
    largest = np.maximum(magnitude, _largest_pair(rows)) if in_pairs else magnitude
    scales = np.maximum(largest / _WEIGHT_LIMIT, _bias_scales(weights, input_scale))
    widened = int((largest > magnitude).sum())
    why = (
        f"{widened} of {len(largest)} channels widened: pairs would saturate" if widened else "largest weight"
    )
    if not per_channel:
        return ValuePlan(weights.value.name or "", "int8", (_float32(float(scales.max())),), why=why)
    scale = tuple(_float32(float(s)) for s in scales)
    return ValuePlan(weights.value.name or "", "int8", scale, axis=weights.axis, why=why)


def _largest_pair(rows: Array) -> Array:
    """The largest |w0 + w1| of each row, over neighbours 0 and 1, 2 and 3, ..."""
    even = rows[:, : rows.shape[1] // 2 * 2].reshape(rows.shape[0], -1, 2)
    largest: Array = np.abs(even.sum(axis=2)).max(axis=1, initial=0.0)
    return largest


def _bias_scales(weights: Weights, input_scale: float) -> Array:
    """The least weight scale at which round(bias / (input scale * weight scale)) fits its integers."""
    if weights.bias is None:
        return np.zeros(weights.channels)
    bias = np.broadcast_to(weights.bias.astype(np.float64).reshape(-1), weights.channels)
    return np.abs(bias) / (input_scale * _BIAS_LIMIT)


def _wider(a: ValuePlan, b: ValuePlan) -> ValuePlan:
    """One plan for a weight that two nodes read; one scale in all if they count channels differently."""
    if a.axis != b.axis:
        return replace(a, scale=(max(a.scale + b.scale),), axis=None, why="shared along two axes")
    return replace(a, scale=tuple(map(max, a.scale, b.scale)), why=a.why if a == b else "shared")


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
