"""What is to be quantized, how, and why: a value that is printed, saved and edited before it is applied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

import numpy as np

from edgewise.runtime.errors import InputError

LIMITS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "uint8": (0, 255),
        "int8": (-128, 127),
        "uint16": (0, 2**16 - 1),
        "int16": (-(2**15), 2**15 - 1),
        "int32": (-(2**31), 2**31 - 1),
    }
)
"""The integers of every storage type a plan may name."""

FORMS = ("int8", "integer", "folded", "float")
"""What becomes of a node, see `NodePlan`."""

NEIGHBOURS = "its neighbours are in float"
"""Why a node stays in float that gains nothing from int8 alone: never the first cause."""

SMALLEST, LARGEST = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
"""The scales that float32 holds in full."""


@dataclass(frozen=True)
class ValuePlan:
    """A float value x and the integers q that stand for it: x = scale * (q - zero_point).

    `scale` holds one number, or one for every index along `axis`. A bias (int32) has none: it is stored in
    units of the products it is added to, input scale times weight scale. `why` says where the grid comes
    from.
    """

    name: str
    dtype: str
    scale: tuple[float, ...] = ()
    zero_point: int = 0
    axis: int | None = None
    why: str = ""

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest number that can be represented; of the widest channel."""
        low, high = LIMITS[self.dtype]
        return max(self.scale) * (low - self.zero_point), max(self.scale) * (high - self.zero_point)


@dataclass(frozen=True)
class NodePlan:
    """A node, named by its first output, and what becomes of it. `why` is the reason where it is float.

    int8     runs in int8: its inputs are dequantized and its output quantized, which the runtime fuses
    integer  is given the integers themselves
    folded   vanishes: the quantized range of its output does its work
    float    is left alone
    """

    output: str
    op_type: str
    form: str
    why: str = ""


