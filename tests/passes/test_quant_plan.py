"""A quantization plan is a plain value: it compares, prints, and survives being written and read."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from edgewise.passes.quant_plan import NodePlan, QuantPlan, ValuePlan
from edgewise.runtime.errors import InputError

PLAN = QuantPlan(
    "x86",
    (
        ValuePlan("x", "uint8", (0.02,), 128, why="minmax of what was seen"),
        ValuePlan("w", "int8", (0.1, 0.25), axis=0, why="largest weight"),
        ValuePlan("b", "int32", why="input scale x weight scale"),
    ),
    (
        NodePlan("c", "Conv", "int8"),
        NodePlan("r", "Relu", "folded"),
        NodePlan("y", "Softmax", "float", "Softmax is slower in int8 than in float on x86"),
    ),
)


def test_is_a_value() -> None:
    assert QuantPlan.from_dict(PLAN.to_dict()) == PLAN
    assert hash(QuantPlan.from_dict(PLAN.to_dict())) == hash(PLAN)
    assert QuantPlan() == QuantPlan.from_dict({})


@pytest.mark.parametrize(
    ("write", "read"), [(json.dumps, json.loads), (yaml.safe_dump, yaml.safe_load)], ids=["json", "yaml"]
)
def test_survives_a_file(write: Any, read: Any) -> None:
    assert QuantPlan.from_dict(read(write(PLAN.to_dict()))) == PLAN


def test_scales_keep_every_bit() -> None:
    third = 0.3333333432674408  # float32
    plan = QuantPlan(values=(ValuePlan("x", "uint8", (third,)),))
    assert QuantPlan.from_dict(yaml.safe_load(yaml.safe_dump(plan.to_dict()))).values[0].scale == (third,)


def test_what_is_default_is_not_written() -> None:
    assert PLAN.to_dict()["nodes"][0] == {"output": "c", "op_type": "Conv", "form": "int8"}
    assert PLAN.to_dict()["values"][2] == {"name": "b", "dtype": "int32", "why": "input scale x weight scale"}


def test_range_is_what_the_integers_reach() -> None:
    x, w, _ = PLAN.values
    assert x.range == pytest.approx((-2.56, 2.54))
    assert w.range == pytest.approx((-32.0, 31.75))


def test_counts() -> None:
    assert [n.output for n in PLAN.quantized] == ["c", "r"]
    assert PLAN.reasons == {"Softmax is slower in int8 than in float on x86": 1}


def test_prints_every_value_and_every_reason() -> None:
    text = str(PLAN)
    assert text.splitlines()[0] == "2 of 3 nodes in int8 for x86"
    for word in ("-2.56 .. 2.54", "128", "2 on axis 0", "largest weight", "Softmax is slower", "int32"):
        assert word in text
    assert len(PLAN.rows()) == 1 + 3 + 1  # head, values, nodes in float
    assert len({len(row) for row in PLAN.rows()}) == 1


def test_one_scale_may_be_written_as_a_number_or_a_list() -> None:
    for scale in (0.5, [0.5]):
        plan = QuantPlan.from_dict({"values": [{"name": "x", "dtype": "int8", "scale": scale}]})
        assert plan.values == (ValuePlan("x", "int8", (0.5,)),)


BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"dtype": "int4"}, "type 'int4' is none of"),
    "zero point": ({"zero_point": 256}, "zero point 256 is not in 0..255"),
    "zero point of int8": ({"dtype": "int8", "zero_point": -129}, "zero point -129"),
    "no scale": ({"scale": []}, "positive"),
    "zero scale": ({"scale": 0.0}, "positive"),
    "negative scale": ({"scale": -1.0}, "positive"),
    "infinite scale": ({"scale": 1e39}, "positive"),
    "scale too small for float32": ({"scale": 1e-60}, "positive"),
    "scale is no number": ({"scale": "wide"}, "cannot be read"),
    "zero point is no integer": ({"zero_point": 0.5}, "zero point 0.5"),
    "axis is no number": ({"axis": "rows"}, "axis 'rows'"),
    "many scales": ({"scale": [1.0, 2.0]}, "2 scales need an axis"),
    "unknown key": ({"bits": 8}, "'bits' means nothing there"),
}


@pytest.mark.parametrize(("change", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_value_that_means_nothing(change: dict[str, Any], message: str) -> None:
    entry = {"name": "x", "dtype": "uint8", "scale": 0.5, **change}
    with pytest.raises(InputError, match=message):
        QuantPlan.from_dict({"values": [entry]})


def test_node_that_means_nothing() -> None:
    entry = {"output": "y", "op_type": "Conv", "form": "int4"}
    with pytest.raises(InputError, match="form 'int4'"):
        QuantPlan.from_dict({"nodes": [entry]})
    with pytest.raises(InputError, match="op_type is missing"):
        QuantPlan.from_dict({"nodes": [{"output": "y"}]})
    with pytest.raises(InputError, match="two entries for node 'y'"):
        QuantPlan.from_dict({"nodes": [entry | {"form": "int8"}, entry | {"form": "float"}]})


def test_value_that_is_there_twice() -> None:
    entry = {"name": "x", "dtype": "uint8", "scale": 0.5}
    with pytest.raises(InputError, match="two entries for value 'x'"):
        QuantPlan.from_dict({"values": [entry, entry]})


@pytest.mark.parametrize("data", [[], "plan", 3])
def test_what_is_no_plan(data: Any) -> None:
    with pytest.raises(InputError, match="keys target, values and nodes"):
        QuantPlan.from_dict(data)
