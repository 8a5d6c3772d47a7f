"""Every conformance case of an operator that the trainable graph claims gives the outputs it expects."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

pytest.importorskip("torch")

from conformance import CLAIMED, cases, cases_by_operator, run, table

PAGE = Path(__file__).parents[2] / "docs" / "graph_module.md"
WITHOUT_CASES = {
    "ConcatFromSequence",
    "GlobalLpPool",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "SequenceAt",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceErase",
    "SequenceLength",
}
RANDOM = {"Bernoulli"}


@pytest.mark.parametrize("operator", CLAIMED)
def test_operator_conforms(operator: str) -> None:
    group = cases_by_operator().get(operator, ())
    if operator in WITHOUT_CASES:
        assert not group
    for case in group:
        if case.reason is None:
            run(case)


def test_no_operator_is_skipped_as_a_whole() -> None:
    run_at_all = {case.operator for case in cases() if not case.lacks and case.reason is None}

    assert set(CLAIMED) - run_at_all == WITHOUT_CASES | RANDOM


def test_operators_that_are_not_claimed_are_named() -> None:
    lacking = {name for case in cases() for name in case.lacks}

    assert not lacking.intersection(CLAIMED)
    assert {"StringSplit", "ImageDecoder", "ai.onnx.ml.TreeEnsemble"} <= lacking


def test_page_says_what_is_covered() -> None:
    text = PAGE.read_text(encoding="utf-8")
    if f"cases of onnx {onnx.__version__} " not in text:
        pytest.skip(f"the page counts the cases of another release than onnx {onnx.__version__}")

    assert text == table(), "run: python tests/support/conformance.py > docs/graph_module.md"
