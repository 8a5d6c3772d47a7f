"""A model in stages gives what it gives as a whole, wherever it is cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewrites import build

from edgewise.optimizer.stages import Stage, in_stages
from edgewise.runtime.evaluate import Array, Evaluator

TEXT = """
    g (float[N, 8] x, float[N, 8] late) => (float[N, 8] early, float[N, 8] y)
    {
        k = Constant <value = float[1] {0.5}> ()
        a = Mul (x, k)
        b = MatMul (a, w)
        early = Relu (b)
        c = MatMul (b, w)
        d = Add (c, a)
        e = MatMul (d, v)
        f = Add (e, late)
        y = Mul (f, k)
    }"""
NODES = ("a", "b", "early", "c", "d", "e", "f", "y")


def net() -> ir.Model:
    rng = np.random.default_rng(1)
    weights = {n: rng.standard_normal((8, 8)).astype(np.float32) for n in ("w", "v")}
    return build(TEXT, 17, **weights)


def feed() -> dict[str, Array]:
    rng = np.random.default_rng(2)
    return {n: rng.standard_normal((3, 8)).astype(np.float32) for n in ("x", "late")}


def run(stages: tuple[Stage, ...], state: Mapping[str, Any]) -> Mapping[str, Any]:
    for stage in stages:
        read = {name: state[name] for name in stage.reads}
        written = Evaluator(stage.model, outputs=stage.writes, threads=1, optimize=False).run(read)
        state = stage.after(state, written)
    return state


@given(count=st.integers(1, 12), groups=st.sets(st.sampled_from(NODES), min_size=1))
def test_gives_the_outputs_of_the_whole(count: int, groups: set[str]) -> None:
    model = net()
    stages = in_stages(model, count, [(name,) for name in NODES if name in groups])
    assert 1 <= len(stages) <= count
    whole = Evaluator(model, threads=1, optimize=False).run(feed())
    state = run(stages, feed())
    assert state.keys() == whole.keys()  # nothing is kept that nobody reads any more
    for name, expected in whole.items():
        np.testing.assert_array_equal(state[name], expected)


def test_every_node_is_in_one_stage_and_the_model_is_untouched() -> None:
    model = net()
    before = [n.outputs[0].name for n in model.graph]
    stages = in_stages(model, 4, [(name,) for name in NODES])
    assert len(stages) == 4
    found = [name for stage in stages for name in stage.nodes]
    assert sorted(found) == sorted(n or "" for n in before)
    assert [n.outputs[0].name for n in model.graph] == before


@pytest.mark.parametrize("group", [("b", "d"), ("a", "e"), ("c", "y")])
def test_a_group_stays_together(group: tuple[str, str]) -> None:
    others = [(n,) for n in NODES if n not in group]
    for stage in in_stages(net(), 8, [group, *others]):
        assert len(stage.nodes & set(group)) in (0, 2)


def test_is_cut_where_least_is_alive() -> None:
    """Of the places between the products, that behind the narrow one."""
    rng = np.random.default_rng(0)
    sizes = {"w1": (8, 64), "w2": (64, 2), "w3": (2, 64), "w4": (64, 8)}
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in sizes.items()}
    body = "a = MatMul (x, w1) b = MatMul (a, w2) c = MatMul (b, w3) d = MatMul (c, w4) y = Relu (d)"
    model = build(f"g (float[N, 8] x) => (float[N, 8] y) {{ {body} }}", 17, **weights)
    first, second = in_stages(model, 2, [("a",), ("b",), ("c",), ("d",)])
    assert (first.writes, second.reads) == (("b",), ("b",))


def test_what_a_body_reads_is_kept() -> None:
    model = build(
        """
        g (float[4] x, bool c) => (float[4] y)
        {
            a = Neg (x)
            b = Exp (x)
            y = If (c) <then_branch = t () => (float[4] u) { u = Add (a, b) },
                        else_branch = e () => (float[4] v) { v = Sub (a, b) }>
        }""",
        17,
        shapes=False,
    )
    stages = in_stages(model, 3, [("a",), ("b",), ("y",)])
    assert len(stages) == 3
    fed = {"x": np.arange(4, dtype=np.float32), "c": np.array(True)}
    whole = Evaluator(model, threads=1).run(fed)
    np.testing.assert_allclose(run(stages, fed)["y"], whole["y"], rtol=1e-6)


def test_is_whole_where_types_are_unknown() -> None:
    """A value without a type cannot be the input of a model."""
    text = (
        "g (float[4] x) => (float[4] y) { a = SequenceConstruct (x, x) y = ConcatFromSequence <axis=0> (a) }"
    )
    assert len(in_stages(build(text, 17, shapes=False), 2, [("a",), ("y",)])) == 1
