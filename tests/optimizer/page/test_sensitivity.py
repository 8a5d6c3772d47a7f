"""What int8 costs, on the page and in the other forms of a report."""

from __future__ import annotations

import dataclasses
import json
import math

from answers import bare, report

from edgewise.optimizer.page import charts
from edgewise.optimizer.page.job import sensitivity_section
from edgewise.optimizer.page.render import page_of, render
from edgewise.optimizer.report import Report
from edgewise.optimizer.sensitivity import FORMS, NodeSensitivity

EVIL = "<script>alert(1)</script>"
FOUND = tuple(
    NodeSensitivity(f"layer_{i}", "Conv", 10 ** (-2 - i / 10), FORMS[0 if i > 4 else 1 + i % 2])
    for i in range(30)
)


def told(found: tuple[NodeSensitivity, ...]) -> Report:
    return dataclasses.replace(report(), sensitivity=found)


def test_the_noisiest_are_drawn_and_all_are_listed() -> None:
    drawn = charts.sensitivity(FOUND[::-1], "t")
    assert "layer_0, Conv: -20.0 dB, float by accuracy" in drawn.wide
    assert "layer_19," in drawn.wide
    assert "layer_20," not in drawn.wide
    assert [key.text for key in drawn.legend] == list(FORMS)
    page = render(told(FOUND))
    assert "layer_29" in page
    assert "What int8 costs, node by node" in page


def test_the_title_tells_the_largest_share() -> None:
    (section,) = sensitivity_section((NodeSensitivity("a", "Conv", 0.03), NodeSensitivity("b", "Gemm", 0.01)))
    assert "a adds 75 % of what all nodes would" in render(
        told((NodeSensitivity("a", "Conv", 0.03), NodeSensitivity("b", "Gemm", 0.01)))
    )
    assert section.blocks


def test_one_node_and_nodes_alike_can_be_drawn() -> None:
    for found in (FOUND[:1], (FOUND[0],) * 3):
        assert charts.sensitivity(found, "t").wide


def test_nodes_that_add_nothing_are_left_out() -> None:
    silent = (NodeSensitivity("quiet", "Add", 0.0), NodeSensitivity("better", "Add", -0.1))
    assert sensitivity_section(silent) == ()
    assert "quiet" not in charts.sensitivity((*FOUND, *silent), "t").alt
    endless = NodeSensitivity("endless", "Conv", math.inf)
    assert "endless" not in charts.sensitivity((*FOUND, endless), "t").wide


def test_is_absent_where_it_was_not_measured() -> None:
    assert "sensitivity" not in [s.name for s in page_of(bare()).sections]
    assert "What int8 costs" not in bare().to_markdown()


def test_foreign_names_stay_text() -> None:
    page = render(told((NodeSensitivity(EVIL, EVIL, 0.1),)))
    assert EVIL not in page


def test_json_and_markdown() -> None:
    data = json.loads(json.dumps(told(FOUND[:2]).to_dict(), allow_nan=False))
    assert data["sensitivity"][0] == {
        "output": "layer_0",
        "op_type": "Conv",
        "noise_share": 0.01,
        "form": "float by accuracy",
    }
    assert "| layer_0 | Conv | -20.0 dB | float by accuracy |" in told(FOUND).to_markdown()
