"""The runner: snapshot, pass, structural check, comparison with the original, keep or roll back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir

from edgewise.optimizer.bisection import replay
from edgewise.optimizer.comparison import relative
from edgewise.passes.base import Contract, Pass, PassError, graphs_of
from edgewise.passes.purity import drawn_outputs
from edgewise.passes.verify import Signature, check
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Evaluator, Feed
from edgewise.runtime.session import weight_bytes

# Rounding of one format through a network of ordinary depth, relative to the largest output.
_TOLERANCES = ((ir.DataType.BFLOAT16, 1e-1), (ir.DataType.FLOAT16, 2e-2))
_TOLERANCE = 1e-4
_RANDOM = 0.1  # no rounding moves an output by a tenth of its largest value
_MAX_ROUNDS = 10  # a chain that still edits in its tenth round is fighting itself

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all."""


def no_progress(_stage: str, _done: int, _total: int) -> None:
    """The progress of a caller that does not want any."""


@dataclass(frozen=True)
class StepReport:
    """What one pass did to the model, and what became of it.

    `status` is "applied", "no change", "left out" (it did not help) or "rolled back" (it broke its contract),
    the last two with a `reason`; of an applied one that is what it brought. `error` is the
    largest difference from the original's outputs relative to their largest value, `score` the
    metric of a lossy step; both None where nothing was measured. `nodes` and `bytes` are those
    after the step.
    """

    step: str
    contract: str
    status: str
    edits: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    error: float | None = None
    score: float | None = None
    seconds: float = 0.0
    nodes: int = 0
    bytes: int = 0
    reason: str = ""

    @property
    def remark(self) -> str:
        """The reason, and what it is the reason of."""
        return self.reason if self.status == "applied" or not self.reason else f"{self.status}: {self.reason}"


class BreachError(EdgewiseError):
    """A step broke its contract."""


