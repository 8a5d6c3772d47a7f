"""Heads of attention leave in every form that exporters write; tokens and scores never do."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build, constants, operators, refusal, rewritten

from edgewise.passes.prune_channels import PruneChannels
from edgewise.runtime.evaluate import Array

PASS = PruneChannels()
RNG = np.random.default_rng(0)
TOKENS, HEADS, SIZE = 5, 4, 3  # of queries; twelve features
DEAD = [1, 2]  # heads
OUT = "f = Reshape(t, back) o = MatMul(f, wo) y = Add(o, bo)"


def floats(*shape: int) -> Array:
    return RNG.uniform(-1.0, 1.0, shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def rows(heads: int = HEADS, dead: list[int] = DEAD, runs: int = 1) -> dict[str, Array]:
    """A projection to so many heads, some of them zero, with its bias; `runs` of them one after another."""
    weight, bias = floats(6, runs, heads, SIZE), floats(runs, heads, SIZE)
    weight[:, :, dead] = 0
    bias[:, dead] = 0
    return {"w": weight.reshape(6, -1), "b": bias.reshape(-1)}


def projection(name: str, heads: int = HEADS, dead: list[int] = DEAD) -> dict[str, Array]:
    return {f"{kind}{name}": array for kind, array in rows(heads, dead).items()}


def model(text: str, opset: int = 20, **weights: Array) -> ir.Model:
    held = {"wo": floats(HEADS * SIZE, 6), "bo": floats(6), **weights}
    return build(f"g (float[N, {TOKENS}, 6] x) => (float[] y) {{ {text} }}", opset, **held)


def widths(model: ir.Model) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in constants(model).items()}


def heads_of(name: str, order: str = "0, 2, 1, 3") -> str:
    """A projection from its name, and its heads as [batch, head, token, number]."""
    return (
        f"m{name} = MatMul(x, w{name}) a{name} = Add(m{name}, b{name}) r{name} = Reshape(a{name}, heads) "
        f"{name} = Transpose<perm = [{order}]>(r{name}) "
    )


APART = {"heads": ints(0, 0, HEADS, SIZE), "back": ints(0, 0, HEADS * SIZE)}
CORE = "s = MatMul(q, k) p = Softmax(s) c = MatMul(p, v) t = Transpose<perm = [0, 2, 1, 3]>(c) " + OUT
SEPARATE = heads_of("q") + heads_of("k", order="0, 2, 3, 1") + heads_of("v")


def separate(**dead: list[int]) -> dict[str, Array]:
    """Projections of their own, with the heads that are dead in each."""
    held = [projection(name, dead=dead.get(name, [])).items() for name in "qkv"]
    return APART | {key: array for items in held for key, array in items}


def test_heads_of_three_projections() -> None:
    after, outcome = rewritten(model(SEPARATE + CORE, **separate(q=DEAD, k=DEAD, v=DEAD)), PASS)
    assert outcome.edits == 2
    assert not outcome.refused
    assert widths(after) | {"wq": (6, 6), "bk": (6,), "wv": (6, 6), "wo": (6, 6)} == widths(after)
    assert constants(after)["back"].tolist() == [0, 0, 6]


def test_values_alone_decide() -> None:
    """A head whose values are zero gives zero, whatever its scores; one without keys still averages."""
    after, outcome = rewritten(model(SEPARATE + CORE, **separate(v=DEAD)), PASS)
    assert outcome.edits == 2
    assert widths(after) | {"wq": (6, 6), "wk": (6, 6), "wv": (6, 6), "wo": (6, 6)} == widths(after)


@pytest.mark.parametrize("name", ["q", "k"])
def test_without_scores_values_are_averaged(name: str) -> None:
    assert refusal(model(SEPARATE + CORE, **separate(**{name: DEAD})), PASS) == ""


def test_heads_that_nobody_reads() -> None:
    weight = floats(HEADS, SIZE, 6)
    weight[DEAD] = 0
    after, outcome = rewritten(model(SEPARATE + CORE, **separate(), wo=weight.reshape(-1, 6)), PASS)
    assert outcome.edits == 2
    assert widths(after) | {"wq": (6, 6), "wk": (6, 6), "wv": (6, 6)} == widths(after)


PACKED = {
    "split": ("r = Reshape(a, three) u = Transpose<perm = [2, 0, 3, 1, 4]>(r) ", ints(0, 0, 3, HEADS, SIZE)),
    "halved": (
        "r = Reshape(a, three) u = Transpose<perm = [2, 0, 3, 1, 4]>(r) ",
        ints(-1, TOKENS, 3, HEADS, SIZE),
    ),
}
TAKEN = {
    "sliced": "".join(
        f"{n}1 = Slice(u, i{i}, i{i + 1}, i0) {n} = Squeeze({n}1, i0) "
        for i, n in enumerate(["q", "k0", "v"])
    ),
    "split": "q1, k1, v1 = Split<axis = 0, num_outputs = 3>(u) q = Squeeze(q1, i0) k0 = Squeeze(k1, i0) "
    "v = Squeeze(v1, i0) ",
    "gathered": "q = Gather(u, j0) k0 = Gather(u, j1) v = Gather(u, j2) ",
}


@pytest.mark.parametrize("taken", TAKEN)
@pytest.mark.parametrize("name", PACKED)
def test_heads_of_one_projection(name: str, taken: str) -> None:
    """As torch's encoder layers and vision transformers have it."""
    apart, shape = PACKED[name]
    text = (
        f"m = MatMul(x, w) a = Add(m, b) {apart}{TAKEN[taken]}k = Transpose<perm = [0, 1, 3, 2]>(k0) {CORE}"
    )
    held = {f"i{i}": ints(i) for i in range(4)} if taken == "sliced" else {"i0": ints(0)}
    held = {f"j{i}": np.array(i) for i in range(3)} if taken == "gathered" else held
    after, outcome = rewritten(
        model(text, **rows(runs=3), **held, three=shape, back=ints(-1, TOKENS, HEADS * SIZE)), PASS
    )
    assert outcome.edits == 2
    assert not outcome.refused
    assert widths(after) | {"w": (6, 18), "b": (18,), "wo": (6, 6)} == widths(after)


