"""One self-contained HTML page of what a run found out: it opens offline and asks nobody for anything."""

from __future__ import annotations

import shlex
from functools import cache, singledispatch
from importlib import resources
from pathlib import Path

import jinja2

from edgewise.optimizer.benchmarking import Benchmark
from edgewise.optimizer.files import make_folder, write_text
from edgewise.optimizer.page import charts
from edgewise.optimizer.page.blocks import Code, Headline, Page, Section, section
from edgewise.optimizer.page.images import images_section
from edgewise.optimizer.page.job import (
    accuracy_section,
    candidates_section,
    floats_section,
    layers_section,
    overview_section,
    recipe_section,
    score_headline,
    sensitivity_section,
    size_headline,
    speed_headline,
    steps_section,
    subject,
    summary,
)
from edgewise.optimizer.page.latency import (
    against_text,
    baseline_section,
    failure_lines,
    grant_table,
    latency_blocks,
    leading,
    machine_section,
    measured,
    ratio_headline,
    sweep_section,
    where_section,
)
from edgewise.optimizer.page.learning import amounts_section, learning_section
from edgewise.optimizer.page.profile import assigned_table, in_float, profile_summary, time_section
from edgewise.optimizer.page.text import count_text, digits, milliseconds, percent
from edgewise.optimizer.profiling import ProfileReport
from edgewise.optimizer.report import Report, size_text
from edgewise.optimizer.version import VERSION
from edgewise.runtime.latency import LatencyReport

Answer = Report | Benchmark | ProfileReport

PAGE = "report.html"
_TEMPLATE, _STYLE = "page.html.j2", "page.css.j2"


def write_page(answer: Answer, folder: Path) -> Path:
    """Write `report.html` into `folder`, over that of an earlier run. `InputError` where it cannot be."""
    make_folder(folder)
    return write_text(folder / PAGE, render(answer), force=True)


def render(answer: Answer) -> str:
    """The page as HTML: the same text for the same answer."""
    return _template().render(page=page_of(answer))


@cache
def _template() -> jinja2.Template:
    """Everything that is filled in is escaped, but the drawings, whose texts are escaped already."""
    here = resources.files("edgewise.optimizer.page")
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({name: (here / name).read_text("utf-8") for name in (_TEMPLATE, _STYLE)}),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(_TEMPLATE)


@singledispatch
def page_of(answer: Answer) -> Page:
    """What the page of an answer says."""
    raise TypeError(f"no page of {type(answer).__name__}")


@page_of.register
def _(report: Report) -> Page:
    latency = report.latency
    names = [c.name for c in report.candidates]
    if latency is not None:
        names = list(dict.fromkeys((*(m.name for m in latency.models), *names)))
    tints = charts.roles(names, report.chosen)
    headlines = (size_headline(report), speed_headline(report), score_headline(report))
    return Page(
        sort="Optimized",
        subject=subject(report),
        summary=summary(report),
        headlines=tuple(h for h in headlines if h is not None),
        warnings=(
            *(f"as asked: {change}" for change in report.changes),
            *report.notes,
            *(() if latency is None else failure_lines(latency)),
        ),
        sections=(
            *overview_section(report),
            *images_section(report.images),
            *(
                ()
                if latency is None
                else section("latency", "How fast it is", *latency_blocks(latency, tints))
            ),
            *candidates_section(report, tints),
            *amounts_section(report),
            *learning_section(report.history),
            *(() if report.profiles is None else time_section(report.profiles)),
            *accuracy_section(report),
            *layers_section(report.layers),
            *sensitivity_section(report.sensitivity),
            *floats_section(report.floats),
            *steps_section(report.steps),
            *where_section(
                None if latency is None else grant_table([latency]),
                *(() if report.profiles is None else in_float(report.profiles)),
            ),
            *(() if latency is None else machine_section(latency.machine, latency.inputs)),
            *recipe_section(report),
        ),
        version=report.version,
    )


@page_of.register
def _(benchmark: Benchmark) -> Page:
    reports = benchmark.reports
    first = reports[0]
    tints = charts.roles([m.name for m in first.models])
    single = (
        section("latency", "How fast they are", *latency_blocks(first, tints)) if len(reports) == 1 else ()
    )
    return Page(
        sort="Benchmark",
        subject=" · ".join(m.name for m in first.models),
        summary=_benchmark_summary(reports),
        headlines=_benchmark_headlines(reports),
        warnings=benchmark.failures,
        sections=(
            *baseline_section(benchmark),
            *single,
            *sweep_section(benchmark, tints),
            *where_section(grant_table(reports)),
            *machine_section(first.machine, first.inputs),
            *_again("bench", [m.path for m in first.models], _bench_options(reports)),
        ),
        version=VERSION,
    )


