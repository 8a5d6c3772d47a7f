"""Biases that take the mean out of what quantization does to a layer's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from edgewise.calibration.edits import NO_EDITS, Anchor, Edits, anchors, nearest, with_weights
from edgewise.calibration.kernels import biased_by, kernel_rows
from edgewise.calibration.moments import Moments
from edgewise.calibration.taps import reduction
from edgewise.passes.fingerprint import fingerprint
from edgewise.passes.graph import (
    Array,
    constant_of,
    forget_names,
    graph_of,
    move_initializers,
    only_user,
    opset,
    unique_name,
)
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.passes.quant_plan import QuantPlan
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator, Feed


def correct_biases(
    model: ir.Model,
    plan: QuantPlan,
    evidence: Moments | Iterable[Feed],
    *,
    edits: Edits = NO_EDITS,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Edits:
    """`edits` of the weights of `model`, and biases that go with them; a bias in `edits` is replaced.

    From moments, each layer by itself: (q - w) E[x] leaves the bias. From samples, in one pass over them,
    what a layer and everything before it shift: see `_side_by_side`. Layers whose bias is missing, or
    shared, are left alone. Both after Nagel et al., "Data-free quantization through weight equalization
    and bias correction", ICCV 2019. Raises `InputError` on moments of another model and without samples.
    """
    if isinstance(evidence, Moments):
        return _analytic(model, plan, evidence, edits)
    return _empirical(model, plan, evidence, edits, threads, progress)


def _analytic(model: ir.Model, plan: QuantPlan, moments: Moments, edits: Edits) -> Edits:
    if moments.fingerprint != fingerprint(model):
        raise InputError("these moments are of another model: collect them again")
    corrected = dict(edits)
    for anchor in anchors(model, plan):
        if (seen := moments.layers.get(anchor.name)) is None:
            continue
        array = anchor.weights.array.astype(np.float64)
        quantized = nearest(edits.get(anchor.weights.value.name or "", array), anchor.grid)
        rows = kernel_rows(anchor.node, quantized - array)
        grouped = rows.reshape(anchor.groups, -1, rows.shape[1])
        corrected |= anchor.corrected_bias(-(grouped @ seen.mean[:, :, None]).reshape(-1))
    return corrected


def _empirical(
    model: ir.Model,
    plan: QuantPlan,
    samples: Iterable[Feed],
    edits: Edits,
    threads: int | None,
    progress: Callable[[int], None] | None,
) -> Edits:
    edited = with_weights(model, edits)
    layers = {a.name: a for a in anchors(edited, plan) if a.own_bias is not None}
    both, outputs = _side_by_side(model, edited, plan, layers.values())
    sums = {name: np.zeros((2, layers[name].weights.channels)) for name in outputs}
    evaluator = Evaluator(both, outputs=tuple(outputs.values()), threads=threads) if outputs else None
    done = 0
    for done, feed in enumerate(samples, start=1):
        shifts = evaluator.run(feed) if evaluator is not None else {}
        for name, output in outputs.items():
            shift = shifts[output].astype(np.float64).reshape(-1)
            sums[name] += (shift, shift**2)
        if progress is not None:
            progress(done)
    if not done:
        raise InputError("no samples to correct biases with")
    corrected = dict(edits)
    for name, total in sums.items():
        corrected |= layers[name].corrected_bias(shrunk(total[0] / done, total[1] / done, done))
    return corrected


def shrunk(mean: Array, square: Array, count: int) -> Array:
    """Means over `count` samples, those nearer to zero that may as well be chance.

    The factor m^2 / (m^2 + v) has the least expected squared error for a mean m known up to the variance v.
    """
    variance = np.maximum(square - mean**2, 0) / max(count - 1, 1)
    kept = np.divide(mean**2, mean**2 + variance, out=np.ones_like(mean), where=variance > 0)
    shrunk_mean: Array = mean * kept
    return shrunk_mean


def _side_by_side(
    model: ir.Model, edited: ir.Model, plan: QuantPlan, layers: Iterable[Anchor]
) -> tuple[ir.Model, dict[str, str]]:
    """Both models in one, so that one run shows what every layer shifts when all before it is corrected.

    Given:   y in `model`, y' in `edited` after the plan     the same value, channels on one axis
    Result:  c = mean(y - y') over the other axes, and y' + c is read for y'; c is an output

    The corrections of a sample are its own, their mean over samples is the bias. Returns the model and
    the name of c for every layer it is there for.
    """
    quantized = edited.clone()
    nodes = {n.outputs[0].name or "": n for n in quantized.graph if n.outputs}
    InsertQdq(plan).apply(quantized)
    twins = _add_float_twin(quantized, model)
    outputs: dict[str, ir.Value] = {}
    for layer in layers:
        result = _result(layer.node)
        rank, axis = _channels(result)
        if rank is not None:
            node = nodes[result.name or ""]
            axes = [i for i in range(rank) if i != axis % rank]
            outputs[layer.name] = _corrected(node, twins[result.name or ""], axes, opset(model))
    quantized.graph.outputs[:] = outputs.values()
    return quantized, {name: value.name or "" for name, value in outputs.items()}


def _result(node: ir.Node) -> ir.Value:
    """What the bias has been added to."""
    reader = only_user(node.outputs[0]) if node.op_type == "MatMul" else None
    return reader.outputs[0] if reader is not None and biased_by(reader) is not None else node.outputs[0]


def _channels(result: ir.Value) -> tuple[int | None, int]:
    """The rank of a result, None if unknown, and the axis of its channels."""
    producer = result.producer()
    if producer is not None and producer.op_type == "Conv":
        weights = constant_of(producer.inputs[1])
        return (None if weights is None else weights.ndim), 1
    return (None if result.shape is None else len(result.shape)), -1


def _add_float_twin(quantized: ir.Model, model: ir.Model) -> dict[str, ir.Value]:
    """Put the nodes of `model` in front of those of `quantized`, on the same inputs; its values by name."""
    graph, twin = quantized.graph, model.clone().graph
    values = {v.name or "": v for node in twin for v in node.outputs}
    twin.outputs.clear()
    for source, value in zip(twin.inputs, graph.inputs, strict=True):
        source.replace_all_uses_with(value)
        twin.initializers.pop(source.name or "", None)
    for name, value in values.items():
        value.name = unique_name(graph, f"{name}.float")
    for node in twin.all_nodes():
        node.name = None  # two nodes of one name are refused
    nodes = list(twin)
    twin.remove(nodes)
    move_initializers(twin, graph)
    graph.insert_before(graph[0], nodes)
    forget_names(graph)
    return values


def _corrected(node: ir.Node, truth: ir.Value, axes: Sequence[int], version: int) -> ir.Value:
    """Let all readers of what `node` gives read it with the mean difference from `truth` added."""
    graph, given = graph_of(node), node.outputs[0]
    uses = list(given.uses())
    difference = ir.node("Sub", [truth, given])
    difference.outputs[0].name = unique_name(graph, f"{given.name}.difference")
    mean = reduction(graph, "ReduceMean", difference.outputs[0], axes, keepdims=True, version=version)
    total = ir.node("Add", [given, mean.outputs[0]])
    for made, suffix in ((mean, "shift"), (total, "corrected")):
        made.outputs[0].name = unique_name(graph, f"{given.name}.{suffix}")
    graph.insert_after(node, [difference, mean, total])
    for reader, index in uses:
        reader.replace_input_with(index, total.outputs[0])
    return mean.outputs[0]
