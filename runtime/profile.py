"""Where the time of a model goes: per node, told in the names of the file.

The times are onnxruntime's own, of the nodes it executes after its fusions and changes of layout;
`lineage` says what each of them stands for. Measuring costs time itself: believe the shares, and
`latency` for the whole.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Array, Feed, input_specs, seeded_feed
from edgewise.runtime.lineage import lineage
from edgewise.runtime.session import (
    first_line,
    import_onnxruntime,
    open_session,
    runtime_errors,
    weight_bytes,
)
from edgewise.runtime.statistics import trimmed_mean

if TYPE_CHECKING:
    import onnxruntime

Event = Mapping[str, Any]

_WARM_UP_RUNS = 3
_SHOWS_ITS_GRAPH = frozenset({"cpu", "cuda"})  # the others compile, and what is compiled cannot be saved
_WITH_BODIES = frozenset({"If", "Loop", "Scan"})
_QDQ = frozenset({"DequantizeLinear", "QuantizeLinear"})
_COPIES = frozenset({"MemcpyFromHost", "MemcpyToHost"})
_NODE_EVENT = "_kernel_time"
_WEIGHTS_FILE = "session.optimized_model_external_initializers_file_name"
_LARGEST_PROTO = 2**30


@dataclass(frozen=True)
class NodeTime:
    """What one executed node takes in a run, in milliseconds, without the nodes inside its bodies."""

    name: str
    op_type: str
    provider: str
    calls: int
    """In one run: more than one inside a loop."""
    ms: float
    share: float
    """Of the time of all nodes, 0 to 1."""
    sources: tuple[str, ...]
    """The nodes of the file it stands for; none if onnxruntime inserted it."""


@dataclass(frozen=True)
class OpTime:
    """What all executed nodes of one type take in a run."""

    op_type: str
    nodes: int
    ms: float
    share: float


@dataclass(frozen=True)
class Profile:
    """The time of a model, node by node, the longest first."""

    path: str
    provider: str
    threads: int | None
    runs: int
    run_ms: float
    """A whole run while it is profiled: the nodes, and what lies between them."""
    nodes: tuple[NodeTime, ...]
    assigned: Mapping[str, int]
    """Nodes per execution provider, by onnxruntime's own record; empty where it keeps none."""
    in_float: tuple[str, ...]
    """Executed nodes that compute in float between a DequantizeLinear and a QuantizeLinear."""

    def by_op(self) -> tuple[OpTime, ...]:
        """The nodes' times added up by type, the longest first."""
        groups: defaultdict[str, list[NodeTime]] = defaultdict(list)
        for node in self.nodes:
            groups[node.op_type].append(node)
        sums = (
            OpTime(op, len(group), sum(n.ms for n in group), sum(n.share for n in group))
            for op, group in groups.items()
        )
        return tuple(sorted(sums, key=lambda o: -o.ms))

    def share_by_provider(self) -> dict[str, float]:
        """The share of the nodes' time that each execution provider took."""
        shares: defaultdict[str, float] = defaultdict(float)
        for node in self.nodes:
            shares[node.provider] += node.share
        return dict(shares)

    def copies(self) -> int:
        """Copies between devices in one run."""
        return sum(node.calls for node in self.nodes if node.op_type in _COPIES)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        data = dataclasses.asdict(self)
        data["nodes"] = [{**node, "sources": list(node["sources"])} for node in data["nodes"]]
        data["by_op"] = [dataclasses.asdict(op) for op in self.by_op()]
        data["share_by_provider"] = self.share_by_provider()
        return {**data, "assigned": dict(self.assigned), "in_float": list(self.in_float)}


def profile(
    path: Path,
    feed: Feed | None = None,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    runs: int = 20,
    seed: int = 0,
) -> Profile:
    """Run the model in this process under onnxruntime's profiler, `runs` times after a warm-up.

    Without a `feed` its inputs are seeded and of plausible values, with one for every dynamic dimension.
    Raises `InputError` where the model cannot be loaded or does not run on these inputs,
    `ProviderError` where the provider is not to be had.
    """
    if runs < 2:
        raise InputError(f"runs must be 2 or more, not {runs}")
    with tempfile.TemporaryDirectory(prefix="edgewise-") as name:
        folder = Path(name)
        checked = open_session(
            path,
            provider=provider,
            threads=threads,
            config={"session.record_ep_graph_assignment_info": "1"},
        )
        file = ir.load(path)
        trace = _trace(checked, _with_names(file, path, folder), folder, provider in _SHOWS_ITS_GRAPH)
        inputs = seeded_feed(input_specs(file), seed, size=1) if feed is None else dict(feed)
        events = _events(trace, inputs, _WARM_UP_RUNS + runs)
        executed = folder / "executed.onnx"
        graph = ir.load(executed).graph if executed.exists() else None
        sources = _sources(file, graph)
        in_float = () if graph is None else tuple(_in_float(graph))
    windows = sorted((e for e in events if e["name"] == "model_run"), key=_start)[_WARM_UP_RUNS:]
    run_ms, _ = trimmed_mean(np.array([e["dur"] for e in windows]) / 1e3)
    return Profile(
        path=str(path),
        provider=provider,
        threads=threads,
        runs=runs,
        run_ms=run_ms,
        nodes=_node_times(events, windows, sources),
        assigned=_assigned(trace),
        in_float=in_float,
    )


