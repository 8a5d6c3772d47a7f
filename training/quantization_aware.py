"""Training through the rounding of a quantization plan, so that a net that int8 hurts is healed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgewise.calibration.data import Samples
from edgewise.passes.graph import Array, constant_of, new_initializer, replace
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.passes.quant_plan import LIMITS, QuantPlan, ValuePlan
from edgewise.training.distillation import distill
from edgewise.training.options import Trained, TrainOptions, ending_in
from edgewise.training.trainer import Progress

_GENTLE = TrainOptions(learning_rate=2e-4, inner=0.0)


def heal(
    model: ir.Model,
    plan: QuantPlan,
    samples: Samples,
    held_back: Samples,
    options: TrainOptions = _GENTLE,
    *,
    teacher: ir.Model | None = None,
    checkpoint: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train the weights of `model` for the integers that `plan` makes of them, with or without labels.

    Gradients pass the rounding as if it were not there, and stop where it cuts off (straight-through,
    Jacob et al., CVPR 2018). The teacher is `model` itself in float, unless another is given. The result is
    a float model: `InsertQdq(plan)` makes of its weights the very integers that were trained with. Its
    history is that of the quantized model. Raises what `distill` raises.
    """
    student = through(model, plan)

    def settled(trained: Trained) -> Trained:
        return Trained(on_grids(model, trained.model, plan), trained.history)

    with ending_in(settled):
        trained = distill(
            model if teacher is None else teacher,
            student,
            samples,
            held_back,
            options,
            checkpoint=checkpoint,
            threads=threads,
            progress=progress,
        )
    return settled(trained)


def through(model: ir.Model, plan: QuantPlan) -> ir.Model:
    """`model` with the plan's QuantizeLinear and DequantizeLinear, and weights that are still floats.

    Given:   DequantizeLinear(W')                      W' in int8, made of the weights W
    Result:  DequantizeLinear(QuantizeLinear(W))

    A bias stays a float: its integers are so fine that rounding does not matter.
    """
    rounded = InsertQdq(plan).on(model)
    grids = {grid.name: grid for grid in plan.values}
    originals = _constants(model)
    made: dict[str, ir.Value] = {}
    for node in list(rounded.graph):
        stored = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if stored is None or not stored.is_initializer():
            continue
        name = (stored.name or "").split(".quantized")[0]
        if name not in originals or name not in grids:
            continue
        if name not in made:
            made[name] = new_initializer(rounded.graph, name, originals[name])
        if grids[name].dtype == "int32":
            replace(node.outputs[0], made[name])
            continue
        quantize = ir.node("QuantizeLinear", [made[name], *node.inputs[1:]], _axis(grids[name]))
        quantize.outputs[0].name, quantize.outputs[0].type = f"{stored.name}.now", stored.type
        quantize.outputs[0].shape = stored.shape
        rounded.graph.insert_before(node, quantize)
        node.replace_input_with(0, quantize.outputs[0])
        if not stored.uses():
            rounded.graph.initializers.pop(stored.name or "")
    return rounded


def _axis(grid: ValuePlan) -> dict[str, int]:
    return {} if grid.axis is None else {"axis": grid.axis}


def _constants(model: ir.Model) -> Mapping[str, Array]:
    """The constants of the main graph by name."""
    values = (*model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs))
    found = ((value.name or "", constant_of(value)) for value in values)
    return {name: array for name, array in found if array is not None}


def on_grids(model: ir.Model, trained: ir.Model, plan: QuantPlan) -> ir.Model:
    """A copy of `model` with the weights of `trained`, each on the point of its grid that it stands for."""
    grids = {grid.name: grid for grid in plan.values}
    new = _constants(trained)
    result = model.clone()
    for name, value in result.graph.initializers.items():
        before = constant_of(value)
        if before is None or name not in new or np.array_equal(before, new[name]):
            continue
        grid = grids.get(name)
        array = new[name] if grid is None or grid.dtype == "int32" else _snapped(new[name], grid)
        value.const_value = ir.Tensor(
            np.asarray(array.reshape(before.shape), before.dtype, order="C"), name=name
        )
    return result


def _snapped(array: Array, grid: ValuePlan) -> Array:
    """Rounded in the precision of the training, where a weight may lie just between two integers."""
    scale = np.array(grid.scale, np.float32).reshape([-1 if i == grid.axis else 1 for i in range(array.ndim)])
    integers = (np.rint(array / scale) + grid.zero_point).clip(*LIMITS[grid.dtype])
    snapped: Array = (integers - grid.zero_point) * scale
    return snapped
