"""How much a network needs each of its channels: one table of scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.calibration.collect import MEMORY, Progress
from edgewise.calibration.data import Samples
from edgewise.passes.channels import ChannelGraph, ChannelGroup
from edgewise.passes.graph import opset
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.training.activation_scores import activation_scores
from edgewise.training.channel_reads import ByGroup
from edgewise.training.reconstruction import reconstruction_scores
from edgewise.training.weight_scores import magnitude_scores, random_scores, scale_scores

Scores = Mapping[str, npt.NDArray[np.float64]]
"""A number a channel, [group.size], by the name of its `ChannelGroup`. The higher, the more it is needed.
Gradients also tell how much a `Branch` is needed, [1], by its name."""


@dataclass(frozen=True, eq=False)
class Job:
    """A model whose channels are scored, and all that a method may ask for."""

    model: ir.Model
    graph: ChannelGraph
    given: Samples | None
    seed: int
    threads: int | None
    memory: int
    progress: Progress | None

    @property
    def samples(self) -> Samples:
        """The samples. Raises `InputError` where there are none."""
        if self.given is None or not len(self.given):
            raise InputError(
                "this score looks at samples and there are none: pass --data, or score by magnitude-l2"
            )
        return self.given


Method = Callable[[Job], ByGroup]


def _activation(statistic: str) -> Method:
    return lambda job: activation_scores(
        job.model,
        job.graph,
        job.samples,
        statistic,
        threads=job.threads,
        memory=job.memory,
        progress=job.progress,
    )


def _gradient(statistic: str) -> Method:
    def method(job: Job) -> ByGroup:
        from edgewise.training.gradient_scores import gradient_scores  # needs torch

        return gradient_scores(
            job.model,
            job.graph,
            job.samples,
            statistic,
            seed=job.seed,
            threads=job.threads,
            memory=job.memory,
            progress=job.progress,
        )

    return method


def _reconstruction(job: Job) -> ByGroup:
    found = reconstruction_scores(
        job.model, job.samples, threads=job.threads, memory=job.memory, progress=job.progress
    )
    return {group: found[group.name] for group in job.graph.groups}


BY_GRADIENTS = frozenset({"gradient", "taylor", "fisher"})
"""The scores that need torch."""

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "random": lambda job: random_scores(job.graph, job.seed),
        "magnitude-l1": lambda job: magnitude_scores(job.graph, 1),
        "magnitude-l2": lambda job: magnitude_scores(job.graph, 2),
        "bn-scale": lambda job: scale_scores(job.graph),
        "activation-mean": _activation("mean"),
        "activation-energy": _activation("energy"),
        "activation-zeros": _activation("zeros"),
        "gradient": _gradient("gradient"),
        "taylor": _gradient("taylor"),
        "fisher": _gradient("fisher"),
        "reconstruction": _reconstruction,
    }
)
"""The scores by name; each says where it is defined how it compares channels of different layers."""


def score(
    model: ir.Model,
    method: str,
    samples: Samples | None = None,
    *,
    seed: int = 0,
    threads: int | None = None,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Scores:
    """Score every channel of the model's main graph by `method`, one of `METHODS`.

    A channel's score is the sum over all that leaves with it, so that it is to be held against what leaving
    saves. Channels that have to stay score infinity. Labels of the samples are used by gradients, where they
    are class numbers. The same seed gives the same scores. `progress` hears the number of samples done.

    Raises `InputError` on an unknown method and on samples that are missing, and `EdgewiseError` on a model
    none of whose channels can leave, with the reasons, and on one whose numbers are not finite.
    """
    if method not in METHODS:
        raise InputError(f"there is no score named {method!r}: choose one of {', '.join(METHODS)}")
    graph = ChannelGraph.of(model.graph, opset(model))
    _check_prunable(graph)
    scores = METHODS[method](Job(model, graph, samples, seed, threads, memory, progress))
    if any(np.isnan(score).any() for score in scores.values()):
        raise EdgewiseError(f"{method} gives NaN: weights or values of the model are not finite")
    channels = {g.name: np.where(g.blocked, np.inf, scores[g]) for g in graph.groups}
    branches = {_sum_of(g): numbers for g, numbers in scores.items() if g not in graph.groups}
    return MappingProxyType({**channels, **branches})


def _sum_of(group: ChannelGroup) -> str:
    """The name of the branch that a group stands for."""
    (slot,) = group.members
    return slot.value.name or ""


def _check_prunable(graph: ChannelGraph) -> None:
    most = graph.settle({group: ~group.blocked for group in graph.groups})
    if any(cut.any() for cut in most.values()):
        return
    counts = Counter[str]()
    for group in graph.groups:
        for reason in {block.reason for block in group.blocks}:
            held = np.zeros(group.size, np.bool_)
            for block in group.blocks:
                held[group.members[block.slot]] |= block.reason == reason
            counts[reason] += int(held.sum())
    reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())
    why = (
        f"channels held by {reasons}"
        if reasons
        else "no layer has channels of constant weights and known size"
    )
    raise EdgewiseError(f"no channel of the model can be removed ({why})")
