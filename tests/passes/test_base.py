"""What a pass is: options that round-trip through text, and rules that run to a fixed point."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import pytest
import yaml
from rewrites import build, operators

from edgewise.passes.base import Contract, Outcome, Pass, Refused, Rule
from edgewise.passes.graph import replace


@dataclass(frozen=True)
class Tuned(Pass):
    name = "tuned"
    strong: bool = False
    count: int = 3
    share: float = 0.5
    word: str = "a"

    def apply(self, model: ir.Model) -> Outcome:
        return Outcome(self.count)


@dataclass(frozen=True)
class DropAbs(Rule):
    """Abs after Abs goes; after Exp it refuses, to have something to count."""

    name = "drop-abs"
    op_types = ("Abs",)

    def rewrite(self, node: ir.Node) -> bool:
        producer = None if node.inputs[0] is None else node.inputs[0].producer()
        if producer is None:
            return False
        if producer.op_type == "Exp":
            raise Refused("after Exp")
        if producer.op_type != "Abs":
            return False
        replace(node.outputs[0], producer.outputs[0])
        return True


@pytest.mark.parametrize(
    ("made", "spec"),
    [
        (Tuned(), "tuned"),
        (Tuned(strong=True), "tuned{strong: true}"),
        (Tuned(count=4, share=0.25), "tuned{count: 4, share: 0.25}"),
        (Tuned(word="b, c"), "tuned{word: 'b, c'}"),
    ],
)
def test_spec(made: Tuned, spec: str) -> None:
    assert made.spec == spec
    _, brace, options = spec.partition("{")
    assert Tuned.from_options(yaml.safe_load(brace + options) or {} if brace else {}) == made


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"weak": True}, "no option 'weak'"),
        ({"strong": 1}, "strong wants"),
        ({"count": True}, "count wants"),
        ({"count": 1.5}, "count wants"),
        ({"share": "half"}, "share wants"),
        ({"share": True}, "share wants"),
        ({"word": 3}, "word wants"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Tuned.from_options(options)


def test_a_whole_number_is_a_share() -> None:
    assert Tuned.from_options({"share": 1}) == Tuned(share=1)


def test_passes_are_values() -> None:
    assert Tuned() == Tuned()
    assert hash(Tuned(count=1)) != hash(Tuned(count=2))
    with pytest.raises(AttributeError):
        Tuned().count = 4  # type: ignore[misc]
    assert Tuned.contract is Contract.EXACT


def test_a_rule_runs_until_nothing_changes() -> None:
    model = build("g (float[2] x) => (float[2] y) { a = Abs(x) b = Abs(a) c = Abs(b) d = Abs(c) y = Neg(d) }")
    outcome = DropAbs().apply(model)
    assert operators(model) == ["Abs", "Neg"]
    assert outcome == Outcome(3)


def test_refusals_are_those_of_the_end() -> None:
    """Each counts once, however many sweeps it took."""
    model = build(
        "g (float[2] x) => (float[2] y) { a = Exp(x) b = Abs(a) c = Abs(x) d = Abs(c) y = Add(b, d) }"
    )
    outcome = DropAbs().apply(model)
    assert outcome.edits == 1
    assert outcome.refused == {"after Exp": 1}


def test_a_rule_enters_bodies() -> None:
    model = build(
        """g (bool c, float[2] x) => (float[2] y) {
            y = If(c) <then_branch = t () => (float[2] a) { k = Abs(x) l = Abs(k) a = Neg(l) },
                       else_branch = e () => (float[2] b) { b = Neg(x) }>
        }"""
    )
    assert DropAbs().apply(model).edits == 1
    body = model.graph.node(0).attributes["then_branch"].as_graph()
    assert [n.op_type for n in body] == ["Abs", "Neg"]


def test_a_rule_looks_at_standard_operators_only() -> None:
    model = build("g (float[2] x) => (float[2] y) { a = Abs(x) b = Abs(a) y = Neg(b) }")
    model.graph.node(1).domain = "custom"
    assert DropAbs().apply(model) == Outcome()
