"""Write convolutions of one input, whose results are concatenated, as one convolution."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused, Rule
from edgewise.passes.channel_rules import UNARY
from edgewise.passes.graph import Array, attribute, constant_of, only_user, remove_if_unused, replace
from edgewise.passes.linear import set_constant
from edgewise.passes.window import Window


@dataclass(frozen=True, eq=False)
class _Branch:
    """A Conv and the elementwise functions behind it, one after the other, each the only user of the last."""

    nodes: tuple[ir.Node, ...]

    @classmethod
    def of(cls, conv: ir.Node) -> _Branch:
        nodes = [conv]
        while (user := only_user(nodes[-1].outputs[0])) is not None and _is_activation(user, nodes[-1]):
            nodes.append(user)
        return cls(tuple(nodes))

    @property
    def conv(self) -> ir.Node:
        return self.nodes[0]

    @property
    def end(self) -> ir.Value:
        return self.nodes[-1].outputs[0]


@dataclass(frozen=True)
class MergeParallelConvs(Rule):
    """Compute what is concatenated by several convolutions of one input with one that has all filters.

    Given:   y = Concat(..., f(Conv(x, W, b)), f(Conv(x, V, c)), ...) along the channels, with constant
             weights and biases, where f is any chain of the same elementwise functions, or none
    Result:  y = Concat(..., f(Conv(x, [W; V], [b; c])), ...)
             and no Concat where nothing else is left to concatenate; a bias that is missing is zero
    The two stand next to each other in the Concat, have the same kernel size, strides, dilations and
    padding, are not grouped, and nothing else reads their results. Each number is computed as before, x
    is read once, and fewer results are copied. Without a Concat the results would have to be split, which
    copies what had not to be copied: such convolutions are left alone.
    """

    name = "merge-parallel-convs"
    op_types = ("Conv",)

    def rewrite(self, node: ir.Node) -> bool:
        others = _others_like(node)
        if not others:
            return False
        first = _Branch.of(node)
        concat, index = _place(first)
        before, after = concat.inputs[:index][-1:], concat.inputs[index + 1 :][:1]
        second = next((b for b in others if b.end in after), None)
        if second is None:
            if any(b.end in before for b in others):
                return False  # that one takes up this one
            raise Refused("the branches are not next to each other in one Concat")
        _check_pair(first, second)
        _stack(first, second)
        _leave_out(concat, index + 1)
        remove_if_unused(second.nodes[-1])
        if len(concat.inputs) == 1:
            replace(concat.outputs[0], first.end)
        return True


def _others_like(conv: ir.Node) -> list[_Branch]:
    """What begins with another Conv of the same input that looks through the same window."""
    data = conv.inputs[0]
    uses = () if data is None else data.uses()
    readers = [use.node for use in uses if use.idx == 0 and use.node.op_type == "Conv"]
    twins = [n for n in readers if n is not conv and n.domain == "" and n.graph is conv.graph]
    return [_Branch.of(n) for n in twins if Window.of(n) == Window.of(conv)]


def _is_activation(node: ir.Node, before: ir.Node) -> bool:
    """Whether `node` maps each number that `before` gives to another, in the same graph."""
    if node.op_type not in UNARY or node.domain != "" or node.graph is not before.graph:
        return False
    return node.inputs[0] is before.outputs[0]


def _place(branch: _Branch) -> tuple[ir.Node, int]:
    """The Concat that alone reads the branch, and as which of its inputs."""
    concat = only_user(branch.end)
    if concat is None:
        raise Refused("a branch has another user")
    rank = 2 + len(Window.of(branch.conv).kernel)
    is_concat = concat.op_type == "Concat" and concat.domain == "" and concat.graph is branch.conv.graph
    if not is_concat or attribute(concat, "axis", 1) % rank != 1:
        raise Refused("no Concat of channels joins the branches")
    (use,) = branch.end.uses()
    return concat, use.idx


def _check_pair(first: _Branch, second: _Branch) -> None:
    if only_user(second.end) is None:
        raise Refused("a branch has another user")
    if any(attribute(b.conv, "group", 1) != 1 for b in (first, second)):
        raise Refused("grouped convolutions cannot be stacked")
    pairs = zip_longest(first.nodes[1:], second.nodes[1:])
    if not all(a is not None and b is not None and _is_same_function(a, b) for a, b in pairs):
        raise Refused("the activations differ")


def _is_same_function(first: ir.Node, second: ir.Node) -> bool:
    """Whether two elementwise functions have the same attributes and the same constants, as bounds are."""
    if first.op_type != second.op_type or _attributes(first) != _attributes(second):
        return False
    return all(_is_same_constant(a, b) for a, b in zip_longest(first.inputs[1:], second.inputs[1:]))


def _attributes(node: ir.Node) -> dict[str, object]:
    return {name: attribute(node, name) for name in node.attributes}


def _is_same_constant(first: ir.Value | None, second: ir.Value | None) -> bool:
    if first is second:
        return True
    a, b = constant_of(first), constant_of(second)
    return a is not None and b is not None and np.array_equal(a, b)


def _stack(first: _Branch, second: _Branch) -> None:
    """Give the filters of the second Conv to the first; `Refused` before any edit."""
    pair = (first.conv, second.conv)
    weights = [_constant(conv, 1, "weight") for conv in pair]
    counts = [weight.shape[0] for weight in weights]
    has_bias = any(_input(conv, 2) is not None for conv in pair)
    biases = [
        np.zeros(n, w.dtype) if _input(conv, 2) is None else _constant(conv, 2, "bias")
        for conv, n, w in zip(pair, counts, weights, strict=True)
    ]
    set_constant(first.conv, 1, np.concatenate(weights), "weight")
    if has_bias:
        set_constant(first.conv, 2, np.concatenate(biases), "bias")
    for node in first.nodes:
        _widen(node.outputs[0], sum(counts))


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _constant(node: ir.Node, index: int, role: str) -> Array:
    array = constant_of(_input(node, index))
    if array is None:
        raise Refused(f"{role} is not constant")
    return array


def _widen(value: ir.Value, channels: int) -> None:
    """Note the new number of channels, on axis 1."""
    if value.shape is not None:
        value.shape = ir.Shape([*value.shape[:1], channels, *value.shape[2:]])


def _leave_out(node: ir.Node, index: int) -> None:
    """Remove an input of `node`; those behind it move up."""
    rest = node.inputs[index + 1 :]
    for i, value in enumerate(rest, start=index):
        node.replace_input_with(i, value)
    node.resize_inputs(len(node.inputs) - 1)
