"""The runner keeps what is right, rolls back what is not, and goes on either way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from edgewise.optimizer.pipeline import BreachError, Reference, run_passes, run_step
from edgewise.optimizer.probe import probe_feeds
from edgewise.passes.base import Contract, Outcome, Pass, PassError
from edgewise.passes.drop_identity import DropIdentity
from edgewise.runtime.errors import EdgewiseError

Edit = Callable[[ir.Model], object]


@dataclass(frozen=True)
class Step(Pass):
    """A pass made of any function."""

    name: ClassVar[str] = "step"
    edit: Edit = lambda model: None
    edits: int = 1

    def apply(self, model: ir.Model) -> Outcome:
        self.edit(model)
        return Outcome(self.edits, {"no reason at all": 2})

    @property
    def spec(self) -> str:
        return self.name


@dataclass(frozen=True)
class Lossy(Step):
    name: ClassVar[str] = "lossy"
    contract: ClassVar[Contract] = Contract.LOSSY


def scaled(name: str, factor: float) -> Edit:
    """Multiply an initializer."""

    def edit(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor((value.const_value.numpy() * factor).astype(np.float32), name=name)

    return edit


def raising(error: BaseException) -> Edit:
    def edit(model: ir.Model) -> None:
        scaled("conv_w", 2.0)(model)  # half the work is done
        raise error

    return edit


def dangling(model: ir.Model) -> None:
    model.graph.remove(model.graph[0])


def renamed(model: ir.Model) -> None:
    model.graph.outputs[0].name = "other"


@pytest.fixture
def reference(model: ir.Model) -> Reference:
    return Reference(model, probe_feeds(model, None), threads=1)


def weights(model: ir.Model) -> bytes:
    return b"".join(v.const_value.tobytes() for v in model.graph.initializers.values() if v.const_value)


def test_an_exact_edit_is_kept(model: ir.Model, reference: Reference) -> None:
    made, step = run_step(model, DropIdentity(), reference)
    assert (step.status, step.edits, step.contract, step.reason) == ("applied", 1, "exact", "")
    assert step.error == 0.0
    assert step.nodes == len(list(made.graph)) == len(list(model.graph)) - 1
    assert step.bytes > 0
    assert step.seconds > 0


def test_rounding_is_exact(model: ir.Model, reference: Reference) -> None:
    made, step = run_step(model, Step(scaled("conv_w", 1 + 1e-6)), reference)
    assert step.status == "applied"
    assert made is not model
    assert step.error is not None
    assert 0 < step.error < 1e-4


def test_nothing_to_do(model: ir.Model, reference: Reference) -> None:
    made, step = run_step(model, Step(edits=0), reference)
    assert made is model
    assert (step.status, step.error, step.refused) == ("no change", None, {"no reason at all": 2})


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (scaled("conv_w", 1.01), "outputs differ"),
        (scaled("fc_w", float("nan")), "outputs differ"),
        (raising(PassError("cannot")), "cannot"),
        (raising(EdgewiseError("broken")), "broken"),
        (raising(KeyError("x")), "defect in step: KeyError"),
        (raising(RuntimeError("one\ntwo")), "defect in step: RuntimeError: one two"),
        (dangling, ""),
        (renamed, "inputs or outputs changed"),
    ],
    ids=["wrong", "NaN", "PassError", "EdgewiseError", "bug", "bug of two lines", "dangling", "renamed"],
)
def test_a_breach_is_rolled_back_and_named(
    model: ir.Model, reference: Reference, edit: Edit, reason: str
) -> None:
    before = weights(model)
    made, step = run_step(model, Step(edit), reference)
    assert made is model
    assert weights(model) == before
    assert step.status == "rolled back"
    assert reason in step.reason
    assert step.reason
    assert "\n" not in step.reason
    assert step.nodes == len(list(model.graph))


def test_strict_raises_what_no_pass_should(model: ir.Model, reference: Reference) -> None:
    with pytest.raises(KeyError):
        run_step(model, Step(raising(KeyError("x"))), reference, strict=True)
    _, step = run_step(model, Step(raising(PassError("cannot"))), reference, strict=True)
    assert step.status == "rolled back"


def test_an_interrupt_is_no_breach(model: ir.Model, reference: Reference) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_step(model, Step(raising(KeyboardInterrupt())), reference)


def test_a_lossy_step_is_held_to_the_judge(model: ir.Model, reference: Reference) -> None:
    step = Lossy(scaled("conv_w", 1.5))
    made, report = run_step(model, step, reference, judge=lambda _: 0.75)
    assert (report.status, report.score, made is model) == ("applied", 0.75, False)
    assert report.error is not None
    assert report.error > 1e-2

    def refuse(_: ir.Model) -> float:
        raise BreachError("top1 fell")

    made, report = run_step(model, step, reference, judge=refuse)
    assert (report.status, report.reason, made is model) == ("rolled back", "top1 fell", True)


def test_a_lossy_step_without_a_judge_has_to_run_at_least(model: ir.Model, reference: Reference) -> None:
    _, report = run_step(model, Lossy(scaled("conv_w", 1.5)), reference)
    assert report.status == "applied"
    assert report.error is not None
    _, report = run_step(model, Lossy(lambda m: scaled("conv_b", 1.0)(m) or resized(m)), reference)
    assert report.status == "rolled back"


def resized(model: ir.Model) -> None:
    """A bias that fits no convolution: sound in structure, and no runtime takes it."""
    value = model.graph.initializers["conv_b"]
    value.const_value = ir.tensor(np.zeros(7, np.float32), name="conv_b")
    value.shape = ir.Shape((7,))


def test_a_chain_runs_until_nothing_changes(model: ir.Model, reference: Reference) -> None:
    left = [2, 1, 0, 0, 0]
    told: list[tuple[str, int, int]] = []

    @dataclass(frozen=True)
    class Later(Step):
        def apply(self, _: ir.Model) -> Outcome:
            return Outcome(left.pop(0))

    _, steps = run_passes(model, [Later(), DropIdentity()], reference, progress=lambda *a: told.append(a))
    assert [(s.step, s.status) for s in steps] == [
        ("step", "applied"),
        ("drop-identity", "applied"),
        ("step", "applied"),  # later rounds tell only what changed
    ]
    assert told[0] == ("round 1: step", 0, 2)
    assert ("round 3", 2, 2) in told


def test_what_was_rolled_back_is_not_tried_again(model: ir.Model, reference: Reference) -> None:
    calls: list[int] = []

    def wrong(m: ir.Model) -> None:
        calls.append(1)
        renamed(m)

    made, steps = run_passes(model, [Step(wrong), DropIdentity()], reference)
    assert len(calls) == 1
    assert [s.status for s in steps] == ["rolled back", "applied"]
    assert "Identity" not in {n.op_type for n in made.graph}


@pytest.mark.parametrize(("first", "calls"), [(True, 2), (False, 1)])
def test_a_pass_is_not_asked_twice_about_the_same_graph(
    model: ir.Model, reference: Reference, first: bool, calls: int
) -> None:
    asked: list[ir.Model] = []
    idle = Step(asked.append, edits=0)
    run_passes(model, [idle, DropIdentity()] if first else [DropIdentity(), idle], reference)
    assert len(asked) == calls


@dataclass(frozen=True)
class Counted(Pass):
    """Says that it edited as often as `left` says, which is one number for each call, and 0 after those."""

    name: ClassVar[str] = "counted"
    key: str = ""

    def apply(self, model: ir.Model) -> Outcome:
        CALLS.append(self.key)
        return Outcome(LEFT[self.key].pop(0) if LEFT.get(self.key) else 0)


@dataclass(frozen=True)
class Waiting(Counted):
    name: ClassVar[str] = "waiting"
    waits: ClassVar[bool] = True


@dataclass(frozen=True)
class Helping(Counted):
    name: ClassVar[str] = "helping"
    helps: ClassVar[tuple[str, ...] | None] = ("waiting",)


CALLS: list[str] = []
LEFT: dict[str, list[int]] = {}


def asked(model: ir.Model, chain: list[Pass], reference: Reference, **left: list[int]) -> str:
    """The passes in the order in which they were asked, with the edits that each claims at each call."""
    CALLS.clear()
    LEFT.clear()
    LEFT.update(left)
    run_passes(model, chain, reference)
    return "".join(CALLS)


def test_a_slow_pass_waits_until_those_before_it_find_nothing(model: ir.Model, reference: Reference) -> None:
    chain = [Counted("a"), Waiting("w"), Counted("z")]
    assert asked(model, chain, reference, a=[1, 1]) == "aaawz"
    assert asked(model, chain, reference, w=[1]) == "awzaw"


def test_a_slow_pass_does_not_wait_for_ever(model: ir.Model, reference: Reference) -> None:
    assert "w" in asked(model, [Counted("a"), Waiting("w")], reference, a=[1] * 99)


def test_an_edit_wakes_the_passes_that_it_helps(model: ir.Model, reference: Reference) -> None:
    chain = [Counted("a"), Waiting("w"), Helping("h")]
    assert asked(model, chain, reference, h=[1]) == "awhwh"
    assert asked(model, [*chain, Counted("z")], reference, z=[1]) == "awhzawhz"


def test_what_was_spoilt_is_made_again(model: ir.Model, reference: Reference) -> None:
    """The edits before the one that is rolled back are still there, and what comes next goes on."""
    made, steps = run_passes(model, [DropIdentity(), Step(renamed), Counted("z")], reference)
    assert [s.status for s in steps] == ["applied", "rolled back", "no change"]
    assert "Identity" not in {n.op_type for n in made.graph}
    assert [v.name for v in made.graph.inputs] == [v.name for v in model.graph.inputs]
    assert steps[1].nodes == steps[0].nodes


def test_a_chain_that_never_settles_ends(model: ir.Model, reference: Reference) -> None:
    _, steps = run_passes(model, [Step()], reference)
    assert len(steps) == 10


def test_the_input_model_is_left_alone(model: ir.Model, reference: Reference) -> None:
    before = str(model.graph)
    run_passes(model, [DropIdentity(), Step(scaled("conv_w", 1 + 1e-7))], reference)
    assert str(model.graph) == before


def test_half_precision_may_round_more() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float16[N,4] x) => (float16[N,4] y) { y = Relu (x) }'
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert Reference(model, ()).tolerance == pytest.approx(2e-2)
    assert Reference(ir.from_proto(onnx.parser.parse_model(text.replace("16", ""))), ()).tolerance == 1e-4