MASKS = {
    "one for all": "z = Add(s, mask) p = Softmax(z) ",
    "scaled": "e = Mul(s, half) z = Add(e, mask) p = Softmax<axis = 3>(z) ",
    "chosen": "g = Greater(mask, half) z = Where(g, s, low) p = Softmax(z) ",
    "guarded": "z = Add(s, mask) e = Softmax(z) h = IsNaN(e) p = Where(h, zero, e) ",
    "dropped out": "e = Softmax(s) p = Dropout(e) ",
}


@pytest.mark.parametrize("shape", [(TOKENS, TOKENS), (1, HEADS, TOKENS, TOKENS), (1, 1, 1, TOKENS)])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, shape: tuple[int, ...]) -> None:
    """A mask may have its own for every head, which leaves with it."""
    text = SEPARATE + CORE.replace("p = Softmax(s) ", MASKS[name])
    numbers = {"mask": floats(*shape), "half": np.float32(0.5), "zero": np.float32(0), "low": np.float32(-9)}
    held = {key: array for key, array in numbers.items() if any(f"{key}{end}" in MASKS[name] for end in ",)")}
    after, outcome = rewritten(model(text, **separate(q=DEAD, k=DEAD, v=DEAD), **held), PASS)
    assert outcome.edits == 2
    assert widths(after) | {"wq": (6, 6), "wo": (6, 6)} == widths(after)


REPEATED = {
    "sizes": ("n = Expand({}, wide)", {"wide": ints(1, 2, 2, 1, 1)}),
    "given in full": ("n = Expand({}, wide)", {"wide": ints(1, 2, 2, TOKENS, 1)}),
    "put together": (
        "h = Shape<start = 0, end = 1>(x) z = Concat<axis = 0>(h, two, four) n = Expand({}, z)",
        {"two": ints(2), "four": ints(2, TOKENS, SIZE)},
    ),
}


