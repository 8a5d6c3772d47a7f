"""The sections of the page that tell what was done to a model, why, and what it cost in accuracy."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from edgewise.optimizer.layers import LayerNoise
from edgewise.optimizer.page import charts
from edgewise.optimizer.page.blocks import (
    Block,
    Cell,
    Code,
    Drawing,
    Fold,
    Headline,
    Row,
    Section,
    Table,
    facts,
    lines,
    section,
    table,
)
from edgewise.optimizer.page.latency import TONES, speed_words
from edgewise.optimizer.page.text import (
    NOTHING,
    TIMES,
    count_text,
    digits,
    interval,
    milliseconds,
    percent,
    plain_digits,
    times,
)
from edgewise.optimizer.pipeline import StepReport
from edgewise.optimizer.report import Candidate, Report, Score, plain, size_text
from edgewise.optimizer.sensitivity import NodeSensitivity

INPUT = "input"
_SHARES = {"top1": "Right answers", "agreement": "Same answers"}
_NAMES = {**_SHARES, "psnr": "Likeness of the images"}
_STATUS_TONES = {"applied": "good", "rolled back": "warn"}
_REASONS_SHOWN = 3
_LAYERS_SHOWN = 10


def size_headline(report: Report) -> Headline:
    """What is left of the file."""
    before, after = report.input.bytes, report.output.bytes
    share = after / before
    value = percent(share, 1 if share < 0.1 else 0)
    tone = "good" if share < 0.995 else "bad" if share > 1.005 else ""
    return Headline("Size", value, f"{size_text(before)} → {size_text(after)}", tone)


def speed_headline(report: Report) -> Headline | None:
    """How many times as fast what was written is; None if it was not measured."""
    if report.latency is None:
        return None
    medians = {m.name: milliseconds(m.median_ms) for m in report.latency.models if not m.failed}
    ratio = next((r for r in report.latency.ratios if r.name == report.chosen), None)
    if ratio is None:
        median = medians.get(report.chosen)
        return None if median is None else Headline("Speed", "unchanged", f"{median} median latency")
    interval = f"95 % interval {digits(ratio.low)} to {digits(ratio.high)}"
    return Headline(
        "Speed",
        speed_words(ratio.speedup, ratio.verdict),
        f"{medians[INPUT]} → {medians[ratio.name]}; {interval}",
        TONES[ratio.verdict],
    )


def score_headline(report: Report) -> Headline | None:
    """The metric before and after; without one, how far the outputs are from the original's."""
    score = report.score
    if score is None:
        return _difference_headline(report)
    detail = f"on {count_text(score.samples, 'sample')}; {_bound_text(score)}"
    tone = "bad" if score.after < score.before - score.allowed - 1e-9 else "good"
    return Headline(_NAMES.get(score.metric, score.metric), _change_text(score), detail, tone)


def _change_text(score: Score) -> str:
    if score.metric == "agreement":
        return percent(score.after, 1)  # the input agrees with itself
    if score.metric == "psnr":
        return score_text(score, score.after)
    if score.metric in _SHARES:
        return f"{100 * score.before:.1f} → {percent(score.after, 1)}"
    return f"{score.before:.4f} → {score.after:.4f}"


def score_text(score: Score, value: float) -> str:
    """A value of the metric of `score`, in the metric's unit."""
    if score.metric == "psnr":
        return f"{value:.1f} dB"
    return percent(value, 1) if score.metric in _SHARES else f"{value:.4f}"


def _bound_text(score: Score) -> str:
    if math.isinf(score.allowed):
        return "not bounded"
    if score.metric == "psnr":  # what is lost of the cap says nothing
        return f"at least {plain_digits(round(score.before - score.allowed, 1))} dB wanted"
    return f"{_allowed_text(score)} may be lost"


def _allowed_text(score: Score) -> str:
    if score.metric not in _SHARES:
        return digits(score.allowed)
    points = plain_digits(round(100 * score.allowed, 2))
    return f"{points} point{'' if points == '1' else 's'}"


def _difference_headline(report: Report) -> Headline | None:
    if not report.differences:
        return None
    worst = max(report.differences, key=lambda d: d.relative)
    return Headline("Largest difference", f"{worst.relative:.0e}", f"of output {worst.output}, relative", "")


def summary(report: Report) -> str:
    """The outcome in one sentence."""
    if report.chosen == INPUT:
        how = "with the changes that were asked for, and no others" if report.changes else "as it came"
        return f"Nothing that was tried beat the input, so it was written {how}."
    share = report.output.bytes / report.input.bytes
    size = f"{percent(share, 1 if share < 0.1 else 0)} of the size"
    speed = speed_headline(report)
    fast = "" if speed is None else f", {speed.value}"
    return f"The {report.chosen} model was written: {size}{fast}{_accuracy_phrase(report.score)}."


