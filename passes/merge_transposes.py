"""A Transpose of a Transpose."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgewise.passes.base import Refused, Rule
from edgewise.passes.graph import attribute, only_user, remove_if_unused, replace


@dataclass(frozen=True)
class MergeTransposes(Rule):
    """Let one Transpose do the work of two that follow each other, or none where they cancel.

    Given:   y = Transpose(Transpose(x, p), q)
    Result:  y = Transpose(x, r) with r[i] = p[q[i]], or x in place of y where r changes no order
    """

    name = "merge-transposes"
    op_types = ("Transpose",)

    def rewrite(self, node: ir.Node) -> bool:
        middle = node.inputs[0]
        first = None if middle is None else middle.producer()
        if middle is None or first is None or first.domain != "" or first.op_type != "Transpose":
            return False
        source, merged = first.inputs[0], _composed(attribute(first, "perm"), attribute(node, "perm"))
        if source is None:
            return False
        if merged == tuple(range(len(merged))):
            replace(node.outputs[0], source)
            return True
        if only_user(middle) is None:
            raise Refused("the first Transpose has another user")
        node.replace_input_with(0, source)
        node.attributes.add(ir.AttrInt64s("perm", merged))
        remove_if_unused(first)
        return True


def _composed(first: tuple[int, ...] | None, second: tuple[int, ...] | None) -> tuple[int, ...]:
    """The order that two in a row amount to; an order that is not written reverses the axes."""
    known = first or second
    if known is None:  # reversed twice; the rank does not matter
        return ()
    reverse = tuple(reversed(range(len(known))))
    first, second = first or reverse, second or reverse
    return tuple(first[axis] for axis in second)
