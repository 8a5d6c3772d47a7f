"""The bound on a lossy step: the metric may fall by so much and no more."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgewise.calibration.data import Samples
from edgewise.optimizer.comparison import Difference, differences
from edgewise.optimizer.metrics import Array, default_metric, metric_named, run_all
from edgewise.optimizer.pipeline import BreachError
from edgewise.optimizer.report import Score
from edgewise.runtime.errors import EdgewiseError

_COUNTING = ("top1", "agreement")


class Judge:
    """Scores models on `samples` against the original and refuses those that lost too much.

    `name` is a metric's name; without one the outputs and labels decide. A metric that counts samples sees
    whole ones only: what may be lost is rounded up to them. A `floor` is the bound itself. Where
    neither a metric was named nor labels are at hand, twice as many answers may change as may get worse: one
    that was wrong before loses nothing.
    """

    def __init__(
        self,
        original: ir.Model,
        samples: Samples,
        name: str | None,
        max_drop: float,
        threads: int | None,
        floor: float | None = None,
    ) -> None:
        self.samples = samples
        self._threads = threads
        self._original = run_all(original, samples, threads=threads)
        self.metric = metric_named(name) if name else default_metric(self._original, samples.labels)
        self.before = self.metric.score(self._original, self._original, samples.labels)
        self.allowed = self._allowed(2 * max_drop if name is None and self._is_unlabelled else max_drop)
        if floor is not None:
            self.allowed = self.before - floor

    @property
    def floor(self) -> float:
        """The least score that keeps the bound."""
        return self.before - self.allowed - 1e-9

    @property
    def _is_unlabelled(self) -> bool:
        return self.metric.name == "agreement"

    def _allowed(self, drop: float) -> float:
        count = len(self.samples)
        return max(math.ceil(drop * count - 1e-9), 1) / count if self.metric.name in _COUNTING else drop

    def __call__(self, model: ir.Model) -> float:
        """The score of `model`; `BreachError` below the bound."""
        score = self.score(model)
        if score < self.floor:
            raise BreachError(
                f"{self.metric.name} fell from {self.before:.4f} to {score:.4f}, "
                f"by {self.before - score:.2g}: more than {self.allowed:.2g}"
            )
        return score

    @property
    def notes(self) -> tuple[str, ...]:
        """What speaks against trusting the scores."""
        notes = []
        if names := [name for name, output in self._original.items() if not _is_finite(output)]:
            notes.append(
                f"NaN or infinity is in output {names[0]!r} of the model itself on the samples that judge: "
                "there it is not judged, so see that it is made for such inputs"
            )
        if self.is_blind:
            notes.append(
                f"{self.metric.name} is {self.before:.4f} as well where every sample gets the outputs of the "
                "first: by these samples it cannot tell a good model from a broken one"
            )
        return tuple(notes)

    @property
    def is_blind(self) -> bool:
        """Whether the score is as good where every sample gets the outputs of the first."""
        alike = {n: np.repeat(output[:1], len(output), axis=0) for n, output in self._original.items()}
        try:
            return self.metric.score(alike, self._original, self.samples.labels) >= self.before
        except EdgewiseError:  # it can
            return False

    def score(self, model: ir.Model) -> float:
        """The score of `model`, whatever it is."""
        outputs = run_all(model, self.samples, threads=self._threads)
        return self.metric.score(outputs, self._original, self.samples.labels)

    def verdict(self, model: ir.Model) -> tuple[Score, tuple[Difference, ...]]:
        """The score of `model` beside the original's, and how far its outputs are from the original's."""
        outputs = run_all(model, self.samples, threads=self._threads)
        after = self.metric.score(outputs, self._original, self.samples.labels)
        score = Score(self.metric.name, self.before, after, self.allowed, len(self.samples))
        return score, differences([self._original], [outputs])


def _is_finite(output: Array) -> bool:
    return output.dtype.kind != "f" or bool(np.isfinite(output).all())
