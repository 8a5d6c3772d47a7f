"""Give a pruned model the outputs of its original back by least squares, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgewise.calibration.data import Samples
from edgewise.calibration.patches import Reader, spread
from edgewise.passes.base import Refused, bodies_of
from edgewise.passes.channel_links import Indices
from edgewise.passes.graph import Array, constant_of, only_user
from edgewise.passes.linear import Linear, layer_ending_at, set_constant
from edgewise.passes.remove_channels import PrunePlan, RemoveChannels, survivors
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Feed
from edgewise.training.frontier import Frontier
from edgewise.training.least_squares import CrossMoments, Floats, fit
from edgewise.training.sums import Total, layers_of, total_behind

Kept = Mapping[tuple[str, int], Indices]
Progress = Callable[[int, int], None]

_HELD_BACK = 4  # of so many feeds one tells how strong the ridge is to be
_BATCH = 32
_GOLDEN = (math.sqrt(5) - 1) / 2  # steps of which fall evenly between what there is
_SMALLEST = 1e-3  # of the scales of a BatchNormalization that are worth dividing by, to the largest


def recover_closed_form(
    original: ir.Model,
    plan: PrunePlan,
    samples: Samples,
    *,
    threads: int | None = None,
    memory: int = 1 << 30,
    progress: Progress | None = None,
) -> ir.Model:
    """`original` without what leaves by `plan`, its layers re-fitted to the original's outputs.

    Front to back: each layer behind a cut sees what the layers before it, fitted already, really give, and
    aims at what the original's layer gave. A layer that writes into a sum also makes up for what the
    other operand has lost. Every fit has an intercept, which lands in the bias, or in the mean of a
    BatchNormalization behind. Neither labels nor gradients are needed.

    Moments take half of `memory` bytes, values between layers the other half. Layers whose moments do not
    fit are treated as `reestimate` treats all. A layer that cannot be fitted, as one whose weights are
    computed, stays as it is. `progress` hears how many layers of how many are done. Raises `InputError`
    where there are no samples.

    The reconstruction of He et al. (channel pruning, ICCV 2017), from moments in place of samples.
    """
    return _recovered(original, plan, samples, memory // 2, memory // 4, threads, progress)


def reestimate(
    original: ir.Model,
    plan: PrunePlan,
    samples: Samples,
    *,
    threads: int | None = None,
    memory: int = 1 << 30,
    progress: Progress | None = None,
) -> ir.Model:
    """`original` without what leaves by `plan`, with new biases and means, and a new scale of each output.

    As `recover_closed_form`, but of each layer's weights only the scale of each output is fitted, as if the
    statistics of batch norms were estimated again, to what the original gave. That takes few samples and
    little time, and overfits nothing.
    """
    return _recovered(original, plan, samples, 0, memory // 4, threads, progress)


def _recovered(
    original: ir.Model,
    plan: PrunePlan,
    samples: Samples,
    moments: int,
    values: int,
    threads: int | None,
    progress: Progress | None,
) -> ir.Model:
    """With at most so many bytes of moments of a layer, and of values between layers of either model."""
    if not len(samples):
        raise InputError("no samples to recover with")
    cut = RemoveChannels(plan).on(original)
    kept = survivors(original, plan)
    jobs = _jobs(original, cut, {*(name for name, _ in kept), *plan.branches})
    size = max(1, min(_BATCH, len(samples) // (2 * _HELD_BACK)))
    feeds = _Batches(samples, size)
    before = Frontier(original, feeds, memory=values, threads=threads)
    after = Frontier(cut, feeds, memory=values, threads=threads)
    for done, job in enumerate(jobs, start=1):
        with suppress(Refused):  # the layer stays as the cut has left it
            job.run(before, after, kept=kept, memory=moments)
        if progress is not None:
            progress(done, len(jobs))
    return cut


@dataclass(frozen=True)
class _Batches:
    """Samples as feeds of several, as often as they are asked for."""

    samples: Samples
    size: int

    def __iter__(self) -> Iterator[Feed]:
        return self.samples.batches(self.size)


@dataclass(frozen=True, eq=False)
class _Job:
    """A layer of the original and what became of it in the cut model, each by its last node."""

    before: ir.Node
    after: ir.Node

    def run(self, original: Frontier, cut: Frontier, *, kept: Kept, memory: int) -> None:
        """Fit the layer of the cut model, which stays as it is where it is of an unknown kind."""
        old, new = layer_ending_at(self.before), layer_ending_at(self.after)
        if old is None or new is None:
            return
        original.advance(old.node)
        cut.advance(new.node)
        pairs = _Pairs.of(old, new, kept, memory)
        total = total_behind(self.after)
        if total is not None and original.has(total.other) and cut.has(total.other):
            pairs = replace(pairs, total=total)
        folds: list[CrossMoments | None] = [None, None]
        for number, (was, now) in enumerate(zip(original, cut, strict=True)):
            moments, fold = pairs.moments(was, now, number), number % _HELD_BACK == _HELD_BACK - 1
            before = folds[fold]
            folds[fold] = moments if before is None else before + moments
        seen, unseen = folds
        if seen is not None:
            _write(new, *fit(seen, unseen, pairs.start, pairs.importance), pairs)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """How the inputs of a layer, and what its outputs should be, are read from the values in front of it."""

    old: Linear
    new: Linear
    outputs: Indices
    """Those of the original that are left."""
    centred: bool
    """Whether the layer has, or may get, a bias."""
    whole: bool
    """Whether every weight is fitted, or a scale and a bias for each output alone."""
    total: Total | None = None

    @classmethod
    def of(cls, old: Linear, new: Linear, kept: Kept, memory: int) -> _Pairs:
        name, axis = old.node.outputs[0].name or "", old.outputs.axis
        if axis is None:
            raise Refused("the rank of the output is unknown")
        outputs = kept.get((name, axis), np.arange(old.outputs.size))
        if len(outputs) != new.outputs.size or max(old.bias.size, new.bias.size) > old.outputs.size:
            raise Refused("the outputs do not match")
        may_have_bias = new.node.op_type != "MatMul" or new.tail is not new.node or new.inputs.rank == 2
        groups, fan_out, fan_in, taps = new.weight.shape
        needed = 8 * 4 * groups * fan_in * taps * (fan_in * taps + fan_out)
        return cls(old, new, outputs, may_have_bias, needed <= memory)

    @property
    def start(self) -> Floats:
        """What the fit starts from: the weight that the layer has, or a scale of one for every output."""
        return _matrix(self.new) if self.whole else np.ones((self.new.outputs.size, 1, 1))

    @property
    def importance(self) -> Floats:
        """Of errors of each output, in the shape of the fit's outputs."""
        start = self.start
        scale = np.ones(1) if self.total is None else self.total.scale
        return np.broadcast_to(scale**2, self.new.outputs.size).reshape(len(start), -1)

    def moments(self, was: Feed, now: Feed, number: int) -> CrossMoments:
        """Of feed `number`, from the values in front of the layer in the original and in the cut model."""
        (reader, array), (own, cut) = _source(self.old, was), _source(self.new, now)
        positions = own.positions(cut.shape)
        if positions != reader.positions(array.shape):
            raise Refused("the inputs do not match")
        at = spread(math.prod(positions), own.patches * cut.shape[0], number * _GOLDEN % 1)
        x = own.read(cut, at)
        y = self._target(reader.read(array, at))
        if self.total is not None:
            y = y + self._lost(was, now, at)
        if self.whole:
            return CrossMoments.of(x, y.reshape(len(at), len(x), -1).swapaxes(0, 1), centred=self.centred)
        given = _outputs(x @ _matrix(self.new).astype(np.float32))
        return CrossMoments.of(given.T[:, :, None], y.T[:, :, None], centred=self.centred)

    def _target(self, x: Array) -> Array:
        """What the original's layer gives, [patch, output that is left]."""
        bias = np.broadcast_to(self.old.bias.reshape(-1), self.old.outputs.size).astype(np.float32)
        y: Array = (_outputs(x @ _matrix(self.old).astype(np.float32)) + bias)[:, self.outputs]
        return y

    def _lost(self, was: Feed, now: Feed, at: Indices) -> Array:
        """What the other operand of the sum lacks in the cut model, in terms of the layer's output."""
        assert self.total is not None
        axis, scale = self.new.outputs.axis or 0, self.total.scale
        before, after = (_rows(values[self.total.other.name or ""], axis, at) for values in (was, now))
        usable = np.abs(scale) > _SMALLEST * np.abs(scale).max()
        factor = np.where(usable, 1 / np.where(usable, scale, 1.0), 0.0)
        lost: Array = (before[:, self.outputs] - after) * factor.astype(np.float32)
        return lost


