"""Answers of the three kinds that have a page, made by hand: no model runs for them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from edgewise.optimizer.benchmarking import Benchmark
from edgewise.optimizer.comparison import Difference
from edgewise.optimizer.layers import LayerNoise
from edgewise.optimizer.pipeline import StepReport
from edgewise.optimizer.profiling import ProfileReport
from edgewise.optimizer.recipe import Prune, Recipe
from edgewise.optimizer.report import Amount, Candidate, ModelFacts, Report, Score
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.costs import Kind
from edgewise.runtime.latency import LatencyReport, ModelLatency, Ratio
from edgewise.runtime.machine import Machine
from edgewise.runtime.peaks import Peaks
from edgewise.runtime.profile import NodeTime, Profile
from edgewise.runtime.profile_difference import difference
from edgewise.runtime.session import Grant
from edgewise.runtime.statistics import Verdict
from edgewise.training.options import Epoch, History

CPU = "CPUExecutionProvider"
MACHINE = Machine(
    cpu="Some Processor 9000",
    architecture="x86_64",
    isa=("avx2", "avx512_vnni"),
    physical_cores=4,
    logical_cores=8,
    usable_cores=8,
    cpu_limit=2.0,
    governor="performance",
    memory_gb=31.9,
    os="Linux-6.1",
    python="3.11.7",
    onnxruntime="1.31.1",
    distributions=("onnxruntime",),
    providers=(CPU,),
    gpus=(),
)
_KINDS: tuple[tuple[Kind, str], ...] = (
    ("convolution", "Conv"),
    ("layout", "Transpose"),
    ("elementwise", "Add"),
    ("matrix product", "Gemm"),
    ("quantize/dequantize", "QuantizeLinear"),
)


def model_latency(name: str, median: float, *, batch: int = 1, failed: str | None = None) -> ModelLatency:
    """Runs that scatter by a few per cent around the median, with a tail."""
    if failed is not None:
        return ModelLatency(name, f"{name}.onnx", 0, failed=failed)
    share = np.linspace(0, 1, 101)
    quantiles = median * (0.9 + 0.2 * share + 0.6 * share**20)
    return ModelLatency(
        name=name,
        path=f"{name}.onnx",
        file_bytes=1_400_000,
        sha256="ab" * 32,
        median_ms=float(quantiles[50]),
        low_ms=float(quantiles[50]) * 0.98,
        high_ms=float(quantiles[50]) * 1.02,
        p90_ms=float(quantiles[90]),
        p99_ms=float(quantiles[99]),
        min_ms=float(quantiles[0]),
        quantiles_ms=tuple(map(float, quantiles)),
        runs=400,
        per_second=1000 * batch / float(quantiles[50]),
        load_ms=20.0,
        first_ms=3 * median,
        loaded_mb=50.0,
        peak_mb=60.0,
        grant=Grant("cpu", {CPU: 12}, {}),
    )


def latency(
    *models: tuple[str, float], conditions: Conditions | None = None, failed: str | None = None
) -> LatencyReport:
    """A measurement of models by name and median; `failed` names one more that has none."""
    conditions = conditions or Conditions(threads=1)
    measured = [model_latency(name, ms, batch=conditions.batch) for name, ms in models]
    (first, base), *others = models
    gains = [(name, base / ms) for name, ms in others]
    bad = [] if failed is None else [model_latency(failed, math.nan, failed="it <crashed> & burned")]
    return LatencyReport(
        machine=MACHINE,
        conditions=conditions,
        inputs="x float32[1, 3, 8, 8] (random, seed 0)",
        models=(*measured, *bad),
        ratios=tuple(Ratio(n, first, g, g * 0.96, g * 1.05, _verdict(g)) for n, g in gains),
        noise_floor=0.012,
        launches=4,
        seconds=6.5,
        stopped_because="precision reached",
    )


def _verdict(gain: float) -> Verdict:
    return "faster" if gain > 1.05 else "slower" if gain < 0.95 else "no difference"


def benchmark(*names: str) -> Benchmark:
    """One measurement; the second model takes half the time of the first, the next half of that."""
    return Benchmark((latency(*((name, 2.0 / 2**i) for i, name in enumerate(names))),))


def sweep() -> Benchmark:
    """Two models, on 1 and 2 threads, with batches of 1, 4 and 16."""
    grid = [Conditions(threads=t, batch=b) for t in (1, 2) for b in (1, 4, 16)]
    reports = (latency(("float", 2.0 * c.batch), ("int8", 1.1 * c.batch), conditions=c) for c in grid)
    return Benchmark(tuple(reports))


def profile(name: str, scale: float, *, in_float: tuple[str, ...] = ()) -> Profile:
    """Five kinds of work, four nodes each."""
    total = sum(scale / (k + 1) / (i + 1) for k in range(len(_KINDS)) for i in range(4))
    nodes = [
        NodeTime(
            ms=(ms := scale / (k + 1) / (i + 1)),
            share=ms / total,
            macs=1_000_000 if k in (0, 3) else 0,
            bytes=50_000,
            name=f"{op}_{i}",
            op_type=op,
            kind=kind,
            dtype="float32",
            provider=CPU,
            calls=1,
            sources=(f"{op}_{i}", f"relu_{i}") if k == 0 else () if k == 4 else (f"{op}_{i}",),
        )
        for k, (kind, op) in enumerate(_KINDS)
        for i in range(4)
    ]
    nodes.sort(key=lambda node: -node.ms)
    grant = Grant("cpu", {CPU: 20}, {})
    return Profile(f"{name}.onnx", "cpu", 1, 30, total * 1.1, tuple(nodes), grant, in_float)


def profiled(*names: str) -> ProfileReport:
    """One profile, or two, of which the second takes half the time and has a node in float."""
    profiles = tuple(profile(name, 1.0 / (i + 1), in_float=("Add_1",) * i) for i, name in enumerate(names))
    compared = difference(*profiles, names=(names[0], names[1])) if len(names) == 2 else None
    peaks = Peaks("cpu", 1, 80.0, 180.0, 12.0, None)
    return ProfileReport(MACHINE, "x float32[1, 3, 8, 8]", names, profiles, peaks, compared)


STEPS = (
    StepReport(
        step="fuse-batch-norm",
        contract="exact",
        status="applied",
        edits=3,
        refused={"Conv output has another user": 2},
        error=1e-7,
        seconds=0.1,
        nodes=40,
        bytes=1_300_000,
    ),
    StepReport("drop-identity", "exact", "no change", nodes=40, bytes=1_300_000),
    StepReport("prune-channels", "exact", "rolled back", reason="outputs differ by 1.0e-01"),
    StepReport(
        step="insert-qdq by minmax ranges",
        contract="lossy",
        status="applied",
        edits=9,
        refused={f"reason {i}": i for i in range(1, 8)},
        error=2e-2,
        score=0.99,
        seconds=0.4,
        nodes=60,
        bytes=400_000,
    ),
)


def report(candidate: str = "int8") -> Report:
    """A run that wrote `candidate`, with everything a run can tell."""
    medians = (("input", 2.0), ("exact", 1.9), (candidate, 0.8))
    found = latency(*medians)
    ratios = {r.name: r for r in found.ratios}
    sizes = {"input": 1_400_000, "exact": 1_300_000, candidate: 400_000}
    candidates = [
        Candidate(n, s, r.speedup, r.low, r.high, n == candidate, r.verdict)
        for n, s in sizes.items()
        if (r := ratios.get(n, Ratio(n, n, 1.0, 1.0, 1.0, "no difference")))
    ]
    before = ModelFacts("net.onnx", "ab" * 32, sizes["input"], 44, 350_000, 17)
    return Report(
        version="1.2.3",
        input=before,
        output=dataclasses.replace(
            before, path="small.onnx", sha256="cd" * 32, bytes=sizes[candidate], nodes=60
        ),
        recipe=Recipe(threads=1).model_dump(mode="json"),
        steps=STEPS,
        differences=(Difference("scores", 0.03, 0.4, 31.2, 0.9997, 0.992),),
        score=Score("top1", 0.996, 0.994, 0.01, 500),
        candidates=tuple(candidates),
        latency=found,
        table="ef" * 32,
        notes=("something to know",),
        layers=tuple(
            LayerNoise(f"value_{i}", "Conv", f"layer_{i}", 40.0 - i + (-12 if i == 4 else 0), i)
            for i in range(14)
        ),
        profiles=profiled("input", candidate),
    )


def pruned() -> Report:
    """A run that pruned, in float and in int8 under one bound, and learned in two phases."""
    tried = ((0.21, 0.86, 0.84), (0.39, 0.992, 0.988), (0.44, 0.99, 0.971), (0.62, 0.993, 0.991))
    blocks = tuple(
        Epoch(i, 0.9 / i if i else None, 0.8 / (i + 1), 0.5, 1e-3, 1.5, "blocks") for i in range(4)
    )
    whole = tuple(Epoch(i, 0.5 / i if i else None, 0.4 / (i + 1), 0.9, 1e-3, 2.5) for i in range(12))
    return dataclasses.replace(
        report("pruned"),
        recipe=Recipe(threads=1, prune=Prune()).model_dump(mode="json"),
        amounts=tuple(
            Amount(macs, macs, round(350_000 * macs), round(1_400_000 * macs), score, int8, int8 > 0.986)
            for macs, score, int8 in tried
        ),
        history=History((*blocks, *whole), "patience is over"),
    )


def bare() -> Report:
    """A run without samples and without a benchmark: the least that a page is made of."""
    full = report()
    only = tuple(
        dataclasses.replace(c, speedup=None, low=None, high=None, why="not measured")
        for c in full.candidates[2:]
    )
    return dataclasses.replace(
        full,
        differences=(),
        score=None,
        candidates=only,
        latency=None,
        notes=(),
        layers=(),
        profiles=None,
        steps=(),
    )


def measured(ratios: dict[str, tuple[float, float, float]], failed: str = "") -> LatencyReport:
    """A measurement with these speed-ups and intervals; `failed` names a model that failed."""

    def verdict(low: float, high: float) -> str:
        return "faster" if low > 1 else "slower" if high < 1 else "no difference"

    names = ["input", *ratios, *filter(None, [failed])]
    return LatencyReport(
        machine=MACHINE,
        conditions=Conditions(threads=1),
        inputs="seeded",
        models=tuple(
            ModelLatency(n, f"{n}.onnx", 100, failed="crashed" if n == failed else None) for n in names
        ),
        ratios=tuple(
            Ratio(name, "input", speedup, low, high, verdict(low, high))  # type: ignore[arg-type]
            for name, (speedup, low, high) in ratios.items()
        ),
        noise_floor=None,
        launches=3,
        seconds=1.0,
        stopped_because="precise",
    )
