"""fuse-attention: products around a softmax become Attention where that is known to do the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build, operators, refusal, rewritten

from edgewise.passes.fuse_attention import FuseAttention
from edgewise.passes.graph import attribute
from edgewise.runtime.evaluate import Array

RULE = FuseAttention()
LOWEST = float(np.finfo(np.float32).min)
QUERY, KEYS, VALUES = "float[2, 4, 5, 8] q", "float[2, 4, 7, 8] k", "float[2, 4, 7, 6] v"
TURN = "kt = Transpose<perm = [0, 1, 3, 2]>(k)"
SCORES = f"{TURN} s = MatMul(q, kt) t = Mul(s, c)"
WEIGH = "p = Softmax<axis = -1>(t) y = MatMul(p, v)"
USED = "a value inside the attention has another user"
HIDDEN = "the mask may hide all keys of a row"
SPREAD = "the mask may spread the scores"
INFINITY = np.array(-np.inf, np.float32)


def net(
    body: str, declared: str = "", outputs: str = "float[] y", opset: int = 23, **weights: Any
) -> ir.Model:
    """A graph with inputs q, k and v unless `declared` has others, and a factor c of 0.3."""
    given = {part.split()[-1]: part.strip() for part in (f"{QUERY}; {KEYS}; {VALUES}").split(";")}
    given |= {part.split()[-1]: part.strip() for part in declared.split(";") if part.strip()}
    words = set("".join(x if x.isalnum() else " " for x in body).split())
    held = {"c": np.float32(0.3), "r": np.float32(np.sqrt(0.3)), "low": INFINITY, **weights}
    held = {name: np.asarray(a) for name, a in held.items() if name in words and name not in given}
    inputs = ", ".join(text for name, text in given.items() if name in words)
    return build(f"g ({inputs}) => ({outputs}) {{ {body} }}", opset, **held)


def fused(model: ir.Model, feed: dict[str, Array] | None = None) -> ir.Node:
    """The one node that is left."""
    after, outcome = rewritten(model, RULE, feed)
    assert outcome.edits == 1
    assert operators(after) == ["Attention"]
    return after.graph[0]


SCALED = {
    "after": f"{TURN} s = MatMul(q, kt) t = Mul(s, c)",
    "after, the other way round": f"{TURN} s = MatMul(q, kt) t = Mul(c, s)",
    "divided": f"{TURN} s = MatMul(q, kt) t = Div(s, inverse)",
    "on the queries": f"z = Mul(q, c) {TURN} t = MatMul(z, kt)",
    "on the keys": "z = Div(k, inverse) kt = Transpose<perm = [0, 1, 3, 2]>(z) t = MatMul(q, kt)",
    "on the transposed keys": f"{TURN} z = Mul(c, kt) t = MatMul(q, z)",
    "on both": f"a = Mul(q, r) {TURN} z = Mul(kt, r) t = MatMul(a, z)",
    "in shares": f"a = Mul(q, c) {TURN} s = MatMul(a, kt) x = Div(s, c) t = Mul(x, c)",
}


@pytest.mark.parametrize("scores", SCALED.values(), ids=SCALED.keys())
def test_where_the_scale_is(scores: str) -> None:
    node = fused(net(f"{scores} {WEIGH}", inverse=np.float32(1 / 0.3)))
    assert attribute(node, "scale") == pytest.approx(0.3, rel=1e-6)
    assert [v.name for v in node.inputs if v is not None] == ["q", "k", "v"]


def test_without_a_scale() -> None:
    assert attribute(fused(net(f"{TURN} t = MatMul(q, kt) {WEIGH}")), "scale") == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_default_scale_is_left_out(dtype: type) -> None:
    """1/sqrt(8), as torch puts it: the root of it on both sides, rounded."""
    root = np.float32(dtype(8) ** dtype(-0.25))
    node = fused(net(f"a = Mul(q, r) {TURN} z = Mul(kt, r) t = MatMul(a, z) {WEIGH}", r=root))
    assert not node.attributes


MASKS = ["[5, 7]", "[1, 1, 5, 7]", "[2, 4, 5, 7]", "[2, 1, 5, 7]", "[1, 4, 5, 7]", "[4, 5, 7]"]


@pytest.mark.parametrize("sum_", ["Add(t, m)", "Add(m, t)"])
@pytest.mark.parametrize("shape", MASKS)
def test_a_mask_that_is_added(shape: str, sum_: str) -> None:
    body = f"{SCORES} u = {sum_} p = Softmax(u) y = MatMul(p, v)"
    node = fused(net(body, f"float{shape} m"))
    assert [v.name for v in node.inputs if v is not None] == ["q", "k", "v", "m"]
    assert attribute(node, "is_causal") is None


@pytest.mark.parametrize("shape", ["[1, 7]", "[2, 1, 1, 7]", "[N, 1, 1, S]"])
def test_one_row_of_a_mask_for_all_queries(shape: str) -> None:
    """onnxruntime's kernel wants a row for each."""
    declared = "float[N, 4, 5, 8] q; float[N, 4, S, 8] k; float[N, 4, S, 6] v; " if "N" in shape else ""
    body = f"{SCORES} u = Add(t, m) p = Softmax(u) y = MatMul(p, v)"
    after, _ = rewritten(net(body, f"{declared}float{shape} m"), RULE)
    assert operators(after) == ["Expand", "Attention"]


