"""What changed between two profiles of the same network, and where: float and int8, before and after."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edgewise.runtime.profile import NodeTime, Profile

_TELLING = 0.05  # of all gains and losses: what is less is not worth a word
_NAMED = 3
_NOTHING_MS = 0.0005  # shows as 0.000


@dataclass(frozen=True)
class Change:
    """What the nodes of one operator, or of one kind of work, take before and after.

    `before_ops` and `after_ops` are the operators they are, the longest first.
    """

    name: str
    before_ops: tuple[str, ...]
    after_ops: tuple[str, ...]
    before_ms: float
    after_ms: float
    before_nodes: int
    after_nodes: int

    @property
    def ms(self) -> float:
        """What it takes more than before; below 0 where it takes less."""
        return self.after_ms - self.before_ms


@dataclass(frozen=True)
class NodeChange:
    """The executed nodes before and after that stand for the same nodes of the file.

    `sources` are the nodes of the first file they stand for; those of the second where nothing in the
    first is like it; none for all those of one operator that onnxruntime inserted. `before` or `after`
    may be empty.
    """

    sources: tuple[str, ...]
    before: tuple[NodeTime, ...]
    after: tuple[NodeTime, ...]

    @property
    def before_ms(self) -> float:
        return sum(node.ms for node in self.before)

    @property
    def after_ms(self) -> float:
        return sum(node.ms for node in self.after)

    @property
    def ms(self) -> float:
        """What they take more than before; below 0 where they take less."""
        return self.after_ms - self.before_ms


@dataclass(frozen=True)
class ProfileDifference:
    """Where the difference comes from: by kind of work, by operator and node by node, the largest first."""

    before_ms: float
    """The time of all nodes."""
    after_ms: float
    kinds: tuple[Change, ...]
    ops: tuple[Change, ...]
    nodes: tuple[NodeChange, ...]
    sentences: tuple[str, ...]
    """The same in words."""

    @property
    def ms(self) -> float:
        return self.after_ms - self.before_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them; nodes by their executed names."""
        nodes = [
            {
                "sources": list(change.sources),
                "before": [node.name for node in change.before],
                "after": [node.name for node in change.after],
                "before_ms": change.before_ms,
                "after_ms": change.after_ms,
            }
            for change in self.nodes
        ]
        return {
            "before_ms": self.before_ms,
            "after_ms": self.after_ms,
            "kinds": [dataclasses.asdict(change) for change in self.kinds],
            "ops": [dataclasses.asdict(change) for change in self.ops],
            "nodes": nodes,
            "sentences": list(self.sentences),
        }


def difference(
    before: Profile, after: Profile, *, names: tuple[str, str] = ("the first", "the second")
) -> ProfileDifference:
    """Hold `after` against `before`; `names` are what the sentences call them."""
    kinds = _changes(before, after, lambda node: node.kind)
    ops = _changes(before, after, lambda node: node.op_type)
    return ProfileDifference(
        before_ms=before.nodes_ms,
        after_ms=after.nodes_ms,
        kinds=kinds,
        ops=ops,
        nodes=_node_changes(before, after),
        sentences=tuple(_sentences(before, after, kinds, ops, names)),
    )


def _changes(before: Profile, after: Profile, key: Callable[[NodeTime], str]) -> tuple[Change, ...]:
    first, second = _by(before.nodes, key), _by(after.nodes, key)
    changes = (
        Change(
            name,
            tuple(dict.fromkeys(node.op_type for node in first.get(name, ()))),
            tuple(dict.fromkeys(node.op_type for node in second.get(name, ()))),
            sum(node.ms for node in first.get(name, ())),
            sum(node.ms for node in second.get(name, ())),
            len(first.get(name, ())),
            len(second.get(name, ())),
        )
        for name in dict.fromkeys((*first, *second))
    )
    return tuple(sorted(changes, key=lambda change: -abs(change.ms)))


def _by(nodes: Iterable[NodeTime], key: Callable[[NodeTime], str]) -> dict[str, list[NodeTime]]:
    groups: defaultdict[str, list[NodeTime]] = defaultdict(list)
    for node in nodes:
        groups[key(node)].append(node)
    return groups


