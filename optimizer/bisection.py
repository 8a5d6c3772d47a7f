"""The pass that made a model slower, found by halving the chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from edgewise.passes import parse


def culprit(original: ir.Model, applied: Sequence[str], is_slower: Callable[[ir.Model], bool]) -> str:
    """The first of the passes `applied` to `original` after which the model `is_slower`.

    `applied` are specs in the order in which the passes edited the model, which was measured to be slower
    after the last. What lies between is measured log2(len(applied)) times.
    """
    fine, slow = 0, len(applied)
    while slow - fine > 1:
        middle = (fine + slow) // 2
        if is_slower(replay(original, applied[:middle])):
            slow = middle
        else:
            fine = middle
    return applied[slow - 1]


def replay(model: ir.Model, specs: Sequence[str]) -> ir.Model:
    """A copy of `model` after these passes, which are deterministic and were verified when they first ran."""
    copy = model.clone()
    for spec in specs:
        parse(spec).apply(copy)
    return copy
