"""Weights that are graph inputs as well stop being inputs."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass

FIRST_IR_WITH_DEFAULTS = 4
"""From this IR version on an initializer may stand alone, and one that is an input is a default value."""


@dataclass(frozen=True)
class FreezeInputs(Pass):
    """Take initializers out of the list of graph inputs.

    Given:   inputs (x, w), initializer w          IR version 3, where every weight had to be an input
    Result:  input (x), initializer w              IR version 4

    A runtime lets nobody override a weight of an IR 3 file, so nothing changes for callers. In a newer
    file such an input is a default value that a caller may override: those are frozen only with `always`.
    """

    name = "freeze-inputs"
    always: bool = False

    def apply(self, model: ir.Model) -> Outcome:
        if model.ir_version < FIRST_IR_WITH_DEFAULTS:
            return Outcome(freeze(model.graph) + raise_ir_version(model, FIRST_IR_WITH_DEFAULTS))
        if self.always:
            return Outcome(freeze(model.graph))
        defaults = sum(v.is_initializer() for v in model.graph.inputs)
        reason = "an input has a default value that a caller may override"
        return Outcome(0, MappingProxyType({reason: defaults} if defaults else {}))


def freeze(graph: ir.Graph) -> int:
    """Drop the initializers from the inputs of `graph`; how many they were."""
    inputs = list(graph.inputs)
    required = [v for v in inputs if not v.is_initializer()]
    if len(required) < len(inputs):
        graph.inputs.clear()
        graph.inputs.extend(required)
    return len(inputs) - len(required)


def raise_ir_version(model: ir.Model, version: int) -> bool:
    """Make the model's IR version at least `version`, which a pass that adds initializers relies on."""
    if model.ir_version >= version:
        return False
    model.ir_version = version
    return True
