"""The charts of the page: pure functions from what was measured to a figure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.patches import Rectangle

from edgewise.optimizer.layers import LayerNoise
from edgewise.optimizer.page.figures import NARROW, Canvas, Figure, Key, Scale, colour, figure, fit
from edgewise.optimizer.page.text import TIMES, digits, milliseconds, percent, plain_digits, times
from edgewise.optimizer.report import Candidate, size_text
from edgewise.optimizer.sensitivity import NodeSensitivity
from edgewise.runtime.costs import Kind
from edgewise.runtime.latency import LatencyReport, ModelLatency
from edgewise.runtime.profile import NodeTime, Profile

Array = npt.NDArray[Any]

BASELINE = "c7"
_HALO = MappingProxyType({"facecolor": colour("paper"), "edgecolor": "none", "pad": 1.5})
_SERIES = ("c0", "c1", "c2", "c3", "c4", "c5", "c6")
_DASHES = ("-", (0, (5, 2)), (0, (2, 2)), (0, (6, 2, 2, 2)))

KIND_ROLES: Mapping[Kind, str] = MappingProxyType(
    {
        "convolution": "c0",
        "group convolution": "c5",
        "depthwise convolution": "c5",
        "matrix product": "c2",
        "attention": "c2",
        "recurrent": "c2",
        "quantize/dequantize": "c1",
        "copy between devices": "c1",
        "layout": "c4",
        "join/slice": "c6",
        "pooling": "c3",
        "normalization": "c3",
        "elementwise": "c7",
        "other": "c7",
    }
)


def roles(names: Sequence[str], chosen: str | None = None) -> dict[str, str]:
    """A colour for each model: grey for the first, the accent for the chosen one, or else the second."""
    accented = chosen if chosen in names[1:] else next(iter(names[1:]), None)
    rest = itertools.cycle(_SERIES[1:])
    others = {name: "c0" if name == accented else next(rest) for name in names[1:]}
    return {names[0]: BASELINE if len(names) > 1 else "c0", **others}


def _ms_tick(value: float) -> str:
    return f"{plain_digits(value)} ms"


def _times_tick(value: float) -> str:
    return f"{plain_digits(value)}{TIMES}"


# Distributions of latency


_DENSITY_POINTS = 72
_ROW = 84


def distributions(models: Sequence[ModelLatency], title: str, tints: Mapping[str, str]) -> Figure:
    """A row a model: the density of its run times, the middle half, and the median with its interval."""
    low = min(m.quantiles_ms[0] for m in models)
    high = max(m.quantiles_ms[99] for m in models)
    scale = _padded(low, high)

    def draw(width: int) -> Canvas:
        canvas = Canvas(width, _ROW * len(models) + 34)
        axes = canvas.axes(4, 0, width - 12, _ROW * len(models))
        _fewer(scale, width).apply_x(axes, _ms_tick)
        axes.set_ylim(len(models), 0)
        axes.set_yticks([])
        for i, model in enumerate(models):
            _distribution(canvas, axes, i, model, tints[model.name])
        return canvas

    said = "; ".join(f"{m.name}: median {_median(m)}" for m in models)
    longest = max(models, key=lambda m: m.quantiles_ms[100])
    return figure(
        "latency",
        title,
        f"Distribution of latency. {said}.",
        draw,
        note=(
            "Each shape is the density of single runs up to the 99th percentile; the bar below it spans the "
            "middle half, the mark the median and its 95 % interval. The longest run of all took "
            f"{milliseconds(longest.quantiles_ms[100])} ({longest.name})."
        ),
    )


def _median(model: ModelLatency) -> str:
    return f"{milliseconds(model.median_ms)} [{digits(model.low_ms)}, {digits(model.high_ms)}]"


def _distribution(canvas: Canvas, axes: Any, row: int, model: ModelLatency, tint: str) -> None:
    size = 12.5
    axes.text(
        0,
        row + 0.2,
        fit(model.name, canvas.width * 0.55, size),
        transform=axes.get_yaxis_transform(),
        color=colour("ink"),
        fontsize=size,
        fontweight="bold",
        bbox=_HALO,
    )
    axes.text(
        1,
        row + 0.2,
        _median(model),
        transform=axes.get_yaxis_transform(),
        color=colour("ink"),
        fontsize=size,
        ha="right",
        bbox=_HALO,
    )
    at, density = _density(np.array(model.quantiles_ms))
    base = row + 0.72
    axes.fill_between(at, base, base - 0.42 * density, color=colour(tint), alpha=0.3, linewidth=0)
    axes.plot(at, base - 0.42 * density, color=colour(tint), linewidth=1.5)
    strip = base + 0.1
    q = model.quantiles_ms
    axes.plot([q[1], q[99]], [strip, strip], color=colour(tint), linewidth=1.2)
    (box,) = axes.plot([q[25], q[75]], [strip, strip], color=colour(tint), linewidth=7)
    canvas.tip(
        box,
        f"{model.name}: half of the runs took {digits(q[25])} to {digits(q[75])} ms, "
        f"90 % up to {digits(q[90])}, 99 % up to {digits(q[99])}",
    )
    axes.plot([model.low_ms, model.high_ms], [strip, strip], color=colour("ink"), linewidth=3)
    axes.plot([model.median_ms] * 2, [strip - 0.075, strip + 0.075], color=colour("ink"), linewidth=2)


def _density(quantiles: Array) -> tuple[Array, Array]:
    """A Gaussian kernel estimate over the logarithms of the percentiles, scaled to a height of 1."""
    logs = np.log(quantiles[:100])
    middle = (logs[75] - logs[25]) / 1.349
    width = 0.7 * (middle or logs.std() or 1e-3) * len(logs) ** -0.2
    at = np.linspace(logs[0] - 2 * width, logs[99], _DENSITY_POINTS)
    density = np.exp(-0.5 * ((at[:, None] - logs) / width) ** 2).sum(axis=1)
    return np.exp(at), density / density.max()


def _padded(low: float, high: float) -> Scale:
    """A scale with some room at both ends."""
    if high / low > 5:
        room = (high / low) ** 0.04
        return Scale.over(low / room, high * room, 8)
    room = max(high - low, high * 0.02) * 0.06
    return Scale.over(max(low - room, low / 2), high + room, 8)


def _fewer(scale: Scale, width: int) -> Scale:
    return Scale.over(scale.low, scale.high, 4, log=scale.log) if width == NARROW else scale


# Ratios to the first model


_RATIO_ROW = 46


def ratios(report: LatencyReport, title: str, tints: Mapping[str, str]) -> Figure:
    """A row a model: how many times as fast as the first, with its interval, over the band of noise."""
    found = report.ratios
    floor = report.noise_floor or 0.0
    low = min(*(r.low for r in found), 1 / (1 + floor), 0.97)
    high = max(*(r.high for r in found), 1 + floor, 1.03)
    room = (high / low) ** 0.06
    low, high = low / room, high * room
    height = _RATIO_ROW * len(found)

    def draw(width: int) -> Canvas:
        canvas = Canvas(width, height + 30)
        axes = canvas.axes(4, 0, width - 12, height)
        most = 4 if canvas.is_narrow else 8
        Scale.over(low, high, most, log=True).apply_x(axes, _times_tick)
        axes.set_ylim(len(found), 0)
        axes.set_yticks([])
        band = axes.axvspan(1 / (1 + floor), 1 + floor, color=colour("muted"), alpha=0.22, linewidth=0)
        canvas.tip(band, f"noise floor: {percent(floor, 1)}")
        axes.axvline(1, color=colour("muted"), linewidth=1.2)
        for i, r in enumerate(found):
            text = f"{times(r.speedup)} [{digits(r.low)}, {digits(r.high)}], {r.verdict}"
            place: dict[str, Any] = {
                "transform": axes.get_yaxis_transform(),
                "color": colour("ink"),
                "fontsize": 12.5,
                "bbox": _HALO,
            }
            axes.text(0, i + 0.36, fit(r.name, width * 0.4, 12.5), fontweight="bold", **place)
            axes.text(1, i + 0.36, text, ha="right", **place)
            axes.plot([r.low, r.high], [i + 0.68] * 2, color=colour(tints[r.name]), linewidth=5)
            axes.plot([r.speedup], [i + 0.68], "o", color=colour(tints[r.name]), markersize=9)
        return canvas

    said = "; ".join(
        f"{r.name} {times(r.speedup)}, 95 % interval {digits(r.low)} to {digits(r.high)}, {r.verdict}"
        for r in found
    )
    band = f"The band is the noise floor of this measurement, {percent(floor, 1)}. " if floor else ""
    return figure(
        "ratios",
        title,
        f"Speed-up over {found[0].baseline}: {said}.",
        draw,
        note=(
            f"{band}Right of the line is faster than {found[0].baseline}. "
            "Bars are 95 % intervals of the paired ratios."
        ),
    )


# Sweeps


@dataclass(frozen=True)
class Series:
    """A model under conditions that differ in one thing: the reports in the order of `labels` of the axis."""

    name: str
    role: str
    dash: int
    models: tuple[ModelLatency | None, ...]


def sweep(axis: str, labels: Sequence[str], series: Sequence[Series], title: str) -> Figure:
    """Latency and throughput against what was varied."""
    measured = [m for s in series for m in s.models if m is not None]

    def draw(width: int) -> Canvas:
        height = 210
        stacked = width == NARROW
        canvas = Canvas(width, 2 * (height + 62) if stacked else height + 62)
        room = width - 62 if stacked else width / 2 - 62
        panels: list[tuple[str, Callable[[ModelLatency], tuple[float, float, float]]]] = [
            ("median latency, ms", lambda m: (m.median_ms, m.low_ms, m.high_ms)),
            ("samples per second", lambda m: (m.per_second,) * 3),
        ]
        for i, (name, value) in enumerate(panels):
            left, top = (54, 26 + i * (height + 62)) if stacked else (54 + i * (width / 2 + 4), 26)
            axes = canvas.axes(left, top, room, height)
            _panel(canvas, axes, [value(m) for m in measured], name)
            axes.set_xlim(-0.25, len(labels) - 0.75)
            axes.set_xticks(range(len(labels)), list(labels))
            axes.set_xlabel(axis, color=colour("muted"), fontsize=12)
            for one in series:
                _line(canvas, axes, one, labels, value)
        return canvas

    said = "; ".join(
        f"{s.name}: "
        + ", ".join(
            f"{axis} {label} {milliseconds(m.median_ms)}"
            for label, m in zip(labels, s.models, strict=True)
            if m is not None
        )
        for s in series
    )
    return figure(
        "sweep",
        title,
        f"Latency and throughput against {axis}. {said}.",
        draw,
        legend=[Key(s.role, s.name, s.dash) for s in series],
        note="Bars are 95 % intervals of the median.",
    )


def _panel(canvas: Canvas, axes: Any, values: Sequence[tuple[float, float, float]], name: str) -> None:
    low, high = min(v[1] for v in values), max(v[2] for v in values)
    log = high / low > 5
    room = (high / low) ** 0.06 * 1.02
    scale = (
        Scale.over(low / room, high * room, 6, log=True) if log else Scale.over(0, high * 1.05, 5, log=False)
    )
    scale.apply_y(axes, plain_digits)
    axes.text(0, 1.05, name, transform=axes.transAxes, color=colour("ink"), fontsize=12.5, fontweight="bold")


def _line(
    canvas: Canvas,
    axes: Any,
    series: Series,
    labels: Sequence[str],
    value: Callable[[ModelLatency], tuple[float, float, float]],
) -> None:
    found = [(i, m) for i, m in enumerate(series.models) if m is not None]
    at = [i for i, _ in found]
    middle, low, high = zip(*(value(m) for _, m in found), strict=True)
    style = {"color": colour(series.role), "linewidth": 2}
    axes.plot(at, middle, linestyle=_DASHES[series.dash], **style)
    axes.vlines(at, low, high, **style)
    for (i, _), v in zip(found, middle, strict=True):
        (dot,) = axes.plot([i], [v], "o", color=colour(series.role), markersize=6)
        canvas.tip(dot, f"{series.name}, {labels[i]}: {digits(v)}")


# Candidates


def pareto(
    candidates: Sequence[Candidate], latency: LatencyReport, title: str, tints: Mapping[str, str]
) -> Figure:
    """Size against latency: what lies to the left is faster, what lies below is smaller."""
    measured = {m.name: m for m in latency.models if not m.failed}
    points = [(c, measured[c.name]) for c in candidates if c.name in measured]
    x = _padded(min(m.low_ms for _, m in points), max(m.high_ms for _, m in points))
    largest, smallest = max(c.bytes for c, _ in points), min(c.bytes for c, _ in points)
    log = largest / smallest > 8

    def draw(width: int) -> Canvas:
        height = 250
        canvas = Canvas(width, height + 66)
        axes = canvas.axes(66, 26, width - 84, height)
        most = 4 if canvas.is_narrow else 8
        room = 0.12 * (x.high - x.low)
        across = (
            Scale.over(x.low / 1.1, x.high * 1.1, most, log=True)
            if x.log
            else Scale.over(max(x.low - room, 0), x.high + room, most, log=False)
        )
        across.apply_x(axes, plain_digits)
        up = (
            Scale.over(smallest / 1.6, largest * 1.6, 5, log=True)
            if log
            else Scale.over(0, largest * 1.3, 5, log=False)
        )
        up.apply_y(axes, lambda b: size_text(round(b)).replace(".00 ", " "))
        axes.set_xlabel("median latency, ms", color=colour("muted"), fontsize=12)
        place: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 12.5}
        axes.text(0, 1.05, "size of the file", color=colour("ink"), fontweight="bold", **place)
        _front(axes, [(m.median_ms, c.bytes) for c, m in points], across, up)
        places = axes.transData.transform([(m.median_ms, c.bytes) for c, m in points])
        for i, (candidate, model) in enumerate(points):
            above = not any(_covers(place, places[i]) for place in np.delete(places, i, axis=0))
            _point(canvas, axes, candidate, model, tints[candidate.name], above=above)
        return canvas

    said = "; ".join(
        f"{c.name}: {size_text(c.bytes)}, {_median(m)}{', written' if c.chosen else ''}" for c, m in points
    )
    return figure(
        "candidates",
        title,
        f"Size against latency of the candidates. {said}.",
        draw,
        note=(
            "Left is faster, below is smaller; the line joins those that nothing beats in both. "
            "Bars are 95 % intervals, the ring marks what was written."
        ),
    )


def _front(axes: Any, points: Sequence[tuple[float, int]], across: Scale, up: Scale) -> None:
    """The steps through the points that no other is both faster and smaller than."""
    best: list[tuple[float, float]] = []
    for time, size in sorted(points):
        if not best or size < best[-1][1]:
            best.append((time, size))
    corners = [(best[0][0], up.high), *best, (across.high, best[-1][1])]
    x, y = zip(*corners, strict=True)
    axes.step(x, y, where="post", color=colour("muted"), linewidth=1.2, linestyle=_DASHES[2])


def _covers(place: Array, other: Array) -> bool:
    """Whether a point stands where the label above another one would."""
    right, up = place - other
    return bool(abs(right) < 100 and (0 < up < 34 or (up == 0 and right > 0)))


def _point(
    canvas: Canvas, axes: Any, candidate: Candidate, model: ModelLatency, tint: str, *, above: bool
) -> None:
    axes.plot([model.low_ms, model.high_ms], [candidate.bytes] * 2, color=colour(tint), linewidth=3)
    if candidate.chosen:
        axes.plot(
            [model.median_ms], [candidate.bytes], "o", mfc="none", mec=colour(tint), mew=2, markersize=18
        )
    (dot,) = axes.plot([model.median_ms], [candidate.bytes], "o", color=colour(tint), markersize=9)
    canvas.tip(dot, f"{candidate.name}: {size_text(candidate.bytes)}, {_median(model)}")
    left, _ = axes.transAxes.inverted().transform(
        axes.transData.transform((model.median_ms, candidate.bytes))
    )
    aligned = "right" if left > 0.6 else "left"
    axes.annotate(
        fit(candidate.name, canvas.width * 0.4, 12.5),
        (model.median_ms, candidate.bytes),
        xytext=(-8 if aligned == "right" else 8, 10 if above else -10),
        textcoords="offset points",
        ha=aligned,
        va="bottom" if above else "top",
        color=colour("ink"),
        fontsize=12.5,
        fontweight="bold" if candidate.chosen else "normal",
    )


# Where the time goes


_KINDS_HEIGHT, _NODES_HEIGHT, _BLOCK = 34, 22, 104
_NARROWEST = 2.0  # pixels: nodes below that are drawn as one


@dataclass(frozen=True)
class _Segment:
    text: str
    tip: str
    left: float
    ms: float
    role: str


def flames(profiles: Sequence[Profile], names: Sequence[str], title: str) -> Figure:
    """Two bars a model on one axis of time: kinds of work, and below each the nodes that do it."""
    longest = max(p.nodes_ms for p in profiles)

    def draw(width: int) -> Canvas:
        canvas = Canvas(width, _BLOCK * len(profiles) + 26)
        axes = canvas.axes(2, 0, width - 14, _BLOCK * len(profiles))
        Scale.over(0, longest, 4 if canvas.is_narrow else 8, log=False).apply_x(axes, _ms_tick)
        axes.set_ylim(_BLOCK * len(profiles), 0)
        axes.set_yticks([])
        for i, (one, name) in enumerate(zip(profiles, names, strict=True)):
            _flame(canvas, axes, i * _BLOCK, one, name, longest / (width - 14))
        return canvas

    said = "; ".join(
        f"{name}: {milliseconds(p.nodes_ms)}, of which "
        + ", ".join(f"{k.kind} {k.share:.0%}" for k in p.by_kind()[:5])
        for p, name in zip(profiles, names, strict=True)
    )
    shown: dict[str, list[str]] = {}
    for kind in dict.fromkeys(k.kind for p in profiles for k in p.by_kind()):
        shown.setdefault(KIND_ROLES[kind], []).append(kind)
    return figure(
        "time",
        title,
        f"Time per kind of work and per node. {said}.",
        draw,
        legend=[Key(role, ", ".join(kinds)) for role, kinds in shown.items()],
        note="Above the kinds of work, below the executed nodes; the pointer names them. Recording takes "
        "time itself, most where nodes are short: believe the shares here, and the latency for the whole.",
    )


def _flame(canvas: Canvas, axes: Any, top: float, profile: Profile, name: str, ms_a_pixel: float) -> None:
    place: dict[str, Any] = {"color": colour("ink"), "fontsize": 12.5, "va": "center"}
    axes.text(0, top + 13, fit(name, canvas.width * 0.6, 12.5), fontweight="bold", **place)
    axes.text(
        1, top + 13, milliseconds(profile.nodes_ms), ha="right", transform=axes.get_yaxis_transform(), **place
    )
    kinds, nodes, left = [], [], 0.0
    for kind in profile.by_kind():
        text = f"{kind.kind}: {milliseconds(kind.ms)}, {kind.share:.0%}, {kind.nodes} nodes"
        kinds.append(_Segment(kind.kind, text, left, kind.ms, KIND_ROLES[kind.kind]))
        members = [node for node in profile.nodes if node.kind == kind.kind]
        nodes += _node_segments(members, left, ms_a_pixel)
        left += kind.ms
    _bar(canvas, axes, kinds, top + 26, _KINDS_HEIGHT, ms_a_pixel, alpha=1.0, ink="paper")
    _bar(canvas, axes, nodes, top + 26 + _KINDS_HEIGHT + 2, _NODES_HEIGHT, ms_a_pixel, alpha=0.35, ink="ink")


def _node_segments(nodes: Sequence[NodeTime], left: float, ms_a_pixel: float) -> list[_Segment]:
    """A segment a node; those too short to be seen are drawn as one."""
    found, small = [], [n for n in nodes if n.ms < _NARROWEST * ms_a_pixel]
    for node in nodes:
        if node.ms >= _NARROWEST * ms_a_pixel:
            stands = f" ({', '.join(node.sources[:4])})" if node.sources not in ((), (node.name,)) else ""
            text = f"{node.name}, {node.op_type}: {milliseconds(node.ms)}, {node.share:.1%}{stands}"
            found.append(_Segment(node.name, text, left, node.ms, KIND_ROLES[node.kind]))
            left += node.ms
    if small:
        total = sum(n.ms for n in small)
        text = f"{len(small)} more nodes: {milliseconds(total)}"
        found.append(_Segment("", text, left, total, KIND_ROLES[small[0].kind]))
    return found


def _bar(
    canvas: Canvas,
    axes: Any,
    segments: Sequence[_Segment],
    top: float,
    height: float,
    ms_a_pixel: float,
    *,
    alpha: float,
    ink: str,
) -> None:
    for s in segments:
        patch = Rectangle((s.left, top), s.ms, height, linewidth=0, facecolor=colour(s.role), alpha=alpha)
        edge = Rectangle((s.left + s.ms, top), 0, height, linewidth=1, edgecolor=colour("paper"))
        axes.add_patch(patch)
        axes.add_patch(edge)
        canvas.tip(patch, s.tip)
        pixels = s.ms / ms_a_pixel
        size = 12 if ink == "paper" else 10.5
        if label := fit(s.text, pixels - 8, size, least=12):
            axes.text(
                s.left + 5 * ms_a_pixel,
                top + height / 2,
                label,
                fontsize=size,
                color=colour(ink),
                va="center_baseline",
            )


# Noise of layers


_WORST = 5


def layers(noise: Sequence[LayerNoise], title: str) -> Figure:
    """Signal-to-noise ratio of each layer's output, from the first layer to the last."""
    finite = [(i, n) for i, n in enumerate(noise) if math.isfinite(n.snr_db)]
    values = [n.snr_db for _, n in finite]
    worst = sorted(finite, key=lambda item: item[1].snr_db)[:_WORST]

    def draw(width: int) -> Canvas:
        height = 220
        canvas = Canvas(width, height + 66)
        axes = canvas.axes(40, 26, width - 56, height)
        span = (max(values) - min(values)) or 1.0
        Scale.over(
            min(0.0, *values) if min(values) < 15 else min(values) - 0.2 * span, max(values) + 0.12 * span, 6
        ).apply_y(axes, plain_digits)
        axes.set_xlim(-0.02 * len(noise) - 0.3, len(noise) - 0.7 + 0.02 * len(noise))
        axes.set_xticks([0, max(len(noise) - 1, 0.5)], ["first layer", "last layer"])
        first, last = axes.get_xticklabels()
        first.set_horizontalalignment("left")
        last.set_horizontalalignment("right")
        place: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 12.5}
        axes.text(0, 1.05, "signal to noise, dB", color=colour("ink"), fontweight="bold", **place)
        at = [i for i, _ in finite]
        axes.plot(at, values, color=colour("c0"), linewidth=1.2, alpha=0.6)
        for i, layer in finite:
            bad = (i, layer) in worst
            (dot,) = axes.plot(
                [i], [layer.snr_db], "o", color=colour("c1" if bad else "c0"), markersize=7 if bad else 5
            )
            canvas.tip(dot, f"{layer.node}, {layer.op_type}: {layer.snr_db:.1f} dB")
        for rank, (i, layer) in enumerate(worst, 1):
            axes.annotate(
                str(rank),
                (i, layer.snr_db),
                xytext=(0, -8),
                textcoords="offset points",
                ha="center",
                va="top",
                color=colour("c1"),
                fontsize=11.5,
                fontweight="bold",
            )
        return canvas

    said = ", ".join(f"{n.node} {n.snr_db:.1f} dB" for _, n in worst)
    return figure(
        "layers",
        title,
        f"Signal-to-noise ratio of {len(noise)} layers against depth. The lowest: {said}.",
        draw,
        note="Each point is the output of a layer against the same in float: all noise since the "
        "inputs, not what the layer alone adds. 10 dB less is ten times the noise energy.",
    )


