"""A student learns what its teacher answers; labels are welcome and not needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from edgewise.calibration.data import Samples
from edgewise.calibration.taps import tapped
from edgewise.passes.channel_links import Indices
from edgewise.passes.graph import Array
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator
from edgewise.training.batches import Batch
from edgewise.training.cut_points import cut_points
from edgewise.training.feeding import can_vary, runner, stacks, stored
from edgewise.training.graph_module import GraphModule, as_tensors
from edgewise.training.objectives import Head, heads
from edgewise.training.options import History, Trained, TrainOptions, ending_in
from edgewise.training.torch_threads import torch_threads
from edgewise.training.trainer import Answer, Progress, Regularizer, judged_on, train

Staying = Mapping[tuple[str, int], Indices]
Values = Mapping[str, Tensor]

EVERYTHING: Staying = MappingProxyType({})
_DEFAULT = TrainOptions()
_TINY = 1e-12
_RESHAPING = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_BOUNDING = ("Sigmoid", "Tanh")
_BLOCKWISE, _END_TO_END = "block by block", "end to end"


@dataclass(frozen=True)
class Compared:
    """A value of the teacher and that of the student to be held against it.

    Scores of classes have their axis; `is_whole` says that more than their order and distances matters, as
    it does where no Softmax reads them. `staying` are the indices of axes that the student has kept.
    """

    teacher: str
    student: str
    axis: int | None = None
    is_whole: bool = True
    staying: tuple[tuple[int, Indices], ...] = ()


def distill(
    teacher: ir.Model,
    student: ir.Model,
    samples: Samples,
    held_back: Samples,
    options: TrainOptions = _DEFAULT,
    *,
    pairs: Mapping[str, str] | None = None,
    staying: Staying = EVERYTHING,
    checkpoint: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train `student` to give the outputs of `teacher`, which has the same inputs and outputs.

    Scores are compared as distributions softened by the temperature (Hinton et al., 2015), before a Softmax
    that ends the model; other floats by their distance relative to their energy. With weight `options.inner`
    so are inner values (FitNets, Romero et al., ICLR 2015): those at `pairs`, name in the teacher -> name in
    the student, by default the ends of blocks that have one name in both. `staying` names what a narrower
    student has left of a teacher's value (see `remove_channels.survivors`). Images are varied, and the
    teacher is asked on the same variation (Beyer et al., CVPR 2022); without that it is asked once. Labels
    of `samples` count with weight `options.labels`.

    Raises `InputError` where the two do not fit together, and what `train` raises.
    """
    _expect_same_signature(teacher, student)
    outputs = _outputs(teacher, student)
    inner = _inner(teacher, student, pairs, staying) if options.inner or options.blockwise else ()
    oracle = Oracle(teacher, [c.teacher for c in (*outputs, *inner)], threads)
    module = GraphModule(student)
    with torch_threads(threads):
        stack, judged = stacks(samples, held_back, options, module, (oracle,))
        if not options.labels:
            stack, judged = replace(stack, labels=None), replace(judged, labels=None)
        varies = can_vary(stack, options)
        judged = judged.with_targets(oracle, options.batch, stored(options))
        if not varies:
            stack = stack.with_targets(oracle, options.batch, stored(options))
    imitation = Imitation(module, oracle, outputs, inner, options)

    def phase(objective: Imitation, chosen: TrainOptions, name: str, file: Path | None) -> Trained:
        return train(
            student, module, objective, stack, judged, chosen,
            varies=varies, flips=varies and stack.labels is None,
            phase=name, checkpoint=file, threads=threads, progress=progress,
        )  # fmt: skip

    if not (options.blockwise and inner):
        return phase(imitation, options, _END_TO_END, checkpoint)
    before, start = judged_on(module, imitation, judged, options.batch), module.state_dict()
    start = {name: tensor.clone() for name, tensor in start.items()}
    file = None if checkpoint is None else checkpoint.with_name(checkpoint.name + ".blocks")
    first = phase(imitation.by_blocks(), options.shortened(options.blockwise), _BLOCKWISE, file)
    if not judged_on(module, imitation, judged, options.batch)[0] < before[0]:
        module.load_state_dict(start)

    def whole(second: Trained) -> Trained:
        epochs = (*first.history.epochs, *second.history.epochs)
        return Trained(second.model, History(epochs, second.history.ended))

    with ending_in(whole):
        second = phase(imitation, options.shortened(1 - options.blockwise), _END_TO_END, checkpoint)
    return whole(second)


