"""Which channels leave under a budget: those whose loss matters least for what they cost.

Channels of a group that lie in the same slots cost the same, so of such a *segment* it is the ones of least
score that leave. What a channel saves depends on how wide the neighbours of its layers still are, so the
segments are narrowed step by step, each time where least score is lost for what is saved. A residual branch
that has a score may leave as a whole.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.passes.branches import Branch, branches_of
from edgewise.passes.channel_links import Indices, Slot
from edgewise.passes.channels import ChannelGraph, ChannelGroup, Cuts, Mask
from edgewise.passes.graph import opset
from edgewise.passes.remove_channels import PrunePlan
from edgewise.runtime.errors import EdgewiseError
from edgewise.training.costs import Cost, Part, full_width, whole_of

Floats = npt.NDArray[np.float64]
Scores = Mapping[str, Floats]
"""What is lost with each channel, by the name of its group, [group.size]; infinite where it must stay. And by
the name of a `Branch` what is lost with it, [1]."""

MULTIPLE = 4
FLOOR = 1 / 8
_AHEAD = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # steps: latency has plateaus that no single step leaves
_ROUNDS = 16


def select(
    model: ir.Model,
    scores: Scores,
    cost: Cost,
    budget: float,
    *,
    multiple: int = MULTIPLE,
    floor: float = FLOOR,
    branch_weight: float = 1.0,
) -> PrunePlan:
    """The channels of least summed score without which the model costs at most `budget` of what it does.

    Widths of layers become multiples of `multiple`, and of every segment of channels the share `floor` stays.
    A branch counts `branch_weight` times its score, infinity keeps them all. Groups and branches without
    scores stay as they are. Raises `EdgewiseError` where the budget cannot be
    reached, with the least that can.
    """
    graph = ChannelGraph.of(model.graph, opset(model))
    worth = _worth(graph, scores)
    segments, bill = _segments(graph, worth, multiple, floor), Bill.of(graph, cost)
    exits = [
        _Exit.of(branch, segments, branch_weight * float(scores[branch.name][0]))
        for branch in branches_of(model.graph)
        if branch.name in scores and branch_weight < math.inf
    ]
    aim = budget
    for _ in range(_ROUNDS):
        search = _Search(segments, bill, exits)
        reached = search.narrow(aim * bill.whole)
        search.widen(aim * bill.whole)
        cuts = graph.settle(_cuts(graph, segments, search.cut), multiple, worth)
        share = bill.at(graph, cuts, search.branches) / bill.whole
        if share <= budget:
            return PrunePlan.of(cuts, [branch.name for branch in search.branches])
        if not reached:
            raise EdgewiseError(
                f"{budget:.1%} of the {cost.unit} cannot be reached: at least {share:.1%} stay, with widths "
                f"that are multiples of {multiple} and at least {floor:.1%} of all channels"
            )
        aim -= share - budget  # what had to be taken back leaves elsewhere
    raise EdgewiseError(f"{budget:.1%} of the {cost.unit} cannot be reached: {share:.1%} stay")


def uniform(
    model: ir.Model, scores: Scores, ratio: float, *, multiple: int = 1, floor: float = 0.0
) -> PrunePlan:
    """The channels of least score of every segment, `ratio` of them, or as many as widths allow."""
    graph = ChannelGraph.of(model.graph, opset(model))
    worth = _worth(graph, scores)
    segments = _segments(graph, worth, multiple, floor)
    removed = [_at_ratio(segment, ratio) for segment in segments]
    return PrunePlan.of(graph.settle(_cuts(graph, segments, removed), multiple, worth))


def achieved(model: ir.Model, plan: PrunePlan, cost: Cost) -> float:
    """The share of a cost that is left when the channels of `plan` have left."""
    graph = ChannelGraph.of(model.graph, opset(model))
    bill = Bill.of(graph, cost)
    return bill.at(graph, plan.cuts(graph), plan.bypassed(model.graph)) / bill.whole


@dataclass(frozen=True, eq=False)
class Bill:
    """What a graph costs, part by part; `whole` is the sum while nothing has left."""

    parts: tuple[Part, ...]
    whole: float

    @classmethod
    def of(cls, graph: ChannelGraph, cost: Cost) -> Bill:
        """Raises `EdgewiseError` where nothing costs anything."""
        parts = tuple(cost.parts(graph))
        whole = whole_of(parts)
        if whole <= 0:
            raise EdgewiseError(f"the model has no {cost.unit} to save")
        return cls(parts, whole)

    def at(self, graph: ChannelGraph, cuts: Cuts, branches: Sequence[Branch] = ()) -> float:
        """What it costs when `cuts` and `branches` have left."""
        gone = frozenset[ir.Node]().union(*(branch.nodes for branch in branches))
        left = [part for part in self.parts if not _is_in(part, gone)]
        slots = dict.fromkeys(slot for part in left for slot in part.slots)
        width = {slot: int((~graph.leaving(slot, cuts)).sum()) for slot in slots}
        return sum(part.cost(tuple(width[slot] for slot in part.slots)) for part in left)


def _is_in(part: Part, nodes: frozenset[ir.Node]) -> bool:
    """Whether a part costs nothing once the nodes have left."""
    return bool(part.nodes) and part.nodes <= nodes


@dataclass(frozen=True, eq=False)
class _Segment:
    """Channels of one group that lie equally often in every slot, in the order in which they leave.

    Unit i is the row `units[i]` of channels, which leave at once: more than one where a grouped convolution
    loses as many in each of its groups. `loss[i]` is the score of the first i units, `stops` are the numbers
    of units that may leave, `takes` the indices of each slot that one unit takes along.
    """

    group: ChannelGroup
    units: Indices
    loss: Floats
    stops: tuple[int, ...]
    takes: Mapping[Slot, int]


@dataclass(frozen=True, eq=False)
class _Exit:
    """A branch that may leave, in the form of a segment that has one unit.

    `within` are the segments of which all channels lie in the branch.
    """

    branch: Branch
    loss: Floats
    within: tuple[int, ...]
    stops: tuple[int, ...] = (0, 1)

    @classmethod
    def of(cls, branch: Branch, segments: Sequence[_Segment], loss: float) -> _Exit:
        within = [i for i, s in enumerate(segments) if _ends_in(s.group, branch.nodes - {branch.total})]
        return cls(branch, np.array([0.0, loss]), tuple(within))


def _ends_in(group: ChannelGroup, nodes: frozenset[ir.Node]) -> bool:
    """Whether none but these nodes make and read the channels of a group."""
    made = {slot.value for slot in group.members if slot.use is None}
    return all(value.producer() in nodes and nodes.issuperset(n for n, _ in value.uses()) for value in made)


def _worth(graph: ChannelGraph, scores: Scores) -> dict[ChannelGroup, Floats]:
    """The scores by group, infinite for what cannot leave."""
    worth = {}
    for group in graph.groups:
        given = np.asarray(scores.get(group.name, np.full(group.size, np.inf)), np.float64)
        if given.shape != (group.size,) or np.isnan(given).any():
            raise EdgewiseError(f"{group.name} has {group.size} channels, and no score for each of them")
        worth[group] = np.where(group.blocked, np.inf, given)
    return worth


def _segments(
    graph: ChannelGraph, worth: Mapping[ChannelGroup, Floats], multiple: int, floor: float
) -> tuple[_Segment, ...]:
    """The segments of which something can leave, in the order of the graph; `EdgewiseError` without any."""
    every = (
        _segment(graph, group, channels, worth[group], multiple, floor)
        for group in graph.groups
        if np.isfinite(worth[group]).any()
        for channels in _alike(group)
    )
    found = tuple(segment for segment in every if len(segment.stops) > 1)
    if not found:
        raise EdgewiseError(f"no channel can leave this model: {_reasons(graph)}")
    return found


def _alike(group: ChannelGroup) -> Iterator[Indices]:
    """The channels of a group, those together that lie equally often in every slot."""
    kinds = {labels.tobytes(): labels for labels in group.members.values()}.values()
    counts = np.stack([np.bincount(labels, minlength=group.size) for labels in kinds])
    _, kind = np.unique(counts, axis=1, return_inverse=True)
    kind = kind.ravel()
    for first in sorted(np.unique(kind, return_index=True)[1]):
        yield np.flatnonzero(kind == kind[first])


def _segment(
    graph: ChannelGraph, group: ChannelGroup, channels: Indices, worth: Floats, multiple: int, floor: float
) -> _Segment:
    units = _units(graph, group, channels, worth)
    cells = units.shape[1]
    takes = {
        slot: cells * count
        for slot, labels in group.members.items()
        if (count := int((labels == channels[0]).sum()))
    }
    loss = np.cumsum([0.0, *worth[units].sum(1)])
    step = math.lcm(1, *(multiple // math.gcd(multiple, n) for s, n in takes.items() if s in graph.widths))
    least = max((-(-n // takes[s]) for s, n in graph.least.items() if s in takes), default=1)
    most = min(int(np.isfinite(loss).sum()) - 1, math.floor(len(units) * (1 - floor)))
    kept = range(len(units) // step * step, len(units) - most - 1, -step)
    stops = [len(units) - k for k in kept if k > 0 and len(units) - k >= least]
    return _Segment(group, units, loss, (0, *stops), takes)


def _units(graph: ChannelGraph, group: ChannelGroup, channels: Indices, worth: Floats) -> Indices:
    """What leaves at once, least score first, [unit, channel]: one channel of each group of the convolutions.

    Where the groups are of unequal size, what one has more stays.
    """
    cell = np.zeros(group.size, np.int64)
    for quota in graph.quotas:
        for slot in (quota.inputs, quota.outputs):
            if slot in group.members:
                labels = group.members[slot]
                block = np.zeros(group.size, np.int64)
                block[labels] = np.arange(len(labels)) // (len(labels) // quota.groups)
                cell = np.unique(cell * quota.groups + block, return_inverse=True)[1]
    ordered = channels[np.argsort(worth[channels], kind="stable")]
    columns = [ordered[cell[ordered] == c] for c in np.unique(cell[ordered])]
    rows = min(map(len, columns))
    return np.stack([column[:rows] for column in columns], axis=1)


def _cuts(
    graph: ChannelGraph, segments: Sequence[_Segment], removed: Sequence[int]
) -> dict[ChannelGroup, Mask]:
    cuts = {group: np.zeros(group.size, np.bool_) for group in graph.groups}
    for segment, count in zip(segments, removed, strict=True):
        cuts[segment.group][segment.units[:count]] = True
    return cuts


def _at_ratio(segment: _Segment, ratio: float) -> int:
    """The greatest stop that is at most the share."""
    wanted = ratio * len(segment.units) + 1e-9
    return max(stop for stop in segment.stops if stop <= wanted)


def _reasons(graph: ChannelGraph) -> str:
    counted = Counter(block.reason for group in graph.groups for block in group.blocks)
    return ", ".join(f"{reason} ({n})" for reason, n in counted.most_common()) or "it has no channel groups"


@dataclass(frozen=True, eq=False)
class _Reach:
    """A part, and for each of its slots the full width and which segments take how much of it a unit."""

    part: Part
    widths: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
    exits: tuple[int, ...]
    """The branches it lies in, as segments."""

    @property
    def segments(self) -> list[int]:
        """Which segments the cost depends on."""
        return sorted({i for _, takes in self.widths for i, _ in takes} | set(self.exits))

    def cost(self, removed: Sequence[int]) -> float:
        if any(removed[i] for i in self.exits):
            return 0.0
        return self.part.cost(
            tuple([full - sum([n * removed[i] for i, n in takes]) for full, takes in self.widths])
        )


class _Search:
    """How many units of each segment have left, of exits behind them too, and what the parts cost now."""

    def __init__(self, segments: Sequence[_Segment], bill: Bill, exits: Sequence[_Exit]) -> None:
        self._segments: tuple[_Segment | _Exit, ...] = (*segments, *exits)
        self._exits = tuple(enumerate(exits, start=len(segments)))
        self.removed = [0] * len(self._segments)
        takers: dict[Slot, list[tuple[int, int]]] = defaultdict(list)
        for i, segment in enumerate(segments):
            for slot, count in segment.takes.items():
                takers[slot].append((i, count))
        self._parts = [
            _Reach(
                part,
                tuple((full_width(slot), tuple(takers[slot])) for slot in part.slots),
                tuple(i for i, exit in self._exits if _is_in(part, exit.branch.nodes)),
            )
            for part in bill.parts
        ]
        self._now = [part.cost(self.removed) for part in self._parts]
        self.total = sum(self._now)
        self._of: list[list[int]] = [[] for _ in self._segments]
        for p, part in enumerate(self._parts):
            for i in part.segments:
                self._of[i].append(p)
        self._neighbours = [sorted({j for p in own for j in self._parts[p].segments}) for own in self._of]

    @property
    def branches(self) -> list[Branch]:
        """Those that leave."""
        return [exit.branch for i, exit in self._exits if self.removed[i]]

    @property
    def cut(self) -> list[int]:
        """How many units of each segment leave without a branch."""
        gone = {j for i, exit in self._exits if self.removed[i] for j in exit.within}
        count = len(self._segments) - len(self._exits)
        return [0 if i in gone else self.removed[i] for i in range(count)]

    def narrow(self, budget: float) -> bool:
        """Remove the units of least score for what they save until the cost is within; whether it is.

        What a move saves shrinks with the widths around it, so an entry of the queue that is out of date
        stands too far in front: it is asked again once it comes first.
        """
        queue = [(*self._best(i), i) for i in range(len(self._segments))]
        heapq.heapify(queue)
        stale = [False] * len(queue)
        while self.total > budget and queue:
            price, _, stop, i = heapq.heappop(queue)
            if stale[i]:
                stale[i] = False
                heapq.heappush(queue, (*self._best(i), i))
            elif price < math.inf:
                self._move(i, stop)
                for j in self._neighbours[i]:
                    stale[j] = True
                    if isinstance(self._segments[j], _Exit):  # it may have become cheaper
                        heapq.heappush(queue, (*self._best(j), j))
                stale[i] = False
                heapq.heappush(queue, (*self._best(i), i))
            else:
                break
        return self.total <= budget

    def widen(self, budget: float) -> None:
        """Put back what can be, the dearest first, until nothing more is within the budget."""
        while sum(self._put_back(i, stop, budget) for _, i, stop in sorted(self._returns())):
            pass

    def _put_back(self, i: int, stop: int, budget: float) -> bool:
        """Widen segment i to `stop` if that is wider and within the budget; whether it was."""
        fits = stop < self.removed[i] and self.total + self._change(i, stop) <= budget
        if fits:
            self._move(i, stop)
        return fits

    def _returns(self) -> Iterator[tuple[float, int, int]]:
        """Every way to widen one segment: the score that comes back, negative, the segment and its stop."""
        for i, segment in enumerate(self._segments):
            at = segment.stops.index(self.removed[i])
            for stop in (segment.stops[at - ahead] for ahead in _AHEAD if ahead <= at):
                yield self._lost(i, stop), i, stop

    def _best(self, i: int) -> tuple[float, float, int]:
        """The least price, score for cost, of a move of segment i, with the change of cost and its stop."""
        segment = self._segments[i]
        at, last = segment.stops.index(self.removed[i]), len(segment.stops) - 1
        best = (math.inf, 0.0, self.removed[i])
        for ahead in (*(a for a in _AHEAD if at + a < last), last - at):
            stop = segment.stops[at + ahead]
            change = self._change(i, stop)
            if change < 0:
                best = min(best, (max(self._lost(i, stop), 0.0) / -change, change, stop))
        return best

    def _lost(self, i: int, stop: int) -> float:
        """The score that is lost by a move of segment i; what a branch has lost before does not count."""
        segment = self._segments[i]
        lost = float(segment.loss[stop] - segment.loss[self.removed[i]])
        if isinstance(segment, _Exit):
            lost *= 1 - max(map(self._share_gone, segment.within), default=0.0)
        return lost

    def _share_gone(self, i: int) -> float:
        """How much of the worth of segment i has left."""
        loss = self._segments[i].loss
        return float(loss[self.removed[i]] / loss[-1]) if loss[-1] > 0 else 0.0

    def _change(self, i: int, stop: int) -> float:
        """What the total changes by if `stop` units of segment i have left."""
        before, self.removed[i] = self.removed[i], stop
        changed = sum(self._parts[p].cost(self.removed) - self._now[p] for p in self._of[i])
        self.removed[i] = before
        return changed

    def _move(self, i: int, stop: int) -> None:
        self.removed[i] = stop
        for p in self._of[i]:
            cost = self._parts[p].cost(self.removed)
            self.total += cost - self._now[p]
            self._now[p] = cost
