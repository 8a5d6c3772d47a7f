"""What a page is made of: sections of tables, figures and facts. How they look is the template's business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from edgewise.optimizer.page.figures import Figure


@dataclass(frozen=True)
class Cell:
    """A table's cell. `tone` is good, bad, warn, strong or quiet; `swatch` a colour's role, `bar` a share."""

    text: str
    tone: str = ""
    swatch: str = ""
    bar: float | None = None


@dataclass(frozen=True)
class Row:
    """Cells, and what has to be said about them below."""

    cells: tuple[Cell, ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """`right` are the columns of numbers."""

    kind: ClassVar[str] = "table"
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    right: frozenset[int] = frozenset()
    caption: str = ""


@dataclass(frozen=True)
class Drawing:
    """A figure."""

    kind: ClassVar[str] = "drawing"
    figure: Figure


@dataclass(frozen=True)
class Facts:
    """A name and what is known under it, a row each."""

    kind: ClassVar[str] = "facts"
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Lines:
    """Sentences, one a line; `tone` as of a cell."""

    kind: ClassVar[str] = "lines"
    lines: tuple[str, ...]
    tone: str = ""


@dataclass(frozen=True)
class Code:
    """Text to copy."""

    kind: ClassVar[str] = "code"
    label: str
    text: str


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown on demand."""

    kind: ClassVar[str] = "fold"
    summary: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Picture:
    """A PNG file in base64. `alt` says what it shows to those who cannot see it."""

    label: str
    alt: str
    data: str


@dataclass(frozen=True)
class Images:
    """Pictures side by side, or one above the other where the page is narrow."""

    kind: ClassVar[str] = "images"
    pictures: tuple[Picture, ...]


Block = Table | Drawing | Facts | Lines | Code | Fold | Images


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Headline:
    """A figure to read from afar: what it is, its value, and what to know about it."""

    label: str
    value: str
    detail: str
    tone: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page. `subject` names the files, `summary` is the finding in a sentence."""

    sort: str
    subject: str
    summary: str
    headlines: tuple[Headline, ...]
    warnings: tuple[str, ...]
    sections: tuple[Section, ...]
    version: str


def table(
    columns: Sequence[str],
    rows: Sequence[Row | Sequence[Cell | str]],
    *,
    left: Sequence[int] = (0,),
    caption: str = "",
) -> Table:
    """A table; all columns but those in `left` are numbers. A text is a cell of its own."""
    made = tuple(row if isinstance(row, Row) else Row(cells(*row)) for row in rows)
    return Table(tuple(columns), made, frozenset(range(len(columns))) - frozenset(left), caption)


def without(whole: Table, column: int) -> Table:
    """The table without one of its columns."""
    rows = tuple(Row(r.cells[:column] + r.cells[column + 1 :], r.remarks) for r in whole.rows)
    right = frozenset(i - (i > column) for i in whole.right if i != column)
    return Table(whole.columns[:column] + whole.columns[column + 1 :], rows, right, whole.caption)


def cells(*contents: Cell | str) -> tuple[Cell, ...]:
    """The cells of a row."""
    return tuple(c if isinstance(c, Cell) else Cell(c) for c in contents)


def section(name: str, title: str, *blocks: Block | None) -> tuple[Section, ...]:
    """The section, or none where no block has anything to show."""
    there = tuple(block for block in blocks if block is not None)
    return (Section(name, title, there),) if there else ()


def facts(rows: Sequence[tuple[str, str | None]]) -> Facts | None:
    """The facts that are known, if any."""
    known = tuple((name, text) for name, text in rows if text)
    return Facts(known) if known else None


def lines(texts: Sequence[str], tone: str = "") -> Lines | None:
    """The lines, if any."""
    return Lines(tuple(texts), tone) if texts else None
