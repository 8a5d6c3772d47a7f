"""The outputs of one model under many plans, on floats that are rounded as the plans say."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from edgewise.optimizer.stages import Stage, State, in_stages
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.passes.quant_plan import QuantPlan
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Feed
from edgewise.runtime.session import first_line, open_session, runtime_errors

_STAGES = 10  # more spare little: half of the chain is run for each plan as it is
_IN_FLOAT = {"session.disable_quant_qdq": "1"}  # no integer kernels: rounding alone, and nothing saturates


class RoundedModel:
    """A model in stages, each of which runs with any part of a plan.

    `together` are groups of nodes, by first outputs, that the plans have in int8 or in float as one.
    """

    def __init__(
        self, model: ir.Model, together: Sequence[Sequence[str]], *, threads: int | None = None
    ) -> None:
        self._stages = in_stages(model, _STAGES, together)
        self._threads = threads

    def outputs(self, plan: QuantPlan, feeds: Sequence[Feed]) -> list[State]:
        """What the model gives under `plan`, for every feed."""
        states: list[State] = list(feeds)
        for stage in self._stages:
            states = _after(stage, self._session(stage, _part(plan, stage)), states)
        return states

    def answers(
        self, base: QuantPlan, plans: Mapping[str, QuantPlan], feeds: Sequence[Feed]
    ) -> Iterator[tuple[str, list[State]]]:
        """The outputs under each of `plans`, in the order of the first stage where it differs from `base`.

        If a plan differs in few stages, those in front of them run once for all such plans, and those
        behind them in sessions that stay open.
        """
        parts = [_part(base, stage) for stage in self._stages]
        sessions = [self._session(stage, part) for stage, part in zip(self._stages, parts, strict=True)]
        states: list[State] = list(feeds)
        left = dict(plans)
        for i, (stage, part) in enumerate(zip(self._stages, parts, strict=True)):
            for name in [n for n, plan in left.items() if _part(plan, stage) != part]:
                yield name, self._onward(i, left.pop(name), parts, sessions, states)
            states = _after(stage, sessions[i], states)
        yield from ((name, states) for name in left)

    def _onward(
        self,
        first: int,
        plan: QuantPlan,
        parts: Sequence[QuantPlan],
        sessions: Sequence[Any],
        states: list[State],
    ) -> list[State]:
        """The outputs under `plan`, from the states in front of stage `first`."""
        for i, stage in enumerate(self._stages[first:], first):
            part = _part(plan, stage)
            session = sessions[i] if part == parts[i] else self._session(stage, part)
            states = _after(stage, session, states)
        return states

    def _session(self, stage: Stage, part: QuantPlan) -> Any:
        rounded = stage.model.clone()
        InsertQdq(part).apply(rounded)
        return open_session(rounded, threads=self._threads, spinning=False, config=_IN_FLOAT)


def _part(plan: QuantPlan, stage: Stage) -> QuantPlan:
    """What of `plan` concerns a stage. A node that is folded or on integers rounds like one in int8."""
    values = tuple(v for v in plan.values if v.name in stage.names)
    nodes = tuple(dataclasses.replace(n, form="int8") for n in plan.quantized if n.output in stage.nodes)
    return QuantPlan(plan.target, values, nodes) if values and nodes else QuantPlan()


def _after(stage: Stage, session: Any, states: Sequence[State]) -> list[State]:
    """The states behind a stage."""
    after: list[State] = []
    for state in states:
        try:
            written = session.run(list(stage.writes), {name: state[name] for name in stage.reads})
        except runtime_errors() as error:
            raise InputError(f"the model does not run on these inputs: {first_line(error)}") from error
        after.append(stage.after(state, dict(zip(stage.writes, written, strict=True))))
    return after
