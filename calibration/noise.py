"""Signal and noise: how far numbers are from those that were expected."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgewise.passes.graph import Array


@dataclass
class Energy:
    """Sums of squares so far: of the numbers expected, and of what the actual ones differ by."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, expected: Array, actual: Array) -> None:
        """Infinities and NaN in the same places do not count; in one of the two they drown everything."""
        e, a = (array.astype(np.float64).ravel() for array in (expected, actual))
        finite = np.isfinite(e)
        if e.shape != a.shape or not np.array_equal(finite, np.isfinite(a)):
            self.noise = math.inf
            return
        e, a = e[finite], a[finite]
        self.signal += float(e @ e)
        self.noise += float(np.sum((e - a) ** 2))

    @property
    def share(self) -> float:
        """Noise over signal; 1 for noise without a signal."""
        if math.isinf(self.noise):
            return math.inf
        return self.noise / self.signal if self.signal > 0 else float(self.noise > 0)

    @property
    def decibels(self) -> float:
        return -math.inf if math.isinf(self.noise) else decibels(self.signal, self.noise)


def decibels(signal: float, noise: float) -> float:
    """Ratio of two energies in dB; infinite without noise."""
    if noise == 0:
        return math.inf
    return 10 * float(np.log10(signal / noise)) if signal > 0 else -math.inf
