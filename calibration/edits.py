"""New numbers for the constants of a model, chosen for the plan that will quantize them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.calibration.kernels import Weights, weights_of
from edgewise.calibration.target import TARGETS
from edgewise.passes.graph import Array, attribute
from edgewise.passes.quant_plan import LIMITS, QuantPlan, ValuePlan
from edgewise.runtime.errors import InputError

Edits = Mapping[str, Array]

NO_EDITS: Edits = MappingProxyType({})

_LARGEST_BIAS = 2**30  # of its integers: half of int32, the other half is left for the products


@dataclass(frozen=True)
class Anchor:
    """A node of `plan` that multiplies by constant weights, with their grid and that of its input."""

    node: ir.Node
    weights: Weights
    grid: ValuePlan
    input_grid: ValuePlan | None
    saturates: bool

    @property
    def name(self) -> str:
        """The name of the node's first output."""
        return self.node.outputs[0].name or ""

    @property
    def input(self) -> ir.Value:
        """The activation that is multiplied."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def groups(self) -> int:
        return int(attribute(self.node, "group", 1))

    @property
    def own_weights(self) -> bool:
        """Whether nothing else reads the weights."""
        return _is_own(self.weights.value)

    @property
    def own_bias(self) -> Array | None:
        """The bias, one number a channel, float64; None where there is none or something else reads it."""
        bias, value = self.weights.bias, self.weights.bias_value
        if bias is None or value is None or not _is_own(value):
            return None
        return np.broadcast_to(bias.astype(np.float64).reshape(-1), self.weights.channels)

    def corrected_bias(self, change: Array) -> dict[str, Array]:
        """The edit that adds `change` to the bias; nothing for channels that their int32 cannot hold."""
        bias, value = self.own_bias, self.weights.bias_value
        if bias is None or value is None:
            return {}
        step = np.array(self.grid.scale) * (self.input_grid.scale[0] if self.input_grid else 1.0)
        fits = np.isfinite(change) & (np.abs(bias + change) <= step * _LARGEST_BIAS)
        edited = np.where(fits, bias + change, bias).astype(np.float32)
        shape = self.weights.bias.shape if self.weights.bias is not None else ()
        return {value.name or "": edited.reshape(shape if edited.size == np.prod(shape) else -1)}


def anchors(model: ir.Model, plan: QuantPlan) -> Iterator[Anchor]:
    """The nodes of the main graph that `plan` runs in int8 by constant int8 weights, in order."""
    grids = {v.name: v for v in plan.values}
    chosen = {n.output for n in plan.quantized}
    saturates = plan.target in TARGETS and TARGETS[plan.target].saturates
    for node in model.graph:
        weights = weights_of(node) if node.outputs and node.outputs[0].name in chosen else None
        grid = None if weights is None else grids.get(weights.value.name or "")
        if weights is not None and grid is not None:
            source = node.inputs[0]
            yield Anchor(node, weights, grid, grids.get(source.name or "") if source else None, saturates)


def nearest(array: Array, grid: ValuePlan) -> Array:
    """What the nearest integers of `grid` stand for, float64."""
    scale = np.array(grid.scale).reshape([-1 if i == grid.axis else 1 for i in range(array.ndim)])
    integers = np.rint(array / scale) + grid.zero_point
    floats: Array = (integers.clip(*LIMITS[grid.dtype]) - grid.zero_point) * scale
    return floats


def with_weights(model: ir.Model, edits: Edits) -> ir.Model:
    """A clone of `model` that holds `edits` in place of the constants of those names.

    Raises `InputError` on a name that is no constant of the main graph or one that several nodes read,
    and on an array of another shape; a bias may become one number a channel.
    """
    edited = model.clone()
    made = {v.name: v for n in edited.graph if n.op_type == "Constant" for v in n.outputs}
    for name, array in edits.items():
        value = edited.graph.initializers.get(name) or made.get(name)
        if value is None or value.is_graph_input():
            raise InputError(f"the model's main graph has no constant named {name!r}")
        if not _is_own(value):
            raise InputError(f"constant {name!r} is read more than once: give every node its own first")
        _set(value, array)
    return edited


def _is_own(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _set(value: ir.Value, array: Array) -> None:
    """Tensors are shared between clones: the value gets a new one."""
    before = value.shape
    if before is not None and tuple(before) != array.shape and array.ndim > 1:
        raise InputError(f"constant {value.name!r} has shape {tuple(before)}, its edit {array.shape}")
    tensor = ir.Tensor(np.asarray(array, order="C"), name=value.name)
    producer = value.producer()
    if producer is None:
        value.const_value = tensor
    else:
        producer.attributes.clear()
        producer.attributes.add(ir.AttrTensor("value", tensor))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
