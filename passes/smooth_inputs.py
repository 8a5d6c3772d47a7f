"""Move outliers of what a matrix product reads into its weights, which have a scale for every column."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import onnx_ir as ir

from edgewise.passes.base import Outcome, Refused
from edgewise.passes.channel_balance import Pulls, balanced
from edgewise.passes.channel_ranges import RangedPass
from edgewise.passes.channel_scales import Layer, ScaleGraph, refusals
from edgewise.passes.graph import opset


@dataclass(frozen=True)
class SmoothInputs(RangedPass):
    """Divide the inputs of a matrix product by factors of two that its weights take in.

    Given:   y = W x, and x = g * n + h        W of MatMul, Gemm or a Conv of a single tap; n is normalized,
                                               or g * n + h are the filters and the bias of a layer
    Result:  y = (W s) x', and x' = (g / s) * n + (h / s)
             s[j] = max|x[j]| ** strength / max|W[:, j]| ** (1 - strength), rounded to a power of two

    What lies between is as for `equalize-channels`, and so are the norms and layers that take the division
    in; where nothing can, the product is left alone. Without `ranges` nothing is done.

    Xiao et al., SmoothQuant, ICML 2023.
    """

    name: ClassVar[str] = "smooth-inputs"
    strength: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"{self.name}: strength must be from 0 to 1, not {self.strength}")

    def apply(self, model: ir.Model) -> Outcome:
        try:
            seen = self.seen_in(model)
        except Refused as refusal:
            return Outcome(0, MappingProxyType({str(refusal): 1}))
        if not seen:
            return Outcome()
        scales = ScaleGraph.of(model.graph, opset(model), seen)
        groups = [g for g, readers in scales.readers.items() if any(_is_product(r) for r in readers)]
        refused = Counter(refusals(groups))
        pulls = Pulls(0, self.strength, 1 - self.strength)
        edits = scales.scale(balanced(scales, groups, pulls, per_channel=False))
        return Outcome(edits, MappingProxyType(dict(refused)))


def _is_product(layer: Layer) -> bool:
    """Whether a layer sums over channels alone."""
    if layer.node.op_type in ("Gemm", "MatMul"):
        return True
    return layer.node.op_type == "Conv" and layer.taps == 1 and not layer.is_depthwise
