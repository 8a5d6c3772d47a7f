"""Figures as SVG inside a page: drawn by matplotlib, coloured and set in type by the page.

A figure is drawn twice, for a desk and for a phone, so that its texts keep their size. Colours are
roles that the page's style sheet gives a value, so one drawing serves light and dark.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Sheet
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

WIDE, NARROW = 720, 340
"""Widths in CSS pixels."""

ROLES = ("ink", "muted", "line", "paper", "soft", *(f"c{i}" for i in range(8)))
"""What a colour is for. c0 to c6 tell things apart, c7 is what they are held against."""

_CODES = MappingProxyType({role: f"#ed9e{i:02x}" for i, role in enumerate(ROLES)})
_STYLE: Mapping[Any, Any] = MappingProxyType(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "edgewise",
        "text.parse_math": False,
        "font.family": ["sans-serif"],
        "font.size": 12.0,
        "axes.unicode_minus": True,
        "lines.solid_capstyle": "butt",
        "figure.dpi": 72.0,
        "savefig.dpi": "figure",
    }
)
_NEARLY_LINEAR = 3  # between ends so near, round numbers tell more than those of decades
_DPI = 72  # a point of the drawing is a pixel of the page
_CHARACTER = 0.56  # of the font size, what a character of running text is wide
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_REFERENCE = re.compile(r"#([^)\"]+)")
_IDENTITY = re.compile(r"rotate\(-?0(\.0)? [^)]*\)")


def colour(role: str) -> str:
    """What to tell matplotlib for a role; it becomes `var(--role)`."""
    return _CODES[role]


@dataclass(frozen=True)
class Key:
    """A line of a legend: a role, whether it is drawn dashed, and what it stands for."""

    role: str
    text: str
    dash: int = 0


@dataclass(frozen=True)
class Figure:
    """A drawing in two widths. `title` states the finding, `alt` says it to those who cannot see it."""

    name: str
    title: str
    alt: str
    wide: str
    narrow: str
    legend: tuple[Key, ...] = ()
    note: str = ""


class Canvas:
    """A sheet measured in pixels from its top left, and the texts that appear under the pointer."""

    def __init__(self, width: int, height: float) -> None:
        self.width, self.height = width, height
        self.sheet = Sheet(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        self.tips: dict[str, str] = {}

    @property
    def is_narrow(self) -> bool:
        return self.width < WIDE

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes without a frame, at a place and of a size."""
        box = (
            left / self.width,
            1 - (top + height) / self.height,
            width / self.width,
            height / self.height,
        )
        axes = self.sheet.add_axes(box)
        axes.patch.set_visible(False)
        axes.tick_params(length=0, labelsize=12, labelcolor=colour("muted"), pad=5)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes

    def tip(self, artist: Artist, text: str) -> None:
        """Show `text` where the pointer rests on `artist`."""
        name = f"tip{len(self.tips)}"
        artist.set_gid(name)
        self.tips[name] = text


Draw = Callable[[int], Canvas]


def figure(
    name: str, title: str, alt: str, draw: Draw, *, legend: Sequence[Key] = (), note: str = ""
) -> Figure:
    """Draw in both widths; `name` is unique in the page."""
    wide, narrow = (
        _svg(draw, width, f"{name}-{label}", alt) for width, label in ((WIDE, "w"), (NARROW, "n"))
    )
    return Figure(name, title, alt, wide, narrow, tuple(legend), note)


def _svg(draw: Draw, width: int, prefix: str, alt: str) -> str:
    with mpl.rc_context(dict(_STYLE)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page has fonts of its own
        canvas = draw(width)
        canvas.sheet.patch.set_visible(False)
        text = io.StringIO()
        canvas.sheet.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(ElementTree.fromstring(text.getvalue()), canvas, prefix, alt)


def _inline(root: ElementTree.Element, canvas: Canvas, prefix: str, alt: str) -> str:
    """The drawing as an element of the page: no namespaces, no ids but its own, colours by role."""
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in (f"{_SVG}metadata", f"{_SVG}style")]:
            parent.remove(child)
    used = set(_references(root))
    names = {name: f"{prefix}{i}" for i, name in enumerate(dict.fromkeys(_ids(root))) if name in used}
    for element in list(root.iter()):
        _simplify(element, names, canvas.tips)
    root.attrib = {
        "viewBox": f"0 0 {canvas.width} {canvas.height:g}",
        "width": f"{canvas.width}",
        "height": f"{canvas.height:g}",
        "role": "img",
        "aria-label": alt,
    }
    return ElementTree.tostring(root, encoding="unicode")


def _ids(root: ElementTree.Element) -> Iterator[str]:
    return (e.attrib["id"] for e in root.iter() if "id" in e.attrib)


