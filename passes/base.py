"""What a graph pass is: a frozen value with a name, a contract and one method."""

from __future__ import annotations

import dataclasses
import enum
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, get_type_hints

import onnx_ir as ir
import yaml


class Contract(enum.Enum):
    """What a pass may change in the model's outputs."""

    EXACT = "exact"  # the same outputs up to rounding
    LOSSY = "lossy"  # different outputs, bounded by the user's metric


class Refused(Exception):  # noqa: N818 - an answer, not an error
    """A pattern is there but a condition of its rewrite is not met. The text is the reason."""


class PassError(Exception):
    """The model cannot be worked on by this pass, or would be broken by it."""


@dataclass(frozen=True)
class Outcome:
    """What one application of a pass did."""

    edits: int = 0
    refused: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a whole model, in place. Its fields are its options.

    The model is valid before and after `apply`, not during it. An exception leaves it half
    edited: whoever calls `apply` keeps a clone.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract] = Contract.EXACT
    keeps_signature: ClassVar[bool] = True
    """Whether inputs and outputs stay as they are; the others run only where a person asked for them."""
    waits: ClassVar[bool] = False
    """Whether it is so slow that a chain gets to it only once the passes before it find nothing more."""
    helps: ClassVar[tuple[str, ...] | None] = None
    """The passes that may find more after an edit of this one; None for all."""

    @abstractmethod
    def apply(self, model: ir.Model) -> Outcome:
        """Edit `model` and say how many edits were made and what was refused, and why."""

    def on(self, model: ir.Model) -> ir.Model:
        """A copy of `model` after this pass; the model itself stays as it is."""
        copy = model.clone()
        self.apply(copy)
        return copy

    @property
    def spec(self) -> str:
        """The text that `from_spec` turns back into this pass; options at their default are left out."""
        options = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        }
        if not options:
            return self.name
        return self.name + yaml.safe_dump(options, default_flow_style=True, width=2**31).strip()

    @property
    def label(self) -> str:
        """What a report calls it."""
        return self.spec

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Pass:
        """Build the pass from option values; `ValueError` names what does not fit."""
        types = get_type_hints(cls)
        known = {f.name: types[f.name] for f in dataclasses.fields(cls)}
        for key, value in options.items():
            if key not in known:
                raise ValueError(f"{cls.name} has no option {key!r}, only {sorted(known) or 'none'}")
            if not _fits(value, known[key]):
                raise ValueError(f"{cls.name}: option {key} wants {known[key]}, not {value!r}")
        return cls(**options)


def _fits(value: object, kind: Any) -> bool:
    """Whether a scalar read from text may stand for a field of type `kind`."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def attempted(edits: Iterable[Callable[[], bool]]) -> Outcome:
    """How many of these edits were made, one after the other, and why the others were refused."""
    done, refused = 0, Counter[str]()
    for edit in edits:
        try:
            done += edit()
        except Refused as refusal:
            refused[str(refusal)] += 1
    return Outcome(done, MappingProxyType(dict(refused)))


def graphs_of(model: ir.Model) -> list[ir.Graph]:
    """The model's graph and those below it, from the outside in, as `model.graphs()` gives them, but fast."""
    found = [model.graph]
    for graph in found:
        for node in graph:
            found.extend(bodies_of(node))
    return found


def bodies_of(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs in a node's attributes; a parameter of a function is filled in where it is called."""
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH and not attr.is_ref():
            yield attr.value  # `as_graph` checks what is known here, for every node of every walk
        elif attr.type == ir.AttributeType.GRAPHS and not attr.is_ref():
            yield from attr.value


@dataclass(frozen=True)
class Rule(Pass):
    """A pass that looks at one node at a time, at those of `op_types` only, to a fixed point.

    `rewrite` returns whether it edited the graph around `node`. It returns False where its pattern
    is not there, and raises `Refused` where the pattern is there but a condition is missing; it
    must do either before its first edit.
    """

    op_types: ClassVar[tuple[str, ...]]

    @abstractmethod
    def rewrite(self, node: ir.Node) -> bool:
        """Try the rule at `node`, which is in a graph and of one of `op_types`."""

    def apply(self, model: ir.Model) -> Outcome:
        edits = 0
        while True:
            done, refused = self._sweep(model)
            edits += done
            if not done:
                return Outcome(edits, MappingProxyType(dict(refused)))

    def _sweep(self, model: ir.Model) -> tuple[int, Counter[str]]:
        """Visit every matching node once, subgraphs included."""
        done, refused = 0, Counter[str]()
        for graph in graphs_of(model):
            for node in [n for n in graph if n.op_type in self.op_types and n.domain == ""]:
                if node.graph is None:  # an earlier rewrite of this sweep removed it
                    continue
                try:
                    done += self.rewrite(node)
                except Refused as refusal:
                    refused[str(refusal)] += 1
        return done, refused
