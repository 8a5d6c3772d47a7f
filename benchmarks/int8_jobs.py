"""Figures that are taken one at a time and kept as they come, so that a long run may end at any time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.foreign import foreign_code

Row = Mapping[str, Any]
"""A line of a table by its columns."""

_WIDTH = 280


@dataclass(frozen=True)
class Setting:
    """How everybody is treated; files go to `folder`."""

    rivals: str
    folder: Path
    samples: int = 128
    images: int = 1000
    threads: int = 1
    max_seconds: float = 30.0


@dataclass(frozen=True)
class Job:
    """A part of table `table`, about `name`."""

    table: str
    name: str
    run: Callable[[], Sequence[Row]] = field(repr=False)


@dataclass(frozen=True)
class Outcome:
    """The lines a job gave, or why it gave none."""

    table: str
    name: str
    rows: Sequence[Row] = ()
    failure: str = ""


class Ledger:
    """What was found, in the file at `path` as soon as it is known."""

    def __init__(self, path: Path | None, conditions: Mapping[str, str], *, resume: bool) -> None:
        self._path, self._conditions, self.outcomes = path, dict(conditions), list[Outcome]()
        if resume and path is not None and path.exists():
            known = json.loads(path.read_text())
            if known["conditions"] != self._conditions:
                raise SystemExit(f"{path} was measured under other conditions: {known['conditions']}")
            self.outcomes = [Outcome(**entry) for entry in known["outcomes"] if not entry["failure"]]

    def run(self, jobs: Iterable[Job]) -> None:
        """Do what was not done before; a job that fails does not stop the others."""
        done = {(outcome.table, outcome.name) for outcome in self.outcomes}
        for job in jobs:
            if (job.table, job.name) not in done:
                print(f"{job.table}: {job.name}", flush=True)
                self._add(attempt(job))

    def _add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        if self._path is not None:
            beside = self._path.with_suffix(".part")
            found = {"conditions": self._conditions, "outcomes": [asdict(o) for o in self.outcomes]}
            beside.write_text(json.dumps(found, indent=1))
            beside.replace(self._path)
        if outcome.failure:
            print(f"    {outcome.failure}", flush=True)
        for row in outcome.rows:
            print("   ", ", ".join(f"{key} {shown}" for key in row if (shown := text(row[key]))), flush=True)

    def rows(self, table: str) -> list[Row]:
        """All lines of a table."""
        return [row for outcome in self.outcomes if outcome.table == table for row in outcome.rows]

    def show(self, table: str, title: str, summary: Callable[[Sequence[Row]], list[str]]) -> None:
        """Print a table, what its lines come to, and what is missing from it."""
        rows, console = self.rows(table), Console(width=_WIDTH)
        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            drawn = Table(*columns, title=title, box=MARKDOWN)
            for row in rows:
                drawn.add_row(*(text(row.get(column)) for column in columns))
            console.print(drawn)
            print(*summary(rows), sep="\n")
        for outcome in self.outcomes:
            if outcome.table == table and outcome.failure:
                print(f"{outcome.name}: {outcome.failure}")


def attempt(job: Job) -> Outcome:
    """Whatever goes wrong, in whosever code, is an outcome too."""
    try:
        with foreign_code("failed"):
            return Outcome(job.table, job.name, job.run())
    except EdgewiseError as error:
        return Outcome(job.table, job.name, failure=str(error))


def text(value: Any) -> str:
    """A value as tables show it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)
