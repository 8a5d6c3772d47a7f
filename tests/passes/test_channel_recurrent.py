"""Hidden units of LSTM, GRU and RNN: what is zero or unread leaves, in all gates and both directions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from rewrites import assert_equal, build, constants, refusal, rewritten

from edgewise.passes import parse
from edgewise.passes.channel_recurrent import CELLS
from edgewise.passes.channels import find_groups
from edgewise.passes.fold_constant_channels import FoldConstantChannels
from edgewise.passes.graph import attribute
from edgewise.passes.merge_channels import MergeChannels
from edgewise.passes.prune_channels import PruneChannels
from edgewise.runtime.evaluate import Array, Evaluator, input_specs

PASS = PruneChannels()
RNG = np.random.default_rng(0)
FEATURES, HIDDEN, STEPS, BATCH = 3, 6, 4, 2
ZERO = [1, 4, 5]  # of the hidden units
DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}


def floats(*shape: int) -> Array:
    return RNG.uniform(0.2, 1.0, shape).astype(np.float32) * RNG.choice([-1, 1], shape).astype(np.float32)


@dataclass(frozen=True)
class Layer:
    """One recurrent layer and its weights, named by their letter and `name`."""

    kind: str = "LSTM"
    direction: str = "forward"
    inputs: int = FEATURES
    hidden: int = HIDDEN
    name: str = ""
    extra: str = ""
    weights: dict[str, Array] = field(default_factory=dict)

    def filled(self) -> Layer:
        d, g, h = DIRECTIONS[self.direction], CELLS[self.kind].gates, self.hidden
        drawn = {"W": floats(d, g * h, self.inputs), "R": floats(d, g * h, h), "B": floats(d, 2 * g * h)}
        return replace(self, weights={key + self.name: a for key, a in drawn.items()})

    def candidate(self, letter: str) -> Array:
        """A view of the rows that make what is new, [direction, (first or second bias,) unit, ...]."""
        cell, array = CELLS[self.kind], self.weights[letter + self.name]
        if letter == "B":
            return array.reshape(len(array), 2, cell.gates, self.hidden)[:, :, cell.candidate]
        return array.reshape(len(array), cell.gates, self.hidden, -1)[:, cell.candidate]

    def zeroed(self, units: list[int]) -> Layer:
        for letter in "WR":
            self.candidate(letter)[:, units] = 0
        self.candidate("B")[:, :, units] = 0
        return self

    def read_from(self, x: str, *more: str) -> str:
        """The call; `more` are inputs from the lengths on."""
        attributes = f'hidden_size = {self.hidden}, direction = "{self.direction}"{self.extra}'
        names = ", ".join(key + self.name for key in "WRB")
        return f"{self.kind}<{attributes}>({', '.join([x, names, *more])})"


def head(layer: Layer, outputs: int = 5) -> Array:
    return floats(DIRECTIONS[layer.direction] * layer.hidden, outputs)


TORCH = "t = Transpose<perm = [0, 2, 1, 3]>(a) f = Reshape(t, shape) y = MatMul(f, V)"


def net(
    layer: Layer, *more: str, inputs: str = "", body: str = TORCH, outs: str = "a", **given: Array
) -> ir.Model:
    """x -> `layer` -> outputs `outs` -> `body`, by default as torch writes it: directions side by side."""
    held = {"shape": np.array([0, 0, -1]), "V": head(layer), **layer.weights, **given}
    text = f"{outs} = {layer.read_from('x', *more)} {body}"
    text = f"g (float[T, N, {layer.inputs}] x{inputs}) => (float[] y) {{ {text} }}"
    words = text.replace(",", " ").replace("(", " ").replace(")", " ").split()
    return build(text, 17, **{name: array for name, array in held.items() if name in words})


def widths(model: ir.Model) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in constants(model).items()}


def narrow(layer: Layer, units: int, inputs: int | None = None) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of `layer` with so many units."""
    d, g = DIRECTIONS[layer.direction], CELLS[layer.kind].gates
    shapes = {
        "W": (d, g * units, inputs or layer.inputs),
        "R": (d, g * units, units),
        "B": (d, 2 * g * units),
    }
    return {key + layer.name: shape for key, shape in shapes.items()}


def recurrent(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type in CELLS]