@pytest.mark.parametrize("name", REPEATED)
def test_heads_that_share_keys_and_values(name: str) -> None:
    """Grouped queries: two heads of keys and values for four of queries, which leave in pairs."""
    spread, held = REPEATED[name]
    text, turn = heads_of("q"), {"k": "0, 1, 3, 2", "v": "0, 1, 2, 3"}
    for key, order in turn.items():
        own = (
            spread.format(f"u{key}")
            .replace("n =", f"n{key} =")
            .replace("h =", f"h{key} =")
            .replace("z =", f"z{key} =")
        )
        own = own.replace("(h,", f"(h{key},").replace(" z)", f" z{key})")
        text += (
            f"m{key} = MatMul(x, w{key}) a{key} = Add(m{key}, b{key}) r{key} = Reshape(a{key}, few) "
            f"t{key} = Transpose<perm = [0, 2, 1, 3]>(r{key}) u{key} = Unsqueeze(t{key}, i2) {own} "
            f"e{key} = Reshape(n{key}, all) {key} = Transpose<perm = [{order}]>(e{key}) "
        )
    held = APART | held | {"few": ints(0, 0, 2, SIZE), "i2": ints(2), "all": ints(-1, HEADS, TOKENS, SIZE)}
    held |= projection("q", dead=[]) | projection("k", 2, [0]) | projection("v", 2, [0])
    after, outcome = rewritten(model(text + CORE, **held), PASS)
    assert outcome.edits == 1
    assert not outcome.refused
    assert widths(after) | {"wq": (6, 6), "wk": (6, 3), "wv": (6, 3), "wo": (6, 6)} == widths(after)


def test_one_head_of_keys_for_all() -> None:
    """Queries that nobody reads leave; the keys and values are everybody's."""
    weight = floats(HEADS, SIZE, 6)
    weight[DEAD] = 0
    one = "k = Transpose<perm = [0, 2, 1]>(ak) kk = Unsqueeze(k, i1) vv = Unsqueeze(av, i1) "
    text = heads_of("q") + "ak = MatMul(x, wk) av = MatMul(x, wv) " + one
    text += CORE.replace("(q, k)", "(q, kk)").replace("(p, v)", "(p, vv)")
    held = APART | projection("q", dead=[]) | {"wk": floats(6, SIZE), "wv": floats(6, SIZE), "i1": ints(1)}
    after, outcome = rewritten(model(text, **held, wo=weight.reshape(-1, 6)), PASS)
    assert outcome.edits == 2
    assert widths(after) | {"wq": (6, 6), "wk": (6, 3), "wo": (6, 6)} == widths(after)


def test_a_factor_of_zero() -> None:
    """Heads that a constant mask makes zero are dead in front of it, too."""
    gate = np.ones((HEADS, 1, 1), np.float32)
    gate[DEAD] = 0
    text = SEPARATE + CORE.replace("c = MatMul(p, v)", "c0 = MatMul(p, v) c = Mul(c0, gate)")
    after, outcome = rewritten(model(text, **separate(), gate=gate), PASS)
    assert outcome.edits == 2
    assert widths(after) | {"wq": (6, 6), "wv": (6, 6), "gate": (2, 1, 1)} == widths(after)


def test_a_weight_for_every_head() -> None:
    """Batches of constant matrices: heads leave with theirs, and columns that are zero in all of them."""
    weight = floats(HEADS, SIZE, 4)
    weight[DEAD] = 0
    weight[..., 3] = 0
    text = heads_of("q") + "c = MatMul(q, wh) t = Transpose<perm = [0, 2, 1, 3]>(c) " + OUT
    held = APART | {"back": ints(0, 0, HEADS * 4), "wo": floats(HEADS * 4, 6), "wh": weight}
    after, outcome = rewritten(model(text, **held | projection("q", dead=[])), PASS)
    assert outcome.edits == 2
    assert widths(after) | {"wq": (6, 6), "wh": (2, SIZE, 4), "wo": (8, 6)} == widths(after)


def latent(dead: str) -> ir.Model:
    """Four constant queries and six keys made by a constant matrix from the tokens, some of them zero."""
    held = {"wq": floats(4, TOKENS), "wk": floats(6, TOKENS), "wv": floats(6, TOKENS)}
    held[f"w{dead}"][DEAD] = 0
    text = """q = MatMul(wq, x) k0 = MatMul(wk, x) v = MatMul(wv, x) k = Transpose<perm = [0, 2, 1]>(k0)
        s = MatMul(q, k) p = Softmax(s) c = MatMul(p, v) o = MatMul(c, wo) y = Add(o, bo)"""
    return model(text, **held, wo=floats(6, 6))


@pytest.mark.parametrize("dead", ["q", "k", "v"])
def test_rows_and_columns_of_scores_stay(dead: str) -> None:
    """A key of zeros has a score all the same, and takes part in the softmax."""
    _, outcome = rewritten(latent(dead), PASS)
    assert outcome.edits == 0


def test_what_is_summed_over_stays() -> None:
    """Numbers of queries that are zero where those of the keys are not: the size of a head stays."""
    weight, bias = floats(6, HEADS, SIZE), floats(HEADS, SIZE)
    weight[..., 1], bias[..., 1] = 0, 0
    held = {"wq": weight.reshape(6, -1), "bq": bias.reshape(-1)}
    _, outcome = rewritten(model(SEPARATE + CORE, **separate() | held), PASS)
    assert outcome.edits == 0


