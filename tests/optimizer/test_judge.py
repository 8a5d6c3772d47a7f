"""The bound on lossy steps: by how much a metric may fall, or below what it may not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_nets import classifier, disturbed, images

from edgewise.calibration.data import Samples, from_arrays
from edgewise.optimizer.judge import Judge
from edgewise.optimizer.pipeline import BreachError
from edgewise.runtime.evaluate import input_specs


@pytest.fixture
def net() -> ir.Model:
    return classifier()


def judge(model: ir.Model, samples: Samples, name: str | None = "fidelity", **options: float) -> Judge:
    return Judge(model, samples, name, options.get("max_drop", 0.01), 1, options.get("floor"))


def test_a_floor_is_the_bound_whatever_may_be_lost(net: ir.Model) -> None:
    samples, worse = images(net, 20), disturbed(net, 0.2)
    found = judge(net, samples).score(worse)
    assert 0 < found < 0.99  # or the bounds below would not be between the two
    assert judge(net, samples, floor=found - 0.01, max_drop=0.0)(worse) == found
    for strict in (judge(net, samples, floor=found + 0.01, max_drop=1.0), judge(net, samples)):
        with pytest.raises(BreachError, match=r"fidelity fell from 1\.0000"):
            strict(worse)


def test_a_floor_that_is_met_exactly_is_kept(net: ir.Model) -> None:
    samples, worse = images(net, 20), disturbed(net, 0.2)
    found = judge(net, samples).score(worse)
    assert judge(net, samples, floor=found)(worse) == found


def test_a_floor_above_the_original_leaves_nothing(net: ir.Model) -> None:
    with pytest.raises(BreachError, match="more than"):
        judge(net, images(net, 20), floor=1.5)(net)


def test_a_floor_is_not_rounded_to_samples_nor_doubled_without_labels(net: ir.Model) -> None:
    """Unlike what may be lost, of which a whole sample is the least, and of answers twice as many."""
    samples = images(net, 20)
    assert judge(net, samples, "agreement", floor=0.99).floor == pytest.approx(0.99)
    assert judge(net, samples, None, floor=0.99).floor == pytest.approx(0.99)
    assert judge(net, samples, "agreement").floor == pytest.approx(0.95)
    assert judge(net, samples, None, max_drop=0.05).floor == pytest.approx(0.9)


def test_the_verdict_tells_the_floor_as_what_may_be_lost(net: ir.Model) -> None:
    score, _ = judge(net, images(net, 20), floor=0.7).verdict(net)
    assert (score.before, score.after) == (1.0, 1.0)
    assert score.allowed == pytest.approx(0.3)


@pytest.mark.parametrize(("count", "blind"), [(1, True), (20, False)])
def test_a_judge_that_cannot_tell_models_apart_is_blind(net: ir.Model, count: int, blind: bool) -> None:
    assert judge(net, images(net, count)).is_blind is blind


def test_samples_that_are_alike_make_it_blind(net: ir.Model) -> None:
    alike = from_arrays({"x": np.ones((20, 1, 8, 8), np.float32)}, input_specs(net))
    assert judge(net, alike).is_blind
    assert "cannot tell a good model from a broken one" in judge(net, alike).notes[0]