def _accuracy_phrase(score: Score | None) -> str:
    if score is None:
        return ""
    after, before = score_text(score, score.after), score_text(score, score.before)
    if score.metric == "agreement":
        return f", with the same answer to {after} of the samples"
    if score.metric == "psnr":
        return f", with images {after} PSNR from the input's"
    name = _SHARES[score.metric].lower() if score.metric in _SHARES else score.metric
    return f", with {after} {name} instead of {before}"


def subject(report: Report) -> str:
    """From which file to which."""
    return f"{Path(report.input.path).name} → {Path(report.output.path).name}"


def overview_section(report: Report) -> tuple[Section, ...]:
    """The two files, side by side."""
    before, after = report.input, report.output
    rows = [
        ("file", before.path, after.path),
        ("size", size_text(before.bytes), size_text(after.bytes)),
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}"),
        ("nodes", f"{before.nodes:,}", f"{after.nodes:,}"),
        ("opset", str(before.opset), str(after.opset)),
    ]
    marked = [
        (Cell(name, "quiet"), Cell(first, "text"), Cell(second, "text")) for name, first, second in rows
    ]
    return section("files", "Before and after", table(("", "input", "output"), marked, left=(0, 1, 2)))


# Candidates


def candidates_section(report: Report, tints: Mapping[str, str]) -> tuple[Section, ...]:
    """What could have been written, and why it was or was not."""
    if len(report.candidates) < 2:
        return ()
    latency = report.latency
    measured = set() if latency is None else {m.name for m in latency.models if not m.failed}
    drawn: Block | None = None
    if latency is not None and len([c for c in report.candidates if c.name in measured]) > 1:
        drawn = Drawing(charts.pareto(report.candidates, latency, _pareto_title(report), tints))
    rows = [_candidate_row(c, tints) for c in report.candidates]
    columns = ("candidate", "size", "speed-up", "95 % interval", "", "why")
    score = report.score
    metric = (
        []
        if score is None
        else [
            f"{score.metric} of what was written: {score_text(score, score.after)}, of the input "
            f"{score_text(score, score.before)}; {_bound_text(score)}. "
            "A candidate that breaks this bound never gets here: see the steps."
        ]
    )
    return section("candidates", "Candidates", drawn, table(columns, rows, left=(0, 4, 5)), lines(metric))


def _pareto_title(report: Report) -> str:
    chosen = next(c for c in report.candidates if c.chosen)
    if chosen.name == INPUT:
        return "No candidate beat the input"
    speed = speed_headline(report)
    share = percent(chosen.bytes / report.input.bytes)
    return f"{chosen.name} was written: {share} of the size{'' if speed is None else f', {speed.value}'}"


def _candidate_row(c: Candidate, tints: Mapping[str, str]) -> Row:
    return Row(
        (
            Cell(c.name, "strong", swatch=tints.get(c.name, "")),
            Cell(size_text(c.bytes)),
            Cell("" if c.speedup is None else times(c.speedup)),
            Cell("" if c.low is None or c.high is None else interval(c.low, c.high)),
            Cell("written" if c.chosen else "", "good"),
            Cell(c.why, "text"),
        )
    )


# Steps


def steps_section(steps: Sequence[StepReport]) -> tuple[Section, ...]:
    """Every step: what it edited, what it refused, and why it was taken back."""
    busy = [s for s in steps if s.status != "no change"]
    idle = [s for s in steps if s.status == "no change"]
    return section(
        "steps",
        "Every step",
        _steps_table(busy) if busy else None,
        Fold(f"{count_text(len(idle), 'step')} found nothing to do", (_steps_table(idle),)) if idle else None,
        *_refusals(steps),
    )


def _steps_table(steps: Sequence[StepReport]) -> Table:
    columns = ("step", "", "edits", "error", "nodes", "weights", "time")
    return table(columns, [_step_row(s) for s in steps], left=(0, 1))


def _step_row(step: StepReport) -> Row:
    refused = sorted(step.refused.items(), key=lambda item: -item[1])
    remarks = [
        *([step.remark] if step.remark else []),
        *(f"Refused {n}{TIMES}: {reason}" for reason, n in refused[:_REASONS_SHOWN]),
        *(
            [f"and {len(refused) - _REASONS_SHOWN} more reasons, below"]
            if len(refused) > _REASONS_SHOWN
            else []
        ),
    ]
    applied = step.status == "applied"
    return Row(
        (
            Cell(step.step, "strong"),
            Cell(
                step.status if step.contract == "exact" else f"{step.status}, {step.contract}",
                _STATUS_TONES.get(step.status, "quiet"),
            ),
            Cell(f"{step.edits:,}" if step.edits else ""),
            Cell("" if step.error is None else _error_text(step.error)),
            Cell(f"{step.nodes:,}" if applied and step.nodes else ""),
            Cell(size_text(step.bytes) if applied and step.bytes else ""),
            Cell(f"{digits(step.seconds, 2)} s" if step.seconds else ""),
        ),
        tuple(remarks),
    )


def _error_text(error: float) -> str:
    return "0" if error == 0 else NOTHING if not math.isfinite(error) else f"{error:.0e}"


