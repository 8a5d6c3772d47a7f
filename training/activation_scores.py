"""Importance that is read from what layers see of a channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.calibration.collect import Progress
from edgewise.calibration.data import Samples
from edgewise.calibration.taps import open_taps, sizes_on, values_of
from edgewise.passes.channel_links import Array
from edgewise.passes.channels import ChannelGraph
from edgewise.runtime.errors import InputError
from edgewise.training.channel_reads import ByGroup, Floats, Read, channel_reads, nothing

Statistic = Callable[[Array], Array]

STATISTICS: Mapping[str, Statistic] = MappingProxyType(
    {"mean": np.abs, "energy": np.square, "zeros": lambda array: array != 0}
)
_ABSOLUTE = "zeros"  # shares are comparable as they are


def activation_scores(
    model: ir.Model,
    graph: ChannelGraph,
    samples: Samples,
    statistic: str,
    *,
    threads: int | None,
    memory: int,
    progress: Progress | None,
) -> ByGroup:
    """A mean over samples and positions of each value that is read, summed over the reads of a channel.

    Of `mean` it is that of absolute activations, of `energy` that of their squares (both Molchanov et al.,
    ICLR 2017), divided by the mean over the channels of the value: the typical channel counts one in every
    layer. Of `zeros` it is one less the share of zeros (APoZ, Hu et al., 2016), a share in any layer.
    Values are streamed, with at most `memory` bytes of them at once.
    """
    reads = channel_reads(graph)
    means = _means(model, reads, samples, STATISTICS[statistic], threads, memory, progress)
    scores = nothing(graph)
    for read in reads:
        if (found := means.get((read.value, read.axis))) is not None:
            typical = 1.0 if statistic == _ABSOLUTE else found.mean()
            scores[read.group] += read.sums(found / typical if typical > 0 else found)
    return scores


def _means(
    model: ir.Model,
    reads: tuple[Read, ...],
    samples: Samples,
    statistic: Statistic,
    threads: int | None,
    memory: int,
    progress: Progress | None,
) -> dict[tuple[str, int], Floats]:
    """The mean of each value that is read for every index of its axis, samples weighing alike."""
    axes: dict[str, set[int]] = {}
    for read in reads:
        axes.setdefault(read.value, set()).add(read.axis)
    stream = iter(samples)
    first = next(stream, None)
    if first is None:
        raise InputError("there are no samples to score channels on: give more")
    names = [name for name in axes if name not in first]
    taps = open_taps(model, sizes_on(model, names, first), memory, threads)
    totals: dict[tuple[str, int], Floats] = {}
    for done, feed in enumerate(chain([first], stream), start=1):
        for name, array in values_of(taps, feed):
            if array.dtype.kind != "f":
                continue
            numbers = statistic(array.astype(np.float32))  # squares leave the range of float16
            for axis in axes[name]:
                others = tuple(i for i in range(numbers.ndim) if i != axis)
                mean = numbers.mean(others, dtype=np.float64)
                totals[name, axis] = totals.get((name, axis), 0.0) + mean
        if progress is not None:
            progress(done)
    return {key: total / len(samples) for key, total in totals.items()}
