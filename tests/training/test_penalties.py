"""Penalties make whole channels zero, and the exact passes remove them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_nets import classifier, constants, images

from edgewise.passes.prune_channels import PruneChannels
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator
from edgewise.training.distillation import finetune
from edgewise.training.graph_module import GraphModule
from edgewise.training.options import Penalty, TrainOptions
from edgewise.training.penalties import Shrinking
from edgewise.training.trainer import trainable

OPTIONS = TrainOptions(epochs=50, batch=16, learning_rate=1e-2, augment="none", weight_decay=0.0)


def _shrinking(penalty: Penalty) -> tuple[GraphModule, Shrinking]:
    model = classifier()
    module = GraphModule(model)
    return module, Shrinking(penalty, model, module, trainable(model))


def test_l1_and_l2_are_their_proximal_steps() -> None:
    module, step = _shrinking(Penalty("l1", 2.0))
    before = module.weights["w3"].detach().clone()
    step(0.1)
    assert torch.allclose(module.weights["w3"], before.sign() * (before.abs() - 0.2).clamp(min=0))
    module, step = _shrinking(Penalty("l2", 2.0))
    step(0.1)
    assert torch.allclose(module.weights["w3"], before / 1.2)


def test_the_scales_of_batch_norms_alone_shrink() -> None:
    module, step = _shrinking(Penalty("bn-scale", 1.0))
    before = {name: weight.detach().clone() for name, weight in module.weights.items()}
    step(0.25)
    assert torch.allclose(module.weights["g1"], before["g1"] - 0.25)
    assert all(torch.equal(w, before[n]) for n, w in module.weights.items() if n not in ("g1", "g2"))


def test_group_lasso_shrinks_a_channel_by_one_factor_and_what_it_cannot_remove_not_at_all() -> None:
    module, step = _shrinking(Penalty("group-lasso", 1.0))
    before = {name: weight.detach().clone() for name, weight in module.weights.items()}
    step(0.01)
    factor = module.weights["w1"].flatten(1)[:, 0] / before["w1"].flatten(1)[:, 0]
    assert ((factor > 0) & (factor < 1)).all()
    assert torch.allclose(module.weights["w1"], before["w1"] * factor.reshape(-1, 1, 1, 1))
    assert torch.allclose(module.weights["g1"], before["g1"] * factor)
    assert torch.equal(module.weights["b3"], before["b3"])  # classes stay


@pytest.mark.parametrize(("kind", "strength"), [("group-lasso", 0.15), ("bn-scale", 0.8)])
def test_channels_that_training_made_zero_are_removed_exactly(kind: str, strength: float) -> None:
    model = classifier(12)
    samples, held_back = images(model, 128, classes=4), images(model, 64, seed=2, classes=4)
    module = GraphModule(model)
    step = Shrinking(Penalty(kind, strength), model, module, trainable(model))  # type: ignore[arg-type]
    trained = finetune(model, samples, held_back, OPTIONS, module=module, regularizer=step, threads=1)
    zero = np.count_nonzero(constants(trained.model)["g1"] == 0)
    assert 1 < zero < 12
    pruned = PruneChannels().on(trained.model)
    # A scale of zero leaves a constant, and behind padding one constant has to stand for all.
    assert constants(pruned)["w1"].shape[0] <= 12 - zero + (kind == "bn-scale")
    feed = {"x": next(held_back.batches(16))["x"]}
    expected, found = Evaluator(trained.model).run(feed)["y"], Evaluator(pruned).run(feed)["y"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert trained.history.best.score > 0.9  # chance is 0.25


def test_penalties_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="l0"):
        Penalty("l0", 1.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="from zero on"):
        Penalty("l1", -1.0)
    model = classifier()
    with pytest.raises(InputError, match="finds nothing"):
        Shrinking(Penalty("bn-scale", 1.0), model, GraphModule(model), ("w1",))
