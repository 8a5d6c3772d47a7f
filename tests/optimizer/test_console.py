"""What a run prints of pruning and of training."""

from __future__ import annotations

import dataclasses
import io

from answers import bare
from rich.console import Console

from edgewise.optimizer.console import view
from edgewise.optimizer.report import Amount, Report
from edgewise.training.options import Epoch, History

AMOUNTS = (
    Amount(0.25, 0.26, 1_180_000, 4_720_000, 0.905, 0.899, False, 2.31),
    Amount(0.5, 0.508, 42_420_000, 169_680_000, 0.9244, None, True),
)
LEARNED = History(
    (Epoch(0, None, 0.31, 0.81, 0.0, 0.0), Epoch(1, 0.2, 0.04, 0.92, 1e-3, 20.0)), "all steps are made"
)


def printed(report: Report) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=80, highlight=False).print(view(report))
    return text.getvalue().splitlines()


def test_amounts_are_a_table_that_fits() -> None:
    lines = printed(dataclasses.replace(bare(), amounts=AMOUNTS))
    little, much = (" ".join(line.split()) for line in lines if line.rstrip().endswith((" no", " yes")))
    assert little == "26.0% 1,180,000 4.72 MB 2.31x 0.9050 0.8990 no"
    assert much == "50.8% 42,420,000 169.68 MB 0.9244 yes"
    assert any(line.rstrip().endswith("bound kept") for line in lines)  # nothing was folded


def test_a_training_is_a_sentence() -> None:
    text = " ".join(printed(dataclasses.replace(bare(), history=LEARNED)))
    assert "learned: held-back loss 0.31 -> 0.04, score 0.8100 -> 0.9200" in text
    assert "best epoch 1 of 1, 20 s; all steps are made" in " ".join(text.split())


def test_without_either_nothing_is_said() -> None:
    text = " ".join(printed(dataclasses.replace(bare(), history=History())))
    assert "learned" not in text
    assert "MACs left" not in text
