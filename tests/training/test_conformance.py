"""Every conformance case of an operator that the trainable graph claims gives the outputs it expects."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases

pytest.importorskip("torch")

from conformance import CLAIMED, cases, cases_of, run, table

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
    group = [case for case in cases_of(operator) if not case.lacks]
    assert (not group) == (operator in WITHOUT_CASES)
    for case in group:
        if case.reason is None:
            run(case)


def test_page_says_what_is_covered() -> None:
    """One test, as all cases have to be made for it, which takes a while."""
    run_at_all = {case.operator for case in cases() if not case.lacks and case.reason is None}
    assert set(CLAIMED) - run_at_all == WITHOUT_CASES | RANDOM
    lacking = {name for case in cases() for name in case.lacks}
    assert not lacking.intersection(CLAIMED)
    assert {"StringSplit", "ImageDecoder", "ai.onnx.ml.TreeEnsemble"} <= lacking
    assert {case.name for case in cases()} == {case.name for case in collect_testcases(None)}

    text = PAGE.read_text(encoding="utf-8")
    if f"cases of onnx {onnx.__version__} " not in text:
        pytest.skip(f"the page counts the cases of another release than onnx {onnx.__version__}")

    assert text == table(), "run: python tests/support/conformance.py > docs/graph_module.md"
