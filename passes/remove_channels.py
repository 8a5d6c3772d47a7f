"""Take the channels of a plan out of the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import yaml

from edgewise.passes.base import Contract, Outcome, Pass, PassError
from edgewise.passes.channel_links import Indices
from edgewise.passes.channels import ChannelGraph, ChannelGroup, Mask
from edgewise.passes.graph import opset


@dataclass(frozen=True)
class PrunePlan:
    """The channels that leave, ascending, by the name of their `ChannelGroup`."""

    leaving: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: MappingProxyType({}))

    def __len__(self) -> int:
        """How many channels leave."""
        return sum(map(len, self.leaving.values()))

    @classmethod
    def of(cls, cuts: Mapping[ChannelGroup, Mask]) -> PrunePlan:
        """The plan to cut what is True, bool of [group.size]."""
        found = {group.name: tuple(np.flatnonzero(cut).tolist()) for group, cut in cuts.items()}
        return cls(MappingProxyType({name: channels for name, channels in found.items() if channels}))

    def cuts(self, graph: ChannelGraph) -> dict[ChannelGroup, Mask]:
        """What leaves each group of `graph`. Raises `PassError` where it is no plan for this graph."""
        named = {group.name: group for group in graph.groups}
        cuts = {group: np.zeros(group.size, np.bool_) for group in graph.groups}
        for name, channels in self.leaving.items():
            if name not in named or max(channels, default=0) >= named[name].size:
                raise PassError(f"the plan removes channels of {name}, which the model does not have")
            cuts[named[name]][list(channels)] = True
        return cuts


@dataclass(frozen=True)
class RemoveChannels(Pass):
    """Remove the channels of a plan, whatever they hold.

    Given:   y = W x + b    where channel i of x is in the plan
    Result:  y = W' x' + b  where x' and W' lack input i, and so does every slice that leaves with it

    All of the plan or nothing: `PassError` where a channel cannot leave (see `ChannelGraph.settle`).
    """

    plan: PrunePlan = field(default_factory=PrunePlan)

    name: ClassVar[str] = "remove-channels"
    contract: ClassVar[Contract] = Contract.LOSSY

    def apply(self, model: ir.Model) -> Outcome:
        if not len(self.plan):
            return Outcome()
        graph = ChannelGraph.of(model.graph, opset(model))
        graph.remove(self.plan.cuts(graph))
        return Outcome(len(self.plan))

    @property
    def spec(self) -> str:
        if not len(self.plan):
            return self.name
        leaving = {name: list(channels) for name, channels in self.plan.leaving.items()}
        return self.name + yaml.safe_dump({"plan": leaving}, default_flow_style=True, width=2**31).strip()

    @property
    def label(self) -> str:
        return f"{self.name}: {len(self.plan)} of {len(self.plan.leaving)} groups"


def survivors(model: ir.Model, plan: PrunePlan) -> dict[tuple[str, int], Indices]:
    """The indices that stay, of every axis of a computed value that shrinks: by (name of the value, axis)."""
    graph = ChannelGraph.of(model.graph, opset(model))
    return {
        (slot.value.name or "", slot.axis): np.flatnonzero(~cut[group.members[slot]])
        for group, cut in plan.cuts(graph).items()
        for slot in group.members
        if slot.use is None and cut[group.members[slot]].any()
    }
