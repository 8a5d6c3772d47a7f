"""A graph prepared for execution: every value has a number, every node its function and attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx_ir as ir
from torch import Tensor

from edgewise.passes.base import bodies_of, graphs_of
from edgewise.passes.graph import opset
from edgewise.runtime.errors import InputError
from edgewise.training.operators import OPERATORS
from edgewise.training.operators.call import Call, Operator, attributes_of, described

Hook: TypeAlias = Callable[[Tensor], Tensor | None]
Hooks: TypeAlias = Mapping[int, Mapping[int, Hook]]
"""By slot, then by the order they were registered in."""

_NOTHING = 0  # the slot of the inputs that a node leaves out: it always holds None
_DEFAULT_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True, slots=True)
class Step:
    """A node to be run: where its inputs lie, where its outputs go, and what nobody reads after it."""

    node: ir.Node
    function: Operator
    attributes: Mapping[str, Any]
    opset: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    frees: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """The steps of a model's graph and of all bodies below it. `size` counts the slots.

    Bodies share the slots of the graph around them, so that what they capture is simply there.
    """

    slots: Mapping[ir.Value, int]
    steps: Mapping[ir.Graph, tuple[Step, ...]]
    size: int

    @classmethod
    def of(cls, model: ir.Model) -> Program:
        """`InputError` names the first node without an operator here."""
        slots: dict[ir.Value, int] = {}
        for graph in graphs_of(model):
            for value in _defined(graph):
                slots.setdefault(value, len(slots) + 1)
        versions = {**model.opset_imports, **dict.fromkeys(_DEFAULT_DOMAINS, opset(model))}
        steps = {graph: tuple(_steps(graph, slots, versions)) for graph in graphs_of(model)}
        return cls(slots, steps, len(slots) + 1)


class Execution:
    """One run of a program: `values` holds what is known at the start, by slot."""

    def __init__(self, program: Program, values: list[Any], hooks: Hooks, *, training: bool) -> None:
        self._program, self._values, self._hooks, self._training = program, values, hooks, training
        for slot in hooks:
            if values[slot] is not None:
                values[slot] = self._hooked(slot, values[slot])

    def run(self, graph: ir.Graph) -> None:
        """Run the nodes of `graph`, whose inputs lie in their slots."""
        for step in self._program.steps[graph]:
            self.run_step(step)

    def run_step(self, step: Step) -> None:
        values = self._values
        inputs = tuple([values[slot] for slot in step.reads])
        call = Call(step.node, inputs, step.opset, self._training, step.attributes, self.run_body)
        try:
            result: Any = step.function(call)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            error.add_note(f"in {described(step.node)} of the model")
            raise
        outputs = result if isinstance(result, tuple) else (result,)
        for slot, output in zip(step.writes, outputs, strict=False):  # the last may be left out
            values[slot] = self._hooked(slot, output) if slot in self._hooks else output
        for slot in step.frees:
            values[slot] = None

    def run_body(self, body: ir.Graph, inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The outputs of an If's, Loop's or Scan's body."""
        slots, values = self._program.slots, self._values
        for value, given in zip(body.inputs, inputs, strict=True):
            slot = slots[value]
            values[slot] = self._hooked(slot, given) if slot in self._hooks else given
        self.run(body)
        return tuple(values[slots[value]] for value in body.outputs)

    def _hooked(self, slot: int, value: Any) -> Any:
        for hook in tuple(self._hooks[slot].values()):
            answer = hook(value)
            value = value if answer is None else answer
        return value


def key_of(node: ir.Node) -> str:
    """The name of a node's operator in the table of operators."""
    return node.op_type if node.domain in _DEFAULT_DOMAINS else f"{node.domain}.{node.op_type}"


def is_constant(node: ir.Node) -> bool:
    """Whether the node only holds a value: it is no step."""
    return node.op_type == "Constant" and node.domain in _DEFAULT_DOMAINS


def _defined(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _steps(graph: ir.Graph, slots: Mapping[ir.Value, int], versions: Mapping[str, int]) -> Iterator[Step]:
    frees = _last_reads(graph)
    for node in graph:
        if is_constant(node):
            continue
        function = OPERATORS.get(key_of(node))
        if function is None:
            raise InputError(f"{described(node)} has no gradient here: there is no operator {key_of(node)}")
        yield Step(
            node,
            function,
            attributes_of(node),
            versions.get(node.domain, 1),
            tuple(_NOTHING if value is None else slots[value] for value in node.inputs),
            tuple(slots[value] for value in node.outputs),
            tuple(slots[value] for value in frees.get(node, ())),
        )


def _last_reads(graph: ir.Graph) -> dict[ir.Node, list[ir.Value]]:
    """The values of this graph that nobody reads after a node. Those of Constant nodes stay."""
    last: dict[ir.Value, ir.Node] = {}
    own = {value for node in graph if not is_constant(node) for value in node.outputs}
    own.update(value for value in graph.inputs if not value.is_initializer())
    for node in graph:
        for value in (*_read(node), *node.outputs):
            if value in own:
                last[value] = node
    frees: dict[ir.Node, list[ir.Value]] = {}
    kept = set(graph.outputs)
    for value, node in last.items():
        if value not in kept:
            frees.setdefault(node, []).append(value)
    return frees


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, in its bodies too."""
    yield from (value for value in node.inputs if value is not None)
    for body in bodies_of(node):
        yield from (value for value in body.outputs if value is not None)
        for inner in body:
            yield from _read(inner)
