"""What int8 costs the outputs of a model, node by node: measured, one rounding at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewise.calibration.kernels import activations, biased_by
from edgewise.calibration.noise import Energy, decibels
from edgewise.optimizer import cache
from edgewise.optimizer.pipeline import Progress, no_progress
from edgewise.optimizer.rounded_model import RoundedModel
from edgewise.optimizer.stages import State
from edgewise.passes.fingerprint import fingerprint
from edgewise.passes.movers import CUTS, MOVERS
from edgewise.passes.quant_plan import QuantPlan
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Feed

_LABEL = "sensitivity"


@dataclass(frozen=True)
class NodeSensitivity:
    """The noise that a node in int8 adds to the outputs, as a share of the signal's energy.

    `output` is the node's first output; those that cut, bias or only move what it gives count as part of
    it. `form` says what became of the node, one of `FORMS`.
    """

    output: str
    op_type: str
    noise_share: float
    form: str = "int8"

    @property
    def snr_db(self) -> float:
        """Signal over noise in dB: infinite where no noise is added, minus infinity where it is endless."""
        return -math.inf if math.isinf(self.noise_share) else decibels(1.0, self.noise_share)


FORMS = ("int8", "float by accuracy", "float by speed")
"""What becomes of a node that could be int8."""


def sensitivities(
    model: ir.Model,
    plan: QuantPlan,
    feeds: Sequence[Feed],
    *,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> tuple[NodeSensitivity, ...]:
    """What each node of `plan` adds to the noise of the outputs of `model`, in the model's order.

    A node answers for its weights, for its output and for those of its inputs that come out of float, of
    several readers the first. So every rounding counts once, and the shares add up to about the noise of
    the whole plan.

    The noise is that of the worst float output. Raises `InputError` where there is none, or no feed.
    """
    if not feeds:
        raise InputError("sensitivity is measured on samples: pass at least one")
    units = _units(model, plan)
    plans = _one_by_one(model, plan, units)
    said = (json.dumps([name, part.to_dict()]) for name, part in plans.items())
    key = cache.key_of(_LABEL, fingerprint(model), *said, *map(_digest, feeds))
    shares = (cache.load(key) or {}).get("shares")
    if not isinstance(shares, dict) or dict.fromkeys(plans, float) != {k: type(v) for k, v in shares.items()}:
        rounded = RoundedModel(model, tuple(units.values()), threads=threads)
        names = [v.name or "" for v in model.graph.outputs]
        shares = _noise_shares(rounded, names, plans, feeds, progress)
        cache.store(key, {"shares": shares})
    types = {n.output: n.op_type for n in plan.nodes}
    return tuple(NodeSensitivity(name, types[name], shares[name]) for name in units)


def _one_by_one(model: ir.Model, plan: QuantPlan, units: Mapping[str, Sequence[str]]) -> dict[str, QuantPlan]:
    """For each unit `plan` with nothing rounded but the values that it answers for."""
    owners = _owners(model, plan, units)
    return {
        head: dataclasses.replace(plan, values=tuple(v for v in plan.values if owners.get(v.name) == head))
        for head in units
    }


def _rounded(model: ir.Model, plan: QuantPlan) -> set[str]:
    """The values that lose digits, each in one place.

    A bias in int32 keeps those that count. What holds nothing but elements of others on the same grid loses
    none.
    """
    grids = {v.name: (v.dtype, v.scale, v.zero_point) for v in plan.values if v.dtype != "int32"}
    chosen = {n.output for n in plan.quantized}
    moved: set[str] = set()
    for node in model.graph:
        if node.op_type not in MOVERS | CUTS | {"Concat"} or node.outputs[0].name not in chosen:
            continue
        sources = [v.name or "" for v in activations(node)]
        for name in (v.name or "" for v in node.outputs):
            if name in grids and all(grids.get(s) == grids[name] for s in sources):
                moved.add(name)
    return grids.keys() - moved


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
    """The unit that makes, or else first reads, each rounded value."""
    rounded = _rounded(model, plan)
    heads = {name: head for head, members in units.items() for name in members}
    owners: dict[str, str] = {}
    for node in model.graph:
        head = heads.get((node.outputs[0].name or "") if node.outputs else "")
        if head is not None:
            for value in (*node.inputs, *node.outputs):
                if value is not None and value.name in rounded:
                    owners.setdefault(value.name, head)
    return owners


def _digest(feed: Feed) -> bytes:
    digest = hashlib.sha256()
    for name, array in sorted(feed.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        numbers = repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
        digest.update(numbers)
    return digest.digest()


def _noise_shares(
    rounded: RoundedModel,
    outputs: Sequence[str],
    plans: Mapping[str, QuantPlan],
    feeds: Sequence[Feed],
    progress: Progress,
) -> dict[str, float]:
    """The noise share at the worst of these outputs under each of `plans`."""
    expected = rounded.outputs(QuantPlan(), feeds)
    shares: dict[str, float] = {}
    for name, states in rounded.answers(QuantPlan(), plans, feeds):
        shares[name] = _noise_share(expected, states, outputs)
        progress(_LABEL, len(shares), len(plans))
    return shares


def _noise_share(expected: Sequence[State], actual: Sequence[State], outputs: Sequence[str]) -> float:
    """Noise over signal energy at the worst output of floats, over all feeds."""
    shares = []
    for name in outputs:
        pairs = [(e[name], a[name]) for e, a in zip(expected, actual, strict=True)]
        if all(isinstance(e, np.ndarray) and e.dtype.kind == "f" for e, _ in pairs):
            energy = Energy()
            for pair in pairs:
                energy.add(*pair)
            shares.append(energy.share)
    if not shares:
        raise InputError("sensitivity is measured at outputs of floats: the model has none")
    return max(shares)