KINDS = [Layer("LSTM"), Layer("GRU"), Layer("GRU", extra=", linear_before_reset = 1"), Layer("RNN")]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind + k.extra)
def test_zero_units(kind: Layer, direction: str) -> None:
    layer = replace(kind, direction=direction).filled().zeroed(ZERO)
    after, outcome = rewritten(net(layer), PASS)
    assert outcome.edits == 3
    assert not outcome.refused
    assert widths(after) | narrow(layer, 3) == widths(after)
    assert widths(after)["V"] == (3 * DIRECTIONS[direction], 5)
    (node,) = recurrent(after)
    assert attribute(node, "hidden_size") == 3
    assert node.outputs[0].shape is not None
    assert node.outputs[0].shape[3] == 3


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind + k.extra)
def test_unread_units(kind: Layer, direction: str) -> None:
    """The units of `ZERO` read each other, and nobody else does."""
    layer = replace(kind, direction=direction).filled()
    live = [i for i in range(HIDDEN) if i not in ZERO]
    rows = np.ix_(range(DIRECTIONS[direction]), range(CELLS[kind.kind].gates), live, ZERO)
    layer.weights["R"].reshape(DIRECTIONS[direction], -1, HIDDEN, HIDDEN)[rows] = 0
    unread = head(layer)
    unread.reshape(-1, HIDDEN, 5)[:, ZERO] = 0
    after, outcome = rewritten(net(layer, V=unread), PASS)
    assert outcome.edits == 3
    assert widths(after) | narrow(layer, 3) == widths(after)


def test_a_unit_that_another_one_reads_stays() -> None:
    layer = Layer().filled()
    layer.weights["R"][:, :, ZERO] = 0
    layer.weights["R"][0, 2, 4] = 1  # a gate of unit 2
    unread = head(layer)
    unread[ZERO] = 0
    after, outcome = rewritten(net(layer, V=unread), PASS)
    assert outcome.edits == 2
    assert widths(after) | narrow(layer, 4) == widths(after)


def test_zero_units_may_read_each_other() -> None:
    layer = Layer().filled().zeroed(ZERO)
    layer.candidate("R")[np.ix_([0], ZERO, ZERO)] = 1
    after, outcome = rewritten(net(layer), PASS)
    assert outcome.edits == 3
    assert widths(after) | narrow(layer, 3) == widths(after)


def test_a_chain_of_units_that_ends_in_a_live_one() -> None:
    """Unit 1 reads unit 4, which reads unit 5, which reads a live one: none of them is zero."""
    layer = Layer().filled().zeroed(ZERO)
    for reader, read in ((1, 4), (4, 5), (5, 0)):
        layer.candidate("R")[0, reader, read] = 1
    assert refusal(net(layer), PASS) == ""


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind + k.extra)
def test_without_bias(kind: Layer) -> None:
    layer = kind.filled().zeroed(ZERO)
    model = net(layer)
    (node,) = recurrent(model)
    node.replace_input_with(3, None)
    del model.graph.initializers["B"]
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 3
    assert widths(after)["R"] == narrow(layer, 3)["R"]


OUTPUTS = {
    "all": ("a, b, c", "p = MatMul(b, V) q = MatMul(c, V) s = Add(p, q) u = MatMul(a, V) y = Add(u, s)", 3),
    "the last state alone": (" , b", "y = MatMul(b, V)", 3),
    "the last cell alone": (" , , c", "y = MatMul(c, V)", 3),
    "one that nobody reads": ("a, b, c", "y = MatMul(b, V)", 3),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name: str) -> None:
    outs, body, units = OUTPUTS[name]
    layer = Layer().filled().zeroed(ZERO)
    after, outcome = rewritten(net(layer, outs=outs, body=body), PASS)
    assert outcome.edits == 3
    assert widths(after) | narrow(layer, units) | {"V": (units, 5)} == widths(after)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind + k.extra)
def test_lengths(kind: Layer) -> None:
    layer = replace(kind, direction="bidirectional").filled().zeroed(ZERO)
    model = net(layer, "n", inputs=", int32[N] n", outs="a, b")
    feed = {"x": floats(STEPS, 3, FEATURES), "n": np.array([4, 2, 1], np.int32)}
    after, outcome = rewritten(model, PASS, feed)
    assert outcome.edits == 3
    assert widths(after) | narrow(layer, 3) == widths(after)


