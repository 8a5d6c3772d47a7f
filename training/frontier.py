"""Run samples through a model piece by piece, so that a layer can change once what feeds it is settled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgewise.passes.base import bodies_of
from edgewise.passes.graph import constant_of
from edgewise.runtime.evaluate import Evaluator, Feed


class Frontier:
    """The values that are alive in front of one node of a model, for every feed.

    `advance` moves on to a later node and runs what lies between. Where the values of all feeds fit into
    `memory` bytes they are kept, and each node is run once; where they do not, each pass over the feeds
    starts again from those that were kept last, or from the feeds. The nodes behind the frontier may change
    their constants; the nodes before it may not any more.
    """

    def __init__(
        self, model: ir.Model, feeds: Iterable[Feed], *, memory: int, threads: int | None = None
    ) -> None:
        self._model = model
        self._feeds: Iterable[Feed] = feeds
        self._kept: Sequence[str] = tuple(v.name or "" for v in model.graph.inputs if v.const_value is None)
        self._memory = memory
        self._threads = threads
        self._nodes = {node: i for i, node in enumerate(model.graph)}
        self._last_use = _last_uses(self._nodes)
        self._ahead: Evaluator | None = None
        self._wanted: Sequence[str] = self._kept

    def has(self, value: ir.Value) -> bool:
        """Whether the value of this name is alive in front of the node."""
        return value.name in self._wanted

    def advance(self, node: ir.Node) -> None:
        """Stand in front of `node`, which lies behind every node that was asked for before."""
        self._wanted = self._alive(node)
        missing = [name for name in self._wanted if name not in self._kept]
        self._ahead = self._evaluator(missing) if missing else None
        if missing:
            self._keep()

    def __iter__(self) -> Iterator[Feed]:
        """The values in front of the node, feed by feed, in the order of the feeds."""
        for feed in self._feeds:
            yield feed if self._ahead is None else self._moved(feed, self._ahead)

    def _moved(self, feed: Feed, ahead: Evaluator) -> Feed:
        values = ahead.run({name: feed[name] for name in self._entered})
        return {name: values[name] if name in values else feed[name] for name in self._wanted}

    def _keep(self) -> None:
        """Replace what is kept by what is alive now, if there is room."""
        moved: list[Feed] = []
        room = self._memory
        for feed in self:
            if not all(isinstance(array, np.ndarray) for array in feed.values()):
                return  # a sequence or a map, whose size nobody knows
            room -= sum(array.nbytes for array in feed.values())
            if room < 0:
                return
            moved.append(feed)
        self._feeds, self._kept, self._ahead = moved, self._wanted, None

    def _alive(self, node: ir.Node) -> list[str]:
        here = self._nodes[node]
        return [
            value.name or ""
            for value, last in self._last_use.items()
            if last >= here and self._made(value) < here
        ]

    def _made(self, value: ir.Value) -> int:
        producer = value.producer()
        return -1 if producer is None else self._nodes[producer]

    def _evaluator(self, wanted: Sequence[str]) -> Evaluator:
        part = between(self._model, self._kept, wanted)
        self._entered = [v.name or "" for v in part.graph.inputs]
        return Evaluator(part, outputs=wanted, threads=self._threads)


def _last_uses(nodes: Mapping[ir.Node, int]) -> dict[ir.Value, int]:
    """The last of `nodes` that reads each computed value, itself or in a graph below it."""
    last: dict[ir.Value, int] = {}
    for node, here in nodes.items():
        inner = (n for body in bodies_of(node) for n in body.all_nodes())
        for value in (v for n in (node, *inner) for v in n.inputs):
            own = value is not None and (value.producer() in nodes or value.is_graph_input())
            if value is not None and own and constant_of(value) is None and value.const_value is None:
                last[value] = here
    return last


def between(model: ir.Model, entered: Sequence[str], wanted: Sequence[str]) -> ir.Model:
    """What of `model` computes `wanted` from the values `entered`, as far as it needs them."""
    part = model.clone()
    graph = part.graph
    values = {v.name: v for v in (*graph.inputs, *(o for n in graph for o in n.outputs))}
    inputs: list[ir.Value] = []
    for name in entered:
        old = values[name]
        if old.producer() is None:
            inputs.append(old)
            continue
        new = ir.Value(name=name, type=old.type, shape=_free(old.shape))
        old.name = f"{name}.before"
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        inputs.append(new)
        values[name] = new
    graph.outputs[:] = [values[name] for name in wanted]
    RemoveUnusedNodesPass()(part)
    graph.inputs[:] = [v for v in inputs if v.uses()]
    return part


def _free(shape: ir.Shape | None) -> ir.Shape | None:
    """Of that rank, and nothing else: what a batch is may be merged into any axis."""
    return None if shape is None else ir.Shape([None] * shape.rank())
