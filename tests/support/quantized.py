"""Quantize small graphs, and see what onnxruntime makes of the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from edgewise.calibration.collect import collect
from edgewise.calibration.plan import QuantOptions, observed_values, plan
from edgewise.calibration.target import X86, Target
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.passes.quant_plan import QuantPlan
from edgewise.passes.verify import Signature, check
from edgewise.runtime.evaluate import Array, Evaluator, Feed, input_specs, seeded_feed
from edgewise.runtime.session import serialize

SAMPLES = 4


def feeds_of(model: ir.Model, count: int = SAMPLES) -> list[dict[str, Array]]:
    return [seeded_feed(input_specs(model), seed=seed) for seed in range(count)]


def planned(
    model: ir.Model,
    target: Target = X86,
    feeds: Sequence[Feed] | None = None,
    *,
    method: str = "minmax",
    per_channel: bool = True,
    exclude: tuple[str, ...] = (),
) -> QuantPlan:
    """The plan for `model`, calibrated on `feeds` or on seeded ones."""
    options = QuantOptions(method, per_channel, exclude)
    table = collect(model, feeds or feeds_of(model), observed_values(model, options, target), threads=1)
    return plan(model, table, options, target)


def inserted(model: ir.Model, made: QuantPlan) -> ir.Model:
    """`model` after its plan, checked to be sound and settled, the original being untouched."""
    before, after = serialize(model), model.clone()
    outcome = InsertQdq(made).apply(after)
    check(after, Signature.of(model))
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert InsertQdq(made).apply(after.clone()).edits == 0
    assert serialize(model) == before
    assert outcome.edits == len(made.quantized)
    assert not outcome.refused
    return after


def optimized(model: ir.Model, folder: Path, **config: str) -> onnx.ModelProto:
    """The graph that onnxruntime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    for key, value in config.items():
        options.add_session_config_entry(f"session.{key}", value)
    onnxruntime.InferenceSession(serialize(model), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath)


def kernels(model: ir.Model, folder: Path) -> Counter[str]:
    """The operators that onnxruntime really runs, without those that only reorder data in memory."""
    layout = ("Transpose", "ReorderInput", "ReorderOutput")
    return Counter(n.op_type for n in optimized(model, folder).graph.node if n.op_type not in layout)


def run(model: ir.Model, feed: Mapping[str, Array], *, optimize: bool = True) -> Array:
    """The first output."""
    evaluator = Evaluator(model, optimize=optimize, threads=1)
    output: Array = evaluator.run(feed)[evaluator.outputs[0]]
    return output


def decibels(signal: Array, other: Array) -> float:
    """Signal-to-noise ratio of `other` against `signal`."""
    noise = float(((signal - other) ** 2).sum())
    return float(10 * np.log10(((signal - signal.mean()) ** 2).sum() / max(noise, 1e-30)))
