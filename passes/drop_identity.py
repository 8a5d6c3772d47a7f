"""Identity nodes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgewise.passes.base import Rule
from edgewise.passes.graph import replace


@dataclass(frozen=True)
class DropIdentity(Rule):
    """Let the users of an Identity read its input.

    Given:   y = Identity(x)
    Result:  x in place of y

    One that carries an input, a weight or a value of an outer graph to a graph output has to stay.
    """

    name = "drop-identity"
    op_types = ("Identity",)

    def rewrite(self, node: ir.Node) -> bool:
        source = node.inputs[0]
        if source is None:
            return False
        replace(node.outputs[0], source)
        return True