def seen(*shape: int) -> Array:
    """A mask with half of the keys, among them the first one of every row."""
    mask = np.random.default_rng(1).random(shape) < 0.5
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("low", [-np.inf, LOWEST])
def test_keys_that_are_seen(low: float) -> None:
    body = f"{SCORES} u = Where(m, t, low) p = Softmax(u) y = MatMul(p, v)"
    node = fused(net(body, m=seen(2, 1, 5, 7), low=np.float32(low)))
    assert [v.name for v in node.inputs if v is not None] == ["q", "k", "v", "m"]


def test_keys_that_are_hidden() -> None:
    body = f"{SCORES} u = Where(m, low, t) p = Softmax(u) y = MatMul(p, v)"
    after, _ = rewritten(net(body, m=~seen(5, 7)), RULE)
    assert operators(after) == ["Not", "Attention"]


def test_a_constant_that_hides_no_whole_row() -> None:
    mask = np.where(seen(5, 7), np.float32(0), INFINITY)
    fused(net(f"{SCORES} u = Add(t, m) p = Softmax(u) y = MatMul(p, v)", m=mask))


SQUARE = "float[2, 4, 5, 8] k; float[2, 4, 5, 6] v"
LATER = ~np.tri(5, dtype=np.bool_)
CAUSAL = {
    "infinity": ("Add(t, m)", np.where(LATER, INFINITY, np.float32(0))),
    "lowest": ("Add(m, t)", np.where(LATER, np.float32(LOWEST), np.float32(0))[None, None]),
    "seen": ("Where(m, t, low)", ~LATER),
    "hidden": ("Where(m, low, t)", LATER[None]),
}


@pytest.mark.parametrize(("masked", "mask"), CAUSAL.values(), ids=CAUSAL.keys())
def test_causal(masked: str, mask: Array) -> None:
    node = fused(net(f"{SCORES} u = {masked} p = Softmax(u) y = MatMul(p, v)", SQUARE, m=mask))
    assert attribute(node, "is_causal") == 1
    assert len(node.inputs) == 3


def test_nearly_causal() -> None:
    mask = np.where(LATER, np.float32(-1e4), np.float32(0))
    node = fused(net(f"{SCORES} u = Add(t, m) p = Softmax(u) y = MatMul(p, v)", SQUARE, m=mask))
    assert attribute(node, "is_causal") is None


GUARD = "n = IsNaN(p) o = Where(n, zero, p) y = MatMul(o, v)"


@pytest.mark.parametrize("masked", ["Add(t, m)", "Where(m, t, low)"])
def test_rows_that_are_hidden_and_guarded(masked: str) -> None:
    """torch's exporter writes this for boolean masks; the operator gives zeros as well."""
    mask = seen(2, 1, 5, 7)
    mask[1, 0, 3] = False
    floats = np.where(mask, np.float32(0), INFINITY)
    body = f"{SCORES} u = {masked} p = Softmax(u) {GUARD}"
    fused(net(body, m=floats if "Add" in masked else mask, zero=np.float32(0)))


def test_a_guarded_mask_from_outside() -> None:
    body = f"{SCORES} u = Where(m, t, low) p = Softmax(u) {GUARD}"
    mask = seen(2, 1, 5, 7)
    mask[0, 0, 2] = False
    model = net(body, "bool[2, 1, 5, 7] m", zero=np.float32(0))
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 4, 5, 8), "k": (2, 4, 7, 8), "v": (2, 4, 7, 6)}
    feed = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    fused(model, {**feed, "m": mask})


KEY_FORMS = {
    "length before heads": ("float[2, 7, 4, 8] k", "kt = Transpose<perm = [0, 2, 3, 1]>(k)", [0, 2, 1, 3]),
    "in front": ("float[8, 2, 7, 4] k", "kt = Transpose<perm = [1, 3, 0, 2]>(k)", [1, 3, 2, 0]),
}


