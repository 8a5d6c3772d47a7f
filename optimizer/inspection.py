"""What a model takes, gives, holds and costs, and what could be made of it; nothing is changed."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from edgewise.calibration.regions import find_regions
from edgewise.calibration.target import target_of
from edgewise.optimizer import files
from edgewise.optimizer.compressed_size import compressed_bytes
from edgewise.optimizer.pipeline import Progress, Reference, no_progress, run_passes
from edgewise.optimizer.recipe import Recipe
from edgewise.passes import PASSES
from edgewise.passes.base import Pass, Refused
from edgewise.passes.graph import attribute
from edgewise.passes.infer_shapes import infer_shapes
from edgewise.passes.prune_channels import ChannelCount, PruneChannels, removable_channels

Dimension = int | str | None

_METADATA_PREFIX = "edgewise."
# Where an operator reads its data and its weight, for those whose cost is data times weight.
_CONVOLUTIONS = {"Conv": (0, 1), "ConvInteger": (0, 1), "QLinearConv": (0, 3)}
_PRODUCTS = {"MatMul": 0, "MatMulInteger": 0, "QLinearMatMul": 0}
_RECURRENT = frozenset({"RNN", "GRU", "LSTM"})


@dataclass(frozen=True)
class Tensor:
    """An input or output. A dimension is a number, a symbol's name, or None if unknown."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]


@dataclass(frozen=True)
class PassFacts:
    """A graph pass: its `contract` is exact or lossy, `options` maps names to their defaults."""

    name: str
    contract: str
    options: Mapping[str, str]
    about: str


