"""A quantization plan as a file that people read and edit, and the job that makes one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import yaml

from edgewise.calibration.data import Samples
from edgewise.calibration.plan import plan as plan_int8
from edgewise.calibration.plan_check import check_plan
from edgewise.calibration.table import CalibrationTable
from edgewise.calibration.target import target_of
from edgewise.optimizer import files
from edgewise.optimizer.int8 import prepare
from edgewise.optimizer.ladder import calibrate_for_int8
from edgewise.optimizer.pipeline import Progress, Reference, no_progress, run_passes
from edgewise.optimizer.recipe import Quantize, Recipe
from edgewise.optimizer.start import begin
from edgewise.optimizer.version import VERSION
from edgewise.passes.fingerprint import fingerprint
from edgewise.passes.graph import constant_of
from edgewise.passes.quant_plan import QuantPlan, ValuePlan
from edgewise.runtime.errors import EdgewiseError, InputError

ModelPath = str | os.PathLike[str]

_FORMAT = 1
_READ = "plan"
_GROUPS = ("activations", "weights", "biases")
_KEYS = frozenset({_READ, "edgewise", "model", "target", *_GROUPS, "nodes", "channel_scales"})
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a net has some ten thousand scales
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_ENDLESS = 2**31 - 1

_HEAD = """\
# How a model is to be quantized. Edit it and apply it: edgewise quantize MODEL --plan THIS_FILE -o OUT.onnx
#
# A float x is stored as the integer q with x = scale * (q - zero_point).
#   dtype       uint8, int8, uint16 or int16 for activations; int8 or uint8 for weights; int32 for biases
#   scale       the step between two integers. Smaller is finer, and cuts off more at both ends.
#   zero_point  the integer that stands for 0 (0 where it is left out)
#   axis        of weights with a scale for every output channel; the scales are at the end, in channel_scales
#   why         where the numbers come from; changes nothing
# Nodes are named by their first output. Their form is
#   int8        runs in int8: its inputs and its output are on grids
#   integer     the same for operators that only move or cut elements, which are given the integers
#   folded      a Relu or Clip that vanishes, for the grid ends where it cuts
#   float       stays as it is
# To keep a node in float, set its form to float. Entries that nothing reads any more do no harm.
# `model` is the fingerprint of the model the plan was made for: it fits no other.
"""


@dataclass(frozen=True)
class PlanReport:
    """A plan that was written to `path` for `model`, from `samples` samples; `digest` names their table."""

    model: str
    path: str
    samples: int
    digest: str
    plan: QuantPlan
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        counts = {"quantized": len(self.plan.quantized), "reasons": dict(self.plan.reasons)}
        return {**facts, "notes": list(self.notes), **counts, "plan": self.plan.to_dict()}


def save_plan(plan: QuantPlan, path: ModelPath, model: ir.Model, *, force: bool = False) -> Path:
    """Write `plan`, made for `model`, as YAML that `load_plan` reads back.

    Scales are written as the float32 numbers that the runtime sees. Raises `InputError` if `path` cannot
    be written.
    """
    return files.write_text(Path(path), plan_text(plan, model), force=force)


def load_plan(path: ModelPath, model: ir.Model) -> QuantPlan:
    """The plan in a file, checked against `model`: what comes back can be applied.

    Raises `InputError` that names the entry which is wrong, and what to do.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"plan {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"plan {path} is no text") from error
    try:
        return parse_plan(text, model)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def plan_text(plan: QuantPlan, model: ir.Model) -> str:
    """A plan as YAML: a line for every value and node, grouped, and the scales of channels at the end."""
    constants = {v.name for v in _values(model) if constant_of(v) is not None}
    data = plan.to_dict()
    groups: dict[str, list[dict[str, Any]]] = {group: [] for group in _GROUPS}
    for value, entry in zip(plan.values, data["values"], strict=True):
        groups[_group(value, constants)].append(_without_scales(entry, value))
    head = {_READ: _FORMAT, "edgewise": VERSION, "model": fingerprint(model), "target": plan.target}
    scales = [
        {"name": v.name, "scale": list(map(_float32, v.scale))} for v in plan.values if v.axis is not None
    ]
    sections = [_HEAD, _block(head), *(_listed(name, entries) for name, entries in groups.items())]
    sections += [_listed("nodes", data["nodes"]), _listed("channel_scales", scales)]
    return "\n".join(section for section in sections if section)


def parse_plan(text: str, model: ir.Model) -> QuantPlan:
    """What `plan_text` wrote, perhaps edited. Raises `InputError` on what cannot be followed in `model`."""
    data = _mapping(text)
    if data.get("model") != fingerprint(model):
        raise InputError(
            "the plan was made for another model, or with other exact passes: make one with edgewise plan"
        )
    scales = _channel_scales(data)
    entries = [_entry(entry, scales) for group in _GROUPS for entry in _entries(data, group)]
    if unknown := scales.keys() - {str(entry.get("name")) for entry in entries if "axis" in entry}:
        raise InputError(f"channel_scales of {min(unknown)!r}: no weight has that name and an axis")
    plan = QuantPlan.from_dict(
        {"target": data.get("target", ""), "values": entries, "nodes": _entries(data, "nodes")}
    )
    check_plan(plan, model)
    return plan


