"""The choice among overlapping boxes. It has no gradient, but nets that end in it run to their end."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from edgewise.training.operators.call import Call, Operator


def non_max_suppression(call: Call) -> Tensor:
    """Boxes [batch, n, 4] and scores [batch, classes, n] -> [chosen, 3]: batch, class and box of each."""
    boxes, scores = call.input(0), call.input(1)
    most, overlap, least = (call.optional(i) for i in (2, 3, 4))
    limit = 0 if most is None else int(most.item())
    corners = _corners(boxes, center=bool(call.attr("center_point_box", 0)))
    chosen = []
    for batch, classes in enumerate(scores):
        for kind, score in enumerate(classes):
            kept = _kept(
                corners[batch],
                score,
                limit,
                0.0 if overlap is None else overlap.item(),
                None if least is None else least.item(),
            )
            chosen += [[batch, kind, box] for box in kept]
    return torch.tensor(chosen, dtype=torch.int64).reshape(-1, 3)


def _corners(boxes: Tensor, *, center: bool) -> Tensor:
    """[.., low, low, high, high], from any two opposite corners or from centre and size."""
    first, second = boxes.chunk(2, -1)
    if center:
        return torch.cat([first - second / 2, first + second / 2], -1)
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)


def _kept(boxes: Tensor, scores: Tensor, limit: int, overlap: float, least: float | None) -> list[int]:
    """Best first; a box leaves when it overlaps one that was kept by more than `overlap`."""
    order = scores.sort(descending=True, stable=True).indices
    if least is not None:
        order = order[scores[order] > least]
    kept: list[int] = []
    while len(order) and len(kept) < limit:
        best, order = order[0], order[1:]
        kept.append(int(best))
        order = order[_shared(boxes[best], boxes[order]) <= overlap]
    return kept


def _shared(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union."""
    sides = torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])
    common = sides.clamp(min=0).prod(-1)
    area, areas = (box[2:] - box[:2]).prod(), (others[:, 2:] - others[:, :2]).prod(-1)
    union = area + areas - common
    return torch.where(union > 0, common / union, torch.zeros_like(union))


OPERATORS: Mapping[str, Operator] = MappingProxyType({"NonMaxSuppression": non_max_suppression})
