"""The page as text: what it says of each kind of answer, and that it stands alone."""

from __future__ import annotations

import dataclasses
import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from answers import bare, benchmark, latency, profiled, pruned, report, sweep

from edgewise.optimizer.benchmarking import AgainstBaseline, Benchmark
from edgewise.optimizer.page.latency import speed_words
from edgewise.optimizer.page.render import Answer, page_of, render, write_page
from edgewise.optimizer.profiling import ProfileReport
from edgewise.optimizer.recipe import recipe_from
from edgewise.optimizer.report import Report
from edgewise.runtime.baseline import Change
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.errors import InputError
from edgewise.runtime.session import Grant

EVIL = "<script>alert(1)</script>&$x"
VOID = {"meta", "link", "br", "hr", "img", "input", "col"}

ANSWERS: dict[str, Answer] = {
    "report": report(),
    "pruned": pruned(),
    "bare": bare(),
    "benchmark": benchmark("float", "int8"),
    "one model": benchmark("float"),
    "sweep": sweep(),
    "profile": profiled("float"),
    "profiles": profiled("float", "int8"),
}


class Reader(HTMLParser):
    """Checks that every element is closed by its own end, and keeps attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts = 0
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            self.ids += [value or ""] if name == "id" else []
            self.links += [value or ""] if name in ("href", "src", "srcset", "data", "action") else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def words(answer: Answer) -> str:
    return text_of(render(answer))


def text_of(page: str) -> str:
    return " ".join(" ".join(read(page).text).split())


def sections(answer: Answer) -> list[str]:
    return [section.name for section in page_of(answer).sections]


@pytest.fixture(scope="module", params=ANSWERS)
def answer(request: pytest.FixtureRequest) -> Answer:
    return ANSWERS[request.param]


@pytest.fixture(scope="module")
def page(answer: Answer) -> str:
    return render(answer)


@pytest.fixture(scope="module")
def of_report() -> str:
    """The words of the page of a run that knows everything."""
    return words(report())


class TestEveryPage:
    def test_is_sound_and_its_ids_are_unique(self, page: str) -> None:
        reader = read(page)
        assert len(reader.ids) == len(set(reader.ids))
        inside = {link[1:] for link in reader.links if link.startswith("#")}
        assert inside <= set(reader.ids)

    def test_asks_nobody_for_anything(self, page: str) -> None:
        reader = read(page)
        assert all(link.startswith(("#", "data:")) for link in reader.links)
        assert reader.scripts == 1
        assert not re.search(r"https?://|@import|url\((?!#)", page.replace("http://www.w3.org", ""))
        assert "default-src 'none'" in html.unescape(page)

    def test_is_the_same_again(self, answer: Answer, page: str) -> None:
        assert render(answer) == page

    def test_is_small(self, page: str) -> None:
        assert len(page.encode()) < 500_000

    def test_has_no_empty_section(self, answer: Answer) -> None:
        for section in page_of(answer).sections:
            assert section.blocks

    def test_says_no_nan(self, page: str) -> None:
        assert not re.search(r"\b(nan|inf|None)\b", text_of(page))


class TestReport:
    def test_all_sections(self) -> None:
        assert sections(report()) == [
            "files",
            "latency",
            "candidates",
            "time",
            "accuracy",
            "layers",
            "steps",
            "providers",
            "machine",
            "recipe",
        ]

    def test_what_is_not_known_is_absent(self) -> None:
        assert sections(bare()) == ["files", "recipe"]

    def test_headlines(self) -> None:
        found = [(h.label, h.value, h.tone) for h in page_of(report()).headlines]
        assert found == [
            ("Size", "29 %", "good"),
            ("Speed", "2.50\u00d7 faster", "good"),
            ("Right answers", "99.6 → 99.4 %", "good"),
        ]
        assert [h.label for h in page_of(bare()).headlines] == ["Size"]

    def test_a_loss_beyond_the_bound_is_not_praised(self) -> None:
        full = report()
        assert full.score is not None
        worse = dataclasses.replace(full, score=dataclasses.replace(full.score, after=0.9))
        assert page_of(worse).headlines[2].tone == "bad"

    def test_nothing_beat_the_input(self) -> None:
        full = report()
        kept = tuple(dataclasses.replace(c, chosen=c.name == "input") for c in full.candidates)
        page = page_of(dataclasses.replace(full, candidates=kept, output=full.input))
        assert "Nothing that was tried beat the input" in page.summary
        assert [h.value for h in page.headlines[:2]] == ["100 %", "unchanged"]

    def test_steps_say_what_they_edited_refused_and_took_back(self, of_report: str) -> None:
        text = of_report
        assert "Refused 2\u00d7: Conv output has another user" in text
        assert "rolled back: outputs differ by 1.0e-01" in text
        assert "1 step found nothing to do" in text
        assert "applied, lossy" in text
        for i in range(1, 8):  # three in the row, all of them in the fold
            assert f"reason {i}" in text
        assert "Everything insert-qdq by minmax ranges refused" in text

    def test_titles_state_findings(self, of_report: str) -> None:
        text = of_report
        assert "int8 is 2.50\u00d7 faster than input" in text
        assert "int8 was written: 29 % of the size, 2.50\u00d7 faster" in text
        assert "layer_4 is the noisiest: 24.0 dB" in text

    def test_the_recipe_can_be_read_back(self) -> None:
        code = re.search(r"<code>(version: .*?)</code>", render(bare()), re.S)
        assert code is not None
        data = yaml.safe_load(html.unescape(code[1]))
        assert recipe_from(data, "the page").model_dump(mode="json") == report().recipe

    def test_the_command(self) -> None:
        full = report()
        spaced = dataclasses.replace(
            bare(), score=full.score, output=dataclasses.replace(full.output, path="my net.onnx")
        )
        text = words(spaced)
        assert "edgewise optimize net.onnx -o 'my net.onnx' --data DATA --recipe recipe.yaml" in text
        assert "--data" not in words(bare())

    def test_notes_are_warnings(self) -> None:
        assert page_of(report()).warnings == ("something to know",)

    def test_what_was_asked_for(self) -> None:
        changed = dataclasses.replace(report("input"), changes=("input x: cut",))
        assert page_of(changed).warnings == ("as asked: input x: cut", "something to know")
        assert "with the changes that were asked for" in page_of(changed).summary
        assert "as it came" in page_of(report("input")).summary

    def test_what_runs_in_float_after_all(self, of_report: str) -> None:
        assert "In float after all: 1 node of int8" in of_report


class TestBenchmark:
    def test_two_models(self) -> None:
        answer = benchmark("float", "int8")
        assert sections(answer) == ["latency", "providers", "machine", "command"]
        assert page_of(answer).headlines[0].value == "2.00\u00d7 faster"
        assert "int8 is 2.00\u00d7 faster than float" in words(answer)

    def test_one_model(self) -> None:
        answer = benchmark("float")
        assert page_of(answer).headlines[0].label == "Median latency"
        assert "Half of all runs of float take 2.00 ms or less" in words(answer)

    def test_a_noisy_leader_is_not_the_fastest(self) -> None:
        """The one to speak of is the one that is sure to be fast, not the one that may be."""
        found = latency(("float", 2.0), ("sure", 1.0), ("maybe", 0.9))
        sure, maybe = found.ratios
        ratios = (sure, dataclasses.replace(maybe, low=0.5, verdict="no difference"))
        page = page_of(Benchmark((dataclasses.replace(found, ratios=ratios),)))
        assert page.headlines[0].label == "Speed of sure"

    def test_a_failed_model_is_named_with_its_cause(self) -> None:
        answer = Benchmark((latency(("float", 2.0), ("int8", 1.0), failed="bad"),))
        assert "it <crashed> & burned" in words(answer)
        assert len(page_of(answer).warnings) == 1

    def test_all_failed(self) -> None:
        alone = latency(("float", 1.0), failed="bad")
        nothing = dataclasses.replace(alone, models=alone.models[1:], ratios=(), noise_floor=None)
        assert "Nothing could be measured" in words(Benchmark((nothing,)))

    def test_sweep(self) -> None:
        answer = sweep()
        assert sections(answer) == ["conditions", "providers", "machine", "command"]
        text = words(answer)
        assert "batch 16, 2 threads" in text
        assert "Most throughput: int8 on cpu" in text
        assert "edgewise bench float.onnx int8.onnx --threads 1,2 --batch 1,4,16" in text
        assert "All numbers on cpu, 2 threads, batch 4" in text

    def test_against_a_baseline(self) -> None:
        change = Change("int8", 0.8, 0.78, 0.82, "slower", "float")
        compared = AgainstBaseline(Conditions(threads=1), (change,), ("another processor",))
        answer = dataclasses.replace(benchmark("float", "int8"), comparisons=(compared,))
        text = words(answer)
        assert sections(answer)[0] == "baseline"
        assert "1.25\u00d7 slower" in text
        assert "The machines differ: another processor" in text

    def test_a_grant_in_part_is_said(self) -> None:
        found = latency(("float", 2.0))
        part = Grant("cuda", {"CUDAExecutionProvider": 9, "CPUExecutionProvider": 3}, {"Loop": 3})
        model = dataclasses.replace(found.models[0], grant=part)
        text = words(Benchmark((dataclasses.replace(found, models=(model,)),)))
        assert "in part" in text
        assert "Loop 3" in text


class TestProfile:
    def test_one(self) -> None:
        answer = profiled("float")
        assert sections(answer) == ["time", "providers", "machine", "command"]
        text = words(answer)
        assert "of the time of float goes to convolutions" in text
        assert "float32 matrix product 80.0 GFLOP/s" in text
        assert "of the peak" in text

    def test_two(self) -> None:
        answer = profiled("float", "int8")
        assert answer.difference is not None
        text = words(answer)
        assert answer.difference.sentences[0].replace("->", "→") in text
        assert "edgewise profile float.onnx int8.onnx --threads 1" in text
        assert "inserted by onnxruntime" in text

    def test_without_peaks(self) -> None:
        text = words(dataclasses.replace(profiled("float"), peaks=None))
        assert "of the peak" not in text
        assert "GFLOP/s" in text  # what was reached is known all the same


def evil_profile() -> ProfileReport:
    answer = profiled(EVIL)
    nodes = tuple(
        dataclasses.replace(n, name=f"{EVIL}{n.name}", sources=(EVIL,)) for n in answer.profiles[0].nodes
    )
    return dataclasses.replace(answer, profiles=(dataclasses.replace(answer.profiles[0], nodes=nodes),))


def evil_report() -> Report:
    full = report(EVIL)
    return dataclasses.replace(
        full,
        input=dataclasses.replace(full.input, path=EVIL),
        steps=tuple(dataclasses.replace(s, reason=EVIL, refused={EVIL: 1}) for s in full.steps),
        layers=tuple(dataclasses.replace(n, node=EVIL, value=EVIL) for n in full.layers),
        differences=tuple(dataclasses.replace(d, output=EVIL) for d in full.differences),
        recipe={"metric": EVIL},
        notes=(EVIL,),
    )


@pytest.mark.parametrize("answer", [evil_report(), evil_profile(), benchmark("float", EVIL)])
def test_foreign_text_is_escaped_everywhere(answer: Answer) -> None:
    page = render(answer)
    reader = read(page)
    assert reader.scripts == 1  # the page's own
    assert "<script>alert" not in page
    assert EVIL in "".join(reader.text)


@pytest.mark.parametrize(
    ("speedup", "verdict", "text"),
    [
        (2.4, "faster", "2.40\u00d7 faster"),
        (1.034, "faster", "3.4 % faster"),
        (0.5, "slower", "2.00\u00d7 slower"),
        (0.95, "slower", "5.3 % slower"),
        (1.3, "no difference", "as fast"),
    ],
)
def test_speed_in_words(speedup: float, verdict: str, text: str) -> None:
    assert speed_words(speedup, verdict) == text


def test_written_and_written_again(tmp_path: Path) -> None:
    for _ in range(2):
        path = write_page(benchmark("float"), tmp_path / "deep" / "report")
    assert path.name == "report.html"
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("")
    with pytest.raises(InputError, match="report"):
        write_page(benchmark("float"), tmp_path / "report")


class TestColours:
    """The page's colours by the Web Content Accessibility Guidelines, on light and on dark."""

    @pytest.fixture(params=[0, 1], ids=["light", "dark"])
    def colours(self, request: pytest.FixtureRequest) -> dict[str, str]:
        blocks = re.findall(r":root \{(.*?)\}", render(bare()), re.S)
        return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", blocks[request.param]))

    @pytest.mark.parametrize("role", ["ink", "muted", "good", "bad", "warn"])
    def test_text_is_read_easily(self, colours: dict[str, str], role: str) -> None:
        assert contrast(colours[role], colours["paper"]) >= 4.5

    @pytest.mark.parametrize("role", [f"c{i}" for i in range(8)])
    def test_shapes_are_seen(self, colours: dict[str, str], role: str) -> None:
        assert contrast(colours[role], colours["paper"]) >= 3


def contrast(one: str, other: str) -> float:
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def luminance(text: str) -> float:
    parts = (int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