class Reference:
    """The original model: its signature, and its outputs on the feeds that every step is checked on.

    How far its outputs move when onnxruntime's own graph optimizations are switched off says how much
    of a difference is rounding; outputs that then differ altogether are random, as are those that depend on
    a random operator, and only their types and shapes are checked.
    """

    def __init__(self, model: ir.Model, feeds: Iterable[Feed], *, threads: int | None = None) -> None:
        self.signature = Signature.of(model)
        self.feeds = tuple(feeds)
        self._threads = threads
        self._expected = self._outputs(model)
        rounding = self._errors(self._plain_outputs(model))
        restless = frozenset(name for name, error in rounding.items() if error > _RANDOM)
        self.random = restless | drawn_outputs(model)
        own = max((error for name, error in rounding.items() if name not in self.random), default=0.0)
        self.tolerance = max(_tolerance(model), 2 * own)

    def _outputs(self, model: ir.Model, *, optimize: bool = True) -> list[dict[str, Any]]:
        if not self.feeds:
            return []
        evaluator = Evaluator(model, threads=self._threads, optimize=optimize)
        return [evaluator.run(feed) for feed in self.feeds]

    def _plain_outputs(self, model: ir.Model) -> list[dict[str, Any]]:
        try:
            return self._outputs(model, optimize=False)
        except InputError:  # some models run only once onnxruntime has fused what it has no kernels for
            return self._outputs(model)

    def _errors(self, outputs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The largest relative difference of each output from the expected."""
        pairs = list(zip(self._expected, outputs, strict=True))
        names = self._expected[0] if self._expected else ()
        return {name: max(relative(e[name], a.get(name)) for e, a in pairs) for name in names}

    def error_of(self, model: ir.Model) -> float:
        """The largest relative difference of `model`'s outputs from the original's."""
        errors = self._errors(self._outputs(model))
        return max((e for name, e in errors.items() if name not in self.random or e == math.inf), default=0.0)

    def require_exact(self, model: ir.Model) -> float:
        """The error, or `BreachError` if it is more than rounding explains."""
        error = self.error_of(model)
        if error > self.tolerance:
            raise BreachError(
                f"outputs differ by {error:.1e} of their largest value, {self.tolerance:.0e} is allowed"
            )
        return error


def _tolerance(model: ir.Model) -> float:
    used = {v.dtype for g in model.graphs() for v in g.initializers.values()} | {
        v.dtype for v in model.graph.inputs
    }
    return next((tolerance for dtype, tolerance in _TOLERANCES if dtype in used), _TOLERANCE)


Judge = Callable[[ir.Model], float]
"""Scores a model by the user's metric; raises `BreachError` below the bound."""


def run_step(
    model: ir.Model,
    step: Pass,
    reference: Reference,
    *,
    judge: Judge | None = None,
    strict: bool = False,
) -> tuple[ir.Model, StepReport]:
    """Apply one pass to a copy of `model`, which is left as it was; give back the model to go on with.

    An exact pass is held to the reference's outputs, a lossy one to `judge`. With `strict` an exception that
    no pass should raise is raised again, instead of being rolled back and named.
    """
    candidate = model.clone()
    report = _attempt(candidate, step, reference, judge=judge, strict=strict)
    kept = candidate if report.status == "applied" else model
    nodes, bytes_ = _size(kept)
    return kept, replace(report, nodes=nodes, bytes=bytes_)


def _attempt(
    model: ir.Model, step: Pass, reference: Reference, *, judge: Judge | None, strict: bool
) -> StepReport:
    """Apply one pass to `model` itself, which is spoilt if the status is "rolled back"."""
    start = time.perf_counter()
    edits, refused, error, score, reason = 0, {}, None, None, ""
    try:
        outcome = step.apply(model)
        edits, refused = outcome.edits, dict(outcome.refused)
        if edits:
            check(model, reference.signature)
            if step.contract is Contract.EXACT:
                error = reference.require_exact(model)
            else:
                error = reference.error_of(model)  # it runs, at least
                score = None if judge is None else judge(model)
    except (PassError, EdgewiseError) as breach:
        reason = str(breach)
    except Exception as bug:  # a defect of one pass must not cost the user the job
        if strict:
            raise
        reason = f"defect in {step.name}: {type(bug).__name__}: {bug}"
    return StepReport(
        step=step.label,
        contract=step.contract.value,
        status="rolled back" if reason else "applied" if edits else "no change",
        edits=edits,
        refused=refused,
        error=error,
        score=score,
        seconds=time.perf_counter() - start,
        reason=" ".join(reason.split()),
    )


def _size(model: ir.Model) -> tuple[int, int]:
    """The nodes of a model and the bytes of its weights."""
    return sum(map(len, graphs_of(model))), weight_bytes(model)


def run_passes(
    model: ir.Model,
    chain: Sequence[Pass],
    reference: Reference,
    *,
    progress: Progress = no_progress,
    strict: bool = False,
) -> tuple[ir.Model, tuple[StepReport, ...]]:
    """Run a chain of exact passes again and again until none edits; `model` is left as it was.

    A round ends early at a pass that `waits` for those before it. A pass that was rolled back is not tried
    again, nor is one that found nothing while no edit since `helps` it. Of a pass that found nothing before,
    only what changed is told.
    """
    steps: list[StepReport] = []
    banned: set[Pass] = set()
    idle: set[Pass] = set()
    """Those that would find nothing now."""
    run: list[Pass] = []
    """Those that `current` went through, which are run again to undo what another one spoilt."""
    current, (nodes, bytes_) = model.clone(), _size(model)
    for round_ in range(_MAX_ROUNDS):
        edited = False
        for done, step in enumerate(chain):
            progress(f"round {round_ + 1}: {step.name}", done, len(chain))
            if step in banned or step in idle:
                continue
            if step.waits and edited and round_ < _MAX_ROUNDS // 2:
                break
            report = _attempt(current, step, reference, judge=None, strict=strict)
            if report.status == "applied":
                edited, (nodes, bytes_) = True, _size(current)
                idle = {other for other in idle if step.helps is not None and other.name not in step.helps}
            elif report.status == "rolled back":
                banned.add(step)
                current = replay(model, run)
            else:
                idle.add(step)
            if report.status != "no change" or step not in run:
                steps.append(replace(report, nodes=nodes, bytes=bytes_))
            if report.status != "rolled back":
                run.append(step)
        progress(f"round {round_ + 1}", len(chain), len(chain))
        if not edited:
            break
    return current, tuple(steps)
