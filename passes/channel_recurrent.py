"""How the hidden units of LSTM, GRU and RNN couple, and which of them are zero for every input."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused
from edgewise.passes.channel_functions import Floats
from edgewise.passes.channel_links import Array, Coupling, Keep, Link, NodeView, op_types
from edgewise.passes.graph import attribute, constant_of
from edgewise.passes.linear import set_constant

X, W, R, B, H, C, P = 0, 1, 2, 3, 5, 6, 7  # inputs, in the letters of their specification; 4 is lengths
STATES = (H, C)


class Cell(NamedTuple):
    """A kind of recurrent layer. `gates` is how many rows of W and R a unit has, each in a run of its own.

    Run `candidate` is what is new in the state. `activations` are those of one direction, of which the first
    `gating` only scale.
    """

    gates: int
    candidate: int
    activations: tuple[str, ...]
    gating: int


CELLS: Mapping[str, Cell] = MappingProxyType(
    {
        "GRU": Cell(gates=3, candidate=2, activations=("Sigmoid", "Tanh"), gating=1),
        "LSTM": Cell(gates=4, candidate=3, activations=("Sigmoid", "Tanh", "Tanh"), gating=1),
        "RNN": Cell(gates=1, candidate=0, activations=("Tanh",), gating=0),
    }
)
"""Operators of the default domain, by type."""

_THROUGH_ZERO = op_types("Elu LeakyRelu Relu ScaledTanh Softsign Tanh ThresholdedRelu")


def recurrent(view: NodeView) -> Coupling:
    """A hidden unit: its row of every gate, its column of R, its place in both biases, states and outputs.

    Directions share their size, so that unit i of one leaves with unit i of the other. Units, like the
    features of the input, lie on the last axis of data, whatever the layout.
    """
    x, hidden = view.slot(X, 2), view.constant_dims(R, "weight")[2]
    view.expect(x, view.constant_dims(W, "weight")[2])
    links = [Link(view.slot(W, 2), x)]
    outs = [view.out(len(view.out_dims(i)) - 1, i) for i, v in enumerate(view.node.outputs) if v.name]
    if not outs:
        raise Refused("nothing is read")
    for out in outs:
        view.expect(out, hidden)
    for (index, axis), runs in _runs(view).items():
        slot, every = view.slot(index, axis), np.arange(runs * hidden)
        view.expect(slot, len(every))
        links += [Link(slot, out, every, every % hidden) for out in outs]
    return Coupling(tuple(links), cut=lambda keep: _set_hidden_size(view, keep))


def _runs(view: NodeView) -> dict[tuple[int, int], int]:
    """The axes of inputs that have an index for every unit, by input and axis, and how many runs of them."""
    gates = CELLS[view.node.op_type].gates
    runs = {(W, 1): gates, (R, 1): gates, (R, 2): 1, (B, 1): 2 * gates, (H, 2): 1, (C, 2): 1, (P, 1): 3}
    given = {(index, axis): n for (index, axis), n in runs.items() if view.input(index) is not None}
    for index, _ in given.keys() & {(B, 1), (P, 1)}:
        view.constant_dims(index, "bias")
    return given


def _set_hidden_size(view: NodeView, keep: Keep) -> None:
    kept = keep(view.slot(R, 2))
    if kept is not None:
        view.node.attributes["hidden_size"] = ir.AttrInt64("hidden_size", len(kept))


def zero_units(view: NodeView, x: Floats, states: Floats) -> Floats:
    """Zero for every unit that is zero at every step in all directions, NaN for the others, [hidden].

    `x` are the features that are known, `states` what the units begin with, both NaN where they are not.

    A unit that begins with zero stays zero if its candidate is zero at every step, for
    LSTM:  c' = f c + i g(candidate),  h' = o h(c')
    GRU:   h' = z h + (1 - z) g(candidate)
    RNN:   h' = f(candidate)
    where g, h and for RNN f pass through zero. A candidate is zero if it reads but units that are zero and
    features that are known, and these and the biases make zero: of all such sets of units, the largest.
    """
    weight, state, bias = (_candidate(view, index) for index in (W, R, B))
    known = np.where(np.isnan(x), 0.0, x)
    level = weight @ known + bias[:, 0]
    steady = ~(weight[:, :, np.isnan(x)] != 0).any(2) & (level + bias[:, 1] == 0)
    if attribute(view.node, "linear_before_reset", 0):  # the second bias is gated, the first is not
        steady &= bias[:, 1] == 0
    zero = steady & (states == 0) & _pass_through_zero(view)
    while (fed := zero & ((state != 0) & ~zero[:, np.newaxis]).any(2)).any():
        zero &= ~fed
    return np.where(zero.all(0), 0.0, np.nan)


def _candidate(view: NodeView, index: int) -> Floats:
    """The rows of W or R that make the candidate, [direction, unit, input]; of B [direction, 2, unit]."""
    cell, value = CELLS[view.node.op_type], view.input(index)
    array = None if value is None else constant_of(value)
    directions, _, hidden = view.constant_dims(R, "weight")
    if array is None:
        return np.zeros((directions, 2, hidden))
    if index == B:
        return array.reshape(directions, 2, cell.gates, hidden)[:, :, cell.candidate].astype(np.float64)
    rows = array.reshape(directions, cell.gates, hidden, -1)
    return rows[:, cell.candidate].astype(np.float64)


def _pass_through_zero(view: NodeView) -> bool:
    """Whether all activations but those of gates do, in all directions."""
    cell = CELLS[view.node.op_type]
    names = attribute(view.node, "activations", cell.activations)
    size = len(cell.activations)
    return all(name in _THROUGH_ZERO for i, name in enumerate(names) if i % size >= cell.gating)


def add_to_bias(node: ir.Node, offset: Floats) -> None:
    """Add numbers, [row of W, direction], to the bias that stands beside W."""
    weight, bias = constant_of(node.inputs[W]), constant_of(node.inputs[B] if len(node.inputs) > B else None)
    assert weight is not None  # it is one of the layers that were analysed
    rows, directions = offset.shape
    changed: Array = np.zeros((directions, 2 * rows)) if bias is None else bias.astype(np.float64)
    changed[:, :rows] += offset.T
    set_constant(node, B, changed.astype(weight.dtype), "bias")