def _benchmark_summary(reports: tuple[LatencyReport, ...]) -> str:
    first = reports[0]
    where = f"on {first.conditions}" if len(reports) == 1 else f"under {len(reports)} conditions"
    if not any(measured(report) for report in reports):
        return f"Nothing could be measured {where}."
    if len(reports) > 1:
        return f"{count_text(len(first.models), 'model')} measured {where}, each in a process of its own."
    if not first.ratios:
        one = measured(first)[0]
        return f"{one.name} takes {milliseconds(one.median_ms)} {where}."
    sentences = [against_text(ratio) for ratio in first.ratios]
    return f"{where[0].upper()}{where[1:]}: {'; '.join(sentences)}."


def _benchmark_headlines(reports: tuple[LatencyReport, ...]) -> tuple[Headline, ...]:
    """The fastest of several models; of one, how fast it is."""
    first = reports[0]
    if len(reports) > 1:
        return _sweep_headlines(reports)
    ratio = leading(first)
    models = {m.name: m for m in measured(first)}
    if not models:
        return ()
    one = models[ratio.name] if ratio is not None else next(iter(models.values()))
    interval = f"95 % interval {digits(one.low_ms)} to {digits(one.high_ms)}"
    speed = (
        Headline("Median latency", milliseconds(one.median_ms), interval)
        if ratio is None
        else ratio_headline(first, ratio)
    )
    return (
        speed,
        Headline("Throughput", f"{digits(one.per_second)} /s", f"samples of {one.name}"),
        Headline("Slowest of 100", milliseconds(one.p99_ms), f"99th percentile of {one.name}"),
        Headline("Memory", f"{digits(one.peak_mb)} MB", f"at the peak; file {size_text(one.file_bytes)}"),
    )


def _sweep_headlines(reports: tuple[LatencyReport, ...]) -> tuple[Headline, ...]:
    found = [(m, report.conditions) for report in reports for m in measured(report)]
    if not found:
        return ()
    quick, where = min(found, key=lambda item: item[0].median_ms)
    busy, there = max(found, key=lambda item: item[0].per_second)
    ratios = [(ratio, report) for report in reports for ratio in report.ratios]
    best = max(ratios, key=lambda item: item[0].low, default=None)
    return (
        *([ratio_headline(best[1], best[0], f" on {best[1].conditions}")] if best is not None else []),
        Headline("Lowest latency", milliseconds(quick.median_ms), f"{quick.name} on {where}"),
        Headline("Highest throughput", f"{digits(busy.per_second)} /s", f"{busy.name} on {there}"),
    )


def _bench_options(reports: tuple[LatencyReport, ...]) -> list[str]:
    """The options of the command that asks for these conditions, without those that are the default."""
    options: list[str] = []
    for option, name, default in (
        ("--ep", "provider", "cpu"),
        ("--threads", "threads", "None"),
        ("--batch", "batch", "1"),
        ("--concurrency", "concurrency", "1"),
    ):
        values = list(dict.fromkeys(str(getattr(report.conditions, name)) for report in reports))
        if values != [default]:
            options += [option, ",".join(values)]
    return options


def _again(command: str, paths: list[str], options: list[str]) -> tuple[Section, ...]:
    text = shlex.join(["edgewise", command, *paths, *options])
    return section("command", "Do it again", Code("the command", text))


@page_of.register
def _(report: ProfileReport) -> Page:
    return Page(
        sort="Profile",
        subject=" → ".join(report.names),
        summary=profile_summary(report),
        headlines=_profile_headlines(report),
        warnings=(),
        sections=(
            *time_section(report),
            *where_section(assigned_table(report), *in_float(report)),
            *machine_section(report.machine, report.inputs),
            *_again("profile", [p.path for p in report.profiles], _profile_options(report)),
        ),
        version=VERSION,
    )


def _profile_headlines(report: ProfileReport) -> tuple[Headline, ...]:
    *before, after = report.profiles
    name = report.names[-1]
    top, slowest = after.by_kind()[0], after.nodes[0]
    medians = [*(digits(p.run_ms) for p in before), milliseconds(after.run_ms)]
    whole = Headline("A run", " → ".join(medians), "while profiled, which takes time itself")
    if before:
        was = {k.kind: k.ms for k in before[0].by_kind()}
        detail = f"{milliseconds(was.get(top.kind, 0.0))} → {milliseconds(top.ms)}, most of {name}"
    else:
        detail = f"{milliseconds(top.ms)} in {count_text(top.nodes, 'node')}"
    return (
        whole,
        Headline(top.kind.capitalize(), percent(top.share), detail),
        Headline("Slowest node", percent(slowest.share), f"{slowest.name}, {milliseconds(slowest.ms)}"),
    )


def _profile_options(report: ProfileReport) -> list[str]:
    one = report.profiles[0]
    options = [] if one.provider == "cpu" else ["--ep", one.provider]
    return options if one.threads is None else [*options, "--threads", str(one.threads)]