def _outputs(product: Array) -> Array:
    """[groups, patch, output of the group] as [patch, output]."""
    return product.swapaxes(0, 1).reshape(product.shape[1], -1)


def _rows(array: Array, axis: int, at: Indices) -> Array:
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])[at]


def _source(layer: Linear, values: Feed) -> tuple[Reader, Array]:
    """How the layer reads its input, and the input."""
    weight, source = constant_of(layer.node.inputs[1]), layer.node.inputs[0]
    assert weight is not None  # `layer_ending_at` has seen to it
    assert source is not None
    return Reader.of(layer.node, weight), values[source.name or ""]


def _matrix(layer: Linear) -> Floats:
    """The weight as [groups, length of a patch, outputs]."""
    groups, outputs, inputs, taps = layer.weight.shape
    return layer.weight.transpose(0, 3, 2, 1).reshape(groups, taps * inputs, outputs)


def _write(layer: Linear, fitted: Floats, intercept: Floats, pairs: _Pairs) -> None:
    """Put a fit into the graph."""
    groups, outputs, inputs, taps = layer.weight.shape
    if pairs.whole:
        weight = fitted.reshape(groups, taps, inputs, outputs).transpose(0, 3, 2, 1)
    else:
        weight = layer.weight * fitted.reshape(groups, outputs, 1, 1)
    bias = np.zeros(1)
    if pairs.centred:
        bias = intercept.reshape(-1)
    norm = _norm_behind(layer)
    if norm is not None:
        mean = constant_of(norm.inputs[3])
        assert mean is not None
        set_constant(norm, 3, (mean - bias).astype(mean.dtype), "mean")
        bias = np.zeros(1)
    replace(layer, weight=weight, bias=bias).write()


def _norm_behind(layer: Linear) -> ir.Node | None:
    """The BatchNormalization that can take the intercept of a layer without a bias."""
    node = only_user(layer.tail.outputs[0])
    if layer.bias.any() or node is None or node.op_type != "BatchNormalization":
        return None
    return node if constant_of(node.inputs[3]) is not None else None


def _jobs(original: ir.Model, cut: ir.Model, names: set[str]) -> list[_Job]:
    """The layers that read something else than they did, as values of these names are, from front to back."""
    changed = _changed(cut.graph, names)
    before = layers_of(original.graph)
    return [
        _Job(before[name][1], tail)
        for name, (node, tail) in layers_of(cut.graph).items()
        if name in before and node.inputs[0] in changed
    ]


def _changed(graph: ir.Graph, names: set[str]) -> set[ir.Value | None]:
    """The values of these names and all that is computed from them."""
    changed: set[ir.Value | None] = {v for v in graph.inputs if v.name in names}
    for node in graph:
        inner = (n for body in bodies_of(node) for n in body.all_nodes())
        read = {v for n in (node, *inner) for v in n.inputs if v is not None}
        changed |= {v for v in node.outputs if v.name in names or not changed.isdisjoint(read)}
    return changed
