"""What was seen of single channels on samples, and passes that want to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Pass, Refused
from edgewise.passes.channel_links import Array
from edgewise.passes.fingerprint import fingerprint

STALE = "ranges are those of another model"


@dataclass(frozen=True, eq=False)
class ChannelRange:
    """The least and the greatest number and the mean magnitude of each index along `axis`, float32."""

    axis: int
    low: Array
    high: Array
    mean: Array

    @property
    def magnitude(self) -> Array:
        """The largest magnitude of each channel."""
        largest: Array = np.maximum(np.abs(self.low), np.abs(self.high))
        return largest


@dataclass(frozen=True, eq=False)
class ChannelRanges:
    """Ranges of values by name, seen in the model of that `fingerprint`; no other one is meant."""

    fingerprint: str = ""
    values: Mapping[str, ChannelRange] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class RangedPass(Pass):
    """A pass that may be told what samples showed. No text names that: `spec` leaves it out."""

    ranges: ChannelRanges | None = None

    @property
    def spec(self) -> str:
        return super().spec if self.ranges is None else replace(self, ranges=None).spec

    def seen_in(self, model: ir.Model) -> Mapping[str, ChannelRange]:
        """The ranges of the values of `model`; `Refused` where they were seen in another one."""
        if self.ranges is None:
            return MappingProxyType({})
        if self.ranges.fingerprint != fingerprint(model):
            raise Refused(STALE)
        return self.ranges.values
