"""Does a plan that was written by hand fit its model? The first entry that does not is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewise.calibration.kernels import activations, biased_by, cut_bounds, refusal, weights_of
from edgewise.calibration.target import Target, target_of
from edgewise.passes.graph import constant_of
from edgewise.passes.movers import CUTS
from edgewise.passes.quant_plan import LARGEST, SMALLEST, NodePlan, QuantPlan, ValuePlan
from edgewise.runtime.errors import InputError

_LARGEST_BIAS = 2**30  # half of int32 for the bias, half for the products
_SLACK = 1 + 1e-6  # of a scale that float32 rounded


def check_plan(plan: QuantPlan, model: ir.Model) -> None:
    """Raise `InputError` on the first entry of `plan` that cannot be followed in `model`.

    What passes is written by `InsertQdq` as it says, and runs in integers on the plan's target. That it
    is fast or close to the float model is not checked.
    """
    plan.check()
    _Check.of(plan, model).run(plan)


@dataclass(frozen=True)
class _Check:
    """A model's values and nodes by name, and the grids that a plan has for them."""

    target: Target
    values: Mapping[str, ir.Value]
    nodes: Mapping[str, ir.Node]
    grids: Mapping[str, ValuePlan]

    @classmethod
    def of(cls, plan: QuantPlan, model: ir.Model) -> _Check:
        graph = model.graph
        inner = [v for node in graph for v in node.outputs]
        values = {v.name or "": v for v in (*graph.inputs, *graph.initializers.values(), *inner)}
        nodes = {n.outputs[0].name or "": n for n in graph if n.outputs}
        return cls(target_of(plan.target), values, nodes, {v.name: v for v in plan.values})

    def run(self, plan: QuantPlan) -> None:
        for value in plan.values:
            if value.name not in self.values:
                raise _wrong(value, "the model's main graph has no value of that name: correct or remove it")
        for node in plan.nodes:
            self._exists(node)
        for value in plan.values:
            self._value(value, self.values[value.name])
        for node in plan.quantized:
            self._node(node, self.nodes[node.output])

    def _exists(self, plan: NodePlan) -> None:
        node = self.nodes.get(plan.output)
        if node is None:
            raise _wrong(plan, "the model's main graph has no node with that first output: remove the entry")
        if node.op_type != plan.op_type:
            raise _wrong(plan, f"it is a {node.op_type} in the model, not a {plan.op_type}")

    def _value(self, grid: ValuePlan, value: ir.Value) -> None:
        if value.dtype not in (None, ir.DataType.FLOAT):
            raise _wrong(grid, "only float32 can be quantized: remove the entry")
        if grid.dtype == "int32":
            if not any(value in (n.inputs[2:3] or ()) or biased_by(n) is value for n in self._readers(value)):
                raise _wrong(grid, "int32 is for biases alone: choose another type")
        elif any(weights.value is value for weights in map(weights_of, self._readers(value)) if weights):
            self._weight(grid, value)
        elif grid.axis is not None:
            raise _wrong(grid, "only weights have an axis: give it one scale and no axis")
        elif self.target.symmetric and grid.zero_point:
            raise _wrong(grid, f"{self.target.name} wants symmetric grids: let its zero point be 0")

    def _readers(self, value: ir.Value) -> list[ir.Node]:
        return [use.node for use in value.uses()]

    def _weight(self, grid: ValuePlan, value: ir.Value) -> None:
        """A constant that is multiplied, by one or several nodes."""
        if grid.dtype not in ("int8", "uint8"):
            raise _wrong(grid, f"weights are int8 or uint8, not {grid.dtype}")
        if grid.zero_point and (grid.dtype == "int8" or self.target.symmetric):
            raise _wrong(grid, "kernels want symmetric weights: let its zero point be 0")
        if grid.axis is None:
            return
        axes = {w.axis for n in self._readers(value) if (w := weights_of(n)) is not None and w.value is value}
        if axes != {grid.axis}:
            raise _wrong(grid, f"output channels count along axis {sorted(axes)}, not {grid.axis}")
        array = constant_of(value)
        if array is not None and array.shape[grid.axis] != len(grid.scale):
            raise _wrong(grid, f"{len(grid.scale)} scales for {array.shape[grid.axis]} channels")

    def _node(self, plan: NodePlan, node: ir.Node) -> None:
        able = self.target.measured()
        if (reason := refusal(node, able)) is not None:
            raise _wrong(plan, f"it cannot run in int8 ({reason}): let its form be float")
        if plan.form == "folded":
            self._folded(plan, node)
        elif plan.form == "integer":
            self._integer(plan, node)
        elif biased_by(node) is None:
            self._operands(plan, node)
        self._bias(plan, node)

    def _folded(self, plan: NodePlan, node: ir.Node) -> None:
        """A Relu or Clip may leave if the grid of its input ends where it cuts."""
        if node.op_type not in CUTS:
            raise _wrong(plan, f"a grid does the work of Relu and Clip only, not of {node.op_type}: int8")
        grid = self._grid(node.inputs[0])
        if grid is None:
            return
        (low, high), bounds, half = grid.range, cut_bounds(node), grid.scale[0] / 2
        if low < bounds[0] - half or high > bounds[1] + half:
            raise _wrong(plan, f"the grid of its input, {low:.4g} .. {high:.4g}, goes beyond what it cuts")

    def _integer(self, plan: NodePlan, node: ir.Node) -> None:
        """What is given integers gives integers on the same grid."""
        if node.op_type not in self.target.movers | CUTS:
            raise _wrong(plan, f"{node.op_type} computes, which takes form int8 or float")
        grid, output = self._operand(plan, node.inputs[0]), self._grid(node.outputs[0])
        if grid.dtype not in ("int8", "uint8"):
            raise _wrong(plan, f"there is no {node.op_type} on {grid.dtype}: let its form be int8")
        if output is not None and _key(output) != _key(grid):
            raise _wrong(plan, f"values {grid.name!r} and {output.name!r} have to share scale and zero point")

    def _operands(self, plan: NodePlan, node: ir.Node) -> None:
        """Every operand of a node in int8 is on a grid, and kernels take the types together."""
        weights = weights_of(node)
        grids = [self._operand(plan, v) for v in activations(node)]
        types = {g.dtype for g in grids}
        if len(types | self._written(node)) > 1:
            raise _wrong(plan, "its inputs and output have grids of different types")
        weight = None if weights is None else self._operand(plan, weights.value)
        if weight is not None and weight.dtype == "uint8" and types == {"int8"}:
            raise _wrong(plan, f"no kernel multiplies int8 by uint8: plan {weight.name!r} as int8")

    def _written(self, node: ir.Node) -> set[str]:
        """The types in which the result of `node` is stored, itself or behind a cut."""
        value = node.outputs[0]
        cuts = (o for n in self._readers(value) if n.op_type in CUTS for o in n.outputs)
        return {grid.dtype for v in (value, *cuts) if (grid := self._grid(v)) is not None}

    def _operand(self, plan: NodePlan, value: ir.Value | None) -> ValuePlan:
        grid = self._grid(value)
        if grid is None or grid.dtype == "int32":
            name = None if value is None else value.name
            raise _wrong(plan, f"its input {name!r} has no grid: add an entry, or let its form be float")
        return grid

    def _grid(self, value: ir.Value | None) -> ValuePlan | None:
        return None if value is None else self.grids.get(value.name or "")

    def _bias(self, plan: NodePlan, node: ir.Node) -> None:
        """A bias in int32 fits into it, with room for the products."""
        weights = weights_of(node)
        grid = None if weights is None else self._grid(weights.bias_value)
        if weights is None or weights.bias is None or grid is None or grid.dtype != "int32":
            return
        inputs, weight = self._operand(plan, node.inputs[0]), self._operand(plan, weights.value)
        units = inputs.scale[0] * np.array(weight.scale)
        if units.min() < SMALLEST or units.max() > LARGEST:
            raise _wrong(
                weight, f"its scales times that of {inputs.name!r} are beyond float32: move them to 1"
            )
        if (np.abs(weights.bias.astype(np.float64).reshape(-1)) / units).max() > _LARGEST_BIAS * _SLACK:
            raise _wrong(
                grid, f"it does not fit int32: let the scales of {weight.name!r} or {inputs.name!r} be larger"
            )


def _key(grid: ValuePlan) -> tuple[str, tuple[float, ...], int]:
    return grid.dtype, grid.scale, grid.zero_point


def _wrong(entry: ValuePlan | NodePlan, what: str) -> InputError:
    kind, name = ("value", entry.name) if isinstance(entry, ValuePlan) else ("node", entry.output)
    return InputError(f"plan of {kind} {name!r}: {what}")