def _references(root: ElementTree.Element) -> Iterator[str]:
    for element in root.iter():
        for key in ("clip-path", _LINK):
            if key in element.attrib:
                yield from _REFERENCE.findall(element.attrib[key])


def _simplify(element: ElementTree.Element, names: Mapping[str, str], tips: Mapping[str, str]) -> None:
    element.tag = element.tag.removeprefix(_SVG)
    attributes = element.attrib
    own = attributes.pop("id", "")
    if own in names:
        attributes["id"] = names[own]
    if own in tips:
        title = ElementTree.Element(f"{_SVG}title")
        title.text = tips[own]
        title.tag = "title"
        element.insert(0, title)
    if _LINK in attributes:
        attributes["href"] = "#" + names[attributes.pop(_LINK)[1:]]
    if "clip-path" in attributes:
        attributes["clip-path"] = _REFERENCE.sub(lambda m: f"#{names[m[1]]}", attributes["clip-path"])
    if "style" in attributes:
        attributes["style"] = _styled(attributes["style"])
    if "transform" in attributes and _IDENTITY.fullmatch(attributes["transform"]):
        del attributes["transform"]
    for key in attributes.keys() & {"d", "x", "y", "transform", "width", "height"}:
        attributes[key] = _NUMBER.sub(lambda m: f"{float(m[0]):.1f}", " ".join(attributes[key].split()))
    if not (element.text or "").strip():
        element.text = None
    element.tail = None


def _styled(style: str) -> str:
    """The declarations with colours by role, in the type of the page."""
    kept = []
    for declaration in style.split(";"):
        name, _, value = declaration.strip().partition(": ")
        if name in ("font-family", "stroke-linejoin"):
            continue
        if name == "font":
            kept += [f"font-size: {size}" for size in re.findall(r"[\d.]+px", value)[:1]]
            kept += ["font-weight: 600"] if re.search(r"\b(bold|[67]00)\b", value) else []
        else:
            kept.append(f"{name}: {value}")
    text = "; ".join(kept)
    for role, code in _CODES.items():
        text = text.replace(code, f"var(--{role})")
    return text


def fit(text: str, pixels: float, size: float = 12, *, least: int = 6) -> str:
    """As much of `text` as fits, its middle left out where it must be cut; empty below `least` characters."""
    room = int(pixels / (size * _CHARACTER))
    if len(text) <= room:
        return text
    head, tail = (room - 1) // 3, room - 1 - (room - 1) // 3
    return f"{text[:head]}…{text[-tail:]}" if room >= least else ""


@dataclass(frozen=True)
class Scale:
    """An axis: its ends, whether it is logarithmic, and where its ticks are."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...] = field(default=())

    @classmethod
    def over(cls, low: float, high: float, most: int, *, log: bool | None = None) -> Scale:
        """An axis from `low` to `high`, logarithmic where they are a factor of 5 apart, `most` ticks."""
        log = (low > 0 and high / low > 5) if log is None else log
        if not log:
            span = (high - low) or abs(high) or 1.0
            found = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, low + span)
            return cls(low, low + span, False, tuple(t for t in map(float, found) if low <= t <= low + span))
        high = max(high, low * 1.0001)
        for mantissas in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            ticks = tuple(_decades(low, high, mantissas))
            if len(ticks) <= most:
                break
        if high / low < _NEARLY_LINEAR or len(ticks) < 2:
            linear = cls.over(low, high, most, log=False)
            return cls(low, high, True, linear.ticks)
        stride = math.ceil(len(ticks) / most)
        return cls(low, high, True, ticks[::stride])

    def apply_x(self, axes: Axes, text: Callable[[float], str]) -> None:
        """Make it the horizontal axis, with a line at each tick."""
        axes.set_xscale("log" if self.log else "linear")
        axes.set_xlim(self.low, self.high)
        axes.xaxis.set_major_locator(FixedLocator(list(self.ticks)))
        axes.xaxis.set_major_formatter(FixedFormatter([text(t) for t in self.ticks]))
        axes.xaxis.set_minor_locator(NullLocator())
        if self.ticks and self.ticks[0] == self.low:
            axes.get_xticklabels()[0].set_horizontalalignment("left")
        axes.grid(axis="x", color=colour("line"), linewidth=1)

    def apply_y(self, axes: Axes, text: Callable[[float], str]) -> None:
        """Make it the vertical axis, with a line at each tick."""
        axes.set_yscale("log" if self.log else "linear")
        axes.set_ylim(self.low, self.high)
        axes.yaxis.set_major_locator(FixedLocator(list(self.ticks)))
        axes.yaxis.set_major_formatter(FixedFormatter([text(t) for t in self.ticks]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", color=colour("line"), linewidth=1)


def _decades(low: float, high: float, mantissas: Sequence[float]) -> Iterator[float]:
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for mantissa in mantissas:
            if low <= mantissa * 10.0**power <= high:
                yield mantissa * 10.0**power