def finetune(
    model: ir.Model,
    samples: Samples,
    held_back: Samples,
    options: TrainOptions = _DEFAULT,
    *,
    module: GraphModule | None = None,
    regularizer: Regularizer | None = None,
    checkpoint: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train `model` on labels: classes for scores, else what its first output should be.

    Images of classes are moved and mixed but not mirrored, for a mirrored 2 is none; those of other labels
    stay as they are. A `regularizer` (see `penalties.Shrinking`) belongs to the weights of a `module` of
    this model. Raises `InputError` where labels are missing or do not fit, and what `train` raises.
    """
    module = module or GraphModule(model)
    head = heads(model)[0]
    for some in (samples, held_back):
        if some.labels is None:
            raise InputError(f"{some.source} has no labels to train on: add them, or train with a teacher")
    with torch_threads(threads):
        stack, judged = stacks(samples, held_back, options, module)
    is_class = _are_classes(stack.labels)
    return train(
        model, module, Lesson(module, head, is_class), stack, judged, options,
        varies=is_class and can_vary(stack, options), regularizer=regularizer,
        checkpoint=checkpoint, threads=threads, progress=progress,
    )  # fmt: skip


def _expect_same_signature(teacher: ir.Model, student: ir.Model) -> None:
    """Names of what goes in and comes out."""
    for kind in ("inputs", "outputs"):
        one, other = (
            [v.name for v in getattr(m.graph, kind) if v.name not in m.graph.initializers]
            for m in (teacher, student)
        )
        if sorted(map(str, one)) != sorted(map(str, other)):
            raise InputError(f"teacher and student differ in their {kind}: {one} and {other}")


def _outputs(teacher: ir.Model, student: ir.Model) -> tuple[Compared, ...]:
    """The float outputs of both, or what a Softmax makes them of."""
    own = dict(zip((v.name for v in student.graph.outputs), heads(student), strict=True))
    found = []
    for value, head in zip(teacher.graph.outputs, heads(teacher), strict=True):
        other = own[value.name]
        name = value.name or ""
        if value.dtype is not None and not value.dtype.is_floating_point():
            continue
        if head.axis is not None and head.axis == other.axis:
            found.append(Compared(head.name, other.name, head.axis, is_whole=False))
        else:
            found.append(Compared(name, name, 1 if _is_row_of_scores(value) else None))
    if not found:
        raise InputError("the model has no output of floats to learn from a teacher: train on labels")
    return tuple(found)


def _is_row_of_scores(value: ir.Value) -> bool:
    """Whether an output is one number a class: [rows, classes], or that with axes of one behind.

    What ends in a Tanh or Sigmoid is taken for a picture, or for answers of which several may be true.
    """
    node = value.producer()
    while node is not None and node.op_type in _RESHAPING and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is not None and node.op_type in _BOUNDING:
        return False
    if value.shape is None or value.shape.rank() < 2 or not isinstance(value.shape[1], int):
        return False
    return value.shape[1] > 1 and all(d == 1 for d in value.shape[2:])


def _inner(
    teacher: ir.Model, student: ir.Model, pairs: Mapping[str, str] | None, staying: Staying
) -> tuple[Compared, ...]:
    """The pairs given, or ends of blocks that are in both; those of other shapes are an error, or out."""
    given = {name: name for name in cut_points(student)} if pairs is None else pairs
    there, here = ({v.name: v for n in m.graph for v in n.outputs} for m in (teacher, student))
    found = []
    for name, other in given.items():
        kept = tuple((axis, indices) for (value, axis), indices in staying.items() if value == name)
        if name in there and other in here and _fits(there[name], here[other], kept):
            found.append(Compared(name, other, staying=kept))
        elif pairs is not None:
            raise InputError(
                f"value {name!r} of the teacher and {other!r} of the student are of different shapes"
            )
    return tuple(found)


def _fits(teacher: ir.Value, student: ir.Value, staying: Sequence[tuple[int, Indices]]) -> bool:
    """Whether they have one shape behind the batch's axis, once the teacher's has lost what it lost."""
    if teacher.shape is None or student.shape is None or teacher.shape.rank() != student.shape.rank():
        return False
    dims = list(teacher.shape)
    for axis, indices in staying:
        dims[axis] = len(indices)
    return dims[1:] == list(student.shape)[1:]


class Oracle:
    """The teacher: gives these values for a batch."""

    def __init__(self, model: ir.Model, names: Sequence[str], threads: int | None = None) -> None:
        self._names = tuple(dict.fromkeys(names))
        part = tapped(model, self._names)
        free = all(
            v.shape is not None and v.shape.rank() and not isinstance(v.shape[0], int)
            for v in part.graph.inputs
        )
        self._inputs = {v.name for v in part.graph.inputs}
        self._evaluator = Evaluator(part, outputs=self._names, threads=threads) if free else None
        self._module = None if free else GraphModule(part).eval()

    def __call__(self, batch: Batch) -> Mapping[str, Array]:
        feed = {name: array for name, array in batch.feed.items() if name in self._inputs}
        if self._evaluator is not None:
            return self._evaluator.run(feed)
        assert self._module is not None
        return runner(self._module)(replace(batch, feed=feed))


class Imitation:
    """How far the student is from the teacher. By blocks, each block is fed what the teacher's is."""

    def __init__(
        self,
        module: GraphModule,
        oracle: Callable[[Batch], Mapping[str, Array]],
        outputs: Sequence[Compared],
        inner: Sequence[Compared],
        options: TrainOptions,
        *,
        blockwise: bool = False,
    ) -> None:
        self._module, self._oracle, self._options = module, oracle, options
        self._outputs, self._inner, self._blockwise = outputs, inner, blockwise

    def by_blocks(self) -> Imitation:
        """The same for each block by itself."""
        return Imitation(
            self._module, self._oracle, self._outputs, self._inner, self._options, blockwise=True
        )

    def __call__(self, batch: Batch) -> Answer:
        targets = as_tensors(self._oracle(batch) if batch.targets is None else batch.targets)
        wanted = {c.student: _kept(targets[c.teacher], c) for c in (*self._outputs, *self._inner)}
        seen = self._values(batch, wanted)
        losses = [self._far(seen[c.student], wanted[c.student], c) for c in self._outputs]
        loss = torch.stack(losses).mean()
        if batch.labels is not None and self._options.labels and _are_classes(batch.labels):
            first = self._outputs[0]
            known = cross_entropy(seen[first.student], first.axis or 1, batch)
            loss = (1 - self._options.labels) * loss + self._options.labels * known
        if self._inner:
            shares = [relative(seen[c.student], wanted[c.student]) for c in self._inner]
            loss = loss + (1.0 if self._blockwise else self._options.inner) * torch.stack(shares).mean()
        return Answer(loss, self._score(seen, wanted, batch))

    def _values(self, batch: Batch, wanted: Values) -> dict[str, Tensor]:
        """What the student gives at the names of `wanted`."""
        inner = {c.student for c in self._inner}
        seen: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[[Tensor], Tensor | None]:
            def see(value: Tensor) -> Tensor | None:
                seen[name] = value
                return wanted[name] if self._blockwise and name in inner else None

            return see

        handles = [self._module.register_value_hook(name, hook(name)) for name in wanted]
        try:
            self._module(as_tensors(batch.feed))
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _far(self, seen: Tensor, wanted: Tensor, compared: Compared) -> Tensor:
        if compared.axis is None:
            return relative(seen, wanted)
        softened = divergence(seen, wanted, compared.axis, self._options.temperature)
        return softened + relative(seen, wanted) if compared.is_whole else softened

    def _score(self, seen: Values, wanted: Values, batch: Batch) -> float:
        first = self._outputs[0]
        if first.axis is None:
            return 1.0 - float(relative(seen[first.student], wanted[first.student], robust=False))
        if batch.labels is not None and _are_classes(batch.labels):
            return hits(seen[first.student], first.axis, torch.from_numpy(batch.labels))
        return hits(seen[first.student], first.axis, wanted[first.student].argmax(first.axis))


class Lesson:
    """How far an output is from the labels: classes by cross-entropy, others by relative distance."""

    def __init__(self, module: GraphModule, head: Head, is_class: bool) -> None:
        self._module, self._head, self._is_class = module, head, is_class

    def __call__(self, batch: Batch) -> Answer:
        assert batch.labels is not None
        seen: list[Tensor] = []
        handle = self._module.register_value_hook(self._head.name, seen.append)
        try:
            self._module(as_tensors(batch.feed))
        finally:
            handle.remove()
        if not self._is_class:
            truth = torch.from_numpy(batch.labels).to(seen[0].dtype)
            if truth.numel() != seen[0].numel():
                raise InputError(
                    f"labels of shape {tuple(truth.shape)} fit no output of {tuple(seen[0].shape)}"
                )
            truth = truth.reshape(seen[0].shape)
            return Answer(relative(seen[0], truth), 1.0 - float(relative(seen[0], truth, robust=False)))
        axis = 1 if self._head.axis is None else self._head.axis
        loss = cross_entropy(seen[0], axis, batch)
        return Answer(loss, hits(seen[0], axis, torch.from_numpy(batch.labels)))


def _kept(value: Tensor, compared: Compared) -> Tensor:
    for axis, indices in compared.staying:
        value = value.index_select(axis, torch.from_numpy(indices))
    return value


def _are_classes(labels: Array | None) -> bool:
    return labels is not None and labels.dtype.kind in "iu"


def divergence(student: Tensor, teacher: Tensor, axis: int, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened scores, a mean over rows, times the temperature squared."""
    log_p = functional.log_softmax(teacher / temperature, axis)
    log_q = functional.log_softmax(student / temperature, axis)
    return (log_p.exp() * (log_p - log_q)).sum(axis).mean() * temperature**2


def relative(student: Tensor, teacher: Tensor, *, robust: bool = True) -> Tensor:
    """Distance over energy; where `robust` outliers count by distance, not its square (Huber)."""
    energy = teacher.square().mean() + _TINY
    if not robust:
        return (student - teacher).detach().square().mean() / energy
    scale = energy.sqrt()
    return 2 * functional.huber_loss(student / scale, teacher / scale)


def cross_entropy(scores: Tensor, axis: int, batch: Batch) -> Tensor:
    """Of the labels of a batch, also where its rows are mixtures."""
    rows = scores.movedim(axis, -1).flatten(0, -2)
    if batch.labels is None or batch.labels.size != len(rows):
        raise InputError(
            f"{0 if batch.labels is None else batch.labels.size} labels for {len(rows)} rows of scores: give "
            "one a row, or none"
        )
    if batch.labels.min() < 0 or batch.labels.max() >= rows.shape[1]:
        raise InputError(
            f"labels from {batch.labels.min()} to {batch.labels.max()} for {rows.shape[1]} classes"
        )
    losses = functional.cross_entropy(rows, _classes(batch.labels), reduction="none")
    if batch.others is not None and batch.share is not None:
        share = torch.from_numpy(batch.share).repeat_interleave(len(rows) // len(batch.share))
        other = functional.cross_entropy(rows, _classes(batch.others), reduction="none")
        losses = share * losses + (1 - share) * other
    return losses.mean()


def _classes(labels: Array) -> Tensor:
    return torch.from_numpy(labels.reshape(-1).astype(np.int64))


def hits(scores: Tensor, axis: int, truth: Tensor) -> float:
    """The share of rows whose largest score stands at `truth`."""
    found = scores.detach().argmax(axis)
    return float((found.reshape(-1) == truth.reshape(-1)).float().mean())


__all__ = ["Compared", "Imitation", "Lesson", "Oracle", "distill", "finetune"]
