"""The pass that made a model slower, found by halving the chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from edgewise.passes.base import Pass


def culprit(original: ir.Model, applied: Sequence[Pass], is_slower: Callable[[ir.Model], bool]) -> Pass:
    """The first of the passes `applied` to `original` after which the model `is_slower`.

    `applied` is in the order in which the passes edited the model, which was measured to be slower after
    the last. What lies between is measured log2(len(applied)) times.
    """
    fine, slow = 0, len(applied)
    while slow - fine > 1:
        middle = (fine + slow) // 2
        if is_slower(replay(original, applied[:middle])):
            slow = middle
        else:
            fine = middle
    return applied[slow - 1]


def replay(model: ir.Model, applied: Sequence[Pass]) -> ir.Model:
    """A copy of `model` after these passes, which are deterministic and were verified when they first ran."""
    copy = model.clone()
    for step in applied:
        step.apply(copy)
    return copy
