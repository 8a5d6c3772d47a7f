"""The sections of the page that tell how much of a model could leave, and how what is left learned."""

from __future__ import annotations

from functools import partial

from edgewise.optimizer.candidates import PRUNED
from edgewise.optimizer.page import learning_charts
from edgewise.optimizer.page.blocks import Cell, Drawing, Row, Section, Table, lines, section, table
from edgewise.optimizer.page.job import score_text
from edgewise.optimizer.page.learning_charts import Bounded
from edgewise.optimizer.page.text import count_text, digits, percent, times
from edgewise.optimizer.recipe import Prune
from edgewise.optimizer.report import Amount, Report, best_amount, size_text
from edgewise.training.options import History

_CAPPED = "psnr"  # against itself the input has a score that says nothing


def amounts_section(report: Report) -> tuple[Section, ...]:
    """What was tried of pruning, and which amount was taken."""
    if not report.amounts:
        return ()
    by, taken = _bounded(report), _taken(report)
    drawn = None
    if len(report.amounts) > 1:
        drawn = Drawing(learning_charts.amounts(report.amounts, by, _title(by, taken), taken=taken))
    return section("amounts", "How much can leave", drawn, _amounts_table(report.amounts, by, taken))


def _bounded(report: Report) -> Bounded:
    """What the amounts are held to; with a bound on something else there is none on the metric."""
    score = report.score
    if score is None:
        return Bounded("score", digits)
    is_bound = Prune.model_validate(report.recipe.get("prune") or {}).bounds_metric
    return Bounded(
        score.metric,
        partial(score_text, score),
        before=None if score.metric == _CAPPED else score.before,
        bound=score.before - score.allowed if is_bound else None,
    )


def _taken(report: Report) -> Amount | None:
    """The amount that became the pruned model, if one did."""
    if PRUNED not in (c.name for c in report.candidates):
        return None
    return best_amount(report.amounts, report.recipe["objective"])


def _title(by: Bounded, taken: Amount | None) -> str:
    if taken is None:
        return f"No amount of pruning keeps {by.metric} within the bound"
    if not taken.keeps_bound:
        return f"The bound was not reached: {by.text(taken.worst)} with {percent(taken.macs)} left"
    return f"{percent(taken.macs)} of the multiply-accumulates keep {by.metric} at {by.text(taken.worst)}"


def _amounts_table(amounts: tuple[Amount, ...], by: Bounded, taken: Amount | None) -> Table:
    with_int8, timed = any(a.int8_score is not None for a in amounts), any(a.speedup for a in amounts)
    rows = [
        Row(
            (
                Cell(percent(a.macs, 1), "strong"),
                Cell(f"{a.parameters:,}"),
                Cell(size_text(a.bytes)),
                *([Cell(times(a.speedup) if a.speedup else "")] if timed else []),
                Cell(by.text(a.score)),
                *([Cell("" if a.int8_score is None else by.text(a.int8_score))] if with_int8 else []),
                Cell("keeps the bound", "good") if a.keeps_bound else Cell("breaks the bound", "bad"),
                Cell("taken" if a is taken else "", "strong"),
            )
        )
        for a in sorted(amounts, key=lambda a: a.macs)
    ]
    maybe = {"speed-up": timed, by.metric: True, "in int8": with_int8}
    columns = ("MACs left", "parameters", "weights", *(name for name, has in maybe.items() if has), "", "")
    return table(columns, rows, left=(0, len(columns) - 2, len(columns) - 1))


def learning_section(learned: History | None) -> tuple[Section, ...]:
    """Loss and score over the epochs of a training."""
    if learned is None or len(learned.epochs) < 2:
        return ()
    start, best = learned.start, learned.best
    title = f"Held-back score {digits(start.score)} → {digits(best.score)}"
    if best is start:
        title = "No epoch was better than the model before"
    made = learning_charts.along(learned)[-1][0]
    ended = f"{count_text(made, 'epoch')} in {digits(learned.seconds)} s; ended: {learned.ended}."
    return section(
        "learning", "How it learned", Drawing(learning_charts.history(learned, title)), lines([ended])
    )
