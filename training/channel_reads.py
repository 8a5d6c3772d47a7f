"""Where channels end: the reads through which a channel acts on other channels and on the outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.passes.branches import Branch, branches_of
from edgewise.passes.channel_links import Indices, Slot
from edgewise.passes.channels import ChannelGraph, ChannelGroup

Floats = npt.NDArray[np.float64]
ByGroup = dict[ChannelGroup, Floats]
"""A number a channel: float64 of shape [group.size]."""


@dataclass(frozen=True, eq=False)
class Read:
    """Input `position` of `node` is a value whose `axis` has the channels `labels` of `group`.

    Nothing that the node writes shares them: a layer multiplies them by its weights, a sum adds them up.
    What leaves with a channel, whoever makes it and however it is copied, scaled and rectified on its way,
    acts through such reads alone. So a channel is gone when all its reads give zeros, and its share in
    anything is the sum over its reads, with no part of it counted twice.
    """

    node: ir.Node
    position: int
    axis: int
    group: ChannelGroup
    labels: Indices

    @property
    def value(self) -> str:
        """The name of what is read."""
        value = self.node.inputs[self.position]
        return "" if value is None else value.name or ""

    def sums(self, numbers: Floats) -> Floats:
        """Numbers for the indices of the axis, [..., index], summed up for channels: [..., group.size]."""
        total = np.zeros((self.group.size, *numbers.shape[:-1]))
        np.add.at(total, self.labels, np.moveaxis(numbers, -1, 0))
        return np.moveaxis(total, 0, -1)


def channel_reads(graph: ChannelGraph) -> tuple[Read, ...]:
    """All of them, in the order of the nodes; those of groups that are blocked altogether are left out."""
    return tuple(read for node in graph.couplings for read in _reads_of(node, graph))


def _reads_of(node: ir.Node, graph: ChannelGraph) -> Iterator[Read]:
    outputs = set(node.outputs)
    coupling = graph.couplings[node]
    links = (*coupling.links, *(link for some in coupling.options for link in some))
    handed_on = {link.a for link in links if link.b.value in outputs}
    for position, value in enumerate(node.inputs):
        rank = 0 if value is None or value.shape is None else len(value.shape)
        slots = [Slot(value, axis) for axis in range(rank)] if value is not None else []
        for slot in slots:
            group = graph.home.get(slot)
            if group is not None and slot not in handed_on and not group.blocked.all():
                yield Read(node, position, slot.axis, group, group.members[slot])


def branch_reads(graph: ir.Graph) -> tuple[Read, ...]:
    """One for each branch, in order: all of it is one channel, of a group that knows nothing but the sum."""
    return tuple(read for branch in branches_of(graph) for read in _reads_of_branch(branch))


def _reads_of_branch(branch: Branch) -> Iterator[Read]:
    value = branch.total.outputs[0]
    sizes = () if value.shape is None else tuple(value.shape)
    for axis in reversed(range(1, len(sizes))):
        size = sizes[axis]
        if isinstance(size, int):
            labels = np.zeros(size, np.int64)
            group = ChannelGroup(1, {Slot(value, axis): labels}, ())
            yield Read(branch.total, branch.position, axis, group, labels)
            return


def nothing(graph: ChannelGraph) -> ByGroup:
    """Zero for every channel."""
    return {group: np.zeros(group.size) for group in graph.groups}
