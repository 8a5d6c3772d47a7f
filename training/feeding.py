"""How samples reach a module: stacked, and as many in a run as there is memory for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from edgewise.calibration.data import Samples
from edgewise.passes.graph import Array
from edgewise.runtime.errors import InputError
from edgewise.training.batches import Batch, Stack, are_images
from edgewise.training.graph_module import GraphModule, as_tensors
from edgewise.training.options import TrainOptions

Run = Callable[[Batch], Mapping[str, Array]]

_STORED = 8  # this part of the memory is for each of samples, samples held back, and the answers to both
_RUNNING = 2  # and this part for what a run forward and back keeps
_GRADIENTS = 4  # so many of the largest value a run back has at once: gradients, and copies laid out anew


def runner(module: GraphModule) -> Run:
    """The outputs of a module in inference, as arrays."""

    def run(batch: Batch) -> Mapping[str, Array]:
        module.eval()
        with torch.no_grad():
            return {name: tensor.numpy() for name, tensor in module(as_tensors(batch.feed)).items()}

    return run


def stacks(
    samples: Samples,
    held_back: Samples,
    options: TrainOptions,
    module: GraphModule,
    teachers: Sequence[Run] = (),
) -> tuple[Stack, Stack]:
    """Both stacked. So many run together as half of `options.memory` holds, at least one.

    One sample runs alone where `module` or one of `teachers` takes no more at once, as it is where a
    batch's size is written into a graph.
    """
    learned, judged = (Stack.of(some, stored(options)) for some in (samples, held_back))
    two, at_once = Stack.of(samples.take(range(min(2, len(samples)))), options.memory), 1
    if all(_takes_more(run, two) for run in (runner(module), *teachers)):
        needed = max(_needed(module, teachers, stack.largest()) for stack in (learned, judged))
        at_once = max(1, options.memory // _RUNNING // max(needed, 1))
    return replace(learned, at_once=at_once), replace(judged, at_once=at_once)


def stored(options: TrainOptions) -> int:
    """Bytes for all samples of one kind, or for the answers to them."""
    return options.memory // _STORED


def _takes_more(run: Run, two: Stack) -> bool:
    """Whether two samples at once give what each gives by itself."""
    if any(array.ndim < 2 for bucket in two.buckets for array in bucket.values()):
        return False
    try:
        together = [run(batch) for batch in two.in_order(2)]
    except (InputError, RuntimeError, IndexError, ValueError):
        return False
    apart = [run(batch) for batch in two.in_order(1)]
    if len(together) == len(apart):  # the two are of different shapes
        return True
    return all(
        array.shape[:1] == (sum(len(part[name]) for part in apart),)
        and np.allclose(array, np.concatenate([part[name] for part in apart]), 1e-2, 1e-3)
        for name, array in together[0].items()
    )


def _needed(module: GraphModule, teachers: Sequence[Run], sample: Batch) -> int:
    """Bytes to learn from a sample: what the run forward keeps, what the run back adds, the answers."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    module.eval()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = module(as_tensors(sample.feed))
    for own in (*module.parameters(), *module.buffers()):
        kept.pop(own.untyped_storage().data_ptr(), None)
    del outputs  # it held what was kept in its place
    answers = sum(array.nbytes for run in teachers for array in run(sample).values())
    return sum(kept.values()) + _GRADIENTS * max(kept.values(), default=0) + answers


def can_vary(stack: Stack, options: TrainOptions) -> bool:
    """Whether the samples are images, to be varied; not where labels tell of places, which would move too."""
    if options.augment != "auto" or (stack.labels is not None and stack.labels[0, 0].size != 1):
        return False
    return all(are_images({name: array[0] for name, array in b.items()}) for b in stack.buckets)