def _with_names(file: ir.Model, path: Path, folder: Path) -> Path:
    """The file itself if all its nodes have a name to tell them by, or else a copy in which they do."""
    taken = {node.name for node in file.graph}
    if taken.isdisjoint({"", None}):
        return path
    for i, node in enumerate(n for n in file.graph if not n.name):
        name = f"{node.op_type}_{i}"
        node.name = f"{name}_unnamed" if name in taken else name
    copy = folder / "named.onnx"
    large = weight_bytes(file) > _LARGEST_PROTO
    ir.save(file.clone(), copy, external_data="named.data" if large else None)
    return copy


def _trace(
    checked: onnxruntime.InferenceSession, path: Path, folder: Path, shows_graph: bool
) -> onnxruntime.InferenceSession:
    """A session like `checked` that records events, and saves the graph it executes if it can."""
    options = checked.get_session_options()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "events")
    if shows_graph:
        options.optimized_model_filepath = str(folder / "executed.onnx")
        options.add_session_config_entry(_WEIGHTS_FILE, "executed.data")
    return import_onnxruntime().InferenceSession(
        path, options, providers=checked.get_providers(), enable_fallback=0
    )


def _events(session: onnxruntime.InferenceSession, feed: Feed, runs: int) -> list[Event]:
    """The events of `runs` runs: times in microseconds."""
    outputs = [o.name for o in session.get_outputs()]
    try:
        for _ in range(runs):
            session.run(outputs, dict(feed))
    except runtime_errors() as error:
        raise InputError(f"the model does not run on these inputs: {first_line(error)}") from error
    events: list[Event] = json.loads(Path(session.end_profiling()).read_text())
    return events


def _start(event: Event) -> tuple[int, int]:
    """Sorts events by time, and those that hold others before what they hold."""
    return event["ts"], -event["dur"]


def _end(event: Event) -> int:
    end: int = event["ts"] + event["dur"]
    return end


def _node_times(
    events: Iterable[Event], windows: Sequence[Event], sources: Mapping[str, tuple[str, ...]]
) -> tuple[NodeTime, ...]:
    """One entry for each node that ran within the windows, one window a run."""
    own: defaultdict[str, Array] = defaultdict(lambda: np.zeros(len(windows)))
    calls: Counter[str] = Counter()
    kinds: dict[str, Event] = {}
    for run, event, microseconds in _own_times(events, windows):
        name = event["name"].removesuffix(_NODE_EVENT)
        own[name][run] += microseconds
        calls[name] += 1
        kinds[name] = event["args"]
    ms = {name: max(trimmed_mean(times)[0], 0.0) / 1e3 for name, times in own.items()}
    total = sum(ms.values()) or 1.0
    nodes = (
        NodeTime(
            name=name,
            op_type=kinds[name]["op_name"],
            provider=kinds[name]["provider"],
            calls=round(calls[name] / len(windows)),
            ms=ms[name],
            share=ms[name] / total,
            sources=sources.get(name, ()),
        )
        for name in own
    )
    return tuple(sorted(nodes, key=lambda node: -node.ms))


def _own_times(events: Iterable[Event], windows: Sequence[Event]) -> Iterator[tuple[int, Event, float]]:
    """For each call of a node: the run it was in, the call, and its time less that of nodes in its bodies."""
    calls = sorted((e for e in events if e["name"].endswith(_NODE_EVENT)), key=_start)
    inner: Counter[int] = Counter()
    around: list[int] = []
    for i, call in enumerate(calls):
        while around and _end(calls[around[-1]]) <= call["ts"]:
            around.pop()
        if around:
            inner[around[-1]] += call["dur"]
        if call["args"]["op_name"] in _WITH_BODIES:
            around.append(i)
    starts = [window["ts"] for window in windows]
    for i, call in enumerate(calls):
        run = bisect_right(starts, call["ts"]) - 1
        if run >= 0:
            yield run, call, call["dur"] - inner[i]


def _sources(file: ir.Model, executed: ir.Graph | None) -> dict[str, tuple[str, ...]]:
    """What executed nodes stand for; a node of the file that kept its name stands for itself."""
    sources: dict[str, tuple[str, ...]] = {n.name: (n.name,) for g in file.graphs() for n in g if n.name}
    return sources if executed is None else sources | lineage(file.graph, executed)


def _in_float(executed: ir.Graph) -> Iterator[str]:
    """The nodes on a way from a DequantizeLinear to a QuantizeLinear: these were not fused to int8."""
    behind: set[ir.Value | None] = set()
    for node in executed:
        if _dequantizes_activation(node) or (node.op_type not in _QDQ and behind.intersection(node.inputs)):
            behind.update(node.outputs)
    before: set[ir.Value | None] = set()
    for node in reversed(executed):
        if node.op_type == "QuantizeLinear":
            before.update(node.inputs[:1])
        elif node.op_type not in _QDQ and before.intersection(node.outputs):
            before.update(node.inputs)
    for node in executed:
        if (
            node.op_type not in _QDQ
            and behind.intersection(node.inputs)
            and before.intersection(node.outputs)
        ):
            yield node.name or ""


def _dequantizes_activation(node: ir.Node) -> bool:
    source = node.inputs[0] if node.op_type == "DequantizeLinear" else None
    return source is not None and not source.is_initializer()


def _assigned(session: onnxruntime.InferenceSession) -> dict[str, int]:
    """Nodes per provider, as onnxruntime assigned them, before the last of its fusions."""
    if not hasattr(session, "get_provider_graph_assignment_info"):  # before onnxruntime 1.24
        return {}
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
    return dict(counts)
