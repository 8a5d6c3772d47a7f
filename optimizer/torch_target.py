"""What a user says about a torch module to export: where it is, what goes in, which axes are free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import TensorSpec
from edgewise.runtime.foreign import foreign_code, import_callable

if TYPE_CHECKING:
    import torch

Axes = Mapping[str, Mapping[int, str]]
"""Input name -> axis -> symbol of its length. Axes with the same symbol have the same length."""

DTYPES = ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")

_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_INPUT = re.compile(r"(?P<name>[^=\s]+)=(?P<shape>\d+(x\d+)*)?(:(?P<dtype>\w+))?")
_AXIS = re.compile(r"(?P<name>.+):(?P<axis>-?\d+)=(?P<symbol>[A-Za-z_]\w*)")


def is_torch_target(text: str) -> bool:
    """Whether `text` has the form `package.module:callable` and is no file."""
    return _TARGET.fullmatch(text) is not None and not Path(text).exists()


def module_at(target: str | torch.nn.Module) -> torch.nn.Module:
    """The module itself, or what `package.module:callable` names: a module, or what makes one.

    Raises `InputError` where torch is missing, nothing is found, or what is found gives no module.
    """
    module_class = import_torch().nn.Module
    found: Any = target
    if isinstance(target, str):
        found = import_callable(target, f"{target!r} names no torch module")
        if not isinstance(found, module_class):
            with foreign_code(f"{target} failed"):
                found = found()
    if not isinstance(found, module_class):
        raise InputError(f"{target} gives {type(found).__name__}, not a torch.nn.Module")
    return cast("torch.nn.Module", found)


def import_torch() -> Any:
    """The torch module, with all that its exporter needs."""
    try:
        import onnxscript  # noqa: F401 - torch.onnx writes the graph with it
        import torch
    except ImportError:
        raise InputError("export needs torch: pip install 'edgewise[torch]'") from None
    return torch


def parse_inputs(texts: Sequence[str]) -> tuple[TensorSpec, ...]:
    """Read `name=1x3x224x224` or `ids=1x16:int64`; float32 if no type is given, a scalar if no shape is."""
    specs = tuple(map(_parse_input, texts))
    if not specs:
        raise InputError("say what goes into the module: --input name=1x3x224x224[:dtype]")
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"input {name!r} is given twice")
    return specs


def _parse_input(text: str) -> TensorSpec:
    found = _INPUT.fullmatch(text)
    if found is None:
        raise InputError(f"input {text!r} is not of the form name=1x3x224x224[:dtype]")
    dtype = found["dtype"] or "float32"
    if dtype not in DTYPES:
        raise InputError(f"input {text!r}: no type {dtype!r}: choose from {', '.join(DTYPES)}")
    shape = tuple(int(d) for d in found["shape"].split("x")) if found["shape"] else ()
    if 0 in shape:
        raise InputError(f"input {text!r}: an axis of length 0 cannot be traced")
    return TensorSpec(found["name"], np.dtype(dtype), shape)


def parse_axes(texts: Sequence[str], specs: Sequence[TensorSpec]) -> Axes:
    """Read `name:axis=symbol`; an axis may count from the end. `InputError` on what does not fit."""
    ranks = {spec.name: len(spec.shape) for spec in specs}
    axes: dict[str, dict[int, str]] = {}
    for text in texts:
        found = _AXIS.fullmatch(text)
        if found is None:
            raise InputError(f"dynamic axis {text!r} is not of the form name:axis=symbol, such as x:0=batch")
        name, axis = found["name"], int(found["axis"])
        if name not in ranks:
            raise InputError(f"dynamic axis {text!r}: the inputs are {', '.join(ranks)}")
        if not -ranks[name] <= axis < ranks[name]:
            raise InputError(f"dynamic axis {text!r}: {name} has {ranks[name]} axes, counted from 0")
        axes.setdefault(name, {})[axis % ranks[name]] = found["symbol"]
    lengths(specs, axes)
    return axes


def batch_axes(specs: Sequence[TensorSpec]) -> Axes:
    """The first axis of every input as "batch", or nothing where they cannot all be the batch."""
    if len({spec.shape[:1] for spec in specs}) != 1 or not specs[0].shape:
        return {}
    return {spec.name: {0: "batch"} for spec in specs}


def lengths(specs: Sequence[TensorSpec], axes: Axes) -> dict[str, int]:
    """The length each symbol has in `specs`; `InputError` where it has two."""
    found: dict[str, int] = {}
    for spec in specs:
        for axis, symbol in axes.get(spec.name, {}).items():
            length = spec.shape[axis]
            if not isinstance(length, int):
                raise InputError(f"input {spec.name!r} needs lengths that are numbers, not {length!r}")
            if found.setdefault(symbol, length) != length:
                raise InputError(
                    f"dynamic axes named {symbol!r} have the lengths {found[symbol]} and {length}: "
                    "name them differently or give equal examples"
                )
    return found


def resized(specs: Sequence[TensorSpec], axes: Axes, sizes: Mapping[str, int]) -> tuple[TensorSpec, ...]:
    """The specs with every free axis as long as `sizes` says for its symbol."""
    return tuple(replace(spec, shape=_resized(spec, axes.get(spec.name, {}), sizes)) for spec in specs)


def _resized(
    spec: TensorSpec, symbols: Mapping[int, str], sizes: Mapping[str, int]
) -> tuple[int | str | None, ...]:
    return tuple(sizes[symbols[i]] if i in symbols else d for i, d in enumerate(spec.shape))