@dataclass(frozen=True)
class PassList:
    """All graph passes there are."""

    passes: tuple[PassFacts, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulate operations of one run.

    Dimensions that are not known count as one: those of the inputs are named in `counted_as_one`.
    `unknown` nodes have no known shape at all and are not in the `total`.
    """

    total: int
    counted_as_one: tuple[str, ...]
    unknown: int


@dataclass(frozen=True)
class Inspection:
    """A model as it is, and what could be made of it.

    `bytes` is the file with its external data, `compressed_bytes` what its weights come to in a zip or a
    download, `parameters` the numbers in all constants, `opsets`
    the version of each operator set by domain, `operators` how often each occurs, most frequent first,
    `metadata` what edgewise wrote into the file. `channels`, and `int8` and `not_int8` (operators, and
    reasons against it, with the number of nodes) are those of the model after the exact passes.
    """

    path: str
    sha256: str
    bytes: int
    compressed_bytes: int
    ir_version: int
    producer: str
    opsets: Mapping[str, int]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    parameters: int
    macs: Macs
    operators: Mapping[str, int]
    metadata: Mapping[str, str]
    channels: tuple[ChannelCount, ...]
    int8: Mapping[str, int]
    not_int8: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


def inspect(
    path: str | os.PathLike[str], *, target: str = "cpu", progress: Progress = no_progress
) -> Inspection:
    """Read the model at `path` and count; `target` is where int8 would run.

    Raises `InputError` where the model cannot be read or the target is not known.
    """
    model = files.load(path)
    operators = Counter(_qualified(node) for node in model.graph.all_nodes())
    prepared = _prepared(model, progress)
    regions = find_regions(prepared, target_of(target))
    return Inspection(
        path=str(path),
        sha256=files.sha256(path),
        bytes=files.file_bytes(path),
        compressed_bytes=compressed_bytes(model),
        ir_version=model.ir_version,
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        opsets=dict(model.opset_imports),
        inputs=tuple(map(_tensor, (v for v in model.graph.inputs if v.name not in model.graph.initializers))),
        outputs=tuple(map(_tensor, model.graph.outputs)),
        parameters=sum(tensor.size for _, tensor in files.tensors(model)),
        macs=count_macs(model),
        operators=dict(operators.most_common()),
        metadata={
            key.removeprefix(_METADATA_PREFIX): value
            for key, value in model.metadata_props.items()
            if key.startswith(_METADATA_PREFIX)
        },
        channels=removable_channels(prepared),
        int8=dict(Counter(node.op_type for node in regions.forms).most_common()),
        not_int8=dict(Counter(regions.reasons.values()).most_common()),
    )


def _prepared(model: ir.Model, progress: Progress) -> ir.Model:
    """The model after the exact passes but for the removal of channels, which are to be seen."""
    chain = [step for step in Recipe().chain if not isinstance(step, PruneChannels)]
    prepared, _ = run_passes(model, chain, Reference(model, feeds=()), progress=progress)
    return prepared


def _qualified(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _tensor(value: ir.Value) -> Tensor:
    shape = () if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return Tensor(value.name or "", str(value.type or "unknown type"), shape)


def count_macs(model: ir.Model) -> Macs:
    """Multiply-accumulates of convolutions, matrix products and recurrent layers; `model` stays as it is.

    Both branches of an If and one iteration of a Loop count.
    """
    model = model.clone()
    assumed = _batch_of_one(model)
    with suppress(Refused):  # what the file itself notes of its shapes has to do
        infer_shapes(model)
    counts = [_macs(node) for node in model.graph.all_nodes()]
    return Macs(sum(c for c in counts if c is not None), assumed, counts.count(None))


def _batch_of_one(model: ir.Model) -> tuple[str, ...]:
    """Make the dynamic leading dimensions of the inputs 1; the names of all dimensions that count as 1."""
    assumed: dict[str, None] = {}
    leading: set[str | None] = set()
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, int) and dim >= 0:
                continue
            assumed[_symbol(dim) or f"{value.name}[{axis}]"] = None
            if axis == 0:
                leading.add(_symbol(dim))
                value.shape = ir.Shape((1, *list(value.shape or ())[1:]))
    named = leading - {None}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([1 if _symbol(d) in named else d for d in value.shape])
    return tuple(assumed)


def _symbol(dim: int | ir.SymbolicDim) -> str | None:
    return None if isinstance(dim, int) else dim.value


def _macs(node: ir.Node) -> int | None:
    """The cost of one node; None where a shape that decides it is not known at all."""
    if node.op_type in _CONVOLUTIONS:
        _, weight = _CONVOLUTIONS[node.op_type]
        return _product(_size(node.outputs[0]), _size(node.inputs[weight], skip=1))
    if node.op_type == "ConvTranspose":
        return _product(_size(node.inputs[0]), _size(node.inputs[1], skip=1))
    if node.op_type == "Gemm":
        return _product(
            _size(node.outputs[0]), _dim(node.inputs[0], 0 if attribute(node, "transA", 0) else 1)
        )
    if node.op_type in _PRODUCTS:
        return _product(_size(node.outputs[0]), _dim(node.inputs[_PRODUCTS[node.op_type]], -1))
    if node.op_type in _RECURRENT:
        steps = _product(_dim(node.inputs[0], 0), _dim(node.inputs[0], 1))
        weights = (_size(node.inputs[1]), _size(node.inputs[2]))
        return None if None in weights else _product(steps, sum(w for w in weights if w is not None))
    return 0


def _product(*factors: int | None) -> int | None:
    return None if None in factors else math.prod(f for f in factors if f is not None)


def _size(value: ir.Value | None, *, skip: int = 0) -> int | None:
    """The number of elements, without the first `skip` axes; unknown dimensions count as 1."""
    if value is None or value.shape is None:
        return None
    return math.prod(d if isinstance(d, int) else 1 for d in list(value.shape)[skip:])


def _dim(value: ir.Value | None, axis: int) -> int | None:
    if value is None or value.shape is None:
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else 1


def list_passes() -> PassList:
    """Every pass by its name, with the first paragraph of its docstring."""
    return PassList(tuple(_pass_facts(kind) for kind in PASSES.values()))


def _pass_facts(kind: type[Pass]) -> PassFacts:
    about = " ".join((kind.__doc__ or "").partition("\n\n")[0].split())
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    options = {name: repr(d) for name, d in defaults.items() if d is not dataclasses.MISSING}
    return PassFacts(kind.name, kind.contract.value, options, about)
