"""The raw timings of several models: launches of fresh processes, and interleaved rounds in each.

A launch opens every model in a process of its own. A round times one short block of runs of each
model and then, in reverse order, another (A B B A): a machine whose speed drifts slows all alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.runtime.conditions import Conditions
from edgewise.runtime.evaluate import Array, Feed, TensorSpec, seeded_feed
from edgewise.runtime.isolated import IsolatedModel, WorkerFailed, save_feed
from edgewise.runtime.session import Grant

_BLOCK_SECONDS = 0.010  # short: a shared machine changes its speed many times a second
_LONGEST_BLOCK_SECONDS = 0.1  # unless a single run takes longer
_LEAD_SECONDS = 0.006  # until the caches that the other models emptied are filled again
_NO_LEAD_SECONDS = 0.05  # for a run this long, cold caches are lost in it
_LAUNCH_SECONDS = 1.0  # about what opening the processes costs
_LAUNCH_ROUNDS = 5
_LOAD_SECONDS = 0.25
_FEWEST_ROUNDS = 2
_DTYPES = {
    "tensor(bool)": np.bool_,
    "tensor(double)": np.float64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(int8)": np.int8,
    "tensor(string)": np.str_,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(uint8)": np.uint8,
}


@dataclass(frozen=True)
class Setup:
    """How every process of one measurement is started."""

    folder: Path
    """For what is passed to the processes and what they write."""
    conditions: Conditions
    timeout: float
    seed: int


@dataclass
class Record:
    """What was seen of one model so far: one item a launch, times in seconds, memory in bytes."""

    path: Path
    feed: Feed | None = None
    """What goes in; None for what can be guessed from the session alone."""
    load: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    loaded: list[int] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    rounds: list[Array] = field(default_factory=list)
    """Arrays of (rounds, 2): the median run of each block."""
    runs: list[Array] = field(default_factory=list)
    throughput: list[float] = field(default_factory=list)
    """Runs a second while several are under way; empty where none are."""
    inputs: str = ""
    grant: Grant | None = None
    failed: str | None = None


@dataclass
class _Player:
    """A model in one launch: its process, the seconds of a run once it is warm, and the blocks played."""

    record: Record
    worker: IsolatedModel
    steady: float
    count: int = 1
    blocks: list[Array] = field(default_factory=list)

    @property
    def lead(self) -> int:
        """Runs of a block before the clock."""
        return 0 if self.steady > _NO_LEAD_SECONDS else max(1, round(_LEAD_SECONDS / self.steady))

    def play(self) -> Array:
        """The seconds of each run of one block; on a failure its cause goes to the record."""
        try:
            return np.array(self.worker.ask("block", lead=self.lead, count=self.count)["times"])
        except WorkerFailed as failure:
            self.record.failed = str(failure)
            return np.empty(0)

    def load(self, concurrency: int) -> None:
        """Note the runs a second with so many under way at any time."""
        try:
            reply = self.worker.ask("load", concurrency=concurrency, seconds=_LOAD_SECONDS)
            self.record.throughput.append(reply["runs"] / reply["seconds"])
        except WorkerFailed as failure:
            self.record.failed = str(failure)


def launch(
    records: Sequence[Record],
    setup: Setup,
    *,
    deadline: float,
    rng: np.random.Generator,
    tick: Callable[[], None],
) -> float:
    """Open every model in a new process, play rounds, and add what was seen to the records.

    Ends at `deadline` (on the monotonic clock), but not before the rounds an estimate needs. A model
    that fails leaves the launch with the cause in its record. `tick` is called after every round. Gives
    the seconds until the first round.
    """
    begin = time.monotonic()
    with ExitStack() as stack:
        workers = [stack.enter_context(_start(i, setup)) for i in range(len(records))]
        players = _open_all(list(zip(records, workers, strict=True)), setup)
        _set_counts(players)
        prepared = time.monotonic()
        players = _play(players, deadline, rng, tick)
        if setup.conditions.concurrency > 1:
            players = _load(players, setup.conditions.concurrency, tick)
        for player in players:
            blocks = np.array(player.blocks)
            player.record.rounds.append(np.median(blocks, axis=1).reshape(-1, 2))
            player.record.runs.append(blocks.ravel())
    return prepared - begin


def _open_all(pairs: Sequence[tuple[Record, IsolatedModel]], setup: Setup) -> list[_Player]:
    """Those that open; none is opened before all have started, which would disturb it."""
    players, ready = [], []
    for record, worker in pairs:
        try:
            worker.wait_until_ready()
            ready.append((record, worker))
        except WorkerFailed as failure:
            record.failed = str(failure)
    for record, worker in ready:
        try:
            players.append(_open(record, worker, setup))
        except WorkerFailed as failure:
            record.failed = str(failure)
    return players


def _start(index: int, setup: Setup) -> IsolatedModel:
    log, threads = setup.folder / f"{index}.log", setup.conditions.threads
    return IsolatedModel(log, threads=threads, timeout=setup.timeout)


def _open(record: Record, worker: IsolatedModel, setup: Setup) -> _Player:
    """Load and warm up one model while all others are at rest."""
    opened = worker.ask("open", model=str(record.path), **setup.conditions.to_dict())
    record.grant = Grant(**opened["grant"])
    if setup.conditions.strict and not record.grant.complete:
        raise WorkerFailed(f"not all of it is granted: {record.grant}")
    feed = _plausible(opened["inputs"], setup.seed) if record.feed is None else record.feed
    _check_names([name for name, *_ in opened["inputs"]], list(feed))
    record.inputs = ", ".join(f"{name} {a.dtype}{list(a.shape)}" for name, a in feed.items())
    file = save_feed(feed, setup.folder)
    started = worker.ask("start", feed=str(file), inputs=list(feed))
    record.load.append(opened["load"])
    record.loaded.append(opened["loaded"])
    record.first.append(started["first"])
    record.peak.append(started["peak"])
    return _Player(record, worker, started["steady"])


def _check_names(wanted: list[str], given: list[str]) -> None:
    """onnxruntime would find this out too, and say it in three lines."""
    if set(wanted) - set(given):
        raise WorkerFailed(f"it takes {', '.join(wanted)} and was given {', '.join(given) or 'nothing'}")


def _set_counts(players: Sequence[_Player]) -> None:
    """Give every player as many runs a block.

    Run times are skewed, and the median of few of them is the larger the fewer they are: with counts
    that follow each model's own speed, the same file twice would not come out the same.
    """
    if not players:
        return
    steady = np.array([player.steady for player in players])
    usual = _BLOCK_SECONDS / np.exp(np.log(steady).mean())
    count = max(1, round(min(usual, _LONGEST_BLOCK_SECONDS / steady.max())))
    for player in players:
        player.count = count - (count + 1) % 2  # of an odd number the median is a run


def _plausible(inputs: Sequence[tuple[str, str, list[Any]]], seed: int) -> Feed:
    """Seeded inputs of the types and shapes onnxruntime reports; one for every dynamic dimension."""
    specs = []
    for name, kind, shape in inputs:
        if kind not in _DTYPES:
            raise WorkerFailed(f"input {name!r} is {kind}: no value for it can be guessed, pass samples")
        specs.append(TensorSpec(name, np.dtype(_DTYPES[kind]), tuple(shape)))
    return seeded_feed(specs, seed, size=1)


def _play(
    players: list[_Player], deadline: float, rng: np.random.Generator, tick: Callable[[], None]
) -> list[_Player]:
    """Rounds over all players until an estimate has what it needs; those who lasted to the end."""
    begin, rounds = time.monotonic(), 0
    while players and not _enough(rounds, begin, deadline):
        order = rng.permutation(len(players))
        blocks = [(players[i], players[i].play()) for i in (*order, *order[::-1])]
        alive = [p for p in players if not p.record.failed]
        if len(alive) < len(players):  # the round has a hole, so it is no pair for anyone
            players = alive
            continue
        for player, times in blocks:
            player.blocks.append(times)
        rounds += 1
        tick()
    return players


def _load(players: list[_Player], concurrency: int, tick: Callable[[], None]) -> list[_Player]:
    """Put each player under load twice, in turn and in reverse; those who lasted."""
    for player in (*players, *reversed(players)):
        if not player.record.failed:
            player.load(concurrency)
            tick()
    return [player for player in players if not player.record.failed]


def _enough(rounds: int, begin: float, deadline: float) -> bool:
    now = time.monotonic()
    long = now - begin >= _LAUNCH_SECONDS and rounds >= _LAUNCH_ROUNDS
    return rounds >= _FEWEST_ROUNDS and (long or now >= deadline)