@dataclass(frozen=True)
class QuantPlan:
    """Every quantized value and every node of a model, in the model's order. The empty plan does nothing."""

    target: str = ""
    values: tuple[ValuePlan, ...] = ()
    nodes: tuple[NodePlan, ...] = ()

    @property
    def quantized(self) -> tuple[NodePlan, ...]:
        """The nodes that will not run in float."""
        return tuple(n for n in self.nodes if n.form != "float")

    @property
    def reasons(self) -> Mapping[str, int]:
        """Why nodes stay in float, and how many."""
        return dict(Counter(n.why for n in self.nodes if n.form == "float").most_common())

    @property
    def why_nothing(self) -> str:
        """Why no node of a model can be int8, in words for people."""
        if "already quantized" in self.reasons:
            return "the model is already quantized: start from the float model it was made from"
        causes = [why for why in self.reasons if why != NEIGHBOURS] or [*self.reasons, "it has no nodes"]
        reason = causes[0]
        return f"none of its operators can be int8; most often because: {reason}"

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """A table: the head, then a row for every value (output of a node or not) and every float node."""
        return (
            ("value", "type", "range", "zero point", "scales", "why"),
            *(_value_row(v) for v in self.values),
            *((n.output, "float", "", "", "", f"{n.op_type}: {n.why}") for n in self.nodes if n.why),
        )

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)
        return "\n".join(
            (f"{len(self.quantized)} of {len(self.nodes)} nodes in int8 for {self.target}", *lines)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts and lists, for YAML or JSON. Entries at their default are left out."""
        return {
            "target": self.target,
            "values": [_entry(v) for v in self.values],
            "nodes": [_entry(n) for n in self.nodes],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantPlan:
        """What `to_dict` gave, perhaps edited. Raises `InputError` on an entry that means nothing."""
        if not isinstance(data, Mapping):
            raise InputError("a quantization plan has the keys target, values and nodes")
        try:
            values = tuple(_value(v) for v in data.get("values") or ())
            nodes = tuple(NodePlan(**_known(n, NodePlan)) for n in data.get("nodes") or ())
        except (TypeError, ValueError) as error:
            raise InputError(f"the quantization plan cannot be read: {error}") from error
        plan = cls(str(data.get("target", "")), values, nodes)
        plan.check()
        return plan

    def check(self) -> None:
        """Raise `InputError` on the first entry that no quantizer could follow."""
        for value in self.values:
            _check_texts(value)
        for node in self.nodes:
            _check_texts(node)
        for value in self.values:
            _check_value(value)
        for node in self.nodes:
            if node.form not in FORMS:
                raise InputError(f"plan of node {node.output!r}: form {node.form!r} is none of {FORMS}")
        for kind, names in (
            ("value", (v.name for v in self.values)),
            ("node", (n.output for n in self.nodes)),
        ):
            for name, times in Counter(names).items():
                if times > 1:
                    raise InputError(f"the plan has two entries for {kind} {name!r}")


def _check_texts(entry: ValuePlan | NodePlan) -> None:
    """YAML reads `name: 12` as a number and `name: yes` as a truth."""
    for field in fields(entry):
        if field.type == "str" and not isinstance(text := getattr(entry, field.name), str):
            raise InputError(f"the quantization plan has {field.name} {text!r}, which is no text: quote it")


def _check_value(value: ValuePlan) -> None:
    where = f"plan of value {value.name!r}"
    if value.dtype not in LIMITS:
        raise InputError(f"{where}: type {value.dtype!r} is none of {tuple(LIMITS)}")
    low, high = LIMITS[value.dtype]
    if type(value.zero_point) is not int or not low <= value.zero_point <= high:
        raise InputError(
            f"{where}: zero point {value.zero_point!r} is not in {low}..{high}, so that no integer were zero"
        )
    if value.dtype == "int32":
        return
    if not value.scale or not all(SMALLEST <= s <= LARGEST for s in value.scale):
        raise InputError(f"{where}: a scale has to be a positive float32")
    if value.axis is None and len(value.scale) != 1:
        raise InputError(f"{where}: {len(value.scale)} scales need an axis")
    if value.axis is not None and type(value.axis) is not int:
        raise InputError(f"{where}: axis {value.axis!r} is no number")


def _value(entry: Mapping[str, Any]) -> ValuePlan:
    """An entry as it is read; one scale may be written without a list."""
    scale = entry.get("scale", ())
    numbers = scale if isinstance(scale, list | tuple) else [scale]
    return ValuePlan(**{**_known(entry, ValuePlan), "scale": tuple(float(s) for s in numbers)})


def _known(entry: Mapping[str, Any], kind: type[ValuePlan | NodePlan]) -> Mapping[str, Any]:
    """An entry that has the keys it needs, and no others."""
    known = fields(kind)
    name = str(entry.get(known[0].name))
    if unknown := [key for key in entry if key not in {f.name for f in known}]:
        raise InputError(f"plan of {name!r}: {unknown[0]!r} means nothing there: remove it")
    if missing := [f.name for f in known if f.default is MISSING and f.name not in entry]:
        raise InputError(f"plan of {name!r}: its {missing[0]} is missing: add it")
    return entry


def _entry(item: ValuePlan | NodePlan) -> dict[str, Any]:
    defaults = {f.name: f.default for f in fields(item)}
    entry = {key: value for key, value in asdict(item).items() if value != defaults[key]}
    if "scale" in entry:
        entry["scale"] = list(entry["scale"]) if len(entry["scale"]) > 1 else entry["scale"][0]
    return entry


def _value_row(value: ValuePlan) -> tuple[str, ...]:
    if not value.scale:
        return (value.name, value.dtype, "", "0", "", value.why)
    low, high = value.range
    scales = f"{value.scale[0]:.4g}" if value.axis is None else f"{len(value.scale)} on axis {value.axis}"
    return (value.name, value.dtype, f"{low:.4g} .. {high:.4g}", str(value.zero_point), scales, value.why)
