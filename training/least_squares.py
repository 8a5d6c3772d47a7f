"""Ridge regression from streamed moments, as strong as samples that it has not seen say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgewise.passes.graph import Array

Floats = npt.NDArray[np.float64]

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Tried strengths, in mean variances of the inputs."""
_ROUNDING = 1e-4  # of variances to squares: what is smaller may be rounding of float32 sums
_FEW = 1024  # pairs, which rounding would hurt and float64 does not slow down
_RIDGE_UNSEEN = 1e-2  # where no samples could be held back


@dataclass(frozen=True)
class CrossMoments:
    """Sums over `count` pairs of an input x, [groups, k], and a target y, [groups, outputs]."""

    count: int
    x: Floats
    y: Floats
    xx: Floats
    """[groups, k, k]"""
    xy: Floats
    """[groups, k, outputs]"""
    yy: Floats

    @classmethod
    def of(cls, x: Array, y: Array, *, centred: bool = True) -> CrossMoments:
        """Of [groups, n, k] and [groups, n, outputs]; where means do not count, sums are zero."""
        if x.shape[1] < _FEW:
            x, y = x.astype(np.float64), y.astype(np.float64)
        turned = x.transpose(0, 2, 1)
        return cls(
            x.shape[1],
            x.sum(1, dtype=np.float64) * centred,
            y.sum(1, dtype=np.float64) * centred,
            (turned @ x).astype(np.float64),
            (turned @ y).astype(np.float64),
            (y * y).sum(1, dtype=np.float64),
        )

    def __add__(self, other: CrossMoments) -> CrossMoments:
        return CrossMoments(
            self.count + other.count,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
        )

    @property
    def covariance(self) -> tuple[Floats, Floats]:
        """Of x with itself and of x with y."""
        n, mean = self.count, self.x / self.count
        xx = self.xx / n - mean[:, :, None] * mean[:, None, :]
        return xx, self.xy / n - mean[:, :, None] * (self.y / n)[:, None, :]

    def intercept(self, weight: Floats) -> Floats:
        """The best one for `weight`, [groups, outputs]."""
        mean: Floats = (self.y - np.einsum("gk,gko->go", self.x, weight)) / self.count
        return mean

    def error(self, weight: Floats, intercept: Floats) -> Floats:
        """The mean square of y - weight x - intercept, [groups, outputs]."""
        n = self.count
        product = (self.xx / n) @ weight
        square = (weight * product).sum(1) - 2 * (weight * self.xy / n).sum(1) + self.yy / n
        mean_x = np.einsum("gk,gko->go", self.x / n, weight)
        rest: Floats = square + 2 * intercept * (mean_x - self.y / n) + intercept**2
        return rest


def fit(
    seen: CrossMoments, unseen: CrossMoments | None, start: Floats, importance: Floats
) -> tuple[Floats, Floats]:
    """Weight [groups, k, outputs] and intercept [groups, outputs] that give y from x.

    The ridge pulls towards `start`, and is as strong as makes the error on `unseen` least, the errors of
    outputs being weighed by `importance`; the fit is then made on both. Where no ridge beats `start`, that
    stays, with the best intercept.
    """
    if unseen is None:
        return _solution(seen, start, _RIDGE_UNSEEN)
    tried = {ridge: _solution(seen, start, ridge) for ridge in (*_RIDGES, np.inf)}
    errors = {ridge: float((unseen.error(*found) * importance).sum()) for ridge, found in tried.items()}
    best = min((r for r in tried if np.isfinite(errors[r])), key=errors.__getitem__, default=np.inf)
    return _solution(seen + unseen, start, best)


def _solution(moments: CrossMoments, start: Floats, ridge: float) -> tuple[Floats, Floats]:
    if not np.isfinite(ridge):
        return start, moments.intercept(start)
    xx, xy = moments.covariance
    square = np.trace(moments.xx, axis1=1, axis2=2) / (moments.count * xx.shape[1])
    variance = np.maximum(np.trace(xx, axis1=1, axis2=2) / xx.shape[1], _ROUNDING * square)
    added = ridge * np.where(variance > 0, variance, 1.0)[:, None, None] * np.eye(xx.shape[1])
    weight = start + np.linalg.solve(xx + added, xy - xx @ start)
    return weight, moments.intercept(weight)
