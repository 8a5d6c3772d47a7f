"""Int8 forms that are quickly found: of all nodes that the target's rules name, without a search for more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgewise.calibration.target import target_of
from edgewise.optimizer.int8 import Split, prepare
from edgewise.optimizer.ladder import Attempt, Ground, best_ranges, calibrated, polish
from edgewise.optimizer.pipeline import Reference, no_progress, run_passes
from edgewise.optimizer.recipe import Quantize, Recipe
from edgewise.optimizer.yardstick import Yardstick
from edgewise.runtime.evaluate import Feed


@dataclass(frozen=True, eq=False)
class QuickInt8:
    """Makes int8 forms by the options of a recipe. `feeds` verify the passes that come first."""

    options: Quantize
    recipe: Recipe
    parts: Split
    feeds: Sequence[Feed]

    def nearest(self, model: ir.Model) -> ir.Model | None:
        """By the best ranges and with corrected biases; None where there is nothing to quantize."""
        found = self._attempt(model, self.options.model_copy(update={"ladder": ("bias",)}))
        return found.int8 if found.plan.quantized else None

    def __call__(self, model: ir.Model) -> ir.Model:
        """By the first ranges that come, which is enough to see how long it takes."""
        by = {"methods": self.options.methods[:1], "ladder": ()}
        found = self._attempt(model, self.options.model_copy(update=by))
        return found.int8 if found.plan.quantized else model

    def _attempt(self, model: ir.Model, options: Quantize) -> Attempt:
        recipe = self.recipe
        exact, _ = run_passes(model, recipe.chain, Reference(model, self.feeds))
        reference = Reference(exact, self.feeds)
        ready, _ = prepare(exact, options, reference)
        few = self.parts.at_most(options.samples)
        ground = Ground(
            samples=few.calibrate,
            reference=reference,
            yardstick=Yardstick(ready, few.choose, threads=recipe.threads),
            options=options,
            target=target_of(recipe.target),
            threads=recipe.threads,
            progress=no_progress,
        )
        best, _ = best_ranges(ground, ready, calibrated(ground, ready))
        return polish(ground, best)[0] if best.plan.quantized else best
