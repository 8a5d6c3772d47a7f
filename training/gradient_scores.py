"""Importance by gradients: what removing a channel is estimated to change of the outputs or of the loss.

A channel is removed by multiplying all its reads (see `Read`) by a gate that goes from one to zero. With
activations a, and gradients g of the objective by them, the derivative by the gate on one sample is the sum
of a * g over all reads and positions, which is also the sum of w * g over the weights that read the channel.
All scores here are made of these products. They have the unit of the objective, not of any layer, so they
are comparable across layers by nature.

With labels the objective is the cross entropy. Without, it is the distance to the original's own outputs,
which has no gradient at the original: there the second derivative counts, whose Gauss-Newton form is the
expected square of the gradient of a random projection of the outputs (Hutchinson, 1990), and behind a
Softmax the Fisher information (Martens, JMLR 2020). See `projection`; signs are drawn from the seed, anew
for every sample and element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgewise.calibration.collect import Progress
from edgewise.calibration.data import Samples
from edgewise.calibration.taps import sizes_on
from edgewise.passes.channel_links import Array
from edgewise.passes.channels import ChannelGraph, ChannelGroup
from edgewise.passes.graph import new_node
from edgewise.passes.infer_shapes import shapes_on
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Feed
from edgewise.training.channel_reads import (
    ByGroup,
    Floats,
    Read,
    branch_reads,
    channel_reads,
    nothing,
)
from edgewise.training.graph_module import GraphModule, as_tensors, lay_out
from edgewise.training.objectives import Head, cross_entropy, has_classes, heads, projection
from edgewise.training.torch_threads import torch_threads

_MOST_AT_ONCE = 32
_COPIES = 3  # of every value: itself, what autograd keeps, its gradient


@dataclass(frozen=True)
class Statistic:
    """A number a channel: `of_mean` of the mean over samples of what `of_row` makes of each.

    It is given the sums of a channel's products a * g and the sums of their squares, both [row, channel].
    """

    of_row: Callable[[Floats, Floats], Floats]
    of_mean: Callable[[Floats], Floats]


STATISTICS: Mapping[str, Statistic] = MappingProxyType(
    {
        "gradient": Statistic(lambda sums, squares: squares, lambda mean: mean),
        "taylor": Statistic(lambda sums, squares: np.abs(sums), np.square),
        "fisher": Statistic(lambda sums, squares: np.square(sums), lambda mean: mean / 2),
    }
)


def gradient_scores(
    model: ir.Model,
    graph: ChannelGraph,
    samples: Samples,
    statistic: str,
    *,
    seed: int,
    threads: int | None,
    memory: int,
    progress: Progress | None,
) -> ByGroup:
    """A statistic of the products a * g of a channel, a mean over samples; and of all of a branch.

    Of `gradient` it is the sum of their squares: every single activation has a gate of its own, and what
    counts is the sum of the squared gradients by all of them. Of `taylor` it is the absolute sum, the first
    order of the change, whose mean is squared (Molchanov et al., CVPR 2019): changes of random signs add up
    by their squares, and only what adds up can be held against a cost. Of `fisher` it is half the squared
    sum, the second order (Theis et al., 2018; for coupled channels Liu et al., ICML 2021).

    As many samples go at once as fit in `memory` bytes by the shapes of all values, where rows are
    independent; else one. Raises `InputError` without samples and on an operator that torch lacks here, and
    `EdgewiseError` on gradients that are not finite.
    """
    if not len(samples):
        raise InputError("there are no samples to score channels on: give more")
    probe = _Probe.of(model, graph)
    generator = torch.Generator().manual_seed(seed)
    supervised = has_classes(samples, probe.heads)
    chosen, totals, done = STATISTICS[statistic], nothing(graph), 0
    with torch_threads(threads):
        for feed, labels, count in _batches(samples, _at_once(model, probe, samples[0], memory)):
            products = probe.products(feed, labels if supervised else None, generator, by_row=count > 1)
            for group, (sums, squares) in products.items():
                totals[group] = totals.get(group, 0.0) + chosen.of_row(sums, squares).sum(0)
            done += count
            if progress is not None:
                progress(done)
    if not all(np.isfinite(total).all() for total in totals.values()):
        raise EdgewiseError("gradients are not finite: the model overflows on these samples")
    return {group: chosen.of_mean(total / done) for group, total in totals.items()}


@dataclass(frozen=True, eq=False)
class _Probe:
    """The model with every read as a value of its own, by name, ending in the scores of a Softmax."""

    module: GraphModule
    reads: Mapping[str, tuple[Read, ...]]
    heads: tuple[Head, ...]

    @classmethod
    def of(cls, model: ir.Model, graph: ChannelGraph) -> _Probe:
        part, ends = model.clone(), heads(model)
        copies = dict(zip(model.graph, part.graph, strict=True))
        reads: dict[str, tuple[Read, ...]] = {}
        names: dict[tuple[ir.Node, int], str] = {}
        for read in (*channel_reads(graph), *branch_reads(graph.graph)):
            edge = read.node, read.position
            if edge not in names:
                node = copies[read.node]
                value = node.inputs[read.position]
                copy = new_node(node, "Identity", [value], hint=f"{read.value}.read")
                copy.shape = None if value is None else value.shape
                node.replace_input_with(read.position, copy)
                names[edge] = copy.name or ""
            reads[names[edge]] = (*reads.get(names[edge], ()), read)
        produced = {v.name: v for node in part.graph for v in node.outputs}
        outputs = {v.name: v for v in part.graph.outputs}
        part.graph.outputs[:] = [produced.get(h.name) or outputs[h.name] for h in ends]
        module = GraphModule(part)
        lay_out(module)
        module.eval()
        module.requires_grad_(False)
        return cls(module, reads, ends)

    def products(
        self, feed: Feed, labels: Array | None, generator: torch.Generator, *, by_row: bool
    ) -> dict[ChannelGroup, tuple[Floats, Floats]]:
        """For every group the sums of a * g and those of its squares over positions, [row, channel].

        There is a row for each of the feed's with `by_row`, else one for all of them.
        """
        with self._watching() as seen:
            outputs = self.module(as_tensors(feed))
        if labels is None:
            objective = projection(outputs, self.heads, generator)
        else:
            objective = cross_entropy(outputs, self.heads[0], torch.tensor(labels, dtype=torch.int64))
        if not objective.requires_grad:
            raise EdgewiseError(
                "no output depends on the channels smoothly: choose a score without gradients"
            )
        gradients = torch.autograd.grad(objective, list(seen.values()), allow_unused=True)
        found: dict[ChannelGroup, tuple[Floats, Floats]] = {}
        for (name, value), gradient in zip(seen.items(), gradients, strict=True):
            if gradient is not None:
                for read in self.reads[name]:
                    sums, squares = _products(read, value.detach() * gradient, by_row)
                    before = found.get(read.group, (0.0, 0.0))
                    found[read.group] = before[0] + sums, before[1] + squares
        return found

    @contextmanager
    def _watching(self) -> Iterator[dict[str, Tensor]]:
        """Collects the reads of the next forward run, each a tensor with a gradient of its own."""
        seen: dict[str, Tensor] = {}

        def watch(name: str, value: Tensor) -> Tensor | None:
            if not value.is_floating_point():
                return None
            seen[name] = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
            return seen[name]

        with ExitStack() as stack:
            for name in self.reads:
                stack.enter_context(self.module.register_value_hook(name, partial(watch, name)))
            yield seen


def _products(read: Read, product: Tensor, by_row: bool) -> tuple[Floats, Floats]:
    """The sums of `product` and of its squares for each channel, [row, channel]."""
    kept = {0, read.axis} if by_row else {read.axis}
    others = [i for i in range(product.ndim) if i not in kept]

    def summed(numbers: Tensor) -> Floats:
        total = numbers.double().sum(others) if others else numbers.double()
        return read.sums(total.reshape(-1, total.shape[-1]).numpy())

    return summed(product), summed(product.square())


def _at_once(model: ir.Model, probe: _Probe, feed: Feed, memory: int) -> int:
    """How many samples may be joined: one where a value that is read does not keep their rows apart."""
    one = {name: array.shape for name, array in feed.items()}
    two = {name: (2, *shape[1:]) for name, shape in one.items() if shape}
    single, double = shapes_on(model, one), shapes_on(model, two)
    read = {(read.value, read.axis) for reads in probe.reads.values() for read in reads}
    apart = all(
        axis > 0 and name in single and single[name][0] == 1 and double.get(name) == (2, *single[name][1:])
        for name, axis in read
    )
    if not apart:
        return 1
    needed = _COPIES * sum(sizes_on(model, [name for name in single if name not in feed], feed).values())
    return max(1, min(_MOST_AT_ONCE, memory // max(needed, 1)))


def _batches(samples: Samples, size: int) -> Iterator[tuple[Feed, Array | None, int]]:
    """Feeds of up to `size` samples with their labels and their number."""
    fixed = any(spec.shape and isinstance(spec.shape[0], int) for spec in samples.specs)
    rows_of_one = len(next(iter(samples[0].values()))) if fixed else 1
    start = 0
    for feed in samples.batches(size):
        rows = len(next(iter(feed.values())))
        labels = None if samples.labels is None else samples.labels[start : start + rows]
        start += rows
        yield feed, labels, rows // rows_of_one