def state(layer: Layer, zero: list[int]) -> Array:
    array = floats(DIRECTIONS[layer.direction], BATCH, layer.hidden)
    array[:, :, zero] = 0
    return array


def fixed(model: ir.Model) -> dict[str, Array]:
    return {spec.name: floats(STEPS, BATCH, FEATURES) for spec in input_specs(model)}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind + k.extra)
def test_constant_states(kind: Layer, direction: str) -> None:
    """Unit 4 begins with something: it stays."""
    layer = replace(kind, direction=direction).filled().zeroed(ZERO)
    names = ["", "H", "C"] if kind.kind == "LSTM" else ["", "H"]
    model = net(layer, *names, H=state(layer, [1, 5]), C=state(layer, ZERO))
    after, outcome = rewritten(model, PASS, fixed(model))
    assert outcome.edits == 2
    assert widths(after) | narrow(layer, 4) | {"H": (DIRECTIONS[direction], BATCH, 4)} == widths(after)


def test_a_cell_that_begins_with_something() -> None:
    layer = Layer().filled().zeroed(ZERO)
    model = net(layer, "", "H", "C", H=state(layer, ZERO), C=state(layer, [5]))
    after, outcome = rewritten(model, PASS, fixed(model))
    assert outcome.edits == 1
    assert widths(after) | narrow(layer, 5) == widths(after)


def test_states_of_another_layer() -> None:
    """An encoder hands its state to a decoder: units that are zero in both leave both."""
    first = Layer("GRU", name="1").filled().zeroed(ZERO)
    second = Layer("GRU", name="2").filled().zeroed([0, 4, 5])
    body = f"d = {second.read_from('x', '', 'b')} e = Squeeze(d, one) y = MatMul(e, V)"
    model = net(first, outs=" , b", body=body, one=np.array([1]), **second.weights)
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 2
    assert widths(after) | narrow(first, 4) | narrow(second, 4) == widths(after)


def test_peepholes() -> None:
    layer = Layer(direction="bidirectional").filled().zeroed(ZERO)
    after, outcome = rewritten(net(layer, "", "", "", "P", P=floats(2, 3 * HIDDEN)), PASS)
    assert outcome.edits == 3
    assert widths(after) | narrow(layer, 3) | {"P": (2, 9)} == widths(after)


def test_peepholes_keep_the_unit_that_they_belong_to() -> None:
    layer = Layer().filled().zeroed(ZERO)
    peep = np.arange(3 * HIDDEN, dtype=np.float32)[None] / 20
    after, _ = rewritten(net(layer, "", "", "", "P", P=peep), PASS)
    np.testing.assert_array_equal(constants(after)["P"], peep[:, [0, 2, 3, 6, 8, 9, 12, 14, 15]])


@pytest.mark.parametrize("extra", [", clip = 0.5", ", input_forget = 0"])
def test_limits(extra: str) -> None:
    """Zero lies within every limit."""
    layer = Layer(extra=extra).filled().zeroed(ZERO)
    _, outcome = rewritten(net(layer), PASS)
    assert outcome.edits == 3


ACTIVATIONS = {
    ("RNN", '"Relu"'): 3,
    ("RNN", '"Sigmoid"'): 0,
    ("RNN", '"Softplus"'): 0,
    ("GRU", '"Sigmoid", "Relu"'): 3,
    ("GRU", '"HardSigmoid", "Softsign"'): 3,
    ("GRU", '"Tanh", "Sigmoid"'): 0,
    ("LSTM", '"Sigmoid", "Relu", "Tanh"'): 3,
    ("LSTM", '"Sigmoid", "Tanh", "Sigmoid"'): 0,
    ("LSTM", '"Sigmoid", "HardSigmoid", "Tanh"'): 0,
}


@pytest.mark.parametrize(("kind", "names"), ACTIVATIONS)
def test_activations(kind: str, names: str) -> None:
    layer = Layer(kind, extra=f", activations = [{names}]").filled().zeroed(ZERO)
    _, outcome = rewritten(net(layer), PASS)
    assert outcome.edits == ACTIVATIONS[kind, names]
    assert not outcome.refused


