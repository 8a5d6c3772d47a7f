"""The sections of the page that tell where the time goes, node by node."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edgewise.optimizer.page import charts
from edgewise.optimizer.page.blocks import (
    Block,
    Cell,
    Drawing,
    Fold,
    Lines,
    Row,
    Section,
    Table,
    lines,
    section,
    table,
    without,
)
from edgewise.optimizer.page.text import MINUS, NOTHING, count_text, digits, fixed, milliseconds, percent
from edgewise.optimizer.profiling import ProfileReport
from edgewise.runtime.peaks import Peaks
from edgewise.runtime.profile import KindTime, NodeTime, OpTime, Profile
from edgewise.runtime.profile_difference import Change, NodeChange, ProfileDifference

_ROWS = 15
_OPS = 8
_SAME = 0.005  # of the whole time: a change below that is not coloured


def time_section(report: ProfileReport) -> tuple[Section, ...]:
    """Time per kind, operator and node, and the machine's peaks."""
    if not any(profile.nodes for profile in report.profiles):
        return ()
    flames = charts.flames(report.profiles, report.names, flame_title(report))
    return section("time", "Where the time goes", Drawing(flames), *_details(report), _peaks(report.peaks))


def _sentence(text: str) -> str:
    """As a sentence of its own; names of models keep their case."""
    text = text.replace("->", "→")
    return f"The {text[4:]}." if text.startswith("the ") else f"{text}."


def _details(report: ProfileReport) -> tuple[Block | None, ...]:
    difference = report.difference
    if difference is None:
        (one,) = report.profiles
        return (
            _groups("kind of work", one.by_kind()),
            _groups("operator", one.by_op()),
            _top(one, report.peaks),
        )
    kinds = _change_rows(difference.kinds, difference)
    ops = _change_rows(difference.ops, difference)
    return (
        lines([_sentence(text) for text in difference.sentences]),
        table(_columns("kind of work", report), [*kinds, _total(report, difference)]),
        table(_columns("operator", report), ops[:_OPS]),
        Fold(count_text(len(ops) - _OPS, "more operator"), (table(_columns("operator", report), ops[_OPS:]),))
        if len(ops) > _OPS
        else None,
        _node_changes(difference.nodes, report),
        *(
            Fold(f"The slowest nodes of {name}", (_top(p, report.peaks),))
            for p, name in zip(report.profiles, report.names, strict=True)
        ),
    )


def profile_summary(report: ProfileReport) -> str:
    """The finding in a sentence."""
    if report.difference is not None:
        return _sentence(report.difference.sentences[0])
    return f"{flame_title(report)}."


def flame_title(report: ProfileReport) -> str:
    """What takes most of the time of the last model."""
    profile, name = report.profiles[-1], report.names[-1]
    top = profile.by_kind()[0]
    share = f"{percent(top.share)} of the time of {name} goes to {_plural(top)}"
    if len(report.profiles) == 1:
        return share
    before, after = (p.nodes_ms for p in report.profiles)
    return f"{report.names[0]} computes for {milliseconds(before)}, {name} for {milliseconds(after)}"


def _plural(time: KindTime) -> str:
    return f"{time.kind}s" if time.kind.endswith(("convolution", "product")) else time.kind


def _groups(label: str, times: Sequence[KindTime] | Sequence[OpTime]) -> Table:
    whole = max(t.ms for t in times)
    columns = (label, "ms", "share", "nodes", "GFLOP/s", "GB/s", "computes in")
    rows = [
        (
            Cell(
                _group_name(t), "strong", swatch=charts.KIND_ROLES[t.kind] if isinstance(t, KindTime) else ""
            ),
            fixed(t.ms, whole),
            Cell(percent(t.share, 1), bar=t.share),
            str(t.nodes),
            _rate(t.gflops),
            _rate(t.gbps),
            ", ".join(t.dtypes),
        )
        for t in times
    ]
    return table(columns, rows, left=(0, 6))


def _group_name(time: KindTime | OpTime) -> str:
    return time.kind if isinstance(time, KindTime) else time.op_type