@pytest.mark.parametrize(("declared", "turn", "perm"), KEY_FORMS.values(), ids=KEY_FORMS.keys())
def test_other_orders_of_the_keys(declared: str, turn: str, perm: list[int]) -> None:
    model = net(f"{turn} s = MatMul(q, kt) t = Mul(s, c) {WEIGH}", declared)
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Transpose", "Attention"]
    assert list(attribute(after.graph[0], "perm")) == perm


THREE_AXES = """
    f = Reshape(k, flat) g = Transpose<perm = [0, 2, 1]>(f) kt = Reshape(g, turned)
    s = MatMul(q, kt) t = Mul(s, c)"""


def test_keys_turned_in_three_axes() -> None:
    body = f"{THREE_AXES} {WEIGH}"
    fused(net(body, flat=np.array([-1, 7, 8]), turned=np.array([2, 4, 8, 7])))


def test_keys_that_never_had_four_axes() -> None:
    """Where a Reshape before was merged with the first one, one is left."""
    declared = "float[8, 7, 8] k"
    body = (
        f"g = Transpose<perm = [0, 2, 1]>(k) kt = Reshape(g, turned) s = MatMul(q, kt) t = Mul(s, c) {WEIGH}"
    )
    after, _ = rewritten(net(body, declared, turned=np.array([2, 4, 8, 7])), RULE)
    assert operators(after) == ["Reshape", "Attention"]


def test_keys_that_never_had_four_axes_of_open_size() -> None:
    declared = "float[N, 1, L, 8] q; float[N, S, 8] k; float[N, 1, S, 6] v"
    body = f"g = Transpose<perm = [0, 2, 1]>(k) kt = Reshape(g, turned) t = MatMul(q, kt) {WEIGH}"
    model = net(body, declared, turned=np.array([0, 1, 8, -1]))
    model.graph[1].outputs[0].shape = ir.Shape(["N", 1, 8, "S"])
    assert refusal(model, RULE) == "the keys have more than one open dimension to be given"


def test_three_axes_of_another_kind() -> None:
    """Heads and lengths are mixed: no transposition of keys."""
    model = net(f"{THREE_AXES} {WEIGH}", flat=np.array([-1, 14, 4]), turned=np.array([2, 4, 8, 7]))
    assert refusal(model, RULE) == ""


def test_open_sizes() -> None:
    declared = "float[N, 4, L, 8] q; float[N, 4, S, 8] k; float[N, 4, S, 6] v; float[N, 1, L, S] m"
    node = fused(net(f"{SCORES} u = Add(t, m) p = Softmax(u) y = MatMul(p, v)", declared))
    assert node.outputs[0].name == "y"


def test_one_head_of_keys_for_all() -> None:
    fused(net(f"{SCORES} {WEIGH}", "float[2, 1, 7, 8] k; float[2, 1, 7, 6] v"))


REPEAT = """
    ku = Unsqueeze(k, two) ke = Expand(ku, kwide) kr = Reshape(ke, kall)
    vu = Unsqueeze(v, two) ve = Expand(vu, vwide) vr = Reshape(ve, vall)
    kt = Transpose<perm = [0, 1, 3, 2]>(kr) s = MatMul(q, kt) t = Mul(s, c)
    p = Softmax(t) y = MatMul(p, vr)"""
REPEATS = {
    "two": np.array([2]),
    "kwide": np.array([2, 2, 2, 7, 8]),
    "kall": np.array([2, 4, 7, 8]),
    "vwide": np.array([2, 2, 2, 7, 6]),
    "vall": np.array([2, 4, 7, 6]),
}


def test_heads_that_are_repeated() -> None:
    node = fused(net(REPEAT, "float[2, 2, 7, 8] k; float[2, 2, 7, 6] v", **REPEATS))
    assert [v.name for v in node.inputs if v is not None] == ["q", "k", "v"]


def test_heads_that_are_repeated_in_turn() -> None:
    """0, 1, 0, 1 and not 0, 0, 1, 1: the repeats stay."""
    one = {"two": np.array([1]), "kwide": np.array([2, 2, 2, 7, 8]), "vwide": np.array([2, 2, 2, 7, 6])}
    model = net(REPEAT, "float[2, 2, 7, 8] k; float[2, 2, 7, 6] v", **{**REPEATS, **one})
    after, _ = rewritten(model, RULE)
    assert operators(after)[-1] == "Attention"
    assert operators(after).count("Expand") == 2


