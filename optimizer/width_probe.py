"""Measure a `WidthTable` on the target.

Layers that compute are timed at a grid of widths, all points of a kind in one model of nothing else: that
shows where kernels like one width better than the next, with the blocks in which they work where the grid is
too coarse. The model itself is profiled at a few widths: that tells what fusions, layouts and caches make of
the layers there, and what lies between them.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.optimizer import cache, files
from edgewise.optimizer.kernel_blocks import Alone, Blocks, kernel_blocks
from edgewise.optimizer.layer_models import Grid, empty_nodes, points_of, side_by_side
from edgewise.optimizer.width_table import Kind, Timing, WidthTable
from edgewise.passes.channels import ChannelGraph
from edgewise.passes.graph import opset
from edgewise.passes.infer_shapes import shapes_on
from edgewise.passes.remove_channels import RemoveChannels
from edgewise.runtime.costs import macs
from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.evaluate import Feed
from edgewise.runtime.machine import describe
from edgewise.runtime.profile import NodeTime, profiler
from edgewise.runtime.profile_rounds import Ask, in_turns, profile_in_turns
from edgewise.training.costs import Layer, Widths, full_width, layers_of
from edgewise.training.selection import uniform

Form = Callable[[ir.Model], ir.Model]
"""What is made of a model before it runs on the target, such as its int8 form."""
Steps = Callable[[int, int], None]

_RATIOS = (0.0, 0.5, 0.75)
"""How much of every group is missing where the whole model is profiled."""
_NARROWEST = 1 / 8
_ROUNDS, _ONCE_MORE = 6, 2  # in turns: a machine is slow for seconds on end, and then for all alike
_STEEPEST = 2.0  # how much slower than a wider layer one of odd width may be
_POINTS = {1: 24, 2: 8, 3: 4}
"""The most widths along an axis, by how many axes there are; with more axes nothing is timed alone."""
_LEAST_MS = 2e-4
_KNOWN = 0.9  # of the multiply-accumulates have to be of layers that are found again
_FINE = 16  # kernels like its multiples everywhere


@dataclass(frozen=True)
class Bench:
    """How widths are timed: where, in steps of `multiple`, and in which form.

    With `int8` layers stand between QuantizeLinear and DequantizeLinear, and `form` has to quantize the
    model.
    """

    provider: str = "cpu"
    threads: int | None = None
    multiple: int = 4
    int8: bool = False
    form: Form = lambda model: model
    timeout: float = 120.0


class UnknownLayersError(EdgewiseError):
    """What the form computes with are other layers than the model's."""


@dataclass(frozen=True)
class _Network:
    """The model as a whole at some widths: what each of its layers took, by first output."""

    widths: Widths
    ms: Mapping[str, float]


def measure_widths(
    model: ir.Model, feed: Feed, bench: Bench, progress: Steps = lambda done, steps: None
) -> WidthTable:
    """The table of `model` run on `feed`.

    Raises `EdgewiseError` where the model cannot be profiled, or nothing of it can be pruned, and
    `UnknownLayersError` where the bench's form has other layers.
    """
    shapes = shapes_on(model, {name: np.shape(array) for name, array in feed.items()})
    graph = ChannelGraph.of(model.graph, opset(model))
    kinds: dict[str, list[Kind]] = defaultdict(list)
    for layer in layers_of(graph, shapes):
        kind = Kind.of(graph, layer)
        kinds[kind.text].append(kind)
    progress(0, len(kinds) + 1)
    timings = {}
    with profiler(None, provider=bench.provider, threads=bench.threads, seed=0, timeout=bench.timeout) as ask:
        empty = _empty(ask)
        layers = [kind.layer for same in kinds.values() for kind in same]
        networks = _networks(model, graph, layers, feed, bench, empty)
        alone = partial(_alone, opset=opset(model), bench=bench, ask=ask, empty=empty)
        blocks = kernel_blocks([same[0] for same in kinds.values()], alone)
        for i, (text, same) in enumerate(kinds.items()):
            progress(i + 1, len(kinds) + 1)
            timings[text] = _timing(same, networks, bench, alone, blocks)
    progress(len(kinds) + 1, len(kinds) + 1)
    return WidthTable(
        machine="; ".join(_facts()),
        provider=bench.provider,
        threads=bench.threads,
        shapes=MappingProxyType(shapes),
        timings=MappingProxyType(timings),
    )


