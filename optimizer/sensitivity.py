"""What int8 costs the outputs of a model, node by node: measured, one rounding at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewise.calibration.kernels import activations, biased_by
from edgewise.calibration.target import CUTS, MOVERS
from edgewise.optimizer import cache
from edgewise.optimizer.comparison import decibels
from edgewise.optimizer.pipeline import Progress, no_progress
from edgewise.optimizer.rounded_model import RoundedModel
from edgewise.optimizer.stages import State
from edgewise.passes.fingerprint import fingerprint
from edgewise.passes.graph import Array
from edgewise.passes.quant_plan import QuantPlan, ValuePlan
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Feed

_LABEL = "sensitivity"


@dataclass(frozen=True)
class NodeSensitivity:
    """The noise that a node in int8 adds to the outputs, as a share of the signal's energy.

    `output` is the node's first output; those that cut, bias or only move what it gives count as part of
    it. `form` says what became of the node, one of `FORMS`. A share measured by leaving the node out may
    be negative: then the outputs are closer to float with the node in int8.
    """

    output: str
    op_type: str
    noise_share: float
    form: str = "int8"

    @property
    def snr_db(self) -> float:
        """Signal over noise in dB: infinite where no noise is added, minus infinity where it is endless."""
        share = max(self.noise_share, 0.0)
        return -math.inf if math.isinf(share) else decibels(1.0, share)


FORMS = ("int8", "float by accuracy", "float by speed")
"""What becomes of a node that could be int8."""


def sensitivities(
    model: ir.Model,
    plan: QuantPlan,
    feeds: Sequence[Feed],
    *,
    leave_one_out: bool = False,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> tuple[NodeSensitivity, ...]:
    """What each node of `plan` adds to the noise of the outputs of `model`, in the model's order.

    A node answers for its weights, for its output and for those of its inputs that come out of float, of
    several readers the first. So every rounding counts once, and the shares add up to about the noise of
    the whole plan. With `leave_one_out` it is the noise of the whole plan less its noise with the node in
    float, where the values that its neighbours share with it stay rounded: what single nodes gain in the
    end, but much of it by chance unless there are many feeds.

    The noise is that of the worst float output. Raises `InputError` where there is none, or no feed.
    """
    units = _units(model, plan)
    trial = _Trial(model, plan, feeds, threads, progress)
    if leave_one_out:
        noise = trial.without(units)
        shares = {head: noise[""] - noise[head] for head in units}
    else:
        owned: dict[str, list[str]] = {head: [] for head in units}
        for name, head in _owners(model, plan, units).items():
            owned[head].append(name)
        shares = trial.alone(owned)
    types = {n.output: n.op_type for n in plan.nodes}
    return tuple(NodeSensitivity(name, types[name], shares[name]) for name in units)


def rounding_shares(
    model: ir.Model,
    plan: QuantPlan,
    feeds: Sequence[Feed],
    *,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> dict[str, float]:
    """The noise share at the worst float output of `model` with one value of `plan` rounded, for each.

    Values in int32 are left out. What was moved from another value, or joined from others, on the same
    grid has their noise and is not measured.
    """
    moved = _moved(model, plan)
    alone = {v.name: (v.name,) for v in _rounded(plan) if v.name not in moved}
    shares = _Trial(model, plan, feeds, threads, progress).alone(alone)
    for name, sources in moved.items():
        shares[name] = sum(shares[source] for source in sources)
    return shares


def predicted_share(model: ir.Model, plan: QuantPlan, shares: Mapping[str, float]) -> float:
    """The noise share to expect of `plan`: the sum over what it rounds, by `rounding_shares` of a plan for
    the same model and ranges that rounds at least as much."""
    moved = _moved(model, plan)
    return sum(shares.get(v.name, 0.0) for v in _rounded(plan) if v.name not in moved)


def _rounded(plan: QuantPlan) -> tuple[ValuePlan, ...]:
    """The values that lose digits. A bias in int32 keeps those that count, and is rounded only with its
    node's input and weights."""
    return tuple(v for v in plan.values if v.dtype != "int32")


def _moved(model: ir.Model, plan: QuantPlan) -> dict[str, list[str]]:
    """The values that hold nothing but elements of others on the same grid, and those others, in order."""
    grids = {v.name: (v.dtype, v.scale, v.zero_point) for v in _rounded(plan)}
    chosen = {n.output for n in plan.quantized}
    found: dict[str, list[str]] = {}
    for node in model.graph:
        if node.op_type not in MOVERS | CUTS | {"Concat"} or node.outputs[0].name not in chosen:
            continue
        sources = [v.name or "" for v in activations(node)]
        for name in (v.name or "" for v in node.outputs):
            if name in grids and all(grids.get(s) == grids[name] for s in sources):
                found[name] = sources
    return found