def _node_changes(before: Profile, after: Profile) -> tuple[NodeChange, ...]:
    """Executed nodes belong together if they stand for a common node of the file, or both do with a third.

    Only nodes that both files have bring them together: what one file alone has, such as the
    quantization, may be spread over many.
    """
    shared = _names(before.nodes) & _names(after.nodes)
    together = _Together()
    for node in (*before.nodes, *after.nodes):
        together.join([name for name in node.sources if name in shared])
    groups: defaultdict[tuple[str, str], tuple[list[NodeTime], list[NodeTime]]]
    groups = defaultdict(lambda: ([], []))
    for side, profile in enumerate((before, after)):
        for node in profile.nodes:
            name = next((name for name in node.sources if name in shared), None)
            groups[_alone(node, side) if name is None else ("", together.of(name))][side].append(node)
    changes = (NodeChange(_sources(pair), tuple(pair[0]), tuple(pair[1])) for pair in groups.values())
    return tuple(sorted(changes, key=lambda change: -abs(change.ms)))


def _alone(node: NodeTime, side: int) -> tuple[str, str]:
    """What onnxruntime inserted belongs to its operator; what only one file has, to itself."""
    return (f"only in {side}", node.name) if node.sources else ("inserted", node.op_type)


def _names(nodes: Iterable[NodeTime]) -> set[str]:
    return {name for node in nodes for name in node.sources}


def _sources(pair: tuple[list[NodeTime], list[NodeTime]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for node in pair[0] or pair[1] for name in node.sources))


class _Together:
    """Sets of names that grow together (Tarjan, 1975: union-find)."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def of(self, name: str) -> str:
        """The name that stands for the set of `name`."""
        while (parent := self._parents.get(name, name)) != name:
            self._parents[name] = self._parents.get(parent, parent)
            name = parent
        return name

    def join(self, names: Sequence[str]) -> None:
        for name in names[1:]:
            self._parents[self.of(name)] = self.of(names[0])


def _sentences(
    before: Profile,
    after: Profile,
    kinds: Sequence[Change],
    ops: Sequence[Change],
    names: tuple[str, str],
) -> Iterable[str]:
    old, new = before.nodes_ms, after.nodes_ms
    first, second = names
    telling = _TELLING * sum(abs(change.ms) for change in kinds)
    gains = _list(kinds, telling, -1)
    losses = _list(kinds, telling, +1)
    if not gains and not losses:
        yield f"{first} and {second} take the same time in every kind of work"
        return
    much = f"{_ms(abs(new - old))} ms {'more' if new > old else 'less'} than {first}"
    much += f" ({_ms(old)} -> {_ms(new)} ms)"
    if abs(new - old) < _NOTHING_MS:
        much = f"as long as {first} ({_ms(new)} ms)"
    won = f"wins {gains}" if gains else ""
    lost = f"loses {losses}" if losses else ""
    yield f"{second} takes {much}: it {' and '.join(filter(None, (won, lost)))}"
    worst = max(kinds, key=lambda change: change.ms)
    if worst.ms > telling:
        change = max((c for c in ops if c.name in worst.before_ops + worst.after_ops), key=lambda c: c.ms)
        times = f"{_ms(change.before_ms)} -> {_ms(change.after_ms)} ms{_counts_text(change, first)}"
        yield f"the largest loss, in {worst.name}, comes with {change.name}: {times}"


def _list(changes: Sequence[Change], telling: float, sign: int) -> str:
    """The largest changes of one sign in words."""
    found = [c for c in changes if sign * c.ms > max(telling, _NOTHING_MS)][:_NAMED]
    texts = [f"{_ms(abs(c.ms))} ms in {c.name}" for c in found]
    return " and ".join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))


def _ms(ms: float) -> str:
    return f"{ms:.3f}" if 0 < ms < 0.1 else f"{ms:.2f}"


def _counts_text(change: Change, first: str) -> str:
    if change.before_nodes == change.after_nodes:
        return ""
    after = f"{change.after_nodes} node{'s' * (change.after_nodes != 1)}"
    if change.before_nodes == 0:
        return f" in {after} that {first} does not have"
    return f" in {after} instead of {change.before_nodes}"
