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

from edgewise.runtime.evaluate import Array, Feed, TensorSpec, seeded_feed
from edgewise.runtime.isolated import IsolatedModel, WorkerFailed

_BLOCK_SECONDS = 0.005  # short: a shared machine changes its speed many times a second
_LEAD_SECONDS = 0.001  # until the caches that the other models emptied are filled again
_NO_LEAD_SECONDS = 0.05  # for a run this long, cold caches are lost in it
_LAUNCH_SECONDS = 1.0  # about what opening the processes costs
_LAUNCH_ROUNDS = 5
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
    provider: str
    threads: int | None
    cores: tuple[int, ...]
    spinning: bool
    timeout: float
    feed: Feed | None
    seed: int


@dataclass
class Record:
    """What was seen of one model so far: one item a launch, times in seconds, memory in bytes."""

    path: Path
    load: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    loaded: list[int] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    rounds: list[Array] = field(default_factory=list)
    """Arrays of (rounds, 2): the median run of each block."""
    runs: list[Array] = field(default_factory=list)
    inputs: str = ""
    failed: str | None = None


@dataclass
class _Player:
    """A model in one launch: its process, the runs of a block, and the blocks played."""

    record: Record
    worker: IsolatedModel
    lead: int
    count: int
    blocks: list[Array] = field(default_factory=list)

    def play(self) -> Array:
        """The seconds of each run of one block; on a failure its cause goes to the record."""
        try:
            return np.array(self.worker.ask("block", lead=self.lead, count=self.count)["times"])
        except WorkerFailed as failure:
            self.record.failed = str(failure)
            return np.empty(0)


def launch(
    records: Sequence[Record],
    setup: Setup,
    *,
    deadline: float,
    rng: np.random.Generator,
    tick: Callable[[], None],
) -> None:
    """Open every model in a new process, play rounds, and add what was seen to the records.

    Ends at `deadline` (on the monotonic clock), but not before the rounds an estimate needs. A model
    that fails leaves the launch with the cause in its record. `tick` is called after every round.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(_start(i, setup)) for i in range(len(records))]
        players = []
        for record, worker in zip(records, workers, strict=True):
            try:
                worker.wait_until_ready()
                players.append(_open(record, worker, setup))
            except WorkerFailed as failure:
                record.failed = str(failure)
        for player in _play(players, deadline, rng, tick):
            blocks = np.array(player.blocks)
            player.record.rounds.append(np.median(blocks, axis=1).reshape(-1, 2))
            player.record.runs.append(blocks.ravel())


def _start(index: int, setup: Setup) -> IsolatedModel:
    return IsolatedModel(setup.folder / f"{index}.log", threads=setup.threads, timeout=setup.timeout)


def _open(record: Record, worker: IsolatedModel, setup: Setup) -> _Player:
    """Load and warm up one model while all others are at rest."""
    opened = worker.ask(
        "open",
        model=str(record.path),
        provider=setup.provider,
        threads=setup.threads,
        cores=setup.cores,
        spinning=setup.spinning,
    )
    feed = setup.feed if setup.feed is not None else _plausible(opened["inputs"], setup.seed)
    record.inputs = ", ".join(f"{name} {a.dtype}{list(a.shape)}" for name, a in feed.items())
    file = _save(feed, setup.folder)
    started = worker.ask("start", feed=str(file), inputs=list(feed))
    record.load.append(opened["load"])
    record.loaded.append(opened["loaded"])
    record.first.append(started["first"])
    record.peak.append(started["peak"])
    return _Player(record, worker, *_block_runs(started["steady"]))


def _block_runs(seconds: float) -> tuple[int, int]:
    """Runs before the clock and under the clock in one block, from the time of one run."""
    lead = 0 if seconds > _NO_LEAD_SECONDS else max(1, round(_LEAD_SECONDS / seconds))
    return lead, max(1, round(_BLOCK_SECONDS / seconds))


def _plausible(inputs: Sequence[tuple[str, str, list[Any]]], seed: int) -> Feed:
    """Seeded inputs of the types and shapes onnxruntime reports; one for every dynamic dimension."""
    specs = []
    for name, kind, shape in inputs:
        if kind not in _DTYPES:
            raise WorkerFailed(f"input {name!r} is {kind}: no value for it can be guessed, pass samples")
        specs.append(TensorSpec(name, np.dtype(_DTYPES[kind]), tuple(shape)))
    return seeded_feed(specs, seed, size=1)


def _save(feed: Feed, folder: Path) -> Path:
    """The arrays by position, without a pickle: strings get a fixed width."""
    path = folder / "feed.npz"
    plain = [np.asarray(a, np.str_) if np.asarray(a).dtype == np.object_ else a for a in feed.values()]
    np.savez(path, *plain)
    return path


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


def _enough(rounds: int, begin: float, deadline: float) -> bool:
    now = time.monotonic()
    long = now - begin >= _LAUNCH_SECONDS and rounds >= _LAUNCH_ROUNDS
    return rounds >= _FEWEST_ROUNDS and (long or now >= deadline)
