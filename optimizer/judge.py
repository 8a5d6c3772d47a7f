"""The bound on a lossy step: the metric may fall by so much and no more."""

from __future__ import annotations

import onnx_ir as ir

from edgewise.calibration.data import Samples
from edgewise.optimizer.comparison import Difference, differences
from edgewise.optimizer.metrics import default_metric, metric_named, run_all
from edgewise.optimizer.pipeline import BreachError
from edgewise.optimizer.report import Score

_COUNTING = ("top1", "agreement")


class Judge:
    """Scores models on `samples` against the original and refuses those that lost too much.

    `name` is a metric's name; without one the outputs and labels decide. A metric that counts samples
    cannot see less than one of them, so at least one may be lost.
    """

    def __init__(
        self, original: ir.Model, samples: Samples, name: str | None, max_drop: float, threads: int | None
    ) -> None:
        self.samples = samples
        self._threads = threads
        self._original = run_all(original, samples, threads=threads)
        self.metric = metric_named(name) if name else default_metric(self._original, samples.labels)
        self.before = self.metric.score(self._original, self._original, samples.labels)
        self.allowed = max(max_drop, 1 / len(samples)) if self.metric.name in _COUNTING else max_drop

    def __call__(self, model: ir.Model) -> float:
        """The score of `model`; `BreachError` below the bound."""
        score = self.score(model)
        if score < self.before - self.allowed - 1e-9:
            raise BreachError(
                f"{self.metric.name} fell from {self.before:.4f} to {score:.4f}, "
                f"by more than {self.allowed:.4f}"
            )
        return score

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