def _rate(value: float | None) -> str:
    return "" if value is None else digits(value)


def _columns(label: str, report: ProfileReport) -> tuple[str, ...]:
    return (label, *(f"{name}, ms" for name in report.names), "change, ms", "nodes")


def _change_rows(changes: Sequence[Change], difference: ProfileDifference) -> list[Row]:
    kinds: dict[str, str] = dict(charts.KIND_ROLES.items())
    whole = max(difference.before_ms, difference.after_ms)
    return [
        Row(
            (
                Cell(c.name, "strong", swatch=kinds.get(c.name, "")),
                _time(c.before_ms, c.before_nodes, whole),
                _time(c.after_ms, c.after_nodes, whole),
                _signed(c.ms, whole),
                Cell(_arrow(c.before_nodes, c.after_nodes)),
            )
        )
        for c in changes
    ]


def _total(report: ProfileReport, difference: ProfileDifference) -> Row:
    whole = max(difference.before_ms, difference.after_ms)
    before, after = (len(p.nodes) for p in report.profiles)
    return Row(
        (
            Cell("all nodes", "strong"),
            Cell(fixed(difference.before_ms, whole), "strong"),
            Cell(fixed(difference.after_ms, whole), "strong"),
            _signed(difference.ms, whole),
            Cell(_arrow(before, after)),
        )
    )


def _arrow(before: int, after: int) -> str:
    return str(after) if before == after else f"{before} → {after}"


def _time(ms: float, nodes: int, whole: float) -> Cell:
    return Cell(fixed(ms, whole)) if nodes else Cell(NOTHING, "quiet")


def _signed(ms: float, whole: float) -> Cell:
    tone = "" if abs(ms) < _SAME * whole else "good" if ms < 0 else "bad"
    return Cell(f"{MINUS if ms < 0 else '+'}{fixed(abs(ms), whole)}", tone)


def _node_changes(nodes: Sequence[NodeChange], report: ProfileReport) -> Fold | None:
    shown = [n for n in nodes if n.before or n.after][:_ROWS]
    if not shown:
        return None
    whole = max(p.nodes_ms for p in report.profiles)
    rows = [
        (
            Cell(_change_name(n), "strong"),
            _time(n.before_ms, len(n.before), whole),
            _time(n.after_ms, len(n.after), whole),
            _signed(n.ms, whole),
            Cell(_executed(n), "quiet"),
        )
        for n in shown
    ]
    columns = (*_columns("node of the file", report)[:-1], "executed as")
    return Fold("Node by node: where most was won and lost", (table(columns, rows, left=(0, 4)),))


def _change_name(change: NodeChange) -> str:
    if not change.sources:
        return f"inserted: {(change.before or change.after)[0].name}"
    more = len(change.sources) - 1
    return change.sources[0] + (f" and {more} more" if more else "")


def _executed(change: NodeChange) -> str:
    sides = (
        " + ".join(dict.fromkeys(n.op_type for n in side)) or "nothing"
        for side in (change.before, change.after)
    )
    return " → ".join(sides)


def _top(profile: Profile, peaks: Peaks | None) -> Table:
    """The slowest nodes, and how much of the machine's best speed each reaches."""
    columns = ("node", "operator", "ms", "share", "of the peak", "GFLOP/s", "GB/s", "stands for")
    shown = profile.nodes[:_ROWS]
    whole = shown[0].ms
    rows = [
        Row(
            (
                Cell(n.name, "strong", swatch=charts.KIND_ROLES[n.kind]),
                Cell(f"{n.op_type} ({n.dtype})" if n.dtype else n.op_type),
                Cell(fixed(n.ms, whole)),
                Cell(percent(n.share, 1), bar=n.share),
                _of_peak(n, peaks),
                Cell(_rate(n.gflops)),
                Cell(_rate(n.gbps)),
                Cell(_stands_for(n), "quiet"),
            )
        )
        for n in shown
    ]
    left = len(profile.nodes) - len(shown)
    caption = (
        f"{count_text(left, 'more node')} take {percent(sum(n.share for n in profile.nodes[_ROWS:]), 1)}."
        if left
        else ""
    )
    made = table(columns, rows, left=(0, 1, 7), caption=caption)
    return made if peaks is not None else without(made, 4)