def test_activations_of_the_second_direction() -> None:
    names = '"Tanh", "Sigmoid"'
    layer = Layer("RNN", "bidirectional", extra=f", activations = [{names}]").filled().zeroed(ZERO)
    assert refusal(net(layer), PASS) == ""


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind + k.extra)
@pytest.mark.parametrize("letter", "WRB")
def test_a_candidate_that_is_not_zero(kind: Layer, letter: str) -> None:
    """One number is enough, in one direction."""
    layer = replace(kind, direction="bidirectional").filled().zeroed([4])
    layer.candidate(letter)[1][..., 4, *[0] * (letter != "B")] = 0.5
    assert refusal(net(layer), PASS) == ""


def test_biases_that_cancel() -> None:
    """Before its reset gate GRU takes one of them alone."""
    for extra, edits in (("", 3), (", linear_before_reset = 1", 0)):
        layer = Layer("GRU", extra=extra).filled().zeroed(ZERO)
        layer.candidate("B")[:, 0, ZERO] = 0.5
        layer.candidate("B")[:, 1, ZERO] = -0.5
        _, outcome = rewritten(net(layer), PASS)
        assert outcome.edits == edits


def test_units_that_are_zero_in_one_direction_stay() -> None:
    layer = Layer(direction="bidirectional").filled().zeroed(ZERO)
    layer.candidate("W")[1, [1, 5]] = 0.5
    after, outcome = rewritten(net(layer), PASS)
    assert outcome.edits == 1
    assert widths(after) | narrow(layer, 5) == widths(after)


def test_the_last_unit_stays() -> None:
    layer = Layer().filled().zeroed(list(range(HIDDEN)))
    after, outcome = rewritten(net(layer), PASS)
    assert outcome.edits >= HIDDEN - 1
    assert widths(after)["R"] == (1, 4, 1)


def test_multiples() -> None:
    for kind in KINDS:
        layer = replace(kind, hidden=8).filled().zeroed([0, 1, 5])
        after, outcome = rewritten(net(layer), PruneChannels(multiple=2))
        assert outcome.edits == 2
        assert widths(after) | narrow(layer, 6) == widths(after)


STACKS = {
    "squeezed": ("forward", "{0}s = Squeeze({0}, one)"),
    "side by side": (
        "bidirectional",
        "{0}t = Transpose<perm = [0, 2, 1, 3]>({0}) {0}s = Reshape({0}t, shape)",
    ),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind + k.extra)