def _refusals(steps: Sequence[StepReport]) -> tuple[Block, ...]:
    """All reasons of the steps that have more of them than their row shows."""
    long = [s for s in steps if len(s.refused) > _REASONS_SHOWN]
    return tuple(
        Fold(
            f"Everything {s.step} refused",
            (
                table(
                    ("reason", "times"),
                    [(reason, f"{n:,}") for reason, n in sorted(s.refused.items(), key=lambda i: -i[1])],
                ),
            ),
        )
        for s in long
    )


# Accuracy


def accuracy_section(report: Report) -> tuple[Section, ...]:
    """How far the outputs and the layers are from those of the input."""
    rows = [
        (
            Cell(d.output, "strong"),
            _error_text(d.relative),
            _error_text(d.absolute),
            _decibels(d.snr_db),
            f"{d.cosine:.6f}",
            "" if d.agreement is None else percent(d.agreement, 2),
        )
        for d in report.differences
    ]
    columns = ("output", "relative", "absolute", "signal to noise", "cosine", "same arg max")
    outputs = (
        table(columns, rows, caption="Outputs of what was written against those of the input.")
        if rows
        else None
    )
    return section("accuracy", "How close it stays", outputs)


def layers_section(noise: Sequence[LayerNoise]) -> tuple[Section, ...]:
    """Which layers lose most by int8."""
    finite = [n for n in noise if math.isfinite(n.snr_db)]
    if not finite:
        return ()
    worst = sorted(finite, key=lambda n: n.snr_db)
    title = f"{worst[0].node or worst[0].value} is the noisiest: {_decibels(worst[0].snr_db)}"
    rows = [
        (
            Cell(
                f"{i}. {n.node or n.value}" if i <= 5 else n.node or n.value,
                "strong",
                swatch="c1" if i <= 5 else "c0",
            ),
            n.op_type,
            _decibels(n.snr_db),
            Cell(n.value, "quiet"),
        )
        for i, n in enumerate(worst, 1)
    ]
    columns = ("layer", "operator", "signal to noise", "value")
    shown = table(columns, rows[:_LAYERS_SHOWN], left=(0, 1, 3))
    rest = rows[_LAYERS_SHOWN:]
    more = (
        Fold(f"{count_text(len(rest), 'more layer')}", (table(columns, rest, left=(0, 1, 3)),))
        if rest
        else None
    )
    return section("layers", "Noise, layer by layer", Drawing(charts.layers(noise, title)), shown, more)


def sensitivity_section(found: Sequence[NodeSensitivity]) -> tuple[Section, ...]:
    """Which nodes add most noise in int8, and whether they are in int8."""
    noisy = [n for n in sorted(found, key=lambda n: n.snr_db) if math.isfinite(n.snr_db)]
    if not noisy:
        return ()
    total = sum(n.noise_share for n in noisy)
    rows = [
        (
            Cell(n.output, "strong", swatch=charts.FORM_ROLES[n.form]),
            n.op_type,
            Cell(_decibels(-n.snr_db)),
            Cell(percent(n.noise_share / total, 1)),
            Cell(n.form, "quiet"),
        )
        for n in noisy
    ]
    columns = ("node", "operator", "noise of the signal", "of all nodes' noise", "runs as")
    title = f"{noisy[0].output} adds {percent(noisy[0].noise_share / total)} of what all nodes would"
    return section(
        "sensitivity",
        "What int8 costs, node by node",
        Drawing(charts.sensitivity(found, title)),
        Fold(count_text(len(rows), "node"), (table(columns, rows, left=(0, 1, 4)),)),
    )


def floats_section(floats: Mapping[str, str]) -> tuple[Section, ...]:
    """Which nodes of an int8 model stay in float, and why."""
    if not floats:
        return ()
    rows = [(Cell(name, "strong"), Cell(why, "quiet")) for name, why in floats.items()]
    shown = Fold(count_text(len(rows), "node"), (table(("node", "why"), rows, left=(0, 1)),))
    return section("floats", "Left in float", shown)


def _decibels(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else "no noise" if value > 0 else NOTHING


# How to do it again


def recipe_section(report: Report) -> tuple[Section, ...]:
    """The recipe and the command."""
    data = "" if report.score is None else " --data DATA"
    command = (
        f"edgewise optimize {shlex.quote(report.input.path)} -o {shlex.quote(report.output.path)}{data} "
        "--recipe recipe.yaml"
    )
    trained = report.history is not None and not report.amounts  # by labels, of which a recipe knows nothing
    return section(
        "recipe",
        "How it was made" if trained else "Do it again",
        None if trained else Code("the command", command),
        Code("recipe.yaml", recipe_text(report.recipe)),
        facts(
            [
                ("edgewise", report.version),
                ("input", report.input.sha256),
                ("output", report.output.sha256),
                ("calibration table", report.table),
            ]
        ),
    )


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """The recipe as YAML that `--recipe` reads."""
    values = json.loads(json.dumps(plain(recipe)))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
