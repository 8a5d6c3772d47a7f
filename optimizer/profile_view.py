"""A profile as people see it on a terminal: bars by kind of work, tables by operator and node."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgewise.optimizer.profiling import ProfileReport
from edgewise.runtime.costs import KINDS, Kind
from edgewise.runtime.peaks import Peaks
from edgewise.runtime.profile import NodeTime, OpTime, Profile
from edgewise.runtime.profile_difference import Change, NodeChange, ProfileDifference

_WIDTH = 78
_COLORS: Mapping[Kind, str] = dict(
    zip(
        KINDS,
        (
            "blue",
            "bright_magenta",
            "cyan",
            "green",
            "bright_green",
            "bright_blue",
            "red",
            "yellow",
            "bright_yellow",
            "bright_cyan",
            "magenta",
            "white",
            "bright_red",
            "bright_white",
            "bright_black",
        ),
        strict=True,
    )
)
_BLOCKS = "█▓▒░#=+~-:"  # by rank, for those who see no colors
_SMALL = 0.005  # of the time: such operators share a row
_OPS, _NAMES, _NAME_WIDTH = 2, 3, 30
_SEPARATORS, _WORTH_CUTTING = "/_.:", 4
_IN_FLOAT_SHOWN = 4


def profile_view(report: ProfileReport) -> RenderableType:
    """What the command prints: the difference first, if there are two models."""
    blocks = _blocks(report.profiles)
    parts: list[RenderableType] = []
    if report.difference is not None:
        parts += _difference(report, report.difference, blocks)
    for name, profile in zip(report.names, report.profiles, strict=True):
        if report.difference is not None:
            parts.append(Text())
        parts.append(_title(name, profile))
        if report.difference is None:
            parts += [_bar(profile, blocks, profile.nodes_ms), _legend(profile, blocks)]
        parts += [_operators(profile, report.peaks), *_warnings(profile)]
        if report.difference is None:
            parts += [_nodes(profile, report.peaks, report.top)]
    return Group(*parts, *_end(report))


def _title(name: str, profile: Profile) -> Text:
    threads = (
        "all cores" if profile.threads is None else f"{profile.threads} thread{'s' * (profile.threads > 1)}"
    )
    facts = (
        f": {profile.run_ms:.2f} ms a run, {profile.nodes_ms:.2f} ms in {len(profile.nodes)} nodes; "
        f"{profile.provider}, {threads}, {profile.runs} runs"
    )
    return Text.assemble((name, "bold"), facts)


def _blocks(profiles: Sequence[Profile]) -> dict[Kind, Text]:
    """One block for every kind of work: its color, and a pattern by rank over all profiles."""
    longest: dict[Kind, float] = {}
    for profile in profiles:
        for k in profile.by_kind():
            longest[k.kind] = max(longest.get(k.kind, 0.0), k.ms)
    ranked = sorted(longest, key=lambda kind: -longest[kind])
    return {kind: Text(_BLOCKS[min(i, len(_BLOCKS) - 1)], _COLORS[kind]) for i, kind in enumerate(ranked)}


def _bar(profile: Profile, blocks: Mapping[Kind, Text], scale_ms: float) -> Text:
    """A line as long as the time of all nodes, every kind as wide as its part of it."""
    bar, end, drawn = Text(), 0.0, 0
    for k in profile.by_kind():
        end += k.ms / (scale_ms or 1.0) * _WIDTH
        for _ in range(round(end) - drawn):
            bar.append_text(blocks[k.kind])
        drawn = max(drawn, round(end))
    return bar


def _legend(profile: Profile, blocks: Mapping[Kind, Text]) -> RenderableType:
    """The kinds in columns, the longest first."""
    cells = [
        Text.assemble(blocks[k.kind], f" {k.kind} {_ms(k.ms)} ms {k.share:.0%}") for k in profile.by_kind()
    ]
    table = Table.grid(padding=(0, 2))
    for i in range(0, len(cells), 2):
        table.add_row(*cells[i : i + 2])
    return table


def _operators(profile: Profile, peaks: Peaks | None) -> RenderableType:
    """A row for every operator that takes time worth a row."""
    ops = profile.by_op()
    large = [op for op in ops if op.share >= _SMALL]
    columns = ["operator", "in", "nodes", "ms", "share", "Gop/s", *(["of peak"] if peaks else []), "GB/s"]
    table = _table(columns, right=range(2, len(columns)))
    for op in large:
        speed = [_number(op.gflops), *([_of_peak(op.gflops, op.dtypes, peaks)] if peaks else [])]
        kinds = ", ".join(op.dtypes)
        table.add_row(
            op.op_type, kinds, str(op.nodes), _ms(op.ms), f"{op.share:.1%}", *speed, _number(op.gbps)
        )
    if rest := ops[len(large) :]:
        sums = (str(sum(op.nodes for op in rest)), _ms(_total(rest)), f"{sum(op.share for op in rest):.1%}")
        table.add_row(f"{len(rest)} other{'s' * (len(rest) > 1)}", "", *sums)
    return table


def _total(ops: Iterable[OpTime]) -> float:
    return sum(op.ms for op in ops)


def _nodes(profile: Profile, peaks: Peaks | None, top: int) -> RenderableType:
    """The longest nodes, told by what they stand for in the file."""
    columns = ["executed as", "nodes of the file", "ms", "share", "Gop/s", *(["of peak"] if peaks else [])]
    table = _table(columns, right=range(2, len(columns)), folds=(1,))
    for node in profile.nodes[:top]:
        speed = [_number(node.gflops), *([_of_peak(node.gflops, (node.dtype,), peaks)] if peaks else [])]
        table.add_row(node.op_type, _stands_for(node), _ms(node.ms), f"{node.share:.1%}", *speed)
    return table


def _stands_for(node: NodeTime) -> str:
    return _sources_text(node.sources) if node.sources else f"inserted: {_shortened(node.name)}"


def _sources_text(names: Sequence[str]) -> str:
    """The first few names; of those that begin like the one before only what is new."""
    shown = [_shortened(name) for name in names[:1]]
    for before, name in itertools.pairwise(names[:_NAMES]):
        cut = _same(before, name)
        shown.append(_shortened(name) if cut < _WORTH_CUTTING else _shortened(f"…{name[cut:]}"))
    more = [f"{len(names) - _NAMES} more"] if len(names) > _NAMES else []
    return " + ".join([*shown, *more])


def _same(before: str, name: str) -> int:
    """How much of a name is like the one before it, up to a separator; below 0 if nothing is."""
    pairs = zip(before, name, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return max(name.rfind(mark, 0, same) for mark in _SEPARATORS)


def _shortened(name: str) -> str:
    """The end of a long name, which tells more than its beginning."""
    return name if len(name) <= _NAME_WIDTH else f"…{name[1 - _NAME_WIDTH :]}"


def _warnings(profile: Profile) -> Iterator[RenderableType]:
    """What must not be missed: nodes that run elsewhere, copies, and int8 that is float after all."""
    if not profile.grant.complete:
        yield Text(f"granted in part: {profile.grant}", style="bold yellow")
    shares = profile.share_by_provider()
    if len(shares) > 1:
        parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        copies = profile.copies()
        word = "copy" if copies == 1 else "copies"
        yield Text(f"share of the time: {parts}; {copies} {word} between devices a run", "yellow")
    if profile.in_float is None:
        yield Text(f"{profile.provider} does not show the graph it executes", style="dim")
    elif profile.in_float:
        yield _in_float(profile, profile.in_float)


def _in_float(profile: Profile, names: Sequence[str]) -> Text:
    nodes = [node for node in profile.nodes if node.name in set(names)]
    shown = ", ".join(f"{node.op_type} {_stands_for(node)}" for node in nodes[:_IN_FLOAT_SHOWN])
    more = f" and {len(nodes) - _IN_FLOAT_SHOWN} more" if len(nodes) > _IN_FLOAT_SHOWN else ""
    ms = sum(node.ms for node in nodes)
    count = "1 quantized node runs" if len(nodes) == 1 else f"{len(nodes)} quantized nodes run"
    text = f"{count} in float after all ({_ms(ms)} ms): {shown}{more}"
    return Text(text, style="bold yellow")


def _difference(
    report: ProfileReport, found: ProfileDifference, blocks: Mapping[Kind, Text]
) -> Iterator[RenderableType]:
    scale = max(found.before_ms, found.after_ms)
    for sentence in found.sentences:
        yield Text(sentence, style="bold")
    for name, profile in zip(report.names, report.profiles, strict=True):
        yield Text()
        yield Text(f"{name}, {_ms(profile.nodes_ms)} ms")
        yield _bar(profile, blocks, scale)
    yield _kinds(found.kinds, blocks)
    changes = [c for c in found.nodes if abs(c.ms) >= _SMALL * scale][: report.top]
    if changes:
        yield _node_changes(changes)


def _kinds(changes: Iterable[Change], blocks: Mapping[Kind, Text]) -> RenderableType:
    columns = ("kind of work", "executed as", "ms before", "after", "change")
    table = _table(columns, right=(2, 3, 4), folds=(1,))
    marks: Mapping[str, Text] = {str(kind): block for kind, block in blocks.items()}
    for c in changes:
        executed = _ops_text(c.before_ops, c.after_ops)
        name = Text.assemble(marks[c.name], f" {c.name}")
        table.add_row(name, executed, _ms(c.before_ms), _ms(c.after_ms), _change(c.ms))
    return table


def _node_changes(changes: Iterable[NodeChange]) -> RenderableType:
    columns = ("nodes of the file", "executed as", "ms before", "after", "change")
    table = _table(columns, right=(2, 3, 4), folds=(0, 1))
    for c in changes:
        executed = _ops_text([n.op_type for n in c.before], [n.op_type for n in c.after])
        name = _sources_text(c.sources) or "inserted by onnxruntime"
        times = (_ms(c.before_ms) if c.before else "", _ms(c.after_ms) if c.after else "")
        table.add_row(name, executed, *times, _change(c.ms))
    return table


def _ops_text(before: Sequence[str], after: Sequence[str]) -> str:
    """What became of it; where it is the same before and after, once."""
    texts = [_first_few(list(dict.fromkeys(ops))) for ops in (before, after)]
    return texts[0] if texts[0] == texts[1] else " -> ".join(filter(None, texts))


def _first_few(names: Sequence[str]) -> str:
    more = f" +{len(names) - _OPS}" if len(names) > _OPS else ""
    return ", ".join(names[:_OPS]) + more


def _change(ms: float) -> Text:
    shown = round(ms, 2) + 0.0  # no -0.00
    return Text(f"{shown:+.2f}", "red" if shown > 0 else "green" if shown < 0 else "")


def _end(report: ProfileReport) -> Iterator[RenderableType]:
    if (peaks := report.peaks) is not None:
        yield Text(_peaks_text(peaks), style="dim")
    machine = report.machine
    yield Text(f"{machine.cpu}; onnxruntime {machine.onnxruntime}; inputs: {report.inputs}", style="dim")
    yield Text("measuring each node takes time itself: for latencies see edgewise bench", style="dim")


def _peaks_text(peaks: Peaks) -> str:
    texts = [
        f"{rate:.0f} {unit}"
        for rate, unit in (
            (peaks.float_gflops, "GFLOP/s float32"),
            (peaks.int8_gops, "GOP/s int8"),
            (peaks.float_copy_gbps, "GB/s copying float32"),
            (peaks.int8_copy_gbps, "GB/s copying int8"),
        )
        if rate is not None
    ]
    return f"peaks measured here: {', '.join(texts) or 'none on this provider'}"


def _of_peak(rate: float | None, dtypes: Sequence[str], peaks: Peaks) -> str:
    """The share of the machine's peak; nothing where the operators compute in several types."""
    peak = peaks.operations(dtypes[0]) if len(dtypes) == 1 else None
    return "" if rate is None or peak is None else f"{rate / peak:.0%}"


def _ms(ms: float) -> str:
    return f"{ms:.2f}" if ms >= 0.1 else f"{ms:.3f}"


def _number(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.1f}"


def _table(columns: Sequence[str], *, right: Iterable[int], folds: Sequence[int] = ()) -> Table:
    numbers = set(right)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for i, column in enumerate(columns):
        justify = "right" if i in numbers else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=i not in folds)  # type: ignore[arg-type]
    return table
