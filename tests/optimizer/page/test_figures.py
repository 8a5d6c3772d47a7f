"""Drawings inside a page: no ids that clash, no colours of their own, foreign text as text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from answers import model_latency, profiled, report, sweep

from edgewise.optimizer.page import charts
from edgewise.optimizer.page.figures import NARROW, ROLES, WIDE, Canvas, Figure, Scale, colour, figure, fit
from edgewise.optimizer.page.text import digits, fixed, interval, milliseconds, percent, plain_digits

EVIL = "<script>alert(1)</script>&$x_1$\"'"


def dotted(width: int) -> Canvas:
    canvas = Canvas(width, 100)
    axes = canvas.axes(10, 10, width - 20, 60)
    Scale.over(1, 10, 4).apply_x(axes, plain_digits)
    (dot,) = axes.plot([2], [1], "o", color=colour("c1"))
    axes.plot([2, 30], [1, 2], color=colour("c0"))
    axes.text(2, 1, EVIL, color=colour("ink"), fontweight="bold")
    canvas.tip(dot, EVIL)
    return canvas


@pytest.fixture(scope="module")
def drawn() -> Figure:
    return figure("one", "a title", f"what it shows {EVIL}", dotted)


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter("text")]


def test_a_drawing_is_one_element_of_either_width(drawn: Figure) -> None:
    for svg, width in ((drawn.wide, WIDE), (drawn.narrow, NARROW)):
        root = ElementTree.fromstring(svg)
        assert root.tag == "svg"
        assert root.attrib["viewBox"] == f"0 0 {width} 100"
        assert root.attrib["role"] == "img"


def test_foreign_text_stays_text(drawn: Figure) -> None:
    """In labels, in what the pointer shows and in the description; and a dollar starts no formula."""
    root = ElementTree.fromstring(drawn.wide)
    assert EVIL in texts(drawn.wide)
    assert root.attrib["aria-label"] == f"what it shows {EVIL}"
    assert [e.text for e in root.iter("title")] == [EVIL]
    assert "<script" not in drawn.wide


def test_colours_are_those_of_the_page(drawn: Figure) -> None:
    svg = drawn.wide
    assert "var(--c0)" in svg
    assert "var(--c1)" in svg
    assert "#ed9e" not in svg
    for style in re.findall(r'style="([^"]*)"', svg):
        assert not re.search(r"(fill|stroke): #(?!000000|ffffff)", style), style


def test_type_is_that_of_the_page(drawn: Figure) -> None:
    assert "DejaVu" not in drawn.wide
    assert "font-family" not in drawn.wide
    assert "font-weight: 600" in drawn.wide or "font-weight: bold" in drawn.wide or "700" in drawn.wide


def test_ids_are_those_referred_to_and_carry_the_name(drawn: Figure) -> None:
    assert "clip-path" in drawn.wide
    for svg, prefix in ((drawn.wide, "one-w"), (drawn.narrow, "one-n")):
        ids = re.findall(r'\bid="([^"]+)"', svg)
        references = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
        assert len(ids) == len(set(ids))
        assert set(ids) == references
        assert all(name.startswith(prefix) for name in ids)


def test_the_same_again(drawn: Figure) -> None:
    assert figure("one", "a title", f"what it shows {EVIL}", dotted) == drawn


def test_global_settings_are_left_alone() -> None:
    before = dict(mpl.rcParams)
    figure("one", "a title", "", dotted)
    assert dict(mpl.rcParams) == before
    assert colour("ink") != colour("muted")
    assert len({colour(role) for role in ROLES}) == len(ROLES)


class TestScale:
    def test_log_where_ends_are_far_apart(self) -> None:
        assert Scale.over(1, 100, 8).log
        assert not Scale.over(1, 3, 8).log
        assert not Scale.over(0, 100, 8).log

    @pytest.mark.parametrize("most", [4, 8])
    @pytest.mark.parametrize(
        ("low", "high"), [(0.97, 1.03), (1, 1.9), (0.3, 2.4), (0.001, 5000), (7, 7), (0.0, 3.0)]
    )
    def test_some_ticks_and_not_too_many(self, low: float, high: float, most: int) -> None:
        scale = Scale.over(low, high, most)
        assert 1 <= len(scale.ticks) <= most + 1
        assert all(scale.low <= t <= scale.high for t in scale.ticks)
        assert len({plain_digits(t) for t in scale.ticks}) == len(scale.ticks)


class TestCharts:
    def test_density_stands_where_the_runs_are(self) -> None:
        quantiles = np.array(model_latency("m", 2.0).quantiles_ms)
        at, density = charts._density(quantiles)
        assert density.max() == 1
        assert at[density.argmax()] == pytest.approx(2.0, rel=0.1)
        assert at[-1] == pytest.approx(quantiles[99])

    def test_density_of_runs_that_all_took_the_same(self) -> None:
        at, density = charts._density(np.full(101, 2.0))
        assert np.isfinite(density).all()
        assert at.max() == pytest.approx(2.0, rel=0.01)

    def test_colours_tell_the_first_and_the_chosen(self) -> None:
        tints = charts.roles(["input", "exact", "int8"], "int8")
        assert tints["input"] == charts.BASELINE
        assert tints["int8"] == "c0"
        assert len(set(tints.values())) == 3
        assert charts.roles(["one"]) == {"one": "c0"}
        assert charts.roles(["a", "b"], "a")["b"] == "c0"

    def test_every_node_is_named_or_counted(self) -> None:
        profiles = profiled("float", "int8")
        drawn = charts.flames(profiles.profiles, profiles.names, "title")
        tips = [e.text or "" for e in ElementTree.fromstring(drawn.wide).iter("title")]
        for one in profiles.profiles:
            for node in one.nodes:
                assert any(tip.startswith(f"{node.name}, {node.op_type}") for tip in tips)
        assert sum(tip.startswith("convolution: ") for tip in tips) == 2

    def test_short_nodes_are_drawn_as_one(self) -> None:
        nodes = profiled("one").profiles[0].nodes
        segments = charts._node_segments(nodes, 0.0, ms_a_pixel=0.2)
        assert len(segments) == sum(n.ms >= 0.4 for n in nodes) + 1
        assert segments[-1].tip.startswith(f"{sum(n.ms < 0.4 for n in nodes)} more nodes")
        assert sum(s.ms for s in segments) == pytest.approx(sum(n.ms for n in nodes))

    def test_all_kinds_have_a_colour_of_the_page(self) -> None:
        assert set(charts.KIND_ROLES.values()) <= set(ROLES)

    def test_the_front_leaves_out_what_is_beaten(self) -> None:
        """exact is slower and larger than int8: the line goes through int8 alone."""
        full = report()
        assert full.latency is not None
        tints = charts.roles([c.name for c in full.candidates], "int8")
        drawn = charts.pareto(full.candidates, full.latency, "t", tints)
        assert {"input", "exact", "int8"} <= set(texts(drawn.wide))

    def test_a_value_at_every_place_of_a_sweep(self) -> None:
        models = tuple(r.models[0] for r in sweep().reports[:3])
        series = [charts.Series("float", "c7", 0, (models[0], None, models[2]))]
        drawn = charts.sweep("batch size", ["1", "4", "16"], series, "t")
        tips = [e.text or "" for e in ElementTree.fromstring(drawn.wide).iter("title")]
        assert len(tips) == 4  # two measured places in two panels
        assert {"1", "4", "16", "batch size"} <= set(texts(drawn.wide))

    def test_layers_without_any_noise_are_left_out(self) -> None:
        noise = [*report().layers, *[type(report().layers[0])("v", "Relu", "clean", float("inf"), 99)]]
        drawn = charts.layers(noise, "t")
        assert "clean" not in drawn.wide
        assert "layer_4" in drawn.wide


def test_cut_in_the_middle() -> None:
    assert fit("short", 100) == "short"
    assert fit("a" * 30 + "tail", 100).endswith("tail")
    assert "…" in fit("a" * 30, 100)
    assert fit("a" * 30, 20) == ""


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.02141, "0.0214"),
        (2.0, "2.00"),
        (21.44, "21.4"),
        (214.4, "214"),
        (21440, "21,400"),
        (9.999, "10.0"),
    ],
)
def test_three_digits(number: float, text: str) -> None:
    assert digits(number) == text


def test_other_numbers() -> None:
    assert digits(float("nan")) == "\u2013"
    assert milliseconds(25_000) == "25.0 s"
    assert percent(0.284) == "28 %"
    assert plain_digits(2.0) == "2"
    assert plain_digits(0.25) == "0.25"
    assert fixed(0.5, 120.0) == "0.5"
    assert fixed(0.5, 1.63) == "0.500"
    assert interval(1, 2) == "1.00 \u2013 2.00"
