"""Which nodes run in int8: the placement of least time, noise at a price, as a minimum cut."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType

import networkx as nx
import onnx_ir as ir

from edgewise.calibration.kernels import activations
from edgewise.passes.graph import constant_of
from edgewise.runtime.profile import NodeTime, Profile

_INT8, _FLOAT = "int8", "float"  # the two sides of the cut
_NOTHING: Mapping[str, float] = MappingProxyType({})
_CALL_MS = 0.002  # of a conversion that was not measured, and then of every element of it
_ELEMENT_MS = 1e-6
_NOISY = "adds noise of"
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


@dataclass(frozen=True)
class Costs:
    """Milliseconds of one run: of nodes by their first output, of conversions by the value converted.

    `apart` is what a node costs in float where the node that it is fused with in float is in int8, by the
    outputs of both. A node without a time takes none, a conversion without one is estimated from `sizes`,
    the elements of every value.
    """

    in_float: Mapping[str, float]
    in_int8: Mapping[str, float]
    quantize: Mapping[str, float] = field(default_factory=dict)
    dequantize: Mapping[str, float] = field(default_factory=dict)
    apart: Mapping[tuple[str, str], float] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict, repr=False)
    border: float = 0.0
    """What the runtime inserts for every element of a value that changes sides, on average: other layouts."""

    def conversion(self, value: str, measured: Mapping[str, float]) -> float:
        """The time to take `value` from one side to the other."""
        size = self.sizes.get(value, 1)
        return measured.get(value, _CALL_MS + _ELEMENT_MS * size) + self.border * size


def costs_of(
    model: ir.Model, in_float: Profile, mixed: Profile, int8: ir.Model, sizes: Mapping[str, int]
) -> Costs:
    """What `model` takes by its profile `in_float`, and what its quantized form `int8` takes by `mixed`.

    All nodes of `model` have names, which those of `int8` that do the same work bear as well.
    """
    outputs = {node.name: node.outputs[0].name or "" for node in model.graph if node.outputs}
    converted = {n.name: n for n in int8.graph if n.op_type in (_QUANTIZE, _DEQUANTIZE)}
    own, other = _times(in_float.nodes, outputs), _times(mixed.nodes, outputs)
    times: dict[str, dict[str, float]] = {_QUANTIZE: {}, _DEQUANTIZE: {}}
    for node in mixed.nodes:
        if node.sources and node.sources[0] in converted:
            conversion = converted[node.sources[0]]
            times[conversion.op_type][_converted(conversion)] = node.ms
    return Costs(
        in_float=own,
        in_int8=other,
        quantize=times[_QUANTIZE],
        dequantize=times[_DEQUANTIZE],
        apart=_apart(in_float.nodes, other, outputs),
        sizes=sizes,
    )


def corrected(
    costs: Costs,
    model: ir.Model,
    floats: Collection[str],
    mixed: Profile,
    placed: ir.Model,
    in_float: Profile,
) -> Costs:
    """`costs` with what the profile `mixed` says of `placed`, which is `model` with `floats` in float."""
    seen = costs_of(model, in_float, mixed, placed, costs.sizes)
    stayed = {name: ms for name, ms in seen.in_int8.items() if name in floats}
    moved = {name: ms for name, ms in seen.in_int8.items() if name not in floats}
    elements = sum(costs.sizes.get(value, 1) for value in (*seen.quantize, *seen.dequantize))
    inserted = _inserted(mixed) - _inserted(in_float)
    return replace(
        costs,
        in_float={**costs.in_float, **stayed},
        in_int8={**costs.in_int8, **moved},
        quantize={**costs.quantize, **seen.quantize},
        dequantize={**costs.dequantize, **seen.dequantize},
        border=max(inserted / elements, 0.0) if elements else costs.border,
    )


def _inserted(profile: Profile) -> float:
    """The time of nodes that stand for none of the file: changes of layout."""
    return sum(node.ms for node in profile.nodes if not node.sources)


def _times(nodes: Iterable[NodeTime], outputs: Mapping[str | None, str]) -> dict[str, float]:
    """The time of every executed node, credited to the first node of the file that it stands for."""
    times: defaultdict[str, float] = defaultdict(float)
    for node in nodes:
        if (name := next((outputs[s] for s in node.sources if s in outputs), None)) is not None:
            times[name] += node.ms
    return dict(times)


def _apart(
    nodes: Iterable[NodeTime], mixed: Mapping[str, float], outputs: Mapping[str | None, str]
) -> dict[tuple[str, str], float]:
    """For nodes that are fused in float: what the later ones took by themselves beside int8."""
    apart = {}
    for node in nodes:
        fused = [outputs[s] for s in node.sources if s in outputs]
        for first, later in pairwise(fused):
            apart[first, later] = mixed.get(later, 0.0)
    return apart


def _converted(node: ir.Node) -> str:
    """The float value that a Q reads or a DQ stands for, by the name it has in the model without them."""
    value = node.inputs[0] if node.op_type == _QUANTIZE else node.outputs[0]
    name = "" if value is None else value.name or ""
    return name.removesuffix(".dequantized").removesuffix(".float")


@dataclass(frozen=True)
class Placement:
    """`floats`: the nodes that stay in float though they could be int8, by first output, and why.

    `ms` is the time it takes by the costs it was made from, `noise` the noise of its int8 nodes.
    """

    floats: Mapping[str, str]
    ms: float
    noise: float


def place(
    model: ir.Model,
    able: Collection[str],
    costs: Costs,
    noise: Mapping[str, float] = _NOTHING,
    price: float = 0.0,
) -> Placement:
    """The placement of least time + `price` x noise, by node of the main graph.

    `able` are the nodes that may be int8, by first output; `noise` is what each of them then adds to the
    outputs, `price` milliseconds for a unit of it. Every node is on one of two sides; a value that is read
    on the side where it is not made is converted once. That is a minimum cut, which is found exactly
    (Stone, "Multiprocessor scheduling with the aid of network flow algorithms", 1977).
    """
    network: nx.DiGraph[object] = nx.DiGraph()
    network.add_nodes_from((_INT8, _FLOAT))
    for tail, head, cost in _edges(model, frozenset(able), costs, noise, price):
        if network.has_edge(tail, head):
            cost += network[tail][head]["capacity"]
        network.add_edge(tail, head, capacity=cost)
    total, (in_int8, _) = nx.minimum_cut(network, _INT8, _FLOAT)
    chosen = {name for name in able if ("node", name) in in_int8}
    added = sum(noise.get(name, 0.0) for name in chosen)
    floats = {name: _why(name, costs, noise, price) for name in able if name not in chosen}
    return Placement(floats, total - price * added, added)


def _edges(
    model: ir.Model, able: frozenset[str], costs: Costs, noise: Mapping[str, float], price: float
) -> Iterator[tuple[object, object, float]]:
    """Pairs (a, b, cost): what it costs that a is in int8 and b is not."""
    for node in model.graph:
        if not node.outputs or node.op_type == "Constant":
            continue
        name = node.outputs[0].name or ""
        yield _INT8, ("node", name), costs.in_float.get(name, 0.0)
        if name in able:
            yield ("node", name), _FLOAT, costs.in_int8.get(name, 0.0) + price * noise.get(name, 0.0)
        else:
            yield ("node", name), _FLOAT, math.inf
    for (first, later), cost in costs.apart.items():
        yield ("node", first), ("node", later), cost
    for value in _values(model):
        yield from _conversions(value, costs)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """What flows between nodes, constants aside."""
    yield from model.graph.inputs
    for node in model.graph:
        yield from (v for v in node.outputs if constant_of(v) is None)


def _conversions(value: ir.Value, costs: Costs) -> Iterator[tuple[object, object, float]]:
    """A value is quantized once for all its readers in int8, and dequantized once for all in float."""
    name = value.name or ""
    maker: object = _side(value.producer())
    read_as_int8, read_as_float = ("quantized", name), ("dequantized", name)
    for use in value.uses():
        if value in activations(use.node):
            yield _side(use.node), read_as_int8, math.inf
        yield read_as_float, _side(use.node), math.inf
    if value.is_graph_output():
        yield read_as_float, _FLOAT, math.inf
    yield read_as_int8, maker, costs.conversion(name, costs.quantize)
    if maker != _FLOAT:
        yield maker, read_as_float, costs.conversion(name, costs.dequantize)


def _side(node: ir.Node | None) -> object:
    """What stands for a node of the main graph; inputs and the bodies of others are in float."""
    if node is None or node.graph is None or not isinstance(node.graph, ir.Graph) or not node.outputs:
        return _FLOAT
    return ("node", node.outputs[0].name or "")


def _why(name: str, costs: Costs, noise: Mapping[str, float], price: float) -> str:
    in_float, in_int8 = costs.in_float.get(name, 0.0), costs.in_int8.get(name, 0.0)
    if price * noise.get(name, 0.0) > abs(in_float - in_int8):
        return noisy(noise[name])
    if in_int8 >= in_float:
        return f"{_micro(in_int8)} in int8, {_micro(in_float)} in float"
    return f"saves {_micro(in_float - in_int8)} in int8, conversions cost more"


def noisy(share: float) -> str:
    """Why a node is in float that adds so much noise, as a share of the signal."""
    return f"{_NOISY} {10 * math.log10(share):.0f} dB to the outputs" if share > 0 else f"{_NOISY} others"


def is_noisy(why: str) -> bool:
    """Whether a node is in float for the noise it would add."""
    return why.startswith(_NOISY)


def _micro(ms: float) -> str:
    return f"{ms * 1e3:.0f} us"