def _facts() -> tuple[str, ...]:
    """What times depend on beside the layer and the bench."""
    machine = describe()
    return machine.cpu, " ".join(machine.isa), f"onnxruntime {machine.onnxruntime}", machine.build


def _empty(ask: Ask) -> float:
    """Milliseconds that a node takes which does nothing: what it costs to measure one."""
    with tempfile.TemporaryDirectory(prefix="edgewise-") as folder:
        path = files.save(empty_nodes(), Path(folder) / "empty.onnx")
        (profile,) = in_turns(ask, [path], _ROUNDS)
    return min(node.ms for node in profile.nodes)


def _timing(
    kinds: Sequence[Kind],
    networks: Sequence[_Network],
    bench: Bench,
    alone: Alone,
    blocks: Blocks,
) -> Timing:
    """The timing of layers of one kind."""
    kind = kinds[0]
    grid = _grid(kind, bench.multiple)
    ms = alone(kind, grid) if grid else ()
    known = tuple(blocks.get((kind.layer.node.op_type, written), 1) for written in kind.written)
    timing = Timing(grid, ms, (), known) if ms else Timing((), (), ())
    return dataclasses.replace(timing, network=tuple(_curve(timing, kinds, networks)))


def _grid(kind: Kind, multiple: int) -> Grid:
    """The widths at which a kind is timed, ascending, for each of its variables; none for one that only moves
    numbers."""
    if not kind.computes or len(kind.variables) not in _POINTS:
        return ()
    most = _POINTS[len(kind.variables)]
    return tuple(
        _axis(full_width(slot), channels, multiple, most)
        for slot, channels in zip(kind.variables, kind.channels, strict=True)
    )


def _axis(full: int, channels: int, multiple: int, most: int) -> tuple[int, ...]:
    """Widths from the narrowest to the full one that can come up, all of them or some of the finest."""
    each = full // channels
    step = int(np.lcm(multiple, each))
    every = [w for w in range(step, full, step) if w >= full * _NARROWEST] + [full]
    if len(every) > most:
        coarse = int(np.lcm(_FINE, each))
        ideal = np.linspace(every[0], full, most)
        every = sorted({min(max(round(w / coarse), 1) * coarse, full) for w in ideal[:-1]} | {full})
    return tuple(every)


def _alone(kind: Kind, grid: Grid, *, opset: int, bench: Bench, ask: Ask, empty: float) -> tuple[float, ...]:
    """Milliseconds at every point of the grid; nothing where the layer cannot stand alone.

    Times that are known from before are measured once more, for nobody knows what disturbed them then.
    """
    asked = (str(bench.provider), str(bench.threads), str(bench.int8), str(opset), kind.text, str(grid))
    key = cache.key_of("widths", *_facts(), *asked)
    known = cache.load(key)
    made = side_by_side(kind, points_of(grid), opset, int8=bench.int8)
    if made is None:
        return ()
    with tempfile.TemporaryDirectory(prefix="edgewise-") as folder:
        path = files.save(made, Path(folder) / "layers.onnx")
        try:
            (profile,) = in_turns(ask, [path], _ROUNDS if known is None else _ONCE_MORE)
        except EdgewiseError:
            return ()
    least = {name: node.ms for node in profile.nodes for name in node.sources}
    names = [str(point) for point in points_of(grid)]
    if not all(name in least for name in names):
        return ()
    now = [_net(least[name], empty) for name in names]
    ms = _plausible(now if known is None else np.minimum(now, known["ms"]).tolist(), grid)
    cache.store(key, {"ms": ms})
    return ms


def _net(ms: float, empty: float) -> float:
    """What a node took without what it costs to measure it, and never nothing."""
    return max(ms - empty, _LEAST_MS)


def _plausible(ms: Sequence[float], grid: Grid) -> tuple[float, ...]:
    """The times of a grid without those that are far above what a wider layer takes: they were disturbed."""
    array = np.array(ms).reshape([len(axis) for axis in grid])
    wider = array
    for axis in range(array.ndim):
        wider = np.flip(np.minimum.accumulate(np.flip(wider, axis), axis), axis)
    return tuple(np.minimum(array, _STEEPEST * wider).ravel().tolist())


