"""What is lost counts after what new statistics and biases give back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from rewrites import build, normal

from edgewise.calibration.data import Samples, from_arrays
from edgewise.optimizer import grading
from edgewise.optimizer.grading import graded
from edgewise.optimizer.pipeline import no_progress
from edgewise.optimizer.prune_trial import scored
from edgewise.optimizer.pruning import split_to_prune
from edgewise.optimizer.recipe import Prune
from edgewise.passes.channels import ChannelGraph
from edgewise.passes.remove_channels import PrunePlan, RemoveChannels
from edgewise.runtime.evaluate import TensorSpec
from edgewise.training.importance import score

NET = """
    g (float[N, 8, 8, 8] x) => (float[N, 8, 8, 8] y)
    {
        f = Conv (x, w1, b1)
        s = Add (x, f)
        g = Conv (s, w2)
        t = Add (s, g)
        c = Conv (t, w3)
        r = Relu (c)
        y = Conv (r, w4)
    }"""
FIRST, SECOND = "s", "t"
PARTS = split_to_prune(
    from_arrays({"x": normal(96, 8, 8, 8)}, (TensorSpec("x", np.dtype(np.float32), ("N", 8, 8, 8)),)), 0
)


def net(first: float, bias: float) -> ir.Model:
    """Two branches: the first `first` times a convolution and a bias, the second a convolution."""
    weights = {f"w{i}": normal(8, 8, 1, 1, seed=i) for i in (1, 2, 3, 4)}
    weights["w1"] = np.float32(first) * weights["w1"]
    return build(NET, 17, **weights, b1=np.full(8, bias, np.float32))


def ones(model: ir.Model) -> dict[str, npt.NDArray[np.float64]]:
    groups = ChannelGraph.of(model.graph, 17).groups
    free = {group.name: np.where(group.blocked, np.inf, np.arange(1.0, group.size + 1)) for group in groups}
    return {**free, FIRST: np.ones(1), SECOND: np.ones(1)}


def grades(model: ir.Model) -> Mapping[str, npt.NDArray[np.float64]]:
    return graded(model, ones(model), PARTS, threads=1, memory=1 << 30, progress=no_progress)


def test_a_branch_that_a_bias_can_stand_for_counts_little() -> None:
    """What it adds is a constant; the other adds what only its input tells."""
    found = grades(net(first=1e-4, bias=3.0))
    assert found[FIRST] < 0.01 * found[SECOND]
    assert found[SECOND] <= 1


def test_channels_of_a_group_keep_their_order() -> None:
    """A group is graded as a whole, by half of its channels, and what must stay stays."""
    model = net(first=1.0, bias=1.0)
    before, after = ones(model), grades(model)
    assert after.keys() == before.keys()
    for name, worth in before.items():
        factors = after[name][np.isfinite(worth)] / worth[np.isfinite(worth)]
        np.testing.assert_allclose(factors, factors[:1].repeat(len(factors)), rtol=1e-12)
        assert (np.isinf(after[name]) == np.isinf(worth)).all()
        assert ((factors > 0) & (factors <= 1)).all()


def test_where_nothing_changes_the_others_tell() -> None:
    """A branch of zeros leaves no noise, whose share could stay."""
    found = grades(net(first=0.0, bias=0.0))
    others = [worth[0] for name, worth in found.items() if name != FIRST and np.isfinite(worth).all()]
    assert found[FIRST] == pytest.approx(np.median(others))


def test_what_cannot_be_measured_at_all_counts_as_before() -> None:
    model = net(first=0.0, bias=0.0)
    alone = {FIRST: np.full(1, 7.0)}
    assert graded(model, alone, PARTS, threads=1, memory=1 << 30, progress=no_progress) == alone


@pytest.mark.parametrize(
    ("options", "is_graded"),
    [
        ({"score": "fisher"}, True),
        ({"score": "taylor", "recover": "closed-form"}, True),
        ({"score": "fisher", "recover": "none"}, False),
        ({"score": "fisher", "ratio": 0.5}, False),
        ({"score": "magnitude-l2"}, False),
    ],
)
def test_gradients_are_graded_where_a_refit_follows(options: dict[str, object], is_graded: bool) -> None:
    """A magnitude foresees no loss that a share could be taken of; one ratio for all needs no comparison."""
    pytest.importorskip("torch", reason="gradients")
    model, asked = net(first=1.0, bias=1.0), Prune.model_validate(options)
    bare = score(model, asked.score, PARTS.calibrate, seed=0, threads=1)
    told: list[str] = []
    found = scored(model, PARTS, asked, 0, 1, lambda stage, done, total: told.append(stage))
    assert any((found[name] != worth).any() for name, worth in bare.items()) == is_graded
    assert bool(told) == is_graded


@pytest.mark.parametrize(("work", "count"), [(1e12, 32), (1e4, 8)])
def test_a_large_model_is_refitted_on_fewer_samples(
    work: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()

    def listen(model: ir.Model, plan: PrunePlan, samples: Samples, **_: object) -> ir.Model:
        seen.add(len(samples))
        return RemoveChannels(plan).on(model)

    monkeypatch.setattr(grading, "_WORK", work)
    monkeypatch.setattr(grading, "reestimate", listen)
    grades(net(first=1.0, bias=1.0))
    assert seen == {count}
