"""The branches of residual sums: what adds itself to a stream that goes on without it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from edgewise.passes.graph import constant_of, new_node, replace
from edgewise.passes.linear import LAYERS


@dataclass(frozen=True, eq=False)
class Branch:
    """`total`, an Add, is `stream` + input number `position`, which `nodes` compute for it alone."""

    total: ir.Node
    position: int
    nodes: frozenset[ir.Node]
    """All that is of no use without the branch, the Add among it."""

    @property
    def name(self) -> str:
        """The name of the sum."""
        return self.total.outputs[0].name or ""

    @cached_property
    def stream(self) -> ir.Value:
        """What is left of the sum without the branch."""
        value = self.total.inputs[1 - self.position]
        assert value is not None  # both were looked at
        return value

    def leave(self) -> None:
        """Let the stream pass by, under the name of the sum."""
        result = self.total.outputs[0]
        name, shape = result.name, result.shape
        passed = new_node(self.total, "Identity", [self.stream], hint=f"{name}.stream")
        replace(result, passed)
        passed.name, passed.shape = name, shape


def branches_of(graph: ir.Graph) -> tuple[Branch, ...]:
    """The branches of a graph in its order, one for each sum of two computed values of one shape at most.

    A branch has a layer of its own. Of two that could leave it is the longer one.
    """
    order = {node: i for i, node in enumerate(graph)}
    return tuple(found for node in graph if (found := _branch(node, order)) is not None)


def _branch(total: ir.Node, order: dict[ir.Node, int]) -> Branch | None:
    """The branch of a sum, if it is one."""
    if total.op_type != "Add" or total.domain != "" or any(v is None for v in total.inputs):
        return None
    one, other = total.inputs
    if one is other or any(constant_of(v) is not None for v in total.inputs):
        return None
    if _known(one) is None or any(_known(v) != _known(one) for v in (other, total.outputs[0])):
        return None
    found = [Branch(total, i, frozenset(_alone(total, i, order))) for i in (0, 1)]
    able = [branch for branch in found if any(node.op_type in LAYERS for node in branch.nodes)]
    return max(able, key=lambda branch: len(branch.nodes), default=None)


def _known(value: ir.Value | None) -> tuple[int | str, ...] | None:
    """The sizes or names of all dimensions, None where one has neither."""
    if value is None or value.shape is None:
        return None
    sizes = [d if isinstance(d, int) else d.value for d in value.shape]
    known = tuple(size for size in sizes if size is not None)
    return known if len(known) == len(sizes) else None


def _alone(total: ir.Node, position: int, order: dict[ir.Node, int]) -> Iterator[ir.Node]:
    """The sum, and what nobody needs but one of its inputs; from the back, so that users come first."""
    own, waiting, stream = {total}, {total.inputs[position]}, total.inputs[1 - position]
    yield total
    while waiting:
        made = {node for v in waiting if v is not None and (node := v.producer()) is not None}
        if not made:
            return
        node = max(made, key=lambda node: order.get(node, -1))
        waiting -= set(node.outputs)
        used = (user for v in node.outputs for user, _ in v.uses())
        seen = any(v is stream or v.is_graph_output() for v in node.outputs)
        if node in order and own.issuperset(used) and not seen:
            own.add(node)
            waiting |= set(node.inputs)
            yield node
