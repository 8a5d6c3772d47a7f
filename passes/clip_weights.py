"""Small weights become zero."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.passes.base import Contract, Outcome, Pass, Refused, graphs_of
from edgewise.passes.graph import Array, attribute, constant_of, graph_of, new_initializer
from edgewise.passes.linear import FLOATS, release

Mask = npt.NDArray[np.bool_]
_Weights = Mapping[ir.Value, Array]

_SCOPES = ("layer", "global")
_PATTERN = re.compile(r"([1-9]\d*):([1-9]\d*)")
_DIGIT = 16  # bits of a magnitude that are looked at together

# The inputs by which operators read weights.
_WEIGHTS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "Conv": (1,),
        "ConvTranspose": (1,),
        "Gemm": (0, 1),
        "MatMul": (0, 1),
        "RNN": (1, 2),
        "GRU": (1, 2),
        "LSTM": (1, 2),
    }
)


@dataclass(frozen=True)
class ClipWeights(Pass):
    """Set the weights of least magnitude to zero (Han et al., NeurIPS 2015), by one of three criteria.

    Given:   y = W x + b
    Result:  y = W' x + b   where W' is W, but zero where
             threshold t    |W| < t
             share s        |W| is among the s * size smallest, counted over the layer, or with the
                            scope `global` over all layers
             pattern n:m    |W| is not among the n largest of its m consecutive inputs

    Without a criterion nothing happens. Weights are those of Conv, ConvTranspose, Gemm, MatMul and recurrent
    layers; one that others read as well, such as the table of a Gather, is refused. Biases and norms stay.
    What is zero already counts, so a second run finds nothing to do.

    Shapes stay: the file becomes smaller once it is compressed (see `compressed_bytes`), and channels of
    which nothing is left are removed by `prune-channels`.
    """

    share: float = 0.0
    threshold: float = 0.0
    pattern: str = ""
    scope: str = "layer"

    name: ClassVar[str] = "clip-weights"
    contract: ClassVar[Contract] = Contract.LOSSY

    def __post_init__(self) -> None:
        if sum(map(bool, (self.share, self.threshold, self.pattern))) > 1:
            raise ValueError(f"{self.name}: give one of share, threshold and pattern")
        if not 0 <= self.share < 1:
            raise ValueError(f"{self.name}: share is at least 0 and below 1, not {self.share}")
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"{self.name}: threshold is a magnitude, not {self.threshold}")
        if self.pattern and self._kept_of()[0] >= self._kept_of()[1]:
            raise ValueError(f"{self.name}: pattern {self.pattern} clips nothing")
        if self.scope not in _SCOPES:
            raise ValueError(f"{self.name}: scope is one of {', '.join(_SCOPES)}, not {self.scope!r}")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Pass:
        if isinstance(options.get("pattern"), int):  # YAML takes 2:4 for minutes and seconds
            raise ValueError(f"{cls.name}: put the pattern in quotes, as in {{pattern: '2:4'}}")
        return super().from_options(options)

    def apply(self, model: ir.Model) -> Outcome:
        weights, refused = _weights_of(model)
        edits = sum(_clip(value, weights[value], mask) for value, mask in self._leaving(weights, refused))
        return Outcome(edits, MappingProxyType(dict(refused)))

    def _leaving(self, weights: _Weights, refused: Counter[str]) -> Iterator[tuple[ir.Value, Mask]]:
        """What is to be zero, one tensor after the other: masks of all would take a lot of memory."""
        if self.threshold:
            yield from ((value, np.abs(array) < self.threshold) for value, array in weights.items())
        elif self.pattern:
            yield from self._patterned(weights, refused)
        elif self.share and self.scope == "global":
            yield from _smallest(weights, self.share)
        elif self.share:
            for value, array in weights.items():
                yield from _smallest({value: array}, self.share)

    def _kept_of(self) -> tuple[int, int]:
        """n and m."""
        found = _PATTERN.fullmatch(self.pattern)
        if found is None:
            raise ValueError(f"{self.name}: pattern is n:m, such as 2:4, not {self.pattern!r}")
        return int(found[1]), int(found[2])

    def _patterned(self, weights: _Weights, refused: Counter[str]) -> Iterator[tuple[ir.Value, Mask]]:
        kept, run = self._kept_of()
        for value, array in weights.items():
            try:
                yield value, _outside(array, _input_axis(value, array, run), kept, run)
            except Refused as refusal:
                refused[str(refusal)] += 1


def _weights_of(model: ir.Model) -> tuple[dict[ir.Value, Array], Counter[str]]:
    """Every weight of a layer once, however many read it, and why others stay."""
    found, refused, seen = dict[ir.Value, Array](), Counter[str](), set[ir.Value]()
    for value in _read_as_weight(model):
        array = constant_of(value)
        if value in seen or array is None or array.dtype not in FLOATS:
            continue
        seen.add(value)
        if value.is_graph_output() or any(i not in _inputs(reader) for reader, i in value.uses()):
            refused["weight has another reader"] += 1
        else:
            found[value] = array
    return found, refused


def _read_as_weight(model: ir.Model) -> Iterator[ir.Value]:
    for graph in graphs_of(model):
        for node in graph:
            read = (node.inputs[i] for i in _inputs(node) if i < len(node.inputs))
            yield from (value for value in read if value is not None)


def _inputs(node: ir.Node) -> tuple[int, ...]:
    """The inputs by which a node reads weights."""
    return _WEIGHTS.get(node.op_type, ()) if node.domain == "" else ()


def _smallest(weights: _Weights, share: float) -> Iterator[tuple[ir.Value, Mask]]:
    """The smallest share of some weights taken together; of equal ones those that come first."""
    count = int(share * sum(array.size for array in weights.values()))
    limit, ties = _limit(tuple(weights.values()), count)
    for value, array in weights.items():
        magnitudes = _magnitudes(array)
        leaving = magnitudes < limit
        equal = np.flatnonzero(magnitudes == limit)[:ties]
        leaving[equal] = True
        ties -= len(equal)
        yield value, leaving.reshape(array.shape)


def _limit(arrays: Sequence[Array], count: int) -> tuple[int, int]:
    """The largest of the `count` smallest magnitudes, and how many equal to it are among them.

    A radix selection: the upper half of the bits is counted, then the lower half of those that share the
    upper half found. It takes two passes and memory for one tensor, however many there are.
    """
    limit = 0
    for shift in (_DIGIT, 0):
        counts = np.zeros(1 << _DIGIT, np.int64)
        for array in arrays:
            digits = _magnitudes(array) >> shift
            low = digits[digits >> _DIGIT == limit] & ((1 << _DIGIT) - 1)
            counts += np.bincount(low.astype(np.int64), minlength=len(counts))
        upto = np.cumsum(counts)
        digit = int(np.searchsorted(upto, count))
        count -= int(upto[digit] - counts[digit])
        limit = limit << _DIGIT | digit
    return limit, count


def _magnitudes(array: Array) -> npt.NDArray[np.uint32]:
    """The bits of |array| in float32, flat: as integers they are in the order of the numbers."""
    return np.abs(array).astype(np.float32, copy=False).ravel().view(np.uint32)


def _input_axis(value: ir.Value, array: Array, run: int) -> int:
    """The axis over which all readers of a weight sum; it must hold whole runs of `run` inputs."""
    axes = {_axis(reader, index, array.ndim) for reader, index in value.uses()}
    if len(axes) > 1:
        raise Refused("readers sum over different axes of one weight")
    (axis,) = axes
    transposed = [reader for reader, _ in value.uses() if reader.op_type == "ConvTranspose"]
    groups = max((attribute(reader, "group", 1) for reader in transposed), default=1)
    if array.shape[axis] // groups % run:
        raise Refused("inputs of a layer are no multiple of the pattern")
    return axis


def _axis(node: ir.Node, index: int, rank: int) -> int:
    if node.op_type == "MatMul":
        return max(rank - 2, 0) if index else rank - 1
    if node.op_type == "Gemm":
        return index ^ 1 ^ bool(attribute(node, ("transA", "transB")[index], 0))
    return {"Conv": 1, "ConvTranspose": 0}.get(node.op_type, 2)


def _outside(array: Array, axis: int, kept: int, run: int) -> Mask:
    """All but the `kept` largest of every `run` along `axis`."""
    inputs_last = np.abs(np.moveaxis(array, axis, -1))
    order = np.argsort(inputs_last.reshape(*inputs_last.shape[:-1], -1, run), axis=-1, kind="stable")
    leaving = np.zeros(order.shape, np.bool_)
    np.put_along_axis(leaving, order[..., : run - kept], True, axis=-1)
    return np.moveaxis(leaving.reshape(inputs_last.shape), -1, axis)


def _clip(value: ir.Value, array: Array, leaving: Mask) -> bool:
    """Give the readers of a weight one that is zero at `leaving`, unless it is so already."""
    if not array[leaving].any():
        return False
    clipped = np.where(leaving, array.dtype.type(0), array)
    if value.is_initializer():
        value.const_value = ir.Tensor(clipped, name=value.name)
        return True
    producer = value.producer()
    assert producer is not None  # a constant is one or the other
    fresh = new_initializer(graph_of(producer), value.name or "weight", clipped)
    value.replace_all_uses_with(fresh)
    release(value)
    return True
