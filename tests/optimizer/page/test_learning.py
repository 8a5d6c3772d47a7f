"""What was pruned and how a model learned, on the page."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
from answers import bare, report

from edgewise.optimizer.page import learning_charts
from edgewise.optimizer.page.blocks import Drawing, Section, Table
from edgewise.optimizer.page.learning import amounts_section, learning_section
from edgewise.optimizer.page.learning_charts import Bounded
from edgewise.optimizer.page.render import page_of, render
from edgewise.optimizer.page.text import TIMES
from edgewise.optimizer.recipe import Prune, Recipe
from edgewise.optimizer.report import Amount, Report, Score
from edgewise.training.options import Epoch, History

SCORE = Score("top1", 0.93, 0.92, 0.01, 500)  # the bound is 0.92
LITTLE = Amount(0.2, 0.21, 90_000, 360_000, 0.86, 0.84, False)
ENOUGH = Amount(0.4, 0.39, 150_000, 600_000, 0.925, 0.921, True)
ONLY_FLOAT = Amount(0.45, 0.44, 170_000, 680_000, 0.924, 0.91, False)
MUCH = Amount(0.6, 0.62, 240_000, 960_000, 0.929, 0.928, True)
TRIED = (MUCH, LITTLE, ENOUGH, ONLY_FLOAT)
EVIL = "<script>alert(1)</script>"


def pruned(*amounts: Amount, score: Score | None = SCORE, by: str = "pruned", **bound: float) -> Report:
    recipe = Recipe(threads=1, prune=Prune(**bound)).model_dump(mode="json")  # type: ignore[arg-type]
    return dataclasses.replace(report(by), amounts=amounts, score=score, recipe=recipe)


def shown(section: tuple[Section, ...]) -> tuple[Drawing | None, Table | None]:
    (only,) = section
    drawn = next((block for block in only.blocks if isinstance(block, Drawing)), None)
    return drawn, next((block for block in only.blocks if isinstance(block, Table)), None)


def learned(losses: list[float], phase: str = "end to end", ended: str = "patience is over") -> History:
    epochs = (
        Epoch(i, None if i == 0 else loss + 0.1, loss, 1 - loss, 1e-3, 2.0, phase)
        for i, loss in enumerate(losses)
    )
    return History(tuple(epochs), ended)


class TestAmounts:
    def test_the_least_that_keeps_the_bound_was_taken(self) -> None:
        drawn, rows = shown(amounts_section(pruned(*TRIED)))
        assert drawn is not None
        assert drawn.figure.title == "39 % of the multiply-accumulates keep top1 at 92.1 %"
        assert rows is not None
        assert [row.cells[0].text for row in rows.rows] == ["21.0 %", "39.0 %", "44.0 %", "62.0 %"]
        assert [row.cells[-1].text for row in rows.rows] == ["", "taken", "", ""]
        assert [row.cells[-2].tone for row in rows.rows] == ["bad", "good", "bad", "good"]

    def test_the_drawing_says_it_to_those_who_cannot_see_it(self) -> None:
        drawn, _ = shown(amounts_section(pruned(*TRIED)))
        assert drawn is not None
        assert "The bound is 92.0 %" in drawn.figure.alt
        assert "21.0 % left: 86.0 %, in int8 84.0 %, breaks the bound" in drawn.figure.alt
        assert "39.0 % left: 92.5 %, in int8 92.1 %, keeps the bound" in drawn.figure.alt
        for drawing in (drawn.figure.wide, drawn.figure.narrow):
            assert "bound 92.0 %" in drawing
            assert "39 % left" in drawing
            assert "input: 93.0 %" in drawing

    def test_a_point_is_filled_where_its_own_score_keeps_the_bound(self) -> None:
        """An amount that keeps it in float alone has one point of each kind."""
        drawn = learning_charts.amounts((ONLY_FLOAT,), Bounded("top1", str, bound=0.92), "t", taken=None).wide
        fill = {
            form: re.findall(rf"left: {score}{form}</title>.*?fill: var\(--(\w+)\)", drawn)
            for form, score in (("", "0.924"), (" in int8", "0.91"))
        }
        assert fill == {"": ["c0"], " in int8": ["paper"]}

    def test_without_int8_there_is_one_series(self) -> None:
        floats = [dataclasses.replace(a, int8_score=None) for a in TRIED]
        drawn, rows = shown(amounts_section(pruned(*floats)))
        assert drawn is not None
        assert rows is not None
        assert [key.text for key in drawn.figure.legend] == ["in float", "input"]
        assert "in int8" not in rows.columns
        assert "int8" not in drawn.figure.alt

    def test_of_measured_amounts_the_fastest_was_taken(self) -> None:
        """Though it is not the one with least left."""
        timed = [dataclasses.replace(a, speedup=x) for a, x in zip(TRIED, (1.9, 3.0, 1.8, 1.7), strict=True)]
        _, rows = shown(amounts_section(pruned(*timed)))
        assert rows is not None
        assert rows.columns[3] == "speed-up"
        assert [row.cells[3].text for row in rows.rows] == [
            f"{x}{TIMES}" for x in ("3.00", "1.80", "1.70", "1.90")
        ]
        assert [row.cells[-1].text for row in rows.rows] == ["", "", "", "taken"]

    def test_one_amount_is_a_table(self) -> None:
        drawn, rows = shown(amounts_section(pruned(ENOUGH)))
        assert drawn is None
        assert rows is not None

    def test_a_bound_on_something_else_is_none_on_the_metric(self) -> None:
        drawn, _ = shown(amounts_section(pruned(ENOUGH, MUCH, max_macs=0.5)))
        assert drawn is not None
        assert "The bound is" not in drawn.figure.alt
        assert "hollow" not in drawn.figure.note
        assert ">bound " not in drawn.figure.wide

    def test_nothing_was_taken(self) -> None:
        drawn, rows = shown(amounts_section(pruned(LITTLE, ONLY_FLOAT, by="int8")))
        assert drawn is not None
        assert rows is not None
        assert drawn.figure.title == "No amount of pruning keeps top1 within the bound"
        assert "ring" not in drawn.figure.note
        assert "taken" not in [row.cells[-1].text for row in rows.rows]

    def test_the_best_effort_is_the_best_of_those_that_break_the_bound(self) -> None:
        drawn, _ = shown(amounts_section(pruned(LITTLE, ONLY_FLOAT)))
        assert drawn is not None
        assert drawn.figure.title == "The bound was not reached: 91.0 % with 44 % left"

    def test_psnr_is_in_decibels_and_its_cap_is_not_drawn(self) -> None:
        images = [dataclasses.replace(a, score=30 + 10 * a.macs, int8_score=None) for a in TRIED]
        drawn, _ = shown(amounts_section(pruned(*images, score=Score("psnr", 100.0, 34.0, 70.0, 384))))
        assert drawn is not None
        assert "33.9 dB" in drawn.figure.alt
        assert "The bound is 30.0 dB" in drawn.figure.alt
        assert "100" not in drawn.figure.alt

    @pytest.mark.parametrize("score", [SCORE, None])
    def test_amounts_alike_can_be_drawn(self, score: Score | None) -> None:
        drawn, _ = shown(amounts_section(pruned(ENOUGH, ENOUGH, score=score)))
        assert drawn is not None

    def test_foreign_names_stay_text(self) -> None:
        score = dataclasses.replace(SCORE, metric=EVIL)
        assert EVIL not in render(pruned(*TRIED, score=score))


class TestLearning:
    def test_the_best_epoch_is_told(self) -> None:
        (section,) = learning_section(learned([0.5, 0.3, 0.2, 0.25]))
        drawn, _ = shown((section,))
        assert drawn is not None
        assert drawn.figure.title == "Held-back score 0.500 → 0.800"
        assert "3 epochs" in drawn.figure.alt
        assert "0.500 before, 0.200 in the best epoch" in drawn.figure.alt
        assert "epoch 2, samples held back: 0.200" in drawn.figure.wide
        assert "epoch 1, samples learned from: 0.400" in drawn.figure.narrow
        assert "epoch 0, samples learned from" not in drawn.figure.wide
        assert "3 epochs in 8.00 s; ended: patience is over." in render(
            dataclasses.replace(bare(), history=learned([0.5, 0.3, 0.2, 0.25]))
        )

    def test_phases_follow_each_other(self) -> None:
        first, second = learned([0.9, 0.5, 0.4], "block by block"), learned([0.6, 0.3])
        both = History((*first.epochs, *second.epochs))
        assert [at for at, _ in learning_charts.along(both)] == [0, 1, 2, 2, 3]
        drawn, _ = shown(learning_section(both))
        assert drawn is not None
        assert "block by block, then end to end" in drawn.figure.note
        assert drawn.figure.title == "Held-back score 0.400 → 0.700"

    def test_what_was_no_better_says_so(self) -> None:
        drawn, _ = shown(learning_section(learned([0.2, 0.3])))
        assert drawn is not None
        assert drawn.figure.title == "No epoch was better than the model before"

    def test_numbers_that_are_none_are_left_out(self) -> None:
        drawn, _ = shown(learning_section(learned([0.5, 0.4, math.nan, math.inf], ended="diverged")))
        assert drawn is not None
        assert "epoch 1, samples held back" in drawn.figure.wide
        assert "epoch 2, samples held back" not in drawn.figure.wide
        assert not re.search(r"\b(nan|inf)\b", drawn.figure.wide)

    @pytest.mark.parametrize("losses", [[0.0, 0.0], [0.5, 0.5], [5.0, 1e-3]])
    def test_any_losses_can_be_drawn(self, losses: list[float]) -> None:
        assert shown(learning_section(learned(losses)))[0] is not None

    @pytest.mark.parametrize("history", [None, History(), learned([0.5])])
    def test_is_absent_where_nothing_was_learned(self, history: History | None) -> None:
        assert learning_section(history) == ()


def test_where_they_stand() -> None:
    whole = dataclasses.replace(pruned(*TRIED), history=learned([0.5, 0.3]))
    names = [section.name for section in page_of(whole).sections]
    assert names[names.index("candidates") :][:3] == ["candidates", "amounts", "learning"]
    assert not {"amounts", "learning"} & {section.name for section in page_of(bare()).sections}
    assert render(whole) == render(whole)
