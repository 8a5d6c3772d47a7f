"""Where int8 begins and ends: the nodes that run in it, and the values that share a scale."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass

import onnx_ir as ir

from edgewise.calibration.kernels import UNBOUNDED, Bounds, activations, biased_by, cut_bounds, refusal
from edgewise.calibration.target import AVERAGES, SHRINKING, Target
from edgewise.passes.graph import only_user, opset
from edgewise.passes.movers import CUTS
from edgewise.passes.quant_plan import NEIGHBOURS


@dataclass(frozen=True)
class Regions:
    """`forms` of the nodes that are not float, `reasons` of those that are (see `NodePlan`).

    `sources` maps every value to be quantized, in the graph's order, to the value whose range it takes.
    """

    forms: Mapping[ir.Node, str]
    reasons: Mapping[ir.Node, str]
    sources: Mapping[ir.Value, ir.Value]


def find_regions(
    model: ir.Model,
    target: Target,
    exclude: Collection[str] = (),
    barred: Mapping[ir.Node, str] | None = None,
) -> Regions:
    """The nodes of the main graph worth running in int8 on `target`.

    Anchors (convolutions, matrix products) are quantized for themselves. A follower joins where one of
    its inputs comes out of int8, and all do or its result goes back into int8 (an average only then); an
    operator that moves elements joins where it lies between. `exclude` holds names or operator types of
    nodes that stay in float; `barred` are further nodes that have to, with the reason.
    """
    reasons = _reasons(model, target, frozenset(exclude), barred or {})
    scope = _Scope(tuple(model.graph), target, {n for n in model.graph if n not in reasons})
    scope.settle()
    reasons |= {n: NEIGHBOURS for n in scope.order if n not in reasons and n not in scope.chosen}
    return Regions({n: scope.form(n) for n in scope.order if n in scope.chosen}, reasons, scope.sources())


def _reasons(
    model: ir.Model, target: Target, exclude: frozenset[str], barred: Mapping[ir.Node, str]
) -> dict[ir.Node, str]:
    """What keeps single nodes in float, whatever their neighbours do."""
    reasons: dict[ir.Node, str] = {}
    for node in model.graph:
        if opset(model) < 13:
            reasons[node] = "opset below 13: upgrade the model first"
        elif node.op_type in exclude or node.name in exclude:
            reasons[node] = "excluded"
        elif (reason := barred.get(node) or refusal(node, target)) is not None:
            reasons[node] = reason
    return reasons


@dataclass
class _Scope:
    """A graph's nodes in order and, of them, those chosen for int8 so far."""

    order: tuple[ir.Node, ...]
    target: Target
    chosen: set[ir.Node]

    def settle(self) -> None:
        """Drop what has no reason to be in int8 until all that is left has one: the largest such set."""
        while dropped := self._unfounded():
            self.chosen -= dropped

    def _unfounded(self) -> set[ir.Node]:
        demanded = self._demanded()
        produced = self._produced(demanded)
        return {n for n in self.chosen if not self._founded(n, demanded, produced)}

    def _demanded(self) -> set[ir.Value]:
        """Values that reach an anchor through chosen nodes only."""
        demanded: set[ir.Value] = set()
        for node in reversed(self.order):
            if node in self.chosen and (node.op_type in self.target.anchors or _any(node.outputs, demanded)):
                demanded.update(activations(node))
        return demanded

    def _produced(self, demanded: Set[ir.Value]) -> set[ir.Value]:
        """Values that chosen nodes hand on in int8."""
        produced: set[ir.Value] = set()
        for node in self.order:
            if node in self.chosen and self._hands_on(node, demanded, produced):
                produced.update(node.outputs)
        return produced

    def _hands_on(self, node: ir.Node, demanded: Set[ir.Value], produced: Set[ir.Value]) -> bool:
        if not self._computes(node):
            return node.inputs[0] in produced
        return _any(node.outputs, demanded) or not self._can_give_float(node)

    def _can_give_float(self, node: ir.Node) -> bool:
        """Whether a reader in float gets the result of `node` without a detour over integers.

        A cut or a bias behind a product is fused with it, in float, unless a QuantizeLinear follows.
        """
        if node.op_type not in self.target.float_outputs and biased_by(node) is None:
            return False
        reader = only_user(node.outputs[0])
        if reader is None:
            return True
        return reader.op_type not in CUTS and (biased_by(reader) is None or reader in self.chosen)

    def _founded(self, node: ir.Node, demanded: Set[ir.Value], produced: Set[ir.Value]) -> bool:
        inputs = activations(node)
        if node.op_type in self.target.anchors:
            return True
        if biased_by(node) is not None:
            return inputs[0].producer() in self.chosen
        if node.op_type in self.target.followers:
            at_hand = all(v in produced or self._feeds_anchor(v) for v in inputs)
            complete = at_hand and node.op_type not in AVERAGES
            return _any(inputs, produced) and (complete or _any(node.outputs, demanded))
        if inputs[0] in produced:
            return True
        readers = {use.node for v in node.outputs for use in v.uses()}
        public = any(v.is_graph_output() for v in node.outputs)
        wanted = _any(node.outputs, demanded) and readers <= self.chosen and not public
        return node.op_type not in CUTS | SHRINKING and wanted

    def _feeds_anchor(self, value: ir.Value) -> bool:
        readers = (use.node for use in value.uses())
        return any(n in self.chosen and n.op_type in self.target.anchors for n in readers)

    def _computes(self, node: ir.Node | None) -> bool:
        """Whether `node` gives its output a range of its own."""
        return node is not None and node.op_type in self.target.anchors | self.target.followers

    def form(self, node: ir.Node) -> str:
        """One of `edgewise.passes.quant_plan.FORMS`."""
        if node.op_type in CUTS and self.folds(node):
            return "folded"
        return "integer" if node.op_type in self.target.integer_movers else "int8"

    def folds(self, cut: ir.Node) -> bool:
        """Whether the quantized range can do the work of a Relu or Clip.

        It can if all that its producer computes goes through the cut, over operators that move elements
        or none, and if zero is not cut off.
        """
        low, high = cut_bounds(cut)
        source = self._sole_source(cut.inputs[0])
        if source is None or not low <= 0 <= high or not self._computes(source.producer()):
            return False
        return source is cut.inputs[0] or not self.target.symmetric

    def _sole_source(self, value: ir.Value | None) -> ir.Value | None:
        """The value that `value` was moved from, if every value on the way has a single reader."""
        while value is not None and only_user(value) is not None:
            node = value.producer()
            if node is None or node not in self.chosen or not self._moves(node) or len(node.outputs) > 1:
                return value
            value = node.inputs[0]
        return None

    def _moves(self, node: ir.Node) -> bool:
        """Whether the output of `node` lies on the grid of its input."""
        return not self._computes(node) and not (node.op_type in CUTS and self.folds(node))

    def sources(self) -> dict[ir.Value, ir.Value]:
        """Every value to be quantized, with the value of its group that comes last in the graph, of those
        that are not moved from another one: a range that is cut or joined is known behind the cut."""
        groups = _Groups()
        for node in self.order:
            if node not in self.chosen:
                continue
            for read, written in self._ties(node):
                groups.join(read, written)
        place = {v: i for i, n in enumerate(self.order) for v in n.outputs}
        values = sorted(self._quantized(), key=lambda v: place.get(v, -1))
        last: dict[ir.Value, ir.Value] = {}
        for value in values:
            root, producer = groups.root(value), value.producer()
            if root not in last or producer not in self.chosen or not self._moves(producer):
                last[root] = value
        return {v: last[groups.root(v)] for v in values}

    def _quantized(self) -> list[ir.Value]:
        """Values that some chosen node reads or writes as integers, each once."""
        produced = self._produced(self._demanded())
        found: dict[ir.Value, None] = {}
        for node in self.order:
            if node not in self.chosen:
                continue
            written = (v for v in node.outputs if v in produced or not self._computes(node))
            touched = (*activations(node), *written)
            found.update(dict.fromkeys(v for v in touched if not self._is_inside(v)))
        return list(found)

    def _is_inside(self, value: ir.Value) -> bool:
        """Whether `value` is never stored: it lies before the cut or the bias that is fused with its node."""
        producer, reader = value.producer(), only_user(value)
        if producer not in self.chosen or reader not in self.chosen or not self._computes(producer):
            return False
        return biased_by(reader) is not None or (reader.op_type in CUTS and self.folds(reader))

    def _ties(self, node: ir.Node) -> Iterable[tuple[ir.Value, ir.Value]]:
        """Pairs of values that have to, or had better, lie on the same grid."""
        if not self._computes(node):
            return [(v, o) for v in activations(node) if not self._is_inside(v) for o in node.outputs]
        if node.op_type != "Concat":
            return []
        bounds = [self._bounds(v) for v in activations(node)]
        hull = (min(low for low, _ in bounds), max(high for _, high in bounds))
        alike = (v for v, b in zip(activations(node), bounds, strict=True) if b == hull)
        return [(v, node.outputs[0]) for v in alike if self._sole_source(v) is not None]

    def _bounds(self, value: ir.Value) -> Bounds:
        """The range that the cut in front of `value`, if there is one, does not let it leave."""
        node = value.producer()
        while node is not None and node in self.chosen and self._moves(node):
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        return cut_bounds(node) if node in self.chosen and node.op_type in CUTS else UNBOUNDED


class _Groups:
    """Disjoint sets of values."""

    def __init__(self) -> None:
        self._parent: dict[ir.Value, ir.Value] = {}

    def root(self, value: ir.Value) -> ir.Value:
        while (parent := self._parent.get(value, value)) is not value:
            self._parent[value] = value = self._parent.get(parent, parent)
        return value

    def join(self, a: ir.Value, b: ir.Value) -> None:
        self._parent[self.root(a)] = self.root(b)


def _any(values: Iterable[ir.Value | None], among: Set[ir.Value]) -> bool:
    return any(v in among for v in values)