def test_inside_a_subgraph() -> None:
    text = f"""g ({QUERY}, {KEYS}, {VALUES}, bool f) => (float[2, 4, 5, 6] y) {{ y = If (f) <
        then_branch = a () => (float[2, 4, 5, 6] o) {{
            kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt) p = Softmax(s) o = MatMul(p, v) }},
        else_branch = b () => (float[2, 4, 5, 6] z) {{ z = Tile(zero, sizes) }}> }}"""
    model = build(text, 23, zero=np.zeros((1, 1, 1, 1), np.float32), sizes=np.array([2, 4, 5, 6]))
    after, outcome = rewritten(model, RULE)
    assert outcome.edits == 1
    assert [n.op_type for n in next(iter(after.graph.subgraphs()))] == ["Attention"]


def test_half_precision() -> None:
    declared = "float16[2, 4, 5, 8] q; float16[2, 4, 7, 8] k; float16[2, 4, 7, 6] v"
    fused(net(f"{SCORES} {WEIGH}", declared, "float16[] y", c=np.float16(0.3)))


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_any_sizes(data: st.DataObject) -> None:
    batch, heads, length, others, size, width = (data.draw(st.integers(1, 4)) for _ in range(6))
    shared = data.draw(st.sampled_from([1, heads]))
    factor = data.draw(st.floats(0.05, 2))
    mask = [data.draw(st.sampled_from([1, n])) for n in (batch, heads, length)]
    mask = mask[data.draw(st.integers(0, 2)) :]
    declared = (
        f"float[{batch}, {heads}, {length}, {size}] q; float[{batch}, {shared}, {others}, {size}] k;"
        f"float[{batch}, {shared}, {others}, {width}] v; float{[*mask, others]} m"
    )
    masked = data.draw(st.sampled_from(["u = Identity(t)", "u = Add(t, m)", "u = Add(m, t)"]))
    body = f"{SCORES} {masked} p = Softmax(u) y = MatMul(p, v)".replace(
        "u = Identity(t) p = Softmax(u)", "p = Softmax(t)"
    )
    after, outcome = rewritten(net(body, declared, c=np.float32(factor)), RULE)
    rows = mask[-1] != length and "Add" in masked
    assert operators(after) == ["Expand"] * rows + ["Attention"]
    assert outcome.edits == 1


MASKED = "u = Add(t, m) p = Softmax(u) y = MatMul(p, v)"
REFUSALS = [
    (f"{SCORES} {WEIGH} z = Relu(s)", "", USED),
    (f"{SCORES} {WEIGH} z = Relu(p)", "", USED),
    (f"{SCORES} {WEIGH} z = MatMul(p, v)", "", USED),
    (f"{SCORES} p = Softmax(t) {GUARD} z = Relu(p)", "", USED),
    (f"{SCORES} p = Softmax(t) {GUARD} z = Relu(o)", "", USED),
    (f"{SCORES} p = Softmax<axis = 2>(t) y = MatMul(p, v)", "", "the softmax is not over the keys"),
    (f"{TURN} s = MatMul(q, kt) n = Neg(c) t = Mul(s, less) {WEIGH}", "", "the scale is not positive"),
    (
        f"{SCORES} {WEIGH}",
        "double[2, 4, 5, 8] q; double[2, 4, 7, 8] k; double[2, 4, 7, 6] v",
        "runtimes have no attention of this type",
    ),
    (
        f"{SCORES} {WEIGH}",
        "float[3, 2, 4, 5, 8] q; float[2, 4, 7, 8] k",
        "the operands are not of rank 4",
    ),
    (f"{SCORES} {WEIGH}", "float[1, 4, 7, 8] k", "the batch sizes are not known to be equal"),
    (
        f"{SCORES} {WEIGH}",
        "float[N, 4, 5, 8] q; float[M, 4, 7, 8] k",
        "the batch sizes are not known to be equal",
    ),
    (
        f"{SCORES} {WEIGH}",
        "float[2, 1, 7, 6] v",
        "the numbers of heads are not known, or differ between keys and values",
    ),
    (
        f"{SCORES} {WEIGH}",
        "float[2, H, 5, 8] q; float[2, H, 7, 8] k; float[2, H, 7, 6] v",
        "the numbers of heads are not known, or differ between keys and values",
    ),
    (
        f"{SCORES} {WEIGH}",
        "float[2, 1, 5, 8] q",
        "the heads of queries and keys do not go together",
    ),
    (f"{SCORES} {MASKED}", "float[7] m", "the mask is not of rank 2 to 4"),
    (f"{SCORES} {MASKED}", "float[5, 1] m", "the mask is not known to have every key"),
    (f"{SCORES} {MASKED}", "float[5, X] m", "the mask is not known to have every key"),
    (
        f"{SCORES} {MASKED}",
        "float[2, 4, L, 8] q; float[2, 1, 1, 7] m",
        "the mask has one row for an open number of queries",
    ),
    (f"{SCORES} {MASKED}", "float[2, 4, 5, 8] q; float[X, 1, 5, 7] m", SPREAD),
    (
        f"{SCORES} {MASKED}",
        "float[1, 4, 5, 8] q; float[1, 4, 7, 8] k; float[1, 4, 7, 6] v; float[2, 1, 5, 7] m",
        SPREAD,
    ),
    (
        f"{SCORES} w = Where(m, zero, low) u = Add(t, w) p = Softmax(u) y = MatMul(p, v)",
        "bool[5, 7] m",
        HIDDEN,
    ),
    (f"{SCORES} u = Where(m, t, low) p = Softmax(u) y = MatMul(p, v)", "bool[5, 7] m", HIDDEN),
    (f"{SCORES} u = Where(m, t, lowest) p = Softmax(u) {GUARD}", "bool[5, 7] m", HIDDEN),
    (f"{SCORES} u = Add(t, nothing) p = Softmax(u) y = MatMul(p, v)", "", "the mask hides all keys of a row"),
]


