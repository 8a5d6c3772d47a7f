"""The int8 form of a model by the target's rules alone: quickly found, to see what int8 would come to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgewise.calibration.data import Samples
from edgewise.calibration.plan import plan
from edgewise.calibration.target import target_of
from edgewise.optimizer.int8 import prepare
from edgewise.optimizer.ladder import calibrate_for_int8
from edgewise.optimizer.pipeline import Reference, run_passes
from edgewise.optimizer.recipe import Quantize, Recipe
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.runtime.evaluate import Feed

_FEW = 32  # samples that calibrate


@dataclass(frozen=True, eq=False)
class QuickInt8:
    """Makes int8 forms by a recipe's options, its first method, and no search. `feeds` verify the passes."""

    options: Quantize
    recipe: Recipe
    samples: Samples
    feeds: Sequence[Feed]

    def of(self, model: ir.Model) -> ir.Model | None:
        """The int8 form; None where the target's rules leave nothing to quantize."""
        recipe, options = self.recipe, self.options
        target = target_of(recipe.target)
        exact, _ = run_passes(model, recipe.chain, Reference(model, self.feeds))
        ready, _ = prepare(exact, options, Reference(model, self.feeds))
        few = self.samples.take(range(min(len(self.samples), _FEW)))
        table = calibrate_for_int8(ready, few, options, target, threads=recipe.threads)
        by = dataclasses.replace(options.options, method=options.methods[0])
        chosen = plan(ready, table, by, target)
        return InsertQdq(chosen).on(ready) if chosen.quantized else None

    def __call__(self, model: ir.Model) -> ir.Model:
        """The int8 form, or else the model as it is."""
        return self.of(model) or model