def _curve(
    timing: Timing, kinds: Sequence[Kind], networks: Sequence[_Network]
) -> Iterator[tuple[float, float]]:
    """From what layers of a kind take alone to what they took in the networks, on average."""
    found = {}
    for network in networks[::-1]:
        bases, times = [], []
        for kind in kinds:
            widths = {slot: network.widths[slot] for slot in kind.layer.slots}
            bases.append(timing.base([widths[slot] for slot in kind.variables], kind.layer.call(widths)))
            times.append(network.ms.get(_name(kind.layer.node), 0.0))
        found[float(np.mean(bases))] = float(np.mean(times))
    bases, least = sorted(found), np.inf
    for base in reversed(bases):
        least = found[base] = min(found[base], least)
    yield from ((base, found[base]) for base in bases)


def _networks(
    model: ir.Model, graph: ChannelGraph, layers: Sequence[Layer], feed: Feed, bench: Bench, empty: float
) -> list[_Network]:
    """The model at all ratios, profiled in turns."""
    scores = {group.name: np.zeros(group.size) for group in graph.groups}
    plans = [uniform(model, scores, r, multiple=bench.multiple, floor=_NARROWEST) for r in _RATIOS]
    full = {slot: full_width(slot) for layer in layers for slot in layer.slots}
    weights = {_name(layer.node): float(macs(layer.call(full)) or 0) for layer in layers}
    with tempfile.TemporaryDirectory(prefix="edgewise-") as folder:
        paths = []
        for i, plan in enumerate(plans):
            made = _named(bench.form(RemoveChannels(plan).on(model)), layers, weights)
            paths.append(files.save(made, Path(folder) / f"{i}.onnx"))
        profiles = profile_in_turns(
            paths,
            feed,
            provider=bench.provider,
            threads=bench.threads,
            rounds=_ROUNDS,
            timeout=bench.timeout,
        )
    networks = []
    for plan, profile in zip(plans, profiles, strict=True):
        cuts = plan.cuts(graph)
        widths = {slot: int((~graph.leaving(slot, cuts)).sum()) for slot in full}
        ms = _shared_out(profile.nodes, weights, empty)
        if bench.int8 and sum(w for name, w in weights.items() if ms.get(name)) < _KNOWN * sum(
            weights.values()
        ):
            raise UnknownLayersError("the int8 form has other layers than the model")
        networks.append(_Network(widths, ms))
    return networks


def _named(made: ir.Model, layers: Sequence[Layer], weights: Mapping[str, float]) -> ir.Model:
    """With nodes called after the layers that they are.

    Those that compute are the same in the same order, or else, like all others, have the same first output.
    """
    made = made.clone()
    computing = [layer.node for layer in layers if weights[_name(layer.node)]]
    order = {node: i for i, node in enumerate(computing[0].graph)} if computing and computing[0].graph else {}
    computing.sort(key=lambda node: order[node])
    types = {node.op_type for node in computing}
    twins = [node for node in made.graph if node.op_type in types and node.domain == ""]
    for node in made.graph:
        node.name = _name(node)
    if [n.op_type for n in twins] == [n.op_type for n in computing]:
        for node, twin in zip(computing, twins, strict=True):
            twin.name = _name(node)
    return made


def _name(node: ir.Node) -> str:
    return next((v.name for v in node.outputs if v.name), "")


def _shared_out(nodes: Sequence[NodeTime], weights: Mapping[str, float], empty: float) -> dict[str, float]:
    """What every layer took, of executed nodes that stand for several what its computing is of it.

    What onnxruntime put in between belongs to all in proportion.
    """
    ms: dict[str, float] = defaultdict(float)
    for node in nodes:
        own = [name for name in node.sources if name in weights]
        total = sum(weights[name] for name in own)
        for name in own:
            ms[name] += _net(node.ms, empty) * (weights[name] / total if total else 1 / len(own))
    known, every = sum(ms.values()), sum(_net(node.ms, empty) for node in nodes)
    return {name: took * every / known for name, took in ms.items()}
