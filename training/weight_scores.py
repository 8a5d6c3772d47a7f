"""Importance that is read from the weights alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import onnx_ir as ir

from edgewise.passes.channel_links import Array, Indices, Use
from edgewise.passes.channels import ChannelGraph, ChannelGroup
from edgewise.passes.graph import attribute, constant_of
from edgewise.runtime.errors import InputError
from edgewise.training.channel_reads import ByGroup, nothing

_NORMS = ("BatchNormalization", "InstanceNormalization")
_STATISTICS = (3, 4)  # inputs of a BatchNormalization that nobody chose


def random_scores(graph: ChannelGraph, seed: int) -> ByGroup:
    """Uniform on [0, 1): what every other score has to beat."""
    rng = np.random.default_rng(seed)
    return {group: rng.random(group.size) for group in graph.groups}


def magnitude_scores(graph: ChannelGraph, order: Literal[1, 2]) -> ByGroup:
    """The L1 or L2 norms of the slices that leave with a channel, summed (Li et al., ICLR 2017).

    Slices are rows of the layers that make the channel, columns of those that read it, depthwise filters,
    biases, scales and shifts; statistics are no weights. The norms of each constant are divided by their
    mean over its slices, for the scale of a layer says nothing where a norm follows. So the typical slice
    counts one everywhere, and a channel as much as it stands out in its layers.
    """
    scores = nothing(graph)
    for group, labels, slices in _weights(graph):
        norms = np.linalg.norm(slices.astype(np.float64), order, axis=1)
        share = norms / mean if (mean := norms.mean()) > 0 else norms
        scores[group] += np.bincount(labels, share, group.size)
    return scores


def scale_scores(graph: ChannelGraph) -> ByGroup:
    """The absolute scales of batch and instance norms, summed (network slimming, Liu et al., ICCV 2017).

    A normalized channel has the scale for its standard deviation, whatever the weights before it, so the
    numbers of all layers can be compared as they are. Of channels that no norm scales nothing is known:
    infinity. Raises `InputError` where that is all of them.
    """
    scores, scaled = nothing(graph), nothing(graph)
    for slot, group in graph.home.items():
        if slot.use is not None and slot.use.node.op_type in _NORMS and slot.use.position == 1:
            labels = group.members[slot]
            scores[group] += np.bincount(labels, np.abs(_constant(slot.value)), group.size)
            scaled[group][labels] = 1
    if not any(mask.any() for mask in scaled.values()):
        raise InputError(
            "bn-scale needs batch norms, and no channel that can leave has one: choose another score"
        )
    return {group: np.where(scaled[group] > 0, score, np.inf) for group, score in scores.items()}


def _weights(graph: ChannelGraph) -> Iterator[tuple[ChannelGroup, Indices, Array]]:
    """Constants along every axis that shrinks: the channels of its slices, the slices [index, element]."""
    for slot, group in graph.home.items():
        if slot.use is not None and not _is_statistic(slot.use):
            array = np.moveaxis(_constant(slot.value), slot.axis, 0)
            if array.dtype.kind == "f":
                yield group, group.members[slot], array.reshape(len(array), -1)
    for node, coupling in graph.couplings.items():
        if coupling.quota is not None:
            for slot, slices in zip(
                (coupling.quota.outputs, coupling.quota.inputs), _grouped(node), strict=True
            ):
                if slot in graph.home:
                    yield graph.home[slot], graph.home[slot].members[slot], slices


def _is_statistic(use: Use) -> bool:
    return use.node.op_type == "BatchNormalization" and use.position in _STATISTICS


def _grouped(conv: ir.Node) -> tuple[Array, Array]:
    """The slices of a grouped convolution's weight, by output and by input."""
    weight, groups = _constant(conv.inputs[1]), int(attribute(conv, "group", 1))
    blocks = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    columns = blocks.swapaxes(1, 2).reshape(groups * weight.shape[1], -1)
    return weight.reshape(len(weight), -1), columns


def _constant(value: ir.Value | None) -> Array:
    array = constant_of(value)
    assert array is not None  # its slot has a use
    return array
