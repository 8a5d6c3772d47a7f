"""What x86 processors without VNNI lose of an int8 model, and what to do about it, found on any processor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from edgewise.calibration.emulation import Emulator, Layer, Watch
from edgewise.calibration.kernels import kernel_rows, weights_of
from edgewise.calibration.noise import Energy
from edgewise.calibration.weight_scales import float32_scale
from edgewise.passes.graph import Array
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.passes.quant_plan import QuantPlan, ValuePlan
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Feed

MARGIN = 1.25
"""How far beyond the largest activation seen at each weight, from zero, others are reckoned with."""

_WIDENINGS = np.linspace(1.01, 1.25, 13)  # of the least scale; half a unit of rounding is below 1 %
_POSITIONS = 32  # of each layer and sample, by which roundings are compared


@dataclass(frozen=True)
class NodeSaturation:
    """A node of which some output channels can saturate: have weights that activations exist for.

    `can` and `does` count channels, for any input and on the samples; `share` is the part of all sums
    that was changed, `loss` the signal-to-noise ratio of the node's output in dB by it alone. `widening`
    is how much larger the scale of each channel has to be for it not to saturate.
    """

    output: str
    op_type: str
    weights: str
    channels: int
    can: int
    does: int
    share: float
    loss: float
    widening: tuple[float, ...] = field(repr=False)

    @property
    def at_risk(self) -> int:
        """Channels that saturate on inputs somewhat larger than those seen."""
        return sum(w > 1 for w in self.widening)


@dataclass(frozen=True)
class SaturationReport:
    """What a plan loses where products are added in pairs, in 16 bits: on x86 without VNNI.

    `outputs` are signal-to-noise ratios in dB, the signal being what the same integers give with VNNI;
    infinite where nothing changes. Only floats whose shape does not depend on other values have one.
    """

    nodes: tuple[NodeSaturation, ...]
    outputs: Mapping[str, float]
    samples: int

    @property
    def safe(self) -> bool:
        """Whether no input whatever saturates."""
        return not self.nodes

    @property
    def loss(self) -> float:
        """The signal-to-noise ratio of the output that suffers most, in dB."""
        return min(self.outputs.values(), default=math.inf)

    @property
    def verdict(self) -> str:
        if self.safe:
            return "safe everywhere: no sum can saturate on x86 without VNNI"
        can, does = (sum(getattr(n, key) for n in self.nodes) for key in ("can", "does"))
        where = f"on x86 without VNNI {can} channels of {len(self.nodes)} nodes can saturate"
        if not does:
            return f"{where}, none does on {self.samples} samples"
        return (
            f"{where}, {does} do on {self.samples} samples: "
            f"{self.loss:.1f} dB signal-to-noise against the same file with VNNI"
        )

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """A table: the head, then a row for every node that can saturate."""
        return (
            ("node", "op", "channels", "can", "at risk", "do", "sums %", "dB"),
            *(
                (
                    *(n.output, n.op_type),
                    *(f"{count}" for count in (n.channels, n.can, n.at_risk, n.does)),
                    *(f"{n.share * 100:.3g}", f"{n.loss:.1f}"),
                )
                for n in self.nodes
            ),
        )

    def __str__(self) -> str:
        rows = self.rows() if self.nodes else ()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)
        return "\n".join((self.verdict, *lines))


def saturation(
    model: ir.Model,
    plan: QuantPlan,
    samples: Iterable[Feed],
    *,
    margin: float = MARGIN,
    most: int = 8,
    threads: int | None = None,
) -> SaturationReport:
    """What the int8 file that `plan` makes of the float `model` loses on x86 without VNNI.

    Every layer that can saturate is run in integers on `most` of the samples, as the kernels compute it:
    alone for the layers' figures, all together for those of the outputs. A channel is at risk if its
    weights saturate on activations `margin` times as far from zero as the largest that was seen at each;
    on any activations, if `margin` is infinite.
    Raises `InputError` where there are no samples.
    """
    quantized = model.clone()
    InsertQdq(plan).apply(quantized)
    emulator = Emulator(quantized, threads=threads)
    twins = dict(zip(map(_name, _anchors(quantized)), _anchors(model), strict=True))
    if not emulator.layers:
        return SaturationReport((), MappingProxyType({}), 0)
    seen = {layer.name: _Seen(layer) for layer in emulator.layers if weights_of(twins[layer.name])}
    energies: dict[str, Energy] = {}
    count = 0
    for feed in islice(samples, most):
        exact, cut = emulator.run(feed, saturating=False, watch=_watch(seen)), emulator.run(feed)
        for name in filter(lambda name: _is_comparable(exact[name], cut[name]), exact):
            energies.setdefault(name, Energy()).add(exact[name], cut[name])
        count += 1
    if not count:
        raise InputError("no samples to find saturation with")
    nodes = tuple(s.report(twins[name], margin) for name, s in seen.items())
    return SaturationReport(nodes, MappingProxyType({k: e.decibels for k, e in energies.items()}), count)


def portable(plan: QuantPlan, report: SaturationReport) -> QuantPlan:
    """`plan` with wider scales for the channels at risk, as `report` found them."""
    widening: dict[str, Array] = {}
    for node in report.nodes:
        widening[node.weights] = np.maximum(widening.get(node.weights, 1.0), node.widening)
    return replace(plan, values=tuple(_widened(v, widening.get(v.name)) for v in plan.values))


def unsigned_weights(plan: QuantPlan, model: ir.Model) -> QuantPlan:
    """`plan` with the same weights stored as uint8: kernels for those add in 32 bits on every processor.

    The file gives what that of `plan` gives with VNNI.
    """
    weights = {w.value.name for node in model.graph if (w := weights_of(node)) is not None}
    values = (
        replace(v, dtype="uint8", zero_point=v.zero_point + 128)
        if v.name in weights and v.dtype == "int8"
        else v
        for v in plan.values
    )
    return replace(plan, values=tuple(values))


def _widened(value: ValuePlan, widening: Array | None) -> ValuePlan:
    if widening is None or not (widening > 1).any():
        return value
    factors = widening if value.axis is not None else widening.max(keepdims=True)
    scale = tuple(float32_scale(s * f) for s, f in zip(value.scale, factors.tolist(), strict=True))
    risky = f"{int((widening > 1).sum())} of {len(widening)} channels widened: pairs would saturate"
    return replace(
        value, scale=scale, why=risky if value.why == "largest weight" else f"{value.why}, {risky}"
    )


def _anchors(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type in ("Conv", "Gemm", "MatMul")]


def _name(node: ir.Node) -> str:
    return node.outputs[0].name or ""


class _Seen:
    """What one layer met on samples."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._low, self._high = (np.full(layer.rows[:, 0].shape, level) for level in (255, 0))
        self._cut = np.zeros(layer.channels, np.int64)
        self._sums = 0
        self._energy = Energy()
        self._columns: list[Array] = []

    def add(self, columns: Array, sums: Array) -> None:
        lost = self._layer.lost(columns)
        self._low = np.minimum(self._low, columns.min(axis=1))
        self._high = np.maximum(self._high, columns.max(axis=1))
        self._cut += (lost != 0).sum(axis=1).ravel()
        self._sums += columns.shape[1]
        self._energy.add(self._layer.floats(sums), self._layer.floats(sums - lost))
        self._columns.append(columns[:, :: -(-columns.shape[1] // _POSITIONS)])

    def report(self, node: ir.Node, margin: float) -> NodeSaturation:
        layer, weights = self._layer, weights_of(node)
        assert weights is not None  # see `saturation`
        return NodeSaturation(
            _name(node),
            node.op_type,
            weights.value.name or "",
            layer.channels,
            int(layer.can_saturate.sum()),
            int((self._cut > 0).sum()),
            float(self._cut.sum() / (self._sums * layer.channels)),
            self._energy.decibels,
            tuple(self._widening(kernel_rows(node, weights.array), margin).tolist()),
        )

    def _widening(self, weights: Array, margin: float) -> Array:
        """Of the scales just above the least that keeps each channel safe, the one that rounds it best."""
        layer = self._layer
        overflow = layer.overflow(*(self._beyond(level, margin) for level in (self._low, self._high)))
        columns = np.concatenate(self._columns, axis=1).astype(np.float32) - layer.zero_point
        target = weights.reshape(layer.rows.shape)
        best, least = np.ones(layer.channels), np.full(layer.channels, np.inf)
        for widening in _WIDENINGS:
            factor = np.where(overflow > 1, overflow * widening, 1.0)
            scale = (layer.weight_scale * factor).reshape(len(target), -1, 1)
            error = (np.rint(target / scale).clip(-128, 127) * scale - target).astype(np.float32)
            noise = ((columns @ error.transpose(0, 2, 1)) ** 2).sum(axis=1).ravel()
            best, least = np.where(noise < least, factor, best), np.minimum(noise, least)
        return best

    def _beyond(self, levels: Array, margin: float) -> Array:
        """`margin` times as far from zero as `levels`, on the grid; its end if the margin has none."""
        if math.isinf(margin):
            return np.full(levels.shape, 0 if levels is self._low else 255)
        zero = self._layer.zero_point
        beyond: Array = np.rint((zero + margin * (levels.astype(np.float64) - zero)).clip(0, 255))
        return beyond


def _watch(seen: Mapping[str, _Seen]) -> Watch:
    def watch(layer: Layer, columns: Array, sums: Array) -> None:
        if layer.name in seen:  # it was not in integers before
            seen[layer.name].add(columns, sums)

    return watch


def _is_comparable(exact: Any, cut: Any) -> bool:
    return isinstance(exact, np.ndarray) and exact.dtype.kind == "f" and exact.shape == cut.shape