def test_a_product_of_a_value_and_itself() -> None:
    """Rows are summed over as well, as columns."""
    text = "m = MatMul(wm, x) c = MatMul(m, m) o = MatMul(c, wo) y = Add(o, bo)"
    weight = floats(6, TOKENS)
    weight[DEAD] = 0
    assert refusal(model(text, wm=weight, wo=floats(6, 6)), PASS) == "MatMul of a value and itself"


def test_nothing_is_left_behind() -> None:
    """The list of sizes that is put together anew takes the place of the old one."""
    spread, _ = REPEATED["put together"]
    text = (
        "u = Unsqueeze(x, i2) " + spread.format("u") + " d = ReduceSum<keepdims = 0>(n, i2) y = MatMul(d, w)"
    )
    weights = {"i2": ints(2), "two": ints(TOKENS, 2), "four": ints(8), "w": floats(8, 3)}
    before = f"m = MatMul(x0, w0) x = Identity(m) {text}"
    dead = floats(6, 8)
    dead[:, DEAD] = 0
    made = build(f"g (float[N, {TOKENS}, 6] x0) => (float[] y) {{ {before} }}", 20, **weights, w0=dead)
    after, outcome = rewritten(made, PASS)
    assert outcome.edits == 2
    assert operators(after).count("Concat") == 1
    assert widths(after)["w"] == (6, 3)


def one_operator(
    query: int, few: int, attributes: str = "", operands: str = "", flat: bool = False, **held: Array
) -> ir.Model:
    """Attention as one operator, over heads on an axis of their own or in runs of the last one."""
    text = "".join(f"m{n} = MatMul(x, w{n}) a{n} = Add(m{n}, b{n}) " for n in "qkv")
    if flat:
        counts = f"q_num_heads = {query}, kv_num_heads = {few}{attributes}"
        text += f"f = Attention<{counts}>(aq, ak, av{operands}) o = MatMul(f, wo) y = Add(o, bo)"
        return model(text, 23, **held)
    for name, shape in (("q", "many"), ("k", "few"), ("v", "few")):
        text += f"r{name} = Reshape(a{name}, {shape}) {name} = Transpose<perm = [0, 2, 1, 3]>(r{name}) "
    text += f"c = Attention{f'<{attributes[2:]}>' if attributes else ''}(q, k, v{operands}) "
    sizes = {"many": ints(0, 0, query, SIZE), "few": ints(0, 0, few, SIZE), "back": ints(0, 0, query * SIZE)}
    return model(f"{text} t = Transpose<perm = [0, 2, 1, 3]>(c) {OUT}", 23, **sizes, **held)


