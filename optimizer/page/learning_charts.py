"""The charts of what was pruned and of how a model learned: pure functions to a figure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from edgewise.optimizer.page.charts import BASELINE
from edgewise.optimizer.page.figures import NARROW, Canvas, Figure, Key, Scale, colour, figure
from edgewise.optimizer.page.text import count_text, digits, percent, plain_digits
from edgewise.optimizer.report import Amount
from edgewise.training.options import Epoch, History

_FLOAT, _INT8 = "c0", "c2"
_HEIGHT = 230
_ROUNDING = 1e-9  # of a score, as the judge has it
_DOTTED, _DASHED = (0, (2, 2)), (0, (5, 2))
_HALO = MappingProxyType({"facecolor": colour("paper"), "edgecolor": "none", "pad": 1.5})


# Amounts of pruning


@dataclass(frozen=True)
class Bounded:
    """The metric that amounts of pruning are held to: its name, how its values are written, and what bounds.

    `before` is the score of the input, where that belongs into a chart; `bound` the least that is allowed,
    where the metric is what is bounded.
    """

    metric: str
    text: Callable[[float], str]
    before: float | None = None
    bound: float | None = None


def amounts(found: Sequence[Amount], by: Bounded, title: str, *, taken: Amount | None) -> Figure:
    """Score against the share of multiply-accumulates that is left, in float and in int8."""
    ordered = sorted(found, key=lambda a: a.macs)
    scores = [(a.macs, a.score) for a in ordered]
    int8 = [(a.macs, a.int8_score) for a in ordered if a.int8_score is not None]

    def draw(width: int) -> Canvas:
        canvas = Canvas(width, _HEIGHT + 66)
        axes = canvas.axes(60, 26, width - 74, _HEIGHT)
        _amount_scales(axes, ordered, by, narrow=canvas.is_narrow)
        place: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 12.5}
        axes.text(0, 1.05, by.metric, color=colour("ink"), fontweight="bold", **place)
        axes.set_xlabel("multiply-accumulates left", color=colour("muted"), fontsize=12)
        if by.bound is not None:
            _bound_line(axes, by.bound, by.text(by.bound))
        if by.before is not None:
            (dot,) = axes.plot([1], [by.before], "o", color=colour(BASELINE), markersize=8)
            canvas.tip(dot, f"input: {by.text(by.before)}")
        for role, points in ((_INT8, int8), (_FLOAT, scores)) if int8 else ((_FLOAT, scores),):
            _tried(canvas, axes, role, points, by)
        if taken is not None:
            _ringed(axes, taken)
        return canvas

    said = "; ".join(_amount_text(a, by) for a in ordered)
    bound = "" if by.bound is None else f"The bound is {by.text(by.bound)}. "
    legend = [Key(_FLOAT, "in float"), *([Key(_INT8, "in int8", 1)] if int8 else [])]
    both = "; an amount has to keep it in both forms" if int8 else ""
    meaning = "" if by.bound is None else f"Filled points keep the bound, hollow ones break it{both}. "
    return figure(
        "amounts",
        title,
        f"{by.metric} against the share of multiply-accumulates left. {bound}{said}.",
        draw,
        legend=[*legend, *([] if by.before is None else [Key(BASELINE, "input")])],
        note=f"Each point is an amount of pruning that was tried, after its recovery, on samples that "
        f"nothing was learned from. {meaning}{'' if taken is None else 'The ring marks what was taken.'}",
    )


def _amount_text(amount: Amount, by: Bounded) -> str:
    int8 = "" if amount.int8_score is None else f", in int8 {by.text(amount.int8_score)}"
    kept = "keeps the bound" if amount.keeps_bound else "breaks the bound"
    return f"{percent(amount.macs, 1)} left: {by.text(amount.score)}{int8}, {kept}"


def _amount_scales(axes: Any, found: Sequence[Amount], by: Bounded, *, narrow: bool) -> None:
    marks = [mark for mark in (by.before, by.bound) if mark is not None]
    low, high = min([*(a.worst for a in found), *marks]), max([*(a.score for a in found), *marks])
    high = max(high, *(a.int8_score for a in found if a.int8_score is not None), low)
    room = 0.1 * (high - low) or 0.05 * abs(high) or 1.0
    Scale.over(low - room, high + room, 6, log=False).apply_y(axes, by.text)
    least = found[0].macs
    left = 0.0 if least < 0.3 else least - 0.1
    right = 1.0 if by.before is not None else min(1.0, found[-1].macs + 0.1)
    Scale.over(left, right, 5 if narrow else 10, log=False).apply_x(axes, percent)
    axes.set_xlim(left, right + 0.02 * (right - left))


def _bound_line(axes: Any, bound: float, text: str) -> None:
    axes.axhline(bound, color=colour("muted"), linewidth=1.4, linestyle=_DASHED)
    axes.annotate(
        f"bound {text}",
        (1, bound),
        xycoords=axes.get_yaxis_transform(),
        xytext=(-4, -5),
        textcoords="offset points",
        ha="right",
        va="top",
        color=colour("muted"),
        fontsize=12,
        bbox=_HALO,
    )


def _tried(canvas: Canvas, axes: Any, role: str, points: Sequence[tuple[float, float]], by: Bounded) -> None:
    """A point an amount: filled where its score keeps the bound."""
    tint, form = colour(role), " in int8" if role == _INT8 else ""
    line = _DASHED if role == _INT8 else "-"
    axes.plot(*zip(*points, strict=True), color=tint, linewidth=1.4, alpha=0.6, linestyle=line)
    for macs, score in points:
        fill = tint if by.bound is None or score >= by.bound - _ROUNDING else colour("paper")
        (dot,) = axes.plot([macs], [score], "o", mfc=fill, mec=tint, mew=1.8, markersize=8)
        canvas.tip(dot, f"{percent(macs, 1)} left: {by.text(score)}{form}")


def _ringed(axes: Any, taken: Amount) -> None:
    tint = colour(_FLOAT)
    axes.plot([taken.macs], [taken.score], "o", mfc="none", mec=tint, mew=2, markersize=17)
    axes.annotate(
        f"{percent(taken.macs)} left",
        (taken.macs, taken.score),
        xytext=(0, 12),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=colour("ink"),
        fontsize=12.5,
        fontweight="bold",
        bbox=_HALO,
    )


# How a model learned


Value = Callable[[Epoch], float | None]
_Along = Sequence[tuple[int, Epoch]]


@dataclass(frozen=True)
class _Line:
    role: str
    name: str
    value: Value


_LEARNED = _Line(BASELINE, "samples learned from", lambda epoch: epoch.loss)
_LOSS = _Line("c0", "samples held back", lambda epoch: epoch.held_back)
_SCORE = _Line("c0", "score of samples held back", lambda epoch: epoch.score)


def history(learned: History, title: str) -> Figure:
    """Loss and score over the epochs, and the epoch whose weights were kept."""
    points, best = along(learned), learned.best
    panels = (("loss", (_LEARNED, _LOSS)), ("score of samples held back", (_SCORE,)))
    borders = [at for at, epoch in points if epoch.number == 0][1:]

    def draw(width: int) -> Canvas:
        stacked = width == NARROW
        canvas = Canvas(width, (2 if stacked else 1) * (_HEIGHT + 70))
        room = width - 66 if stacked else width / 2 - 66
        for i, (name, shown) in enumerate(panels):
            left, top = (54, 28 + i * (_HEIGHT + 70)) if stacked else (54 + i * (width / 2 + 4), 28)
            axes = canvas.axes(left, top, room, _HEIGHT)
            _epochs_axis(axes, points[-1][0], narrow=stacked)
            _values_axis(axes, [v for one in shown for _, v in _known(points, one.value)], name)
            for border in borders:
                axes.axvline(border, color=colour("muted"), linewidth=1.2, linestyle=_DOTTED)
            for one in shown:
                _curve(canvas, axes, points, one)
            _best_mark(axes, next(at for at, epoch in points if epoch is best), shown[-1].value(best))
        return canvas

    start = learned.start
    phases = [name for name, _ in itertools.groupby(epoch.phase for epoch in learned.epochs)]
    parts = f"The dotted line parts two phases: {', then '.join(phases)}. " if borders else ""
    return figure(
        "learning",
        title,
        f"Loss and score over {count_text(points[-1][0], 'epoch')}. Held-back loss {digits(start.held_back)} "
        f"before, {digits(best.held_back)} in the best epoch; score {digits(start.score)} before, "
        f"{digits(best.score)} then.",
        draw,
        legend=[Key(_LEARNED.role, _LEARNED.name), Key(_LOSS.role, _LOSS.name)],
        note="The ring marks the epoch of the least held-back loss, whose weights were kept. Epoch 0 is the "
        f"model before. {parts}While it learns samples are varied and batches small: that loss may be "
        "the larger one.",
    )


def along(learned: History) -> list[tuple[int, Epoch]]:
    """The epochs, each with the number of epochs that were made by then, in all phases."""
    found, before = [], 0
    for _, phase in itertools.groupby(learned.epochs, lambda epoch: epoch.phase):
        found += [(before + epoch.number, epoch) for epoch in phase]
        before = found[-1][0]
    return found


def _known(points: _Along, value: Value) -> Iterator[tuple[int, float]]:
    """Where a value is known and finite."""
    for at, epoch in points:
        if (number := value(epoch)) is not None and math.isfinite(number):
            yield at, number


def _epochs_axis(axes: Any, last: int, *, narrow: bool) -> None:
    ticks = [t for t in Scale.over(0, max(last, 1), 5 if narrow else 8, log=False).ticks if t == int(t)]
    axes.set_xlim(-0.03 * max(last, 1), 1.03 * max(last, 1))
    axes.set_xticks(ticks, [f"{t:.0f}" for t in ticks])
    axes.set_xlabel("epoch", color=colour("muted"), fontsize=12)


def _values_axis(axes: Any, values: Sequence[float], name: str) -> None:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low > 0 and high / low > 5:
        room = (high / low) ** 0.06
        Scale.over(low / room, high * room, 6, log=True).apply_y(axes, plain_digits)
    else:
        room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        Scale.over(low - room, high + room, 6, log=False).apply_y(axes, plain_digits)
    axes.text(0, 1.05, name, transform=axes.transAxes, color=colour("ink"), fontsize=12.5, fontweight="bold")


def _curve(canvas: Canvas, axes: Any, points: _Along, line: _Line) -> None:
    """A line a phase: what one phase minimizes is no number of the other."""
    for _, phase in itertools.groupby(points, lambda point: point[1].phase):
        known = list(_known(list(phase), line.value))
        if not known:
            continue
        at, values = zip(*known, strict=True)
        axes.plot(at, values, color=colour(line.role), linewidth=1.8)
        for x, value in known:
            (dot,) = axes.plot([x], [value], "o", color=colour(line.role), markersize=3.5)
            canvas.tip(dot, f"epoch {x}, {line.name}: {digits(value)}")


def _best_mark(axes: Any, at: int, value: float | None) -> None:
    if value is not None and math.isfinite(value):
        axes.plot([at], [value], "o", mfc="none", mec=colour("c0"), mew=2, markersize=13)