def _stands_for(node: NodeTime) -> str:
    if not node.sources:
        return "inserted by onnxruntime"
    if node.sources == (node.name,):
        return ""
    more = len(node.sources) - 3
    return ", ".join(node.sources[:3]) + (f" and {more} more" if more > 0 else "")


def _of_peak(node: NodeTime, peaks: Peaks | None) -> Cell:
    """The larger of the shares of peak arithmetic and peak copying: what bounds it."""
    if peaks is None:
        return Cell("")
    pairs = (
        (node.gflops, peaks.operations(node.dtype), "compute"),
        (node.gbps, peaks.copy(node.dtype), "memory"),
    )
    shares = [
        (rate / peak, what) for rate, peak, what in pairs if rate and peak and math.isfinite(rate / peak)
    ]
    if not shares:
        return Cell("")
    share, what = max(shares)
    return Cell(f"{percent(share)} {what}", bar=min(share, 1.0))


def _peaks(peaks: Peaks | None) -> Lines | None:
    """What the nodes are held against."""
    if peaks is None:
        return None
    known = [
        f"{name} {digits(value)} {unit}"
        for name, value, unit in (
            ("float32 matrix product", peaks.float_gflops, "GFLOP/s"),
            ("int8 matrix product", peaks.int8_gops, "GOP/s"),
            ("copy of float32", peaks.float_copy_gbps, "GB/s"),
            ("copy of int8", peaks.int8_copy_gbps, "GB/s"),
        )
        if value is not None
    ]
    where = (
        f"{peaks.provider}, {'all cores' if peaks.threads is None else count_text(peaks.threads, 'thread')}"
    )
    said = f"The machine's own peaks, by onnxruntime's kernels on {where}: {', '.join(known)}."
    return lines([said]) if known else None


def in_float(report: ProfileReport) -> tuple[Block | None, ...]:
    """The nodes of quantized models that compute in float after all, and what they take."""
    blocks: list[Block | None] = []
    for profile, name in zip(report.profiles, report.names, strict=True):
        if not profile.in_float:
            continue
        times = {n.name: n for n in profile.nodes}
        known = sorted(profile.in_float, key=lambda n: -(times[n].ms if n in times else 0.0))
        share = sum(times[n].share for n in known if n in times)
        said = (
            f"In float after all: {count_text(len(known), 'node')} of {name} between a DequantizeLinear and "
            f"a QuantizeLinear that onnxruntime did not fuse, {percent(share, 1)} of the time."
        )
        rows = [
            (Cell(n, "strong"), times[n].op_type, milliseconds(times[n].ms), percent(times[n].share, 1))
            for n in known
            if n in times
        ]
        listed = table(("node in float", "operator", "time", "share"), rows, left=(0, 1)) if rows else None
        folded = Fold("All of them", (listed,)) if listed is not None and len(rows) > _ROWS else listed
        blocks += [lines([said], "warn"), folded]
    return tuple(blocks)


def assigned_table(report: ProfileReport) -> Table | None:
    """Nodes and time per provider, of the models for which onnxruntime kept a record."""
    rows = [
        Row(
            (
                Cell(name, "strong"),
                Cell(provider),
                Cell(str(profile.assigned.get(provider, NOTHING))),
                Cell(percent(share, 1), bar=share),
                Cell(_counts(profile.elsewhere.get(provider, {})), "warn"),
            )
        )
        for profile, name in zip(report.profiles, report.names, strict=True)
        for provider, share in _shares(profile).items()
    ]
    columns = ("model", "provider", "nodes", "share of time", "not taken by the one asked for")
    made = table(columns, rows, left=(0, 1, 4))
    return made if any(row.cells[-1].text for row in rows) else without(made, 4) if rows else None


def _shares(profile: Profile) -> dict[str, float]:
    """Of the time of all nodes, also for providers whose nodes took none."""
    return {**dict.fromkeys(profile.assigned, 0.0), **profile.share_by_provider()}


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items())