@pytest.mark.parametrize("attributes", ["", ", is_causal = 1, scale = 0.3"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("few", [HEADS, 2])
def test_the_operator(few: int, flat: bool, attributes: str) -> None:
    dead = DEAD if few == HEADS else [1]
    held = projection("q", dead=[]) | projection("k", few, []) | projection("v", few, dead)
    after, outcome = rewritten(one_operator(HEADS, few, attributes, flat=flat, **held), PASS)
    assert not outcome.refused
    kept = few - len(dead)
    assert widths(after) | {"wq": (6, 6), "wk": (6, 3 * kept), "bv": (3 * kept,), "wo": (6, 6)} == widths(
        after
    )
    (node,) = [n for n in after.graph if n.op_type == "Attention"]
    if flat:
        assert (node.attributes["q_num_heads"].value, node.attributes["kv_num_heads"].value) == (2, kept)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("shape", [(TOKENS, TOKENS), (HEADS, TOKENS, TOKENS), (1, HEADS, TOKENS, TOKENS)])
def test_masks_of_the_operator(shape: tuple[int, ...], flat: bool) -> None:
    held = {k: a for n in "qkv" for k, a in projection(n).items()} | {"mask": floats(*shape)}
    after, _ = rewritten(one_operator(HEADS, HEADS, operands=", mask", flat=flat, **held), PASS)
    assert widths(after) | {"wq": (6, 6), "wo": (6, 6)} == widths(after)
    assert HEADS not in constants(after)["mask"].shape


@pytest.mark.parametrize("flat", [False, True])
def test_one_head_of_values_for_all(flat: bool) -> None:
    """What it is zero in could leave every head, but only as long as heads are an axis of their own."""
    held = projection("q", dead=[]) | projection("k", 1, []) | projection("v", 1, [])
    held["wv"][:, 1], held["bv"][1] = 0, 0
    unread = floats(HEADS, SIZE, 6)
    unread[DEAD] = 0
    after, _ = rewritten(one_operator(HEADS, 1, flat=flat, **held, wo=unread.reshape(-1, 6)), PASS)
    assert widths(after) | {"wq": (6, 6), "wk": (6, SIZE), "wv": (6, SIZE), "wo": (6, 6)} == widths(after)


def test_rotated_heads() -> None:
    """Queries and keys are turned in pairs of numbers, of every head alike."""
    held = {k: a for n in "qkv" for k, a in projection(n).items()}
    angles = {"cos": floats(1, TOKENS, 1), "sin": floats(1, TOKENS, 1)}
    text = "".join(f"m{n} = MatMul(x, w{n}) a{n} = Add(m{n}, b{n}) " for n in "qkv")
    for name in "qkv":
        text += f"r{name} = Reshape(a{name}, many) {name}0 = Transpose<perm = [0, 2, 1, 3]>(r{name}) "
    for name in "qk":
        text += f"{name} = RotaryEmbedding<rotary_embedding_dim = 2>({name}0, cos, sin) "
    text += f"c = Attention(q, k, v0) t = Transpose<perm = [0, 2, 1, 3]>(c) {OUT}"
    sizes = {"many": ints(0, 0, HEADS, SIZE), "back": ints(0, 0, HEADS * SIZE)}
    graph = f"g (float[1, {TOKENS}, 6] x) => (float[] y) {{ {text} }}"
    made = build(graph, 23, **sizes, **held, **angles, wo=floats(HEADS * SIZE, 6), bo=floats(6))
    after, outcome = rewritten(made, PASS, {"x": floats(1, TOKENS, 6)})
    assert outcome.edits == 2
    assert widths(after) | {"wq": (6, 6), "wo": (6, 6)} == widths(after)


def test_a_cache_of_keys_and_values() -> None:
    """Its heads come from outside."""
    text = "".join(f"m{n} = MatMul(x, w{n}) a{n} = Add(m{n}, b{n}) " for n in "qkv")
    counts = f"q_num_heads = {HEADS}, kv_num_heads = {HEADS}"
    text += f"f, nk, nv = Attention<{counts}>(aq, ak, av, , pk, pv) o = MatMul(f, wo) y = Add(o, bo)"
    cache = f"float[N, {HEADS}, P, {SIZE}] pk, float[N, {HEADS}, P, {SIZE}] pv"
    declared = (
        f"(float[N, {TOKENS}, 6] x, {cache}) => (float[] y, float[N, 4, A, 3] nk, float[N, 4, A, 3] nv)"
    )
    held = {k: a for n in "qkv" for k, a in projection(n).items()} | {"wo": floats(12, 6), "bo": floats(6)}
    assert (
        refusal(build(f"g {declared} {{ {text} }}", 23, **held), PASS)
        == "Attention gives more than its result"
    )


@given(st.data(), st.integers(0, 2**16))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_any_heads(data: st.DataObject, seed: int) -> None:
    """Any heads and any numbers of them zero, in queries, keys, values and in what reads them."""
    rng = np.random.default_rng(seed)
    held = {key: array for name in "qkv" for key, array in projection(name, dead=[]).items()}
    held |= {"wo": floats(HEADS * SIZE, 6), "bo": np.full(6, 3, np.float32)}
    for name in ("wq", "wk", "wv", "wo"):
        array = held[name] if name == "wo" else held[name].T
        apart = array.reshape(HEADS, SIZE, -1).copy()
        if data.draw(st.booleans()):
            apart[rng.random(HEADS) < 0.5] = 0
        if data.draw(st.booleans()):
            apart[:, rng.random(SIZE) < 0.5] = 0
        flat = apart.reshape(array.shape)
        held[name] = flat if name == "wo" else flat.T.copy()
        if name != "wo":
            held[name.replace("w", "b")] = np.where(flat.any(1), held[name.replace("w", "b")], 0).astype(
                np.float32
            )
    form = data.draw(st.sampled_from(["written out", "operator", "flat"]))
    if form == "written out":
        rewritten(model(SEPARATE + CORE, **held | APART), PASS)
    else:
        rewritten(one_operator(HEADS, HEADS, flat=form == "flat", **held), PASS)
