"""Keep an int8 model from saturating on x86 without VNNI, at the least cost."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from itertools import islice

from edgewise.calibration.plan import plan
from edgewise.calibration.saturation import MARGIN, SaturationReport, portable, saturation
from edgewise.optimizer.ladder import WORTH, Attempt, Floats, Ground, judged, report
from edgewise.optimizer.pipeline import StepReport
from edgewise.passes.quant_plan import QuantPlan
from edgewise.runtime.evaluate import Feed

_MOST = 4  # samples that are run in emulated integers
SAFE = "safe everywhere: no sum can saturate on x86 without VNNI"
_NAME = "room for sums of 16 bits"


@dataclasses.dataclass(frozen=True)
class Ported:
    """An attempt and what is known of it on x86 without VNNI."""

    attempt: Attempt
    step: StepReport
    verdict: str


def ported(ground: Ground, safe: Attempt, floats: Floats, *, here: bool) -> Ported:
    """The best of three: every pair of weights with room for its sum, only those at risk, or none.

    `safe` is the first. The second has room for activations somewhat larger than those seen. The third is
    taken only where this processor does not saturate (`here` says whether it does), the others cost 0.1 dB
    or more, and nobody asked for a portable file.
    """
    start = time.perf_counter()
    ground.progress("saturation without VNNI", 0, 1)
    full = dataclasses.replace(safe, plan=_without_room(ground, safe, floats))
    found = saturation(full.model, full.plan, _feeds(ground), most=_MOST, threads=ground.threads)
    lean = judged(ground, dataclasses.replace(full, plan=_named(portable(full.plan, found), safe.plan)))
    best, verdict = (lean, _verdict(found)) if lean.decibels > safe.decibels else (safe, SAFE)
    if not here and ground.options.portable == "auto":
        full = judged(ground, full)
        if full.decibels >= best.decibels + WORTH:
            best, verdict = full, found.verdict
    ground.progress("saturation without VNNI", 1, 1)
    figures = f"{safe.decibels:.1f} -> {best.decibels:.1f} dB"
    return Ported(best, report(_NAME, 0, best is not safe, f"{figures}; {verdict}", start), verdict)


def _feeds(ground: Ground) -> Iterator[Feed]:
    return islice(iter(ground.samples), _MOST)


def _without_room(ground: Ground, safe: Attempt, floats: Floats) -> QuantPlan:
    options = dataclasses.replace(ground.options.options, method=safe.method)
    rules = dataclasses.replace(ground.target, name="x86-vnni", saturates=False)
    return plan(safe.model, safe.table, options, rules, floats=floats)


def _named(chosen: QuantPlan, safe: QuantPlan) -> QuantPlan:
    """With the target's name, by which those that round know that sums must stay in range."""
    return dataclasses.replace(chosen, target=safe.target)


def _verdict(found: SaturationReport) -> str:
    return f"no sum saturates on x86 without VNNI by activations up to {MARGIN:g} times those seen"
