"""Take the channels of a plan out of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import yaml

from edgewise.passes.base import Contract, Outcome, Pass, PassError
from edgewise.passes.branches import Branch, branches_of
from edgewise.passes.channel_links import Indices
from edgewise.passes.channels import ChannelGraph, ChannelGroup, Mask
from edgewise.passes.graph import opset


@dataclass(frozen=True)
class PrunePlan:
    """The channels that leave, ascending, by the name of their `ChannelGroup`, and the names of the sums that
    lose their `Branch`."""

    leaving: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: MappingProxyType({}))
    branches: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many channels and branches leave."""
        return sum(map(len, self.leaving.values())) + len(self.branches)

    @classmethod
    def of(cls, cuts: Mapping[ChannelGroup, Mask], branches: Sequence[str] = ()) -> PrunePlan:
        """The plan to cut what is True, bool of [group.size], and these branches."""
        found = {group.name: tuple(np.flatnonzero(cut).tolist()) for group, cut in cuts.items()}
        leaving = {name: channels for name, channels in found.items() if channels}
        return cls(MappingProxyType(leaving), tuple(branches))

    def cuts(self, graph: ChannelGraph) -> dict[ChannelGroup, Mask]:
        """What leaves each group of `graph`. Raises `PassError` where it is no plan for this graph."""
        named = {group.name: group for group in graph.groups}
        cuts = {group: np.zeros(group.size, np.bool_) for group in graph.groups}
        for name, channels in self.leaving.items():
            if name not in named or max(channels, default=0) >= named[name].size:
                raise PassError(f"the plan removes channels of {name}, which the model does not have")
            cuts[named[name]][list(channels)] = True
        return cuts

    def bypassed(self, graph: ir.Graph) -> tuple[Branch, ...]:
        """The branches of `graph` that leave. Raises `PassError` where it is no plan for this graph."""
        found = {branch.name: branch for branch in branches_of(graph)} if self.branches else {}
        for name in self.branches:
            if name not in found:
                raise PassError(f"the plan removes the branch of {name}, which the model does not have")
        return tuple(found[name] for name in self.branches)


@dataclass(frozen=True)
class RemoveChannels(Pass):
    """Remove the channels and the branches of a plan, whatever they hold.

    Given:   y = W x + b    where channel i of x is in the plan
    Result:  y = W' x' + b  where x' and W' lack input i, and so does every slice that leaves with it

    Given:   y = x + f(x)  where y is in the plan
    Result:  y = x

    All of the plan or nothing: `PassError` where a channel cannot leave (see `ChannelGraph.settle`).
    """

    plan: PrunePlan = field(default_factory=PrunePlan)

    name: ClassVar[str] = "remove-channels"
    contract: ClassVar[Contract] = Contract.LOSSY

    def apply(self, model: ir.Model) -> Outcome:
        if not len(self.plan):
            return Outcome()
        graph, branches = ChannelGraph.of(model.graph, opset(model)), self.plan.bypassed(model.graph)
        graph.remove(self.plan.cuts(graph))
        for branch in branches:
            branch.leave()
        return Outcome(len(self.plan))

    @property
    def spec(self) -> str:
        if not len(self.plan):
            return self.name
        leaving = {name: list(channels) for name, channels in self.plan.leaving.items()}
        plan = {"plan": leaving, **({"branches": list(self.plan.branches)} if self.plan.branches else {})}
        return self.name + yaml.safe_dump(plan, default_flow_style=True, width=2**31).strip()

    @property
    def label(self) -> str:
        branches = len(self.plan.branches)
        channels = f"{self.name}: {len(self.plan) - branches} of {len(self.plan.leaving)} groups"
        return channels + (f", {branches} branch{'es' * (branches > 1)}" if branches else "")


def survivors(model: ir.Model, plan: PrunePlan) -> dict[tuple[str, int], Indices]:
    """The indices that stay, of every axis of a computed value that shrinks: by (name of the value, axis)."""
    graph = ChannelGraph.of(model.graph, opset(model))
    return {
        (slot.value.name or "", slot.axis): np.flatnonzero(~cut[group.members[slot]])
        for group, cut in plan.cuts(graph).items()
        for slot in group.members
        if slot.use is None and cut[group.members[slot]].any()
    }