def test_stacked(kind: Layer, name: str) -> None:
    """Both layers lose units; the second one the features that were those of the first, too."""
    direction, between = STACKS[name]
    first = replace(kind, direction=direction, name="1").filled().zeroed(ZERO)
    width = HIDDEN * DIRECTIONS[direction]
    second = replace(kind, direction=direction, name="2", inputs=width).filled().zeroed([0, 2])
    lines = between.format("a"), f"c = {second.read_from('as')}", between.format("c"), "y = MatMul(cs, V)"
    model = net(first, body=" ".join(lines), one=np.array([1]), V=head(second), **second.weights)
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 5
    assert widths(after) | narrow(first, 3) | narrow(second, 4, width // 2) == widths(after)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind + k.extra)
def test_constant_features(kind: Layer, direction: str) -> None:
    """What a dense layer gives: 0 is zero, 2 is a number, which goes into the biases; nobody reads 3."""
    layer = replace(kind, direction=direction, inputs=5).filled()
    layer.weights["W"][:, :, 3] = 0
    dense, bias = floats(5, 5), floats(5)
    dense[:, [0, 2]], bias[0] = 0, 0
    body = f"m = MatMul(x, D) i = Add(m, k) a = {layer.read_from('i')} {TORCH}"
    held = {**layer.weights, "D": dense, "k": bias, "shape": np.array([0, 0, -1]), "V": head(layer)}
    model = build(f"g (float[T, N, 5] x) => (float[] y) {{ {body} }}", **held)
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 3
    assert widths(after) | narrow(layer, HIDDEN, 2) | {"D": (5, 2), "k": (2,)} == widths(after)


def test_constant_features_without_a_bias() -> None:
    layer = Layer("GRU", inputs=5).filled()
    body = f"m = MatMul(x, D) i = Add(m, k) a = {layer.read_from('i')[: -len(', B)')]}) {TORCH}"
    dense = floats(5, 5)
    dense[:, [0, 2]] = 0
    held = {**layer.weights, "D": dense, "k": floats(5), "shape": np.array([0, 0, -1]), "V": head(layer)}
    del held["B"]
    after, outcome = rewritten(build(f"g (float[T, N, 5] x) => (float[] y) {{ {body} }}", **held), PASS)
    assert outcome.edits == 2
    (node,) = recurrent(after)
    assert node.inputs[3] is not None


def test_constant_features_that_make_a_unit_live() -> None:
    """The candidate reads but a feature of zero, or one of two: then the unit is none that is zero."""
    for number, edits in ((0, 1 + 3), (2, 1)):
        layer = Layer(inputs=5).filled().zeroed(ZERO)
        layer.candidate("W")[:, ZERO, 0] = 0.5
        dense, bias = floats(5, 5), floats(5)
        dense[:, 0], bias[0] = 0, number
        body = f"m = MatMul(x, D) i = Add(m, k) a = {layer.read_from('i')} {TORCH}"
        held = {**layer.weights, "D": dense, "k": bias, "shape": np.array([0, 0, -1]), "V": head(layer)}
        _, outcome = rewritten(build(f"g (float[T, N, 5] x) => (float[] y) {{ {body} }}", **held), PASS)
        assert outcome.edits == edits


def test_an_output_of_the_graph_keeps_its_units() -> None:
    layer = Layer().filled().zeroed(ZERO)
    text = f"g (float[T, N, 3] x) => (float[T, 1, N, 6] y) {{ y = {layer.read_from('x')} }}"
    assert refusal(build(text, **layer.weights), PASS) == "graph output"


def test_the_last_state_as_an_output_of_the_graph() -> None:
    layer = Layer().filled().zeroed(ZERO)
    text = f"g (float[T, N, 3] x) => (float[1, N, 6] y) {{ a, y = {layer.read_from('x')} }}"
    assert refusal(build(text, **layer.weights), PASS) == "graph output"


def test_a_state_from_outside_keeps_its_units() -> None:
    layer = Layer().filled()
    layer.weights["R"][:, :, ZERO] = 0
    unread = head(layer)
    unread[ZERO] = 0
    model = net(layer, "", "h", inputs=f", float[1, N, {HIDDEN}] h", V=unread)
    assert refusal(model, PASS) == "graph input"


def test_computed_weights() -> None:
    layer = Layer().filled().zeroed(ZERO)
    del layer.weights["R"]
    body = f"a = {layer.read_from('i')} {TORCH}"
    text = f"g (float[T, N, 4] x, float[1, 24, 6] R) => (float[] y) {{ i = MatMul(x, D) {body} }}"
    first = floats(4, FEATURES)
    first[:, 1] = 0
    held = {**layer.weights, "D": first, "shape": np.array([0, 0, -1]), "V": head(layer)}
    assert refusal(build(text, **held), PASS) == "weight is not constant"


def test_shared_weights() -> None:
    """Two layers share theirs: a unit that one of them has to keep stays in both."""
    layer = Layer().filled().zeroed(ZERO)
    both = f"a = {layer.read_from('x')} c = {layer.read_from('x', '', 'H', 'H')} s = Add(a, c)"
    held = {**layer.weights, "H": state(layer, [1]), "shape": np.array([0, 0, -1]), "V": head(layer)}
    body = both + " " + TORCH.replace("(a)", "(s)")
    model = build(f"g (float[T, {BATCH}, 3] x) => (float[] y) {{ {body} }}", **held)
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 1
    assert widths(after) | narrow(layer, 5) == widths(after)


def test_weights_that_something_else_reads() -> None:
    layer = Layer().filled().zeroed(ZERO)
    body = TORCH.replace("y = MatMul(f, V)", "z = MatMul(f, V) n = ReduceSum<keepdims = 0>(R) y = Add(z, n)")
    model = net(layer, body=body)
    assert refusal(model, PASS) == "shared weight"


def test_batches_first() -> None:
    """onnxruntime has no kernel for this layout; the last axis is the same."""
    layer = Layer("RNN", extra=", layout = 1").filled().zeroed(ZERO)
    before = net(layer, body="s = Squeeze(a, two) y = MatMul(s, V)", two=np.array([2]))
    after = before.clone()
    assert PASS.apply(after).edits == 3
    assert widths(after) | narrow(layer, 3) == widths(after)
    feed = {"x": floats(BATCH, STEPS, FEATURES)}
    outputs = [ReferenceEvaluator(ir.to_proto(model)).run(None, feed)[0] for model in (before, after)]
    np.testing.assert_allclose(*outputs, rtol=1e-5)


@pytest.mark.parametrize("kind", ["float16", "float64"])
def test_other_types(kind: str) -> None:
    layer = Layer("GRU").filled().zeroed(ZERO)
    declared = {"float16": "float16", "float64": "double"}[kind]
    held = {"V": head(layer), **layer.weights}
    text = f"a = {layer.read_from('x')} y = MatMul(a, V)"
    model = build(
        f"g ({declared}[T, N, 3] x) => ({declared}[] y) {{ {text} }}",
        **{name: array.astype(kind) for name, array in held.items()},
    )
    assert PASS.apply(model).edits == 3
    assert {a.dtype.name for a in constants(model).values()} == {kind}


def test_one_group() -> None:
    layer = Layer(direction="bidirectional").filled()
    groups = [g for g in find_groups(net(layer)) if any(s.value.name == "R" for s in g.members)]
    (group,) = groups
    assert group.size == HIDDEN
    leaving = {(v.name, axis): indices.tolist() for v, axis, indices in group.slices(4)}
    assert leaving == {
        ("W", 1): [4, 10, 16, 22],
        ("R", 1): [4, 10, 16, 22],
        ("R", 2): [4],
        ("B", 1): [4, 10, 16, 22, 28, 34, 40, 46],
        ("a", 3): [4],
        ("t", 3): [4],
        ("f", 2): [4, 10],
        ("V", 0): [4, 10],
    }


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind + k.extra)
def test_copies_among_the_features_merge(kind: Layer, direction: str) -> None:
    layer = replace(kind, direction=direction, inputs=5).filled()
    dense, bias = floats(5, 5), floats(5)
    dense[:, 4], bias[4] = 2 * dense[:, 1], 2 * bias[1]
    body = f"m = MatMul(x, D) i = Add(m, k) a = {layer.read_from('i')} {TORCH}"
    held = {**layer.weights, "D": dense, "k": bias, "shape": np.array([0, 0, -1]), "V": head(layer)}
    model = build(f"g (float[T, N, 5] x) => (float[] y) {{ {body} }}", **held)
    after, outcome = rewritten(model, MergeChannels())
    assert outcome.edits == 1
    assert widths(after) | narrow(layer, HIDDEN, 4) | {"D": (5, 4)} == widths(after)


