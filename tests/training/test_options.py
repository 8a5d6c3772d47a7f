"""What is chosen before a training and known after it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from edgewise.runtime.errors import InputError
from edgewise.training.options import Epoch, History, TrainOptions


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"max_seconds": -1.0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"momentum": 1.0},
        {"warmup": -0.1},
        {"inner": -1.0},
        {"optimizer": "adam"},
        {"augment": "all"},
    ],
)
def test_an_option_that_means_nothing_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        TrainOptions(**wrong)


def test_the_rate_rises_and_falls_to_zero() -> None:
    options = TrainOptions(learning_rate=1.0, warmup=0.1)
    assert options.rate(0.0) < options.rate(0.05) < options.rate(0.1) == 1.0
    assert options.rate(0.55) == pytest.approx(0.5)
    assert options.rate(1.0) == pytest.approx(0.0)


def test_the_first_limit_counts() -> None:
    assert TrainOptions(epochs=3, steps=100).total(10) == 30
    assert TrainOptions(epochs=30, steps=100).total(10) == 100
    assert TrainOptions(max_seconds=1.0).total(10) == math.inf
    assert TrainOptions().total(10) == 300
    assert TrainOptions().shortened(0.5).total(10) == 150


def test_history_is_plain_and_knows_its_best_epoch() -> None:
    def epoch(number: int, held_back: float, phase: str = "end to end") -> Epoch:
        return Epoch(number, None if number == 0 else 1.0, held_back, 0.5, 0.1, 1.0, phase)

    history = History((epoch(0, 0.1, "blocks"), epoch(0, 3.0), epoch(1, 1.0), epoch(2, 2.0)), "done")
    assert History.from_dict(json.loads(json.dumps(history.to_dict()))) == history
    assert history.best.number == 1
    assert history.start.held_back == 3.0
    assert history.seconds == 4.0