def make_plan(
    model: ModelPath,
    output: ModelPath,
    *,
    data: str | Samples | None = None,
    table: ModelPath | None = None,
    recipe: Recipe | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> PlanReport:
    """Write the plan by which `quantize` would make `model` int8, by the recipe's first range method.

    The plan is for the model after the recipe's exact passes: `quantize` with the same recipe meets the
    same model. Its ranges come from `table`, which `calibrate` wrote, or from all of `data`. Raises
    `InputError` on input that cannot be used, `EdgewiseError` if nothing can be int8.
    """
    if (data is None) == (table is None):
        raise InputError(
            "a plan needs the ranges of values: pass samples with --data, or a table with --table"
        )
    recipe, output = recipe or Recipe(), Path(output)
    options = recipe.quantize or Quantize()
    files.check_writable(output, force=force, source=Path(model))
    loaded = None if table is None else CalibrationTable.load(table)
    start = begin(Path(model), data, recipe)
    reference = Reference(start.adapted.model, start.feeds, threads=recipe.threads)
    exact, _ = run_passes(start.adapted.model, recipe.chain, reference, progress=progress)
    exact, _ = prepare(exact, options, reference, progress=progress)
    target = target_of(recipe.target)
    if loaded is None:
        assert start.samples is not None
        loaded = calibrate_for_int8(
            exact, start.samples, options, target, threads=recipe.threads, progress=progress
        )
    chosen = dataclasses.replace(options.options, method=options.methods[0])
    made = plan_int8(exact, loaded, chosen, target)
    if not made.quantized:
        raise EdgewiseError(f"{start.path} was not planned: {made.why_nothing}")
    save_plan(made, output, exact, force=force)
    return PlanReport(str(model), str(output), loaded.samples, loaded.digest, made, start.notes)


def _values(model: ir.Model) -> Iterable[ir.Value]:
    return (*model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs))


def _group(value: ValuePlan, constants: Iterable[str | None]) -> str:
    if value.dtype == "int32":
        return "biases"
    return "weights" if value.axis is not None or value.name in constants else "activations"


def _without_scales(entry: dict[str, Any], value: ValuePlan) -> dict[str, Any]:
    """A value's line: its one scale, or where its scales count."""
    rest = {key: item for key, item in entry.items() if key != "scale"}
    if value.axis is not None or not value.scale:
        return rest
    why = {"why": rest.pop("why")} if "why" in rest else {}
    zero_point = {"zero_point": rest.pop("zero_point", 0)}
    return {**rest, "scale": _float32(value.scale[0]), **zero_point, **why}


def _float32(number: float) -> float:
    """The shortest number that is the same in float32."""
    return float(str(np.float32(number)))


def _block(data: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(data), sort_keys=False)


def _flow(data: Any) -> str:
    """A value in one line."""
    text: str = yaml.dump(
        data, Dumper=_DUMPER, sort_keys=False, default_flow_style=True, width=_ENDLESS, allow_unicode=True
    )
    return text.strip()


def _listed(name: str, entries: Sequence[Mapping[str, Any]]) -> str:
    return "".join((f"{name}:\n", *(f"- {_flow(entry)}\n" for entry in entries))) if entries else ""


def _mapping(text: str) -> Mapping[str, Any]:
    """The file as plain data."""
    try:
        data = yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise InputError(f"it is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or _READ not in data:
        raise InputError("it is no quantization plan: make one with edgewise plan")
    if data[_READ] != _FORMAT:
        raise InputError(f"it has format {data[_READ]!r}, this edgewise reads {_FORMAT}: make it again")
    if unknown := sorted(map(str, data.keys() - _KEYS)):
        raise InputError(f"{unknown[0]!r} means nothing in a quantization plan: remove it")
    return data


def _entries(data: Mapping[str, Any], group: str) -> list[dict[str, Any]]:
    entries = data.get(group) or []
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise InputError(f"{group} is a list of entries such as {{name: x, dtype: uint8}}")
    return entries


def _channel_scales(data: Mapping[str, Any]) -> dict[str, Any]:
    entries = _entries(data, "channel_scales")
    scales = {str(entry.get("name")): entry.get("scale") for entry in entries}
    if len(scales) < len(entries):
        raise InputError("channel_scales has two entries for one weight: remove one")
    return scales


def _entry(entry: dict[str, Any], scales: Mapping[str, Any]) -> dict[str, Any]:
    """An entry with its scales, as float32 sees them."""
    name = str(entry.get("name"))
    if "axis" in entry:
        if "scale" in entry or name not in scales:
            raise InputError(f"plan of value {name!r}: with an axis its scales are written in channel_scales")
        entry = {**entry, "scale": scales[name]}
    if "scale" not in entry:
        return entry
    numbers = entry["scale"] if isinstance(entry["scale"], list) else [entry["scale"]]
    try:
        with np.errstate(over="ignore"):
            return {**entry, "scale": np.array(numbers, np.float64).astype(np.float32).tolist()}
    except (TypeError, ValueError) as error:
        raise InputError(f"plan of value {name!r}: scale {str(numbers)[:40]} is no number") from error