def test_copies_among_the_units_stay() -> None:
    layer = Layer().filled()
    for letter in "WRB":
        rows = layer.weights[letter].reshape(1, -1, HIDDEN, *layer.weights[letter].shape[2:])
        rows[:, :, 4] = rows[:, :, 2]
    assert refusal(net(layer), MergeChannels()) == ""


def test_copies_beside_the_units_merge() -> None:
    """Of what is joined to the units, which a norm of zero makes copies of each other, only that."""
    layer = Layer().filled()
    dense = floats(FEATURES, 4)
    dense[:, 3] = dense[:, 0]
    body = "s = Squeeze(a, one) m = MatMul(x, D) j = Concat<axis = 2>(s, m) y = MatMul(j, J)"
    model = net(layer, body=body, one=np.array([1]), D=dense, J=floats(HIDDEN + 4, 5))
    after, outcome = rewritten(model, MergeChannels())
    assert outcome.edits == 1
    assert widths(after) | narrow(layer, HIDDEN) | {"D": (FEATURES, 3)} == widths(after)


@pytest.mark.slow  # torch's exporter takes seconds for each
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("both", [False, True])
def test_half_of_the_units_of_torch(kind: str, both: bool) -> None:
    """Two layers and a dense one: what connects units with units, most of all, shrinks to a quarter."""
    torch = pytest.importorskip("torch", reason="the nets are torch's")
    from edgewise.optimizer.torch_export import export_module

    class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.rnn = getattr(torch.nn, kind)(32, 64, num_layers=2, bidirectional=both, batch_first=True)
            self.head = torch.nn.Linear(128 if both else 64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x)[0])

    torch.manual_seed(0)
    module = Net().eval()
    candidate = {"LSTM": 2, "GRU": 2, "RNN": 0}[kind]  # torch's order of gates is another one
    for name, parameter in module.rnn.named_parameters():
        dead = np.random.default_rng("_l0" in name).permutation(64)[:32]
        parameter.data.view(CELLS[kind].gates, 64, -1)[candidate, dead] = 0
    before = export_module(module, ["x=3x7x32"]).model
    after = before.clone()
    for spec in ("infer-shapes", "fold-shapes", "fold-constants", "drop-zero-states", "prune-channels"):
        parse(spec).apply(after)
    sizes = [
        sum(a.size for a in constants(model).values() if a.dtype == np.float32) for model in (before, after)
    ]
    assert sizes[1] < 0.37 * sizes[0], sizes
    for batch in (1, 3):
        feed = {"x": floats(batch, 7, 32)}
        assert_equal(Evaluator(before).run(feed), Evaluator(after).run(feed))