@pytest.mark.parametrize(("body", "declared", "reason"), REFUSALS)
def test_conditions(body: str, declared: str, reason: str) -> None:
    more = {"less": np.float32(-0.3), "zero": np.float32(0), "lowest": np.float32(LOWEST)}
    nothing = np.zeros((5, 7), np.float32)
    nothing[2] = -np.inf
    kind = "double" if "double" in declared else "float"
    more |= {"c": np.float64(0.3)} if kind == "double" else {}
    outputs = f"{kind}[] y, float[] z" if "z =" in body else f"{kind}[] y"
    assert refusal(net(body, declared, outputs, **more, nothing=nothing), RULE) == reason


def test_the_weights_are_an_output() -> None:
    model = net(f"{SCORES} {WEIGH}", outputs="float[] y, float[] p")
    assert refusal(model, RULE) == USED


def test_spread_over_graphs() -> None:
    text = f"""g ({QUERY}, {KEYS}, {VALUES}, bool f) => (float[2, 4, 5, 6] y) {{
        kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt)
        y = If (f) <
        then_branch = a () => (float[2, 4, 5, 6] o) {{ p = Softmax(s) o = MatMul(p, v) }},
        else_branch = b () => (float[2, 4, 5, 6] z) {{ z = Tile(zero, sizes) }}> }}"""
    model = build(text, 23, zero=np.zeros((1, 1, 1, 1), np.float32), sizes=np.array([2, 4, 5, 6]))
    assert refusal(model, RULE) == "the attention is spread over several graphs"


BODIES = [
    "t = MatMul(q, w) y = Softmax(t)",
    "t = MatMul(q, w) p = Softmax(t) y = MatMul(p, x)",  # nothing is transposed
    "t = Relu(q) p = Softmax(t) y = MatMul(p, w)",
    f"{TURN} s = MatMul(q, kt) t = Sqrt(s) p = Softmax(t) y = MatMul(p, v)",
    f"{SCORES} p = Softmax(t) vt = Transpose<perm = [0, 1, 3, 2]>(v) o = Transpose<perm = [0, 1, 3, 2]>(p)"
    " y = MatMul(vt, o)",
    f"{SCORES} u = Where(m, t, zero) p = Softmax(u) y = MatMul(p, v)",
]


@pytest.mark.parametrize("body", BODIES)
def test_what_is_no_attention(body: str) -> None:
    weights = {"w": np.ones((8, 3), np.float32), "x": np.ones((3, 2), np.float32)}
    if "Relu" in body:
        weights["w"] = np.ones((8, 2), np.float32)
    assert refusal(net(body, m=seen(5, 7), zero=np.float32(0), **weights), RULE) == ""


@pytest.mark.parametrize("opset", [23, 24, 25])
def test_operator_sets_with_it(opset: int) -> None:
    """The operator has changed since, but not for what is written here."""
    body = f"{SCORES} u = Add(t, m) p = Softmax(u) {GUARD}"
    mask = np.where(seen(2, 1, 5, 7), np.float32(0), INFINITY)
    mask[1, 0, 3] = -np.inf
    fused(net(body, opset=opset, m=mask, zero=np.float32(0)))


def test_operator_sets_without_it() -> None:
    assert refusal(net(f"{SCORES} {WEIGH}", opset=22), RULE) == ""
