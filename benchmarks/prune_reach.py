"""How many parameters leave when every width is halved: how far the coupling of channels is understood.

Half of every group of channels leaves. Which half, the L2 norms decide on every side; for the number of
parameters it makes no difference. edgewise's result has to run, on one input and on three, and to give
finite outputs of the same shapes. Torch-Pruning prunes the same torch module, onnxsim the same file, both
at ratio 0.5. Parameters are those of the exported files.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import architectures
import numpy as np
import onnx_ir as ir
from int8_jobs import Row, Setting
from prune_files import reached
from prune_rival import ONNXSIM, TORCH_PRUNING, Request, attempt
from zeroed import parameters, removed

from edgewise.optimizer import files
from edgewise.optimizer.pipeline import Reference, run_passes
from edgewise.optimizer.probe import probe_feeds
from edgewise.optimizer.pruning import PREPARATION
from edgewise.passes import parse
from edgewise.passes.remove_channels import RemoveChannels
from edgewise.runtime.evaluate import Evaluator, input_specs, seeded_feed
from edgewise.training.importance import score
from edgewise.training.selection import uniform

GOALS: Mapping[str, int] = MappingProxyType(
    {
        "resnet18": 74,
        "resnet50": 73,
        "mobilenet_v2": 65,
        "densenet121": 72,
        "efficientnet": 66,
        "yolo": 70,
        "encoder": 45,
    }
)
"""Whole percents of the parameters to be removed."""

_RATIO = 0.5
_BATCHES = (1, 3)


def reach_rows(name: str, setting: Setting) -> list[Row]:
    """The line of a network."""
    path = architectures.exported(name, "none", setting.folder)
    before, start = files.load(path), time.perf_counter()
    prepared = [parse(spec) for spec in PREPARATION]
    model, _ = run_passes(before, prepared, Reference(before, probe_feeds(before, None)))
    after = halved(model)
    seconds = time.perf_counter() - start
    share, goal = removed(before, after), GOALS[name]
    return [
        {
            "model": name,
            "parameters": f"{parameters(before):,}",
            "removed %": share,
            "reach": goal,
            "runs": answers_alike(before, after),
            "s": seconds,
            "reached": round(share) >= goal,
            **_rival(Request(name, "", tool=TORCH_PRUNING), before, setting),
            **_rival(Request(str(path), "", tool=ONNXSIM), before, setting),
        }
    ]


def halved(model: ir.Model) -> ir.Model:
    """The model without the weaker half of every group of channels, as far as they can leave."""
    return RemoveChannels(uniform(model, score(model, "magnitude-l2"), _RATIO)).on(model)


def answers_alike(before: ir.Model, after: ir.Model) -> bool:
    """Whether the outputs have the shapes that they had, and hold numbers."""
    one, other = Evaluator(before), Evaluator(after)
    for feed in (seeded_feed(input_specs(before), 0, batch) for batch in _BATCHES):
        found = other.run(feed)
        for name, expected in one.run(feed).items():
            if found[name].shape != expected.shape or not np.isfinite(found[name]).all():
                return False
    return True


def _rival(request: Request, before: ir.Model, setting: Setting) -> Row:
    """What a rival removes, or why it does not."""
    tool, out = request.tool, setting.folder / f"{Path(request.net).stem}.half.{request.tool}.onnx"
    found = attempt(setting.rivals, dataclasses.replace(request, out=str(out), ratio=_RATIO))
    if found.failure:
        return {f"{tool} removed %": found.failure[:60]}
    return {f"{tool} removed %": removed(before, files.load(out)), f"{tool} s": found.seconds}


def reach_summary(rows: Sequence[Row]) -> list[str]:
    """Which networks lose what they are to lose, in whole percents, and run."""
    broken = [str(row["model"]) for row in rows if not row["runs"]]
    return [f"reached: {reached(rows)}", f"do not run: {', '.join(broken) or 'none'}"]