def _units(model: ir.Model, plan: QuantPlan) -> dict[str, tuple[str, ...]]:
    """The nodes of `plan` that compute, by first output; each with those that cut, move or bias what it
    gives, and are not in int8 without it."""
    chosen = {n.output for n in plan.quantized}
    heads: dict[str, str] = {}
    units: dict[str, tuple[str, ...]] = {}
    for node in model.graph:
        name = (node.outputs[0].name or "") if node.outputs else ""
        if name in chosen:
            hangs = node.op_type in MOVERS | CUTS or biased_by(node) is not None
            joined = [heads[v.name] for v in node.inputs if v is not None and v.name in heads]
            head = joined[0] if hangs and joined else name
            heads |= {v.name: head for v in node.outputs if v.name}
            units[head] = (*units.get(head, ()), name)
    return units


def _owners(model: ir.Model, plan: QuantPlan, units: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The unit that makes, or else first reads, each rounded value that is not moved."""
    moved = _moved(model, plan)
    rounded = {v.name for v in _rounded(plan)} - set(moved)
    heads = {name: head for head, members in units.items() for name in members}
    owners: dict[str, str] = {}
    for node in model.graph:
        head = heads.get((node.outputs[0].name or "") if node.outputs else "")
        if head is not None:
            for value in (*node.inputs, *node.outputs):
                if value is not None and value.name in rounded:
                    owners.setdefault(value.name, head)
    return owners


@dataclass(frozen=True)
class _Trial:
    """A model, a plan for it and the inputs on which parts of the plan are tried."""

    model: ir.Model
    plan: QuantPlan
    feeds: Sequence[Feed]
    threads: int | None
    progress: Progress

    def alone(self, groups: Mapping[str, Collection[str]]) -> dict[str, float]:
        """The noise share with the values of one group rounded and no others, for each group."""
        plans = {
            name: dataclasses.replace(
                self.plan, values=tuple(v for v in self.plan.values if v.name in members)
            )
            for name, members in groups.items()
        }
        return self._shares(dataclasses.replace(self.plan, values=()), plans)

    def without(self, units: Mapping[str, Sequence[str]]) -> dict[str, float]:
        """The noise share of the plan with one unit in float, for each, and as "" that of the whole plan."""
        plans = {
            head: dataclasses.replace(
                self.plan, nodes=tuple(n for n in self.plan.nodes if n.output not in members)
            )
            for head, members in units.items()
        }
        return self._shares(self.plan, {**plans, "": self.plan})

    def _shares(self, base: QuantPlan, plans: Mapping[str, QuantPlan]) -> dict[str, float]:
        """The noise share under each of `plans`, from the cache if it was asked for before."""
        if not self.feeds:
            raise InputError("sensitivity is measured on samples: pass at least one")
        if not plans:
            return {}
        said = (json.dumps([name, plan.to_dict()]) for name, plan in plans.items())
        key = cache.key_of(_LABEL, fingerprint(self.model), *said, *map(_digest, self.feeds))
        known = (cache.load(key) or {}).get("shares")
        if isinstance(known, dict) and dict.fromkeys(plans, float) == {k: type(v) for k, v in known.items()}:
            return known
        names = [v.name or "" for v in self.model.graph.outputs]
        rounded = RoundedModel(
            self.model, tuple(_units(self.model, self.plan).values()), threads=self.threads
        )
        expected = rounded.outputs(QuantPlan(), self.feeds)
        shares: dict[str, float] = {}
        for name, outputs in rounded.answers(base, plans, self.feeds):
            shares[name] = _noise_share(expected, outputs, names)
            self.progress(_LABEL, len(shares), len(plans))
        cache.store(key, {"shares": shares})
        return shares


def _digest(feed: Feed) -> bytes:
    digest = hashlib.sha256()
    for name, array in sorted(feed.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        numbers = repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
        digest.update(numbers)
    return digest.digest()


def _noise_share(expected: Sequence[State], actual: Sequence[State], outputs: Sequence[str]) -> float:
    """Noise over signal energy at the worst output of floats, over all feeds."""
    shares = []
    for name in outputs:
        pairs = [(e[name], a[name]) for e, a in zip(expected, actual, strict=True)]
        if all(isinstance(e, np.ndarray) and e.dtype.kind == "f" for e, _ in pairs):
            shares.append(_share(pairs))
    if not shares:
        raise InputError("sensitivity is measured at outputs of floats: the model has none")
    return max(shares)


def _share(pairs: Sequence[tuple[Array, Array]]) -> float:
    """What is not finite in both does not count; in one of them it drowns everything."""
    signal = noise = 0.0
    for expected, actual in pairs:
        e, a = expected.astype(np.float64).ravel(), actual.astype(np.float64).ravel()
        if e.shape != a.shape or not np.array_equal(finite := np.isfinite(e), np.isfinite(a)):
            return math.inf
        signal += float(np.sum(e[finite] ** 2))
        noise += float(np.sum((e[finite] - a[finite]) ** 2))
    return noise / signal if signal > 0 else float(noise > 0)
