"""Narrow copies of the benchmarks' networks, exported by torch, with half of their filters zeroed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from edgewise.optimizer import files
from edgewise.optimizer.comparison import relative
from edgewise.optimizer.pipeline import Reference, run_passes
from edgewise.optimizer.recipe import Recipe
from edgewise.runtime.evaluate import Evaluator, input_specs, seeded_feed

torch = pytest.importorskip("torch", reason="torch is not installed: nothing to export")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from architectures import ARCHITECTURES, Plan, exported, filters_of, zeroed  # noqa: E402
from zeroed import removed  # noqa: E402

SMALL = Plan(width=0.25, depth=0.2, pixels=32)

# Percent of the parameters; stems and classifiers, which lose one side only, weigh more than at full size.
# Of a transformer that keeps its width the heads and the neurons go, which is less than half.
REMOVED = {(name, "coupled"): 53 for name in ARCHITECTURES} | {
    ("shufflenet_v2", "coupled"): 45,
    ("encoder", "coupled"): 45,
    ("encoder", "coupled-width"): 72,
    ("vit", "coupled"): 28,
    ("vit", "coupled-width"): 63,
}


@pytest.mark.slow  # torch's exporter takes seconds for each
@pytest.mark.parametrize(("name", "scheme"), REMOVED)
def test_half_of_the_filters(name: str, scheme: str, tmp_path: Path) -> None:
    """The default chain, judged by batches of one and of three."""
    model = files.load(exported(name, scheme, tmp_path, SMALL))
    after, steps = run_passes(model, Recipe().chain, Reference(model, ()), strict=True)
    assert not [step.reason for step in steps if step.status == "rolled back"]
    assert removed(model, after) >= REMOVED[name, scheme]
    before, pruned = Evaluator(model, optimize=False), Evaluator(after, optimize=False)
    for batch in (1, 3):
        feed = seeded_feed(input_specs(model), batch, batch)
        actual = pruned.run(feed)
        for output, expected in before.run(feed).items():
            assert relative(expected, actual[output]) <= 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sizes_are_those_published(name: str) -> None:
    """The architecture is the one in the paper, down to the last parameter."""
    with torch.device("meta"):
        module = ARCHITECTURES[name].build(Plan())
    assert sum(p.numel() for p in module.parameters()) == ARCHITECTURES[name].parameters


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_filters_that_go_are_zero(name: str) -> None:
    """The filters that go are zero in every tensor of their layer, the others are not."""
    module, _ = zeroed(name, "coupled", SMALL)
    dead = [filters.dead for filters in filters_of(module)]
    assert 0.2 <= np.concatenate(dead).mean() <= 0.5
    for filters in filters_of(module):
        for parameter in filters.modules[0].parameters(recurse=False):
            swapped = isinstance(filters.modules[0], torch.nn.ConvTranspose2d) and parameter.ndim > 1
            rows = (
                (parameter.transpose(0, 1) if swapped else parameter).detach().reshape(len(filters.dead), -1)
            )
            assert (~rows.numpy().any(1) == filters.dead).all()
