"""The runner: snapshot, pass, structural check, comparison with the original, keep or roll back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from edgewise.optimizer.comparison import relative
from edgewise.passes.base import Contract, Pass, PassError
from edgewise.passes.verify import Signature, check
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Evaluator, Feed
from edgewise.runtime.session import weight_bytes

# Rounding of one format through a network of ordinary depth, relative to the largest output.
_TOLERANCES = ((ir.DataType.BFLOAT16, 1e-1), (ir.DataType.FLOAT16, 2e-2))
_TOLERANCE = 1e-4
_RANDOM = 0.1  # no rounding moves an output by a tenth of its largest value
_MAX_ROUNDS = 5  # a chain that still edits in its fifth round is fighting itself

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all."""


def no_progress(_stage: str, _done: int, _total: int) -> None:
    """The progress of a caller that does not want any."""


@dataclass(frozen=True)
class StepReport:
    """What one pass did to the model, and what became of it.

    `status` is "applied", "no change" or "rolled back", the last with its `reason`. `error` is the
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


class BreachError(EdgewiseError):
    """A step broke its contract."""


class Reference:
    """The original model: its signature, and its outputs on the feeds that every step is checked on.

    How far its outputs move when onnxruntime's own graph optimizations are switched off says how much
    of a difference is rounding; outputs that then differ altogether are random, and only their types
    and shapes are checked.
    """

    def __init__(self, model: ir.Model, feeds: Iterable[Feed], *, threads: int | None = None) -> None:
        self.signature = Signature.of(model)
        self.feeds = tuple(feeds)
        self._threads = threads
        self._expected = self._outputs(model)
        rounding = self._errors(self._plain_outputs(model))
        self.random = frozenset(name for name, error in rounding.items() if error > _RANDOM)
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
    copy: ir.Model | None = None,
    judge: Judge | None = None,
    strict: bool = False,
) -> tuple[ir.Model, StepReport]:
    """Apply one pass to `model`, which is left as it was; give back the model to go on with.

    The pass works on `copy`, by default a new one, which afterwards is the model given back, or spoilt, or
    as it was if the status is "no change". An exact pass is held to the reference's outputs, a lossy one to
    `judge`. With `strict` an exception that no pass should raise is raised again, instead of being rolled
    back and named.
    """
    start = time.perf_counter()
    candidate = model.clone() if copy is None else copy
    edits, refused, error, score, reason = 0, {}, None, None, ""
    try:
        outcome = step.apply(candidate)
        edits, refused = outcome.edits, dict(outcome.refused)
        if edits:
            check(candidate, reference.signature)
            if step.contract is Contract.EXACT:
                error = reference.require_exact(candidate)
            else:
                error = reference.error_of(candidate)  # it runs, at least
                score = None if judge is None else judge(candidate)
    except (PassError, EdgewiseError) as breach:
        reason = str(breach)
    except Exception as bug:  # a defect of one pass must not cost the user the job
        if strict:
            raise
        reason = f"defect in {step.name}: {type(bug).__name__}: {bug}"
    kept = candidate if edits and not reason else model
    return kept, StepReport(
        step=step.spec,
        contract=step.contract.value,
        status="rolled back" if reason else "applied" if edits else "no change",
        edits=edits,
        refused=refused,
        error=error,
        score=score,
        seconds=time.perf_counter() - start,
        nodes=sum(1 for _ in kept.graph.all_nodes()),
        bytes=weight_bytes(kept),
        reason=" ".join(reason.split()),
    )


def run_passes(
    model: ir.Model,
    chain: Sequence[Pass],
    reference: Reference,
    *,
    progress: Progress = no_progress,
    strict: bool = False,
) -> tuple[ir.Model, tuple[StepReport, ...]]:
    """Run a chain of exact passes again and again until none edits; `model` is left as it was.

    A pass that was rolled back is not tried again, nor is one that found nothing in this very graph. After
    the first round only what changed is told.
    """
    steps: list[StepReport] = []
    banned: set[Pass] = set()
    idle: set[Pass] = set()
    """Those that found nothing since the last edit."""
    copy = None
    for round_ in range(_MAX_ROUNDS):
        edited = False
        for done, step in enumerate(chain):
            progress(f"round {round_ + 1}: {step.name}", done, len(chain))
            if step in banned or step in idle:
                continue
            copy = model.clone() if copy is None else copy
            model, report = run_step(model, step, reference, copy=copy, strict=strict)
            copy = copy if report.status == "no change" else None
            if report.status == "applied":
                edited = True
                idle.clear()
            elif report.status == "rolled back":
                banned.add(step)
            else:
                idle.add(step)
            if round_ == 0 or report.status != "no change":
                steps.append(report)
        progress(f"round {round_ + 1}", len(chain), len(chain))
        if not edited:
            break
    return model, tuple(steps)
