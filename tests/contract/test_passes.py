"""Every pass on every model: same inputs and outputs, sound, exact, deterministic, settled, in the list."""

from __future__ import annotations

import functools

import onnx_ir as ir
import pytest
import zoo

from edgewise.optimizer.pipeline import Reference
from edgewise.passes import EXACT_CHAIN, PASSES, parse
from edgewise.passes.base import Contract, Outcome, PassError
from edgewise.passes.verify import Signature, check
from edgewise.runtime.session import serialize

EXACT = [name for name, kind in PASSES.items() if kind.contract is Contract.EXACT]


@functools.lru_cache(maxsize=1)
def subject(name: str) -> tuple[ir.Model, Reference]:
    model = zoo.build(name)
    return model, Reference(model, [zoo.feed_of(name, model)], threads=1)


def applied(model: ir.Model, spec: str) -> tuple[ir.Model, Outcome]:
    """The model after the pass; where the pass declines the model as a whole, the model as it was."""
    copy = model.clone()
    try:
        return copy, parse(spec).apply(copy)
    except PassError:
        return model, Outcome()


@pytest.mark.parametrize("spec", EXACT)
@pytest.mark.parametrize("name", zoo.names())
def test_contract(name: str, spec: str) -> None:
    model, reference = subject(name)
    before = serialize(model)
    after, outcome = applied(model, spec)
    assert serialize(model) == before, "the pass wrote into tensors it shares with the original"
    check(after, Signature.of(model))
    reference.require_exact(after)
    _again, second = applied(after, spec)
    assert second.edits == 0, "a second run still edits"
    assert outcome.edits == 0 or serialize(after) != before, "edits are claimed and nothing changed"
    assert serialize(applied(model, spec)[0]) == serialize(after), "two runs differ"


@pytest.mark.parametrize("name", zoo.names())
def test_chain(name: str) -> None:
    """The whole chain, twice: passes that are right alone must be right together, and settle."""
    model, reference = subject(name)
    after = model
    for _ in range(2):
        for spec in EXACT_CHAIN:
            after, _outcome = applied(after, spec)
    check(after, Signature.of(model))
    reference.require_exact(after)


@pytest.mark.parametrize("name", PASSES)
def test_spec_round_trips(name: str) -> None:
    default = parse(name)
    assert default.name == name
    assert parse(default.spec) == default


def test_chain_is_made_of_known_exact_passes() -> None:
    assert {parse(spec).name for spec in EXACT_CHAIN} <= set(EXACT)


def test_every_pass_of_the_chain_has_something_to_do() -> None:
    """A contract kept by a pass that never edits says nothing: the small graphs make each of them edit."""
    busy = set()
    for name in zoo.GRAPHS:
        model = zoo.build(name)
        for spec in EXACT_CHAIN:
            model, outcome = applied(model, spec)
            busy |= {spec} if outcome.edits else set()
    assert busy == set(EXACT_CHAIN)