# What nodes in int8 add to the noise


SENSITIVITY_SHOWN = 20
_SENSITIVITY_ROW, _SENSITIVITY_STACKED = 22, 36
_SENSITIVITY_EDGE = 26
_LEAST_SPAN = 10.0  # dB: bars that differ by less are to look alike
FORM_ROLES: Mapping[str, str] = MappingProxyType(
    {"int8": "c0", "float by accuracy": "c1", "float by speed": BASELINE}
)


def sensitivity(found: Sequence[NodeSensitivity], title: str) -> Figure:
    """A bar a node: the noise it adds to the outputs in int8, in dB of the signal; the noisiest first."""
    noisy = [n for n in sorted(found, key=lambda n: n.snr_db) if math.isfinite(n.snr_db)]
    shown = noisy[:SENSITIVITY_SHOWN]
    values = [-n.snr_db for n in shown]
    low = 5.0 * math.floor((min(*values, max(values) - _LEAST_SPAN) - 0.5) / 5)

    def draw(width: int) -> Canvas:
        row = _SENSITIVITY_STACKED if width == NARROW else _SENSITIVITY_ROW
        canvas = Canvas(width, row * len(shown) + 34)
        left = 4 if canvas.is_narrow else 0.38 * width
        axes = canvas.axes(left, 4, width - left - _SENSITIVITY_EDGE, row * len(shown))
        room = 0.0 if canvas.is_narrow else 0.14 * (max(values) - low)
        Scale.over(low, max(values) + room, 4 if canvas.is_narrow else 6, log=False).apply_x(axes, _db_tick)
        axes.set_ylim(len(shown), 0)
        axes.set_yticks([])
        for i, node in enumerate(shown):
            (bar,) = axes.barh(
                i + (0.72 if canvas.is_narrow else 0.5),
                -node.snr_db - low,
                height=(9 if canvas.is_narrow else 14) / row,
                left=low,
                color=colour(FORM_ROLES[node.form]),
            )
            canvas.tip(bar, f"{node.output}, {node.op_type}: {_below(node)}, {node.form}")
            _named_bar(canvas, axes, i, node, left)
        return canvas

    said = "; ".join(f"{n.output} {_below(n)}, {n.form}" for n in shown[:5])
    forms = dict.fromkeys(n.form for n in shown)
    return figure(
        "sensitivity",
        title,
        f"Noise that single nodes in int8 add to the outputs. The most: {said}.",
        draw,
        legend=[Key(FORM_ROLES[form], form) for form in FORM_ROLES if form in forms],
        note="Noise at the worst output from rounding the node's weights and results alone, in dB of the "
        "output's own energy: 10 dB more is ten times the noise. What the nodes in int8 add sums up to "
        "about the noise of the whole.",
    )


def _db_tick(value: float) -> str:
    return f"{plain_digits(value)} dB"


def _below(node: NodeSensitivity) -> str:
    return f"{-node.snr_db:.1f} dB"


def _named_bar(canvas: Canvas, axes: Any, row: int, node: NodeSensitivity, left: float) -> None:
    """The name left of a bar and the number at its end; above it where there is no room beside it."""
    place: dict[str, Any] = {"fontsize": 12, "va": "center", "transform": axes.get_yaxis_transform()}
    if canvas.is_narrow:
        name = fit(node.output, canvas.width * 0.7)
        axes.text(0, row + 0.3, name, color=colour("ink"), bbox=_HALO, **place)
        axes.text(1, row + 0.3, _below(node), ha="right", color=colour("ink"), bbox=_HALO, **place)
        return
    name = fit(f"{node.output}  {node.op_type}", left - 12)
    axes.text(
        -8 / (canvas.width - left - _SENSITIVITY_EDGE),
        row + 0.5,
        name,
        ha="right",
        color=colour("ink"),
        **place,
    )
    axes.annotate(
        _below(node),
        (-node.snr_db, row + 0.5),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=colour("muted"),
        fontsize=11.5,
        bbox=_HALO,
    )
