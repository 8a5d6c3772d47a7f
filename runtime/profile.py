"""Where the time of a model goes: per node, told in the names of the file.

The times are onnxruntime's own, of the nodes it executes after its fusions and changes of layout;
`lineage` says what each of them stands for. Measuring costs time itself: believe the shares, and
`latency` for the whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgewise.runtime.costs import KINDS, Call, Kind, Operand, computes_in, kind, macs, moved_bytes
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Array, Feed
from edgewise.runtime.isolated import IsolatedModel, WorkerFailed, save_feed
from edgewise.runtime.lineage import lineage, weight_of_convolution
from edgewise.runtime.machine import cores_for
from edgewise.runtime.plausible import plausible_feed
from edgewise.runtime.session import PROVIDERS, Grant, grant_of, open_session, weight_bytes
from edgewise.runtime.statistics import trimmed_mean
from edgewise.runtime.trace import Event, Trace, record, tracing

if TYPE_CHECKING:
    import onnxruntime

# The others compile what they take, which cannot be saved, or execute another graph when it is saved (dml).
_SHOWS_ITS_GRAPH = frozenset({"cpu", "cuda", "xnnpack"})
_QDQ = frozenset({"DequantizeLinear", "QuantizeLinear"})
_BLOCKED_DOMAIN = "com.microsoft.nchwc"
_LARGEST_PROTO = 2**30
_LONG_NAMES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True)
class _Work:
    """Time and what was done in it, in one run."""

    ms: float
    share: float
    """Of the time of all nodes, 0 to 1."""
    macs: int | None
    """Multiply-accumulates; None where they cannot be told."""
    bytes: int
    """What is read and written, each tensor once, weights included."""

    @property
    def gflops(self) -> float | None:
        """Billions of operations a second, a multiply-accumulate being two; None where there are none."""
        return 2 * self.macs / self.ms / 1e6 if self.macs and self.ms else None

    @property
    def gbps(self) -> float | None:
        """Billions of bytes a second; None where none are moved."""
        return self.bytes / self.ms / 1e6 if self.bytes and self.ms else None


@dataclass(frozen=True)
class NodeTime(_Work):
    """What one executed node takes in a run, in milliseconds, without the nodes inside its bodies."""

    name: str
    op_type: str
    kind: Kind
    dtype: str
    """The type it computes in, such as float32 or uint8."""
    provider: str
    calls: int
    """In one run: more than one inside a loop."""
    sources: tuple[str, ...]
    """The nodes of the file it stands for, in order, but those that only quantize and dequantize last; none
    if onnxruntime inserted it."""


@dataclass(frozen=True)
class OpTime(_Work):
    """What all executed nodes of one type take in a run, and the types they compute in."""

    op_type: str
    nodes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class KindTime(_Work):
    """What all executed nodes of one kind take in a run, and the types they compute in."""

    kind: Kind
    nodes: int
    dtypes: tuple[str, ...]


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
    grant: Grant
    """Which execution provider took how many nodes, by onnxruntime's own record; where it keeps none, by
    that of the executed nodes."""
    in_float: tuple[str, ...] | None
    """Executed nodes that compute in float between a DequantizeLinear and a QuantizeLinear; None where
    the provider does not show the graph it executes."""

    @property
    def nodes_ms(self) -> float:
        """The time of all nodes."""
        return sum(node.ms for node in self.nodes)

    @property
    def assigned(self) -> Mapping[str, int]:
        """Nodes per execution provider, see `grant`."""
        return self.grant.assigned

    @property
    def elsewhere(self) -> Mapping[str, Mapping[str, int]]:
        """For every other provider than the one asked for, how many nodes of which operator it executed."""
        asked, _ = PROVIDERS[self.provider]
        others = _groups((n for n in self.nodes if n.provider != asked), lambda node: node.provider)
        return {name: Counter(node.op_type for node in nodes) for name, nodes in others.items()}

    def by_op(self) -> tuple[OpTime, ...]:
        """The nodes' times added up by operator, the longest first."""
        groups = _groups(self.nodes, lambda node: node.op_type)
        sums = (OpTime(**_sum(group), op_type=op) for op, group in groups.items())
        return tuple(sorted(sums, key=lambda o: -o.ms))

    def by_kind(self) -> tuple[KindTime, ...]:
        """The nodes' times added up by kind of work, the longest first."""
        groups = _groups(self.nodes, lambda node: node.kind)
        sums = (KindTime(**_sum(groups[k]), kind=k) for k in KINDS if k in groups)
        return tuple(sorted(sums, key=lambda k: -k.ms))

    def share_by_provider(self) -> dict[str, float]:
        """The share of the nodes' time that each execution provider took."""
        shares: defaultdict[str, float] = defaultdict(float)
        for node in self.nodes:
            shares[node.provider] += node.share
        return dict(shares)

    def copies(self) -> int:
        """Copies between devices in one run."""
        return sum(node.calls for node in self.nodes if node.kind == "copy between devices")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them, with the sums by operator, kind and provider."""
        data = dataclasses.asdict(self)
        data["nodes"] = [{**node, "sources": list(node["sources"])} for node in data["nodes"]]
        data["in_float"] = None if self.in_float is None else list(self.in_float)
        return {
            **data,
            "by_op": [{**dataclasses.asdict(o), "dtypes": list(o.dtypes)} for o in self.by_op()],
            "by_kind": [{**dataclasses.asdict(k), "dtypes": list(k.dtypes)} for k in self.by_kind()],
            "share_by_provider": self.share_by_provider(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Profile:
        """The profile that `to_dict` wrote."""
        fields = {f.name: data[f.name] for f in dataclasses.fields(cls)}
        nodes = (NodeTime(**{**node, "sources": tuple(node["sources"])}) for node in data["nodes"])
        in_float = None if data["in_float"] is None else tuple(data["in_float"])
        grant = Grant(**data["grant"])
        return cls(**{**fields, "nodes": tuple(nodes), "grant": grant, "in_float": in_float})


def _groups(nodes: Iterable[NodeTime], key: Callable[[NodeTime], str]) -> dict[str, list[NodeTime]]:
    groups: defaultdict[str, list[NodeTime]] = defaultdict(list)
    for node in nodes:
        groups[key(node)].append(node)
    return groups


def _sum(nodes: list[NodeTime]) -> dict[str, Any]:
    """What the nodes do together; of the multiply-accumulates those that can be told."""
    counted = [node.macs for node in nodes if node.macs is not None]
    return {
        "ms": sum(node.ms for node in nodes),
        "share": sum(node.share for node in nodes),
        "macs": sum(counted) if counted else None,
        "bytes": sum(node.bytes for node in nodes),
        "nodes": len(nodes),
        "dtypes": tuple(sorted({node.dtype for node in nodes if node.dtype})),
    }


def profile_isolated(
    path: Path,
    feed: Feed | None = None,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    runs: int | None = None,
    seed: int = 0,
    timeout: float = 120.0,
) -> Profile:
    """`profile` in a process of its own, pinned to as many cores as `threads`, which may crash or hang.

    On CUDA every node waits there for its work to end, which otherwise runs on while the next is
    started: the sum of the nodes is more than the latency. `timeout` is in seconds. Raises
    `EdgewiseError` with the cause where there is no profile, `ProviderError` where the provider is not
    to be had.
    """
    with profiler(feed, provider=provider, threads=threads, seed=seed, timeout=timeout) as ask:
        return ask(path, runs)


@contextlib.contextmanager
def profiler(
    feed: Feed | None, *, provider: str, threads: int | None, seed: int, timeout: float
) -> Iterator[Callable[[Path, int | None], Profile]]:
    """A process in which models are profiled one by one: called with a file and a number of runs."""
    cores = () if threads is None else cores_for(threads)
    with tempfile.TemporaryDirectory(prefix="edgewise-") as name:
        folder = Path(name)
        asked = {
            "feed": str(save_feed(feed or {}, folder)),
            "inputs": None if feed is None else list(feed),
            "cores": cores,
            "provider": provider,
            "threads": threads,
            "seed": seed,
        }
        with IsolatedModel(folder / "log", threads=threads, timeout=timeout) as worker:
            ready = False

            def ask(path: Path, runs: int | None) -> Profile:
                nonlocal ready
                try:
                    if not ready:
                        worker.wait_until_ready()
                        ready = True
                    reply = worker.ask("profile", model=str(path), runs=runs, **asked)
                except WorkerFailed as failure:
                    raise EdgewiseError(f"{path} could not be profiled: {failure}") from None
                return Profile.from_dict(reply["profile"])

            yield ask


def profile(
    path: Path,
    feed: Feed | None = None,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    runs: int | None = None,
    seed: int = 0,
) -> Profile:
    """Run the model in this process under onnxruntime's profiler, `runs` times after a warm-up.

    Without `runs`, for a few seconds. Without a `feed` its inputs are seeded and of plausible values,
    with one for every dynamic dimension. Raises `InputError` where the model cannot be loaded or does
    not run on these inputs, `ProviderError` where the provider is not to be had.
    """
    if runs is not None and runs < 2:
        raise InputError(f"runs must be 2 or more, not {runs}")
    with tempfile.TemporaryDirectory(prefix="edgewise-") as name:
        folder = Path(name)
        session, file = _session(path, folder, provider, threads)
        inputs = plausible_feed(file, seed=seed) if feed is None else feed
        trace = record(session, inputs, runs)
        saved = folder / "executed.onnx"
        executed = ir.load(saved).graph if saved.exists() else None
        nodes = _node_times(trace, _Graphs.of(file, executed))
        in_float = None if executed is None else tuple(_in_float(executed))
    run_ms, _ = trimmed_mean(np.array([run["dur"] for run in trace.runs]) / 1e3)
    return Profile(
        path=str(path),
        provider=provider,
        threads=threads,
        runs=len(trace.runs),
        run_ms=run_ms,
        nodes=nodes,
        grant=_grant(session, provider, nodes),
        in_float=in_float,
    )


def _session(
    path: Path, folder: Path, provider: str, threads: int | None
) -> tuple[onnxruntime.InferenceSession, ir.Model]:
    """A session that records its nodes, and the file it is of, in which every node has a name."""
    plain = open_session(path, provider=provider, threads=threads, record_assignment=True)
    file = ir.load(path)
    executed = folder / "executed.onnx" if provider in _SHOWS_ITS_GRAPH else None
    return tracing(plain, _with_names(file, path, folder), folder, executed), file


def _with_names(file: ir.Model, path: Path, folder: Path) -> Path:
    """The file itself if all its nodes have a name to tell them by, or else a copy in which they do.

    A node without one is called after its first output, as it is in another version of the same file.
    """
    taken = {node.name for node in file.graph}
    if taken.isdisjoint({"", None}):
        return path
    for i, node in enumerate(n for n in file.graph if not n.name):
        name = next((v.name for v in node.outputs if v.name), f"{node.op_type}_{i}")
        node.name = f"{name}_{node.op_type}" if name in taken else name
    copy = folder / "named.onnx"
    large = weight_bytes(file) > _LARGEST_PROTO
    ir.save(file.clone(), copy, external_data="named.data" if large else None)
    return copy


@dataclass(frozen=True)
class _Graphs:
    """The nodes of the file and those that are executed, by name."""

    file: Mapping[str, ir.Node]
    executed: Mapping[str, ir.Node]
    sources: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, file: ir.Model, executed: ir.Graph | None) -> _Graphs:
        """A node of the file that kept its name stands for itself."""
        own = {node.name: node for graph in file.graphs() for node in graph if node.name}
        qdq = {name for name, node in own.items() if node.op_type in _QDQ}
        sources: dict[str, tuple[str, ...]] = {name: (name,) for name in own}
        if executed is None:
            return cls(own, own, sources)
        nodes = {node.name: node for node in executed.all_nodes() if node.name}
        for name, names in lineage(file.graph, executed).items():
            sources[name] = (*(n for n in names if n not in qdq), *(n for n in names if n in qdq))
        return cls(own, nodes, sources)

    def call(self, name: str, event: Event) -> Call:
        """The call that an event tells of."""
        op_type, node = event["args"]["op_name"], self.executed.get(name)
        given = [_operand(item) for item in event["args"].get("input_type_shape", ())]
        outputs = tuple(_operand(item) for item in event["args"].get("output_type_shape", ()))
        if node is None or node.op_type != op_type:
            return Call(op_type, tuple(given), outputs)
        values = {a.name: a.value for a in node.attributes.values() if not a.is_ref()}
        return Call(op_type, tuple(_inputs(node, given)), outputs, values)

    def macs(self, name: str, call: Call) -> int | None:
        """Without those of the channels that the blocked layout adds to fill its last block."""
        count, node, weight = macs(call), self.executed.get(name), call.weight
        if not count or node is None or node.domain != _BLOCKED_DOMAIN or weight is None:
            return count
        sizes = [weight_of_convolution(self.file[s]) for s in self.sources.get(name, ())]
        found = [size for size in sizes if size is not None]
        return count // weight.size * found[0] if len(found) == 1 else count


def _operand(item: Mapping[str, list[int]]) -> Operand:
    ((dtype, shape),) = item.items()
    return Operand(_LONG_NAMES.get(dtype, dtype), tuple(shape))


def _inputs(node: ir.Node, given: list[Operand]) -> Iterator[Operand | None]:
    """The operands of a node by position, of which onnxruntime's event names those it still holds: not the
    absent ones, nor a weight of which a kernel keeps a copy in a layout of its own."""
    left = list(given)
    computed = sum(value is not None and _constant(value) is None for value in node.inputs)
    for value in node.inputs:
        constant = None if value is None else _constant(value)
        if value is None:
            yield None
        elif constant is not None:
            if len(left) > computed and left[0] == constant:
                left.pop(0)
            yield constant
        else:
            computed -= 1
            yield left.pop(0) if left else None


def _constant(value: ir.Value) -> Operand | None:
    """What an initializer or a Constant holds."""
    tensor, producer = value.const_value, value.producer()
    if tensor is None and producer is not None and producer.op_type == "Constant":
        attribute = producer.attributes.get("value")
        tensor = None if attribute is None else attribute.as_tensor()
    if tensor is None:
        return None
    dtype = tensor.dtype.name.lower()
    return Operand(_LONG_NAMES.get(dtype, dtype), tuple(tensor.shape.numpy()))


def _node_times(trace: Trace, graphs: _Graphs) -> tuple[NodeTime, ...]:
    """One entry for each node that ran."""
    own: defaultdict[str, Array] = defaultdict(lambda: np.zeros(len(trace.runs)))
    calls: Counter[str] = Counter()
    last: dict[str, tuple[int, list[Event]]] = {}
    for run, name, event, microseconds in trace.calls():
        own[name][run] += microseconds
        calls[name] += 1
        if name not in last or last[name][0] != run:
            last[name] = run, []
        last[name][1].append(event)
    ms = {name: max(trimmed_mean(times)[0], 0.0) / 1e3 for name, times in own.items()}
    total = sum(ms.values()) or 1.0
    nodes = (
        NodeTime(
            name=name,
            provider=events[0]["args"]["provider"],
            calls=round(calls[name] / len(trace.runs)),
            ms=ms[name],
            share=ms[name] / total,
            sources=graphs.sources.get(name, ()),
            **_work(name, events, graphs),
        )
        for name, (_, events) in last.items()
    )
    return tuple(sorted(nodes, key=lambda node: -node.ms))


def _work(name: str, events: list[Event], graphs: _Graphs) -> dict[str, Any]:
    """What a node did in the calls of one run."""
    calls = [graphs.call(name, event) for event in events]
    counts = [graphs.macs(name, call) for call in calls]
    return {
        "op_type": calls[0].op_type,
        "kind": kind(calls[0]),
        "dtype": computes_in(calls[0]),
        "macs": None if None in counts else sum(c for c in counts if c is not None),
        "bytes": sum(map(moved_bytes, calls)),
    }


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


def _grant(session: onnxruntime.InferenceSession, provider: str, nodes: Iterable[NodeTime]) -> Grant:
    recorded = grant_of(session, provider)
    if recorded.assigned:
        return recorded
    name, _ = PROVIDERS[provider]
    elsewhere = Counter(node.op_type for node in nodes if node.provider != name)
    return Grant(provider, dict(Counter(node.provider for node in nodes)), dict(elsewhere.most_common()))
