"""A torch module in, an .onnx file out whose outputs are those of the module."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from edgewise.optimizer import files
from edgewise.optimizer.comparison import relative
from edgewise.optimizer.torch_target import (
    Axes,
    batch_axes,
    import_torch,
    is_torch_target,
    lengths,
    module_at,
    parse_axes,
    parse_inputs,
    resized,
)
from edgewise.passes.graph import opset as opset_of
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Evaluator, Feed, TensorSpec, input_specs, seeded_feed

if TYPE_CHECKING:
    import torch

    from edgewise.optimizer.dynamo import Call

__all__ = ["Check", "Export", "ExportReport", "export", "export_module", "is_torch_target", "to_model"]

_TOLERANCE = 1e-4
_HALF_TOLERANCE = 1e-2  # a few units in the last of float16's 11 bits, a layer
_TRACED = 2  # torch.export takes a length of 1 for a constant
_OLDEST_OPSET = 18  # torch writes this one and converts it


@dataclass(frozen=True)
class Check:
    """One comparison with torch: the shapes that went in, and the worst relative error of any output."""

    shapes: Mapping[str, tuple[int, ...]]
    error: float


@dataclass(frozen=True)
class Export:
    """An exported model, the comparisons it stood, and what the user should know."""

    model: ir.Model
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportReport:
    """What was written and how close it is to torch. `bytes` is the file with its external data."""

    path: str
    bytes: int
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        inputs = [{"name": s.name, "dtype": str(s.dtype), "shape": list(s.shape)} for s in self.inputs]
        checks = [
            {"shapes": {k: list(v) for k, v in c.shapes.items()}, "error": c.error} for c in self.checks
        ]
        plain = {name: getattr(self, name) for name in ("path", "bytes", "opset", "seconds")}
        lists = {"outputs": list(self.outputs), "notes": list(self.notes)}
        return {**plain, "inputs": inputs, **lists, "checks": checks}


def export(
    target: str | torch.nn.Module,
    inputs: Sequence[str],
    output: str | os.PathLike[str],
    *,
    dynamic: Sequence[str] | None = (),
    opset: int | None = None,
    seed: int = 0,
    force: bool = False,
) -> ExportReport:
    """Write a torch module as .onnx after holding its outputs against torch's.

    `target` is a module or `package.module:callable` of one; it is exported in eval mode and left as it
    was. `inputs` are `name=1x3x224x224[:dtype]`: all named like parameters of `forward`, or in their
    order. `dynamic` are `name:axis=symbol`; without any, the first axis of every input becomes "batch"
    if the module allows it, and with None every length is fixed. `opset` is 18 or later, by default
    what torch recommends.

    Outputs are compared at two lengths of the free axes, or on two inputs drawn from `seed`: within 1e-4
    of the largest value (1e-2 for half precision), integers exactly. Raises `InputError` where torch is
    missing, the module cannot be made or run, or the file cannot be written; `EdgewiseError` where torch
    cannot export it or the outputs differ.
    """
    start = time.monotonic()
    path = Path(output)
    files.check_writable(path, force=force)
    made = export_module(target, inputs, dynamic=dynamic, opset=opset, seed=seed)
    files.save(made.model, path, force=force)
    return ExportReport(
        path=str(path),
        bytes=files.file_bytes(path),
        opset=opset_of(made.model),
        inputs=input_specs(made.model),
        outputs=tuple(v.name or "" for v in made.model.graph.outputs),
        checks=made.checks,
        notes=made.notes,
        seconds=time.monotonic() - start,
    )


def to_model(
    target: str | torch.nn.Module,
    inputs: Sequence[str],
    *,
    dynamic: Sequence[str] | None = (),
    opset: int | None = None,
    seed: int = 0,
) -> ir.Model:
    """The model that `export` would write."""
    return export_module(target, inputs, dynamic=dynamic, opset=opset, seed=seed).model


def export_module(
    target: str | torch.nn.Module,
    inputs: Sequence[str],
    *,
    dynamic: Sequence[str] | None = (),
    opset: int | None = None,
    seed: int = 0,
) -> Export:
    """`export` without the file; weights are copies, metadata holds no paths or source lines."""
    if opset is not None and opset < _OLDEST_OPSET:
        raise InputError(f"opset {opset}: torch's exporter writes {_OLDEST_OPSET} or later")
    import_torch()
    from edgewise.optimizer.dynamo import Call, evaluating

    specs = parse_inputs(inputs)
    asked = parse_axes(dynamic or (), specs)
    module = module_at(target)
    call = Call.of(module, [spec.name for spec in specs])
    job = _Job(call, specs, opset, seed, _tolerance(module, specs))
    with evaluating(module):
        if asked or dynamic is None:
            return job.run(asked)
        return _with_free_batch(job)


def _with_free_batch(job: _Job) -> Export:
    """Export with a free batch size if that stands the comparison, else with the one that was given."""
    axes = batch_axes(job.specs)
    if not axes:
        return job.run({}, "every length is fixed: the inputs share no first axis to be the batch")
    try:
        return job.run(axes)
    except EdgewiseError as error:
        return job.run({}, f"the batch size is fixed at {job.specs[0].shape[0]}: {error}")


@dataclass(frozen=True)
class _Job:
    """A module to export and what its outputs are held to."""

    call: Call
    specs: tuple[TensorSpec, ...]
    opset: int | None
    seed: int
    tolerance: float

    def run(self, axes: Axes, *notes: str) -> Export:
        """Run the module where the comparison will be, export it, compare."""
        from edgewise.optimizer.dynamo import write_onnx

        feeds = self._feeds(axes)
        expected = [self.call.run(feed) for feed in feeds]
        traced = {symbol: max(n, _TRACED) for symbol, n in lengths(self.specs, axes).items()}
        example = seeded_feed(resized(self.specs, axes, traced), self.seed)
        model = write_onnx(self.call, example, axes, list(expected[0]), self.opset)
        evaluator = Evaluator(model)
        checks = tuple(
            self._check(feed, right, evaluator.run(feed)) for feed, right in zip(feeds, expected, strict=True)
        )
        return Export(model, checks, notes)

    def _feeds(self, axes: Axes) -> tuple[Feed, Feed]:
        """Two inputs: at the lengths given and at others, neither pair all as traced; else two seeds."""
        given = lengths(self.specs, axes)
        others = {symbol: 2 * n if n >= _TRACED else _TRACED + 1 for symbol, n in given.items()}
        first = seeded_feed(resized(self.specs, axes, given), self.seed)
        return first, seeded_feed(resized(self.specs, axes, others), self.seed + 1)

    def _check(self, feed: Feed, expected: Mapping[str, Any], actual: Mapping[str, Any]) -> Check:
        errors = {name: relative(expected[name], actual[name]) for name in expected}
        worst = max(errors, key=lambda name: errors[name])
        shapes = {name: array.shape for name, array in feed.items()}
        if not errors[worst] <= self.tolerance:
            raise EdgewiseError(
                f"output {worst!r} of the exported model is {errors[worst]:.1e} off torch's "
                f"({self.tolerance:.0e} is allowed) with input shapes {shapes}"
            )
        return Check(shapes, errors[worst])


def _tolerance(module: torch.nn.Module, specs: Sequence[TensorSpec]) -> float:
    """What rounding may do: more where anything is computed in half precision."""
    sizes = [p.element_size() for p in module.parameters() if p.is_floating_point()]
    sizes += [spec.dtype.itemsize for spec in specs if spec.dtype.kind == "f"]
    return _HALF_TOLERANCE if min(sizes, default=4) < 4 else _TOLERANCE