def test_a_layer_that_is_zero_as_a_whole_becomes_a_constant() -> None:
    layer = Layer(direction="bidirectional").filled().zeroed(list(range(HIDDEN)))
    dense = floats(FEATURES, 2 * HIDDEN)
    body = "t = Transpose<perm = [0, 2, 1, 3]>(a) f = Reshape(t, shape) m = MatMul(x, D) y = Add(m, f)"
    after, outcome = rewritten(net(layer, body=body, D=dense), FoldConstantChannels())
    assert outcome.edits == 1
    assert not recurrent(after)


def test_a_layer_that_nobody_listens_to() -> None:
    """Its outputs are there, and a reader of their shape."""
    layer = Layer("GRU").filled().zeroed(ZERO)
    body = "s = Shape(b) c = Cast<to = 1>(s) n = ReduceSum(c) y = Add(n, x)"
    _, outcome = rewritten(net(layer, outs=" , b", body=body), PASS)
    assert outcome.edits == 0
    assert "Shape" in outcome.refused


@st.composite
def stacks(draw: st.DrawFn) -> ir.Model:
    """One to three layers of any kind whose weights are zero in part, each behind a dense layer or not."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    lines, held, width, x = [], dict[str, Array](), 4, "x"
    for k in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            dense, bias = rng.standard_normal((width, 5)), rng.standard_normal(5)
            dense[:, rng.random(5) < 0.4] = 0
            bias[rng.random(5) < 0.4] = 0
            held |= {f"D{k}": dense.astype(np.float32), f"k{k}": bias.astype(np.float32)}
            lines.append(f"m{k} = MatMul({x}, D{k}) i{k} = Add(m{k}, k{k})")
            x, width = f"i{k}", 5
        kind, direction = draw(st.sampled_from(KINDS)), draw(st.sampled_from(list(DIRECTIONS)))
        layer = replace(kind, direction=direction, inputs=width, name=str(k), hidden=5).filled()
        thin(rng, layer)
        held |= layer.weights
        lines.append(f"a{k} = {layer.read_from(x)} t{k} = Transpose<perm = [0, 2, 1, 3]>(a{k})")
        lines.append(f"f{k} = Reshape(t{k}, shape)")
        x, width = f"f{k}", 5 * DIRECTIONS[direction]
    held |= {"shape": np.array([0, 0, -1]), "V": mostly(rng, (width, 3)), "last": 3 + np.zeros(3, np.float32)}
    lines.append(f"m = MatMul({x}, V) y = Add(m, last)")
    return build(f"g (float[T, N, 4] x) => (float[] y) {{ {' '.join(lines)} }}", **held)


def mostly(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Numbers with rows of zeros along the first axis."""
    weight = rng.standard_normal(shape).astype(np.float32)
    weight[rng.random(shape[0]) < 0.4] = 0
    return weight


def thin(rng: np.random.Generator, layer: Layer) -> None:
    """New weights, of which units of any kind are zero, unread, or nearly so."""
    for name, array in layer.weights.items():
        layer.weights[name] = (rng.standard_normal(array.shape) / 2).astype(np.float32)
    layer.zeroed(np.flatnonzero(rng.random(layer.hidden) < 0.5).tolist())
    for letter in "WR":
        weight = layer.weights[letter + layer.name]
        weight[:, :, rng.random(weight.shape[2]) < 0.3] = 0
    if rng.random() < 0.5:
        candidate = layer.candidate("RWB"[rng.integers(3)])
        candidate[..., rng.integers(candidate.shape[-1])] = 0.5


@settings(max_examples=40)
@given(stacks())
def test_any_stack(model: ir.Model) -> None:
    rewritten(model, PASS)
    rewritten(model, MergeChannels())
