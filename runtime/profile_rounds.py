"""Several models profiled in turns, for times that can be held against each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from edgewise.runtime.evaluate import Feed
from edgewise.runtime.profile import NodeTime, Profile, profiler

Ask = Callable[[Path, int | None], Profile]
"""Profiles a file, so many runs of it."""
_ROUNDS = 2  # a disturbance hits one of them
_TURN_MS = 300.0
_FIRST_RUNS, _LEAST_RUNS, _MOST_RUNS = 4, 4, 40


def profile_in_turns(
    paths: Sequence[Path],
    feed: Feed,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    rounds: int = _ROUNDS,
    timeout: float = 120.0,
) -> tuple[Profile, ...]:
    """A profile of each model, in one process of their own; of every node the least time of all `rounds`.

    What disturbs a measurement only ever adds to it, and hits models alike that take turns. Raises as
    `edgewise.runtime.profile.profile_isolated` does.
    """
    with profiler(feed, provider=provider, threads=threads, seed=0, timeout=timeout) as ask:
        return in_turns(ask, paths, rounds)


def in_turns(ask: Ask, paths: Sequence[Path], rounds: int) -> tuple[Profile, ...]:
    """The same by a process that is there (see `profiler`)."""
    turns = [[ask(path, _FIRST_RUNS) for path in paths]]
    for _ in range(rounds - 1):
        turns.append([ask(path, _runs(p)) for path, p in zip(paths, turns[0], strict=True)])
    return tuple(_least(same) for same in zip(*turns, strict=True))


def _runs(profile: Profile) -> int:
    return int(np.clip(_TURN_MS / profile.run_ms, _LEAST_RUNS, _MOST_RUNS))


def _least(profiles: Iterable[Profile]) -> Profile:
    """One profile of all: of every node its shortest time."""
    first, *others = profiles
    times = [{node.name: node.ms for node in profile.nodes} for profile in others]

    def least(node: NodeTime) -> NodeTime:
        return dataclasses.replace(node, ms=min([node.ms, *(t[node.name] for t in times if node.name in t)]))

    return dataclasses.replace(first, nodes=tuple(map(least, first.nodes)))
