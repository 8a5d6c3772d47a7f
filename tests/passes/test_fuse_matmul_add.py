"""fuse-matmul-add: a product and its bias become one Gemm, and what is no Gemm stays."""

from __future__ import annotations

import numpy as np
import pytest
from rewrites import build, constants, operators, refusal, rewritten

from edgewise.passes.fuse_matmul_add import FuseMatmulAdd
from edgewise.runtime.evaluate import Array

RULE = FuseMatmulAdd()


def normal(*shape: int, dtype: type = np.float32) -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


def dense(add: str = "Add(p, b)", tail: str = "", outputs: str = "float[N, 4] y") -> str:
    return f"g (float[N, 3] x) => ({outputs}) {{ p = MatMul(x, w) y = {add} {tail} }}"


@pytest.mark.parametrize("shape", [(4,), (1, 4)])
@pytest.mark.parametrize("add", ["Add(p, b)", "Add(b, p)"])
def test_product_with_a_bias(add: str, shape: tuple[int, ...]) -> None:
    after, outcome = rewritten(build(dense(add), w=normal(3, 4), b=normal(*shape)), RULE)
    assert operators(after) == ["Gemm"]
    assert outcome.edits == 1
    assert {name: a.shape for name, a in constants(after).items()} == {"w": (3, 4), "b": (4,)}


@pytest.mark.parametrize(("kind", "dtype"), [("float16", np.float16), ("double", np.float64)])
def test_other_float_types(kind: str, dtype: type) -> None:
    model = build(
        dense().replace("float[", f"{kind}["), w=normal(3, 4, dtype=dtype), b=normal(4, dtype=dtype)
    )
    assert operators(rewritten(model, RULE)[0]) == ["Gemm"]


def test_one_column() -> None:
    text = "g (float[N, 3] x) => (float[N, 1] y) { p = MatMul(x, w) y = Add(p, b) }"
    assert operators(rewritten(build(text, w=normal(3, 1), b=normal(1)), RULE)[0]) == ["Gemm"]


def test_a_shared_bias_is_copied() -> None:
    text = dense(tail="z = Add(y, b)", outputs="float[N, 4] y, float[N, 4] z")
    after, _ = rewritten(build(text, w=normal(3, 4), b=normal(1, 4)), RULE)
    assert operators(after) == ["Gemm", "Add"]
    assert constants(after)["b"].shape == (1, 4)


def test_bias_made_behind_the_product() -> None:
    """The bias has to exist before the node that now reads it."""
    text = (
        "g (float[N, 3] x) => (float[N, 2] y)"
        "{ p = MatMul(x, w) b = Constant<value_floats = [1.0, 2.0]>() y = Add(p, b) }"
    )
    assert operators(rewritten(build(text, w=normal(3, 2)), RULE)[0]) == ["Gemm"]


def test_inside_a_subgraph_with_weights_from_outside() -> None:
    text = (
        "g (float[N, 3] x, bool k) => (float[N, 4] y) { y = If (k) <"
        "then_branch = t () => (float[N, 4] o) { p = MatMul(x, w) o = Add(p, b) },"
        "else_branch = e () => (float[N, 4] q) { r = MatMul(x, w) q = Add(r, b) }> }"
    )
    after, outcome = rewritten(build(text, w=normal(3, 4), b=normal(1, 4)), RULE)
    assert outcome.edits == 2
    assert [[n.op_type for n in g] for g in after.graph.subgraphs()] == [["Gemm"], ["Gemm"]]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 4), (2, 1), (1, 1, 4)])
def test_bias_of_another_shape(shape: tuple[int, ...]) -> None:
    outputs = "float[1, 2, 4] y" if len(shape) == 3 else "float[2, 4] y"
    text = f"g (float[2, 3] x) => ({outputs}) {{ p = MatMul(x, w) y = Add(p, b) }}"
    assert refusal(build(text, w=normal(3, 4), b=normal(*shape)), RULE) == "bias is not one number per column"


def test_bias_that_widens_a_single_column() -> None:
    model = build(dense(), w=normal(3, 1), b=normal(4))
    assert refusal(model, RULE) == "bias is not one number per column"


def test_product_of_another_rank() -> None:
    text = "g (float[N, 2, 3] x) => (float[N, 2, 4] y) { p = MatMul(x, w) y = Add(p, b) }"
    assert refusal(build(text, w=normal(3, 4), b=normal(4)), RULE) == "MatMul is not known to be of rank 2"


def test_product_of_unknown_rank() -> None:
    text = (
        "g (float[N, K] x, int64[R] r) => (float[P, 4] y){ z = Reshape(x, r) p = MatMul(z, w) y = Add(p, b) }"
    )
    assert (
        refusal(build(text, shapes=False, w=normal(3, 4), b=normal(4)), RULE)
        == "MatMul is not known to be of rank 2"
    )


@pytest.mark.parametrize(
    ("tail", "outputs"),
    [("", "float[N, 4] y, float[N, 4] p"), ("z = Relu(p)", "float[N, 4] y, float[N, 4] z")],
)
def test_other_users_of_the_product(tail: str, outputs: str) -> None:
    model = build(dense(tail=tail, outputs=outputs), w=normal(3, 4), b=normal(4))
    assert refusal(model, RULE) == "MatMul output has another user"


def test_computed_weight() -> None:
    text = "g (float[N, 3] x, float[3, 4] w) => (float[N, 4] y) { p = MatMul(x, w) y = Add(p, b) }"
    assert refusal(build(text, b=normal(4)), RULE) == "weight is not a constant matrix"


def test_weight_before_the_data() -> None:
    text = "g (float[3, 4] x) => (float[2, 4] y) { p = MatMul(w, x) y = Add(p, b) }"
    assert refusal(build(text, w=normal(2, 3), b=normal(4)), RULE) == "weight is not a constant matrix"


def test_integers() -> None:
    text = "g (int32[N, 3] x) => (int32[N, 4] y) { p = MatMul(x, w) y = Add(p, b) }"
    model = build(text, w=normal(3, 4).astype(np.int32), b=normal(4).astype(np.int32))
    assert refusal(model, RULE) == "weight is not of a float type"


def test_product_outside_of_the_subgraph() -> None:
    text = (
        "g (float[N, 3] x, bool k) => (float[N, 4] y) { p = MatMul(x, w) y = If (k) <"
        "then_branch = t () => (float[N, 4] o) { o = Add(p, b) },"
        "else_branch = e () => (float[N, 4] q) { q = MatMul(x, w) }> }"
    )
    assert refusal(build(text, w=normal(3, 4), b=normal(4)), RULE) == "MatMul is in another graph"


@pytest.mark.parametrize("add", ["Add(p, p)", "Add(p, x2)", "Sub(p, b)"])
def test_what_is_no_bias(add: str) -> None:
    text = f"g (float[N, 3] x, float[N, 4] x2) => (float[N, 4] y) {{ p = MatMul(x, w) y = {add} }}"
    weights = {"w": normal(3, 4), **({"b": normal(4)} if "b" in add else {})}
    assert refusal(build(text, **weights), RULE) == ""
