"""Give the channels between layers one magnitude, so that a scale for all of them loses less."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import onnx_ir as ir

from edgewise.passes.base import Outcome, Refused
from edgewise.passes.channel_balance import Pulls, balanced
from edgewise.passes.channel_ranges import RangedPass
from edgewise.passes.channel_scales import ScaleGraph, refusals
from edgewise.passes.graph import opset


@dataclass(frozen=True)
class EqualizeChannels(RangedPass):
    """Move factors of two from the filters that write a channel to the weights that read it.

    Given:   y = W f(V x + b)            where f(s z) = s f(z) for all s > 0, channel by channel
    Result:  y = (W / s) f((s V) x + s b)    s powers of two, one for each channel

    V and W are Conv, ConvTranspose, Gemm or MatMul, of groups or not; f is any chain of Relu, LeakyRelu,
    PRelu, pooling, padding with zeros, moves and sums: all that write or read a channel share its factor,
    along residual branches too. A Clip is passed where `ranges` show that the channel stays clear of its
    bound; the outputs are then the same for inputs like those samples. s balances the largest magnitudes of
    a channel in V and in W, and in f where `ranges` tell; with weight scales `per_channel`, then not in V.

    Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019.
    """

    name: ClassVar[str] = "equalize-channels"
    per_channel: bool = False

    def apply(self, model: ir.Model) -> Outcome:
        try:
            seen = self.seen_in(model)
        except Refused as refusal:
            return Outcome(0, MappingProxyType({str(refusal): 1}))
        edits, refused = 0, Counter[str]()
        for graph in list(model.graphs()):
            scales = ScaleGraph.of(graph, opset(model), seen)
            groups = [group for group in scales.graph.groups if scales.writers[group]]
            refused.update(refusals(groups))
            exponents = balanced(scales, groups, Pulls(1, 1, 1), per_channel=self.per_channel)
            edits += scales.scale(exponents)
        return Outcome(edits, MappingProxyType(dict(refused)))
