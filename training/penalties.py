"""Penalties on weights that drive whole channels to zero, so that the exact passes can remove them.

Each is a proximal step behind the optimizer's (ISTA): the penalty's own minimum is taken exactly, so that
what is not worth its cost becomes zero and not just small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from edgewise.passes.channels import ChannelGraph
from edgewise.passes.graph import opset
from edgewise.runtime.errors import InputError
from edgewise.training.graph_module import GraphModule
from edgewise.training.options import Penalty


class Shrinking:
    """The proximal step of a penalty on the weights of a module; to be called behind every step."""

    def __init__(
        self, penalty: Penalty, model: ir.Model, module: GraphModule, weights: Sequence[str]
    ) -> None:
        self._penalty = penalty
        self._weights = {name: module.weights[name] for name in weights if name in module.weights}
        self._groups: Sequence[_Group] = ()
        if penalty.kind == "group-lasso":
            self._groups = tuple(_groups(model, self._weights))
        if penalty.kind == "bn-scale":
            self._weights = {n: w for n, w in self._weights.items() if n in _scales(model)}
        if not (self._groups if penalty.kind == "group-lasso" else self._weights):
            raise InputError(
                f"the penalty {penalty.kind} finds nothing in this model: it needs channels to remove"
            )

    def __call__(self, rate: float) -> None:
        """Shrink by the learning rate `rate` times the strength."""
        threshold = rate * self._penalty.strength
        with torch.no_grad():
            for group in self._groups:
                group.shrink(threshold)
            if self._penalty.kind != "group-lasso":
                for weight in self._weights.values():
                    self._shrink(weight, threshold)

    @property
    def value(self) -> float:
        """What the penalty is of the weights as they are."""
        with torch.no_grad():
            if self._penalty.kind == "group-lasso":
                parts = [group.norms() for group in self._groups]
            elif self._penalty.kind == "l2":
                parts = [weight.square().sum() / 2 for weight in self._weights.values()]
            else:
                parts = [weight.abs().sum() for weight in self._weights.values()]
            return self._penalty.strength * float(torch.stack(parts).sum())

    def _shrink(self, weight: Tensor, threshold: float) -> None:
        if self._penalty.kind == "l2":
            weight.div_(1 + threshold)
        else:
            weight.copy_(weight.sign() * (weight.abs() - threshold).clamp_(min=0))


@dataclass(frozen=True, eq=False)
class _Group:
    """A channel group: its weights with the axis and the channel of each index; what is not free stays."""

    size: int
    free: Tensor
    slices: tuple[tuple[Tensor, int, Tensor], ...]

    def shrink(self, threshold: float) -> None:
        """Each channel towards zero by its own share of the threshold, all its weights by one factor."""
        norm, root = self._norms()
        factor = (1 - threshold * root / norm.clamp(min=1e-30)).clamp(min=0)
        factor = torch.where(self.free, factor, torch.ones(()))
        for weight, axis, channels in self.slices:
            shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
            weight.mul_(factor[channels].reshape(shape).to(weight.dtype))

    def norms(self) -> Tensor:
        """The sum over the channels that can leave of norm times root of count."""
        norm, root = self._norms()
        return (norm * root)[self.free].sum()

    def _norms(self) -> tuple[Tensor, Tensor]:
        """Of each channel the norm of its weights, and the square root of their number."""
        energy, count = torch.zeros(self.size), torch.zeros(self.size)
        for weight, axis, channels in self.slices:
            squares = weight.square().movedim(axis, 0).reshape(len(channels), -1)
            energy.index_add_(0, channels, squares.sum(1).float())
            count.index_add_(0, channels, torch.full((len(channels),), float(squares.shape[1])))
        return energy.sqrt(), count.sqrt()


def _groups(model: ir.Model, weights: Mapping[str, Tensor]) -> list[_Group]:
    """All weights that leave with each channel: what makes it and what reads it (DepGraph, CVPR 2023)."""
    found = []
    for group in ChannelGraph.of(model.graph, opset(model)).groups:
        slices = tuple(
            (weights[slot.value.name or ""], slot.axis, torch.from_numpy(labels))
            for slot, labels in group.members.items()
            if slot.use is not None and slot.value.name in weights
        )
        if slices and not group.blocked.all():
            found.append(_Group(group.size, torch.from_numpy(~group.blocked), slices))
    return found


def _scales(model: ir.Model) -> frozenset[str]:
    """The scales of batch norms."""
    nodes = (node for node in model.graph if node.op_type == "BatchNormalization")
    return frozenset(node.inputs[1].name or "" for node in nodes if node.inputs[1] is not None)
