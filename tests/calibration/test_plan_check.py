"""A plan that was edited into nonsense is refused, with the entry and what to do."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from quantized import feeds_of, inserted, planned, run
from rewrites import build

from edgewise.calibration.plan_check import check_plan
from edgewise.calibration.target import ARM, OPENVINO, TENSORRT, X86, Target
from edgewise.passes.quant_plan import NodePlan, QuantPlan, ValuePlan
from edgewise.runtime.errors import InputError

NET = """g (float[N, 16, 8, 8] x) => (float[N, 4] y)
    { c = Conv<pads = [1, 1, 1, 1]>(x, w, b) r = Relu(c) p = MaxPool<kernel_shape = [2, 2]>(r)
      a = Pad(p, q) d = Conv(a, v) s = Softmax(d) f = Flatten(s) y = Gemm(f, m) }"""


def normal(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed + len(shape)).standard_normal(shape).astype(np.float32)


def net() -> ir.Model:
    weights = {"w": normal(16, 16, 3, 3), "b": normal(16), "v": normal(16, 16, 1, 1), "m": normal(1296, 4)}
    return build(NET, q=np.array([0, 0, 1, 1, 0, 0, 1, 1]), **weights)


def changed(plan: QuantPlan, name: str, **fields: Any) -> QuantPlan:
    """`plan` with other fields for one value or node."""
    assert name in {v.name for v in plan.values} | {n.output for n in plan.nodes}
    values = tuple(
        dataclasses.replace(v, **fields) if v.name == name and "form" not in fields else v
        for v in plan.values
    )
    nodes = tuple(
        dataclasses.replace(n, **fields) if n.output == name and "form" in fields else n for n in plan.nodes
    )
    return dataclasses.replace(plan, values=values, nodes=nodes)


def without(plan: QuantPlan, name: str) -> QuantPlan:
    return dataclasses.replace(plan, values=tuple(v for v in plan.values if v.name != name))


@pytest.mark.parametrize("target", [X86, ARM, TENSORRT, OPENVINO], ids=lambda t: t.name)
@pytest.mark.parametrize("text", [NET, NET.replace("Relu(c)", "Sigmoid(c)")], ids=["relu", "sigmoid"])
def test_what_the_planner_says_passes(target: Target, text: str) -> None:
    model = net() if text is NET else build(text, **{k: normal(16, 16, 1, 1) for k in "v"}, **_rest())
    check_plan(planned(model, target), model)


def _rest() -> dict[str, Any]:
    return {
        "q": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "w": normal(16, 16, 3, 3),
        "b": normal(16),
        "m": normal(1296, 4),
    }


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "weight with a zero point": ("w", {"zero_point": 3}, "'w': kernels want symmetric weights"),
    "weight in 16 bits": ("w", {"dtype": "int16"}, "weights are int8 or uint8, not int16"),
    "other axis": ("w", {"axis": 1}, r"count along axis \[0\], not 1"),
    "axis beyond the rank": ("w", {"axis": 7}, "not 7"),
    "too few scales": ("w", {"scale": (0.1, 0.2)}, "2 scales for 16 channels"),
    "activation with an axis": ("x", {"scale": (0.1,) * 16, "axis": 1}, "only weights have an axis"),
    "activation as int32": ("x", {"dtype": "int32", "zero_point": 0}, "int32 is for biases alone"),
    "scale 0": ("x", {"scale": (0.0,)}, "positive float32"),
    "scale infinite": ("x", {"scale": (float("inf"),)}, "positive float32"),
    "scale NaN": ("x", {"scale": (float("nan"),)}, "positive float32"),
    "zero not on the grid": ("x", {"zero_point": 256}, "no integer were zero"),
    "bias beyond int32": ("x", {"scale": (1e-12,)}, "'b': it does not fit int32"),
    "units beyond float32": ("x", {"scale": (1.2e-38,)}, "beyond float32"),
    "types that do not go together": ("x", {"dtype": "int8", "zero_point": 0}, "'c': its inputs and output"),
    "grid wider than what is folded": ("p", {"form": "folded"}, "not of MaxPool"),
    "integer form of what computes": ("c", {"form": "integer"}, "Conv computes"),
    "integer form on two grids": ("a", {"scale": (0.5,)}, "'p' and 'a' have to share"),
    "no kernel": ("s", {"form": "int8"}, "'s': it cannot run in int8"),
    "form unknown": ("c", {"form": "int4"}, "form 'int4'"),
    "other operator": ("c", {"form": "int8", "op_type": "Gemm"}, "it is a Conv in the model, not a Gemm"),
}


@pytest.mark.parametrize(("name", "fields", "message"), BAD.values(), ids=BAD)
def test_nonsense(name: str, fields: dict[str, Any], message: str) -> None:
    model = net()
    plan = changed(planned(model, ARM), name, **fields)
    with pytest.raises(InputError, match=message):
        check_plan(plan, model)


def test_names_that_are_not_in_the_model() -> None:
    model, plan = net(), planned(net())
    with pytest.raises(InputError, match="value 'z': the model's main graph has no value"):
        check_plan(dataclasses.replace(plan, values=(ValuePlan("z", "uint8", (1.0,)),)), model)
    with pytest.raises(InputError, match="node 'z': the model's main graph has no node"):
        check_plan(dataclasses.replace(plan, nodes=(NodePlan("z", "Conv", "int8"),)), model)


def test_value_that_is_no_float() -> None:
    plan = QuantPlan("x86", (ValuePlan("q", "uint8", (1.0,)),))
    with pytest.raises(InputError, match="value 'q': only float32"):
        check_plan(plan, net())


def test_input_without_a_grid() -> None:
    model, plan = net(), planned(net())
    for name in ("x", "w"):
        with pytest.raises(InputError, match=f"node 'c': its input '{name}' has no grid"):
            check_plan(without(plan, name), model)


def test_symmetric_target() -> None:
    model, plan = net(), planned(net(), TENSORRT)
    with pytest.raises(InputError, match="tensorrt wants symmetric grids"):
        check_plan(changed(plan, "x", zero_point=4), model)
    with pytest.raises(InputError, match="kernels want symmetric weights"):
        check_plan(changed(plan, "w", dtype="uint8", zero_point=128), model)


def test_cut_that_the_grid_does_not_do() -> None:
    text = """g (float[N, 16, 8, 8] x) => (float[N, 16, 8, 8] y)
        { c = Conv(x, w) t = Transpose<perm = [0, 1, 3, 2]>(c) r = Relu(t) y = Conv(r, w) }"""
    model = build(text, w=normal(16, 16, 1, 1))
    plan = planned(model)
    assert next(n for n in plan.nodes if n.output == "r").form == "folded"
    check_plan(plan, model)
    with pytest.raises(InputError, match="node 'r': the grid of its input, -"):
        check_plan(changed(plan, "t", zero_point=100), model)


def test_target_that_does_not_exist() -> None:
    with pytest.raises(InputError, match="unknown target"):
        check_plan(QuantPlan("abacus"), net())


def test_node_taken_back_to_float() -> None:
    """What people do most: a layer that suffers stays in float, and the file still runs."""
    model = net()
    plan = changed(planned(model), "d", form="float", why="it suffers")
    plan = without(plan, "v")
    check_plan(plan, model)
    after = inserted(model, plan)
    assert np.isfinite(run(after, feeds_of(model)[0])).all()


def test_weights_in_uint8() -> None:
    """Kernels of uint8 x uint8 do not saturate."""
    model, plan = net(), planned(net())
    plan = changed(plan, "v", dtype="uint8", zero_point=128)
    check_plan(plan, model)
    assert np.isfinite(run(inserted(model, plan), feeds_of(model)[0])).all()
