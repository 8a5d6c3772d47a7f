"""How good the benchmark itself is: python benchmarks/bench_quality.py --runs 20

Prints how often a file differs from itself, how often 3 % more work is found, how far the median is
from a plain loop's, how long a run of two small models takes, and how fast a worker starts; and, as the
rival, what two plain loops of the same file one after the other would have claimed.
The machine should be quiet: what else runs on it is part of what is measured.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgewise.runtime.conditions import Conditions
from edgewise.runtime.evaluate import Array
from edgewise.runtime.isolated import IsolatedModel
from edgewise.runtime.latency import LatencyReport, measure
from edgewise.runtime.machine import cores_for, describe

LAYERS = 33  # one more is 3 % more work
CHANNELS, SIDE = 16, 28
SIDE_BY_SIDE = 24  # times that all ways to measure take turns
TURN_SECONDS = 3.0  # short, for a shared machine drifts

PLAIN_LOOP = """
import os, sys, time
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [int(core) for core in sys.argv[2].split(",")])
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = int(sys.argv[3])
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
rng = np.random.default_rng(0)
feed = {i.name: rng.standard_normal(i.shape).astype(np.float32) for i in session.get_inputs()}
seconds, end = [], time.perf_counter() + 1
while time.perf_counter() < end:
    start = time.perf_counter()
    session.run(None, feed)
    seconds.append(time.perf_counter() - start)
print(np.median(seconds[len(seconds) // 10 :]) * 1e3)
"""


def conv_net(path: Path, layers: int) -> Path:
    """Save `layers` equal 3x3 convolutions, each with a Relu, as an ONNX file."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for i in range(layers):
        weight = rng.standard_normal((CHANNELS, CHANNELS, 3, 3)) * np.sqrt(2 / (9 * CHANNELS))
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("Conv", [value, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        value = f"r{i}"
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, CHANNELS, SIDE, SIDE])
        for name in ("x", value)
    ]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def pairs(first: Path, second: Path, runs: int, threads: int) -> list[LatencyReport]:
    """The same pair of files measured `runs` times at default settings."""
    reports = []
    for run in range(runs):
        reports.append(
            measure({"first": first, "second": second}, conditions=Conditions(threads=threads), seed=run)
        )
        ratio = reports[-1].ratios[0]
        print(
            f"  {run + 1:3d}: {ratio.speedup:.4f} [{ratio.low:.4f}, {ratio.high:.4f}] {ratio.verdict}, "
            f"{reports[-1].launches} launches, {reports[-1].seconds:.1f} s, {reports[-1].stopped_because}",
            flush=True,
        )
    return reports


def verdicts(reports: list[LatencyReport]) -> str:
    counts = Counter(report.ratios[0].verdict for report in reports)
    covered = [report.ratios[0] for report in reports]
    truth = np.median([ratio.speedup for ratio in covered])
    inside = sum(ratio.low <= truth <= ratio.high for ratio in covered)
    return f"{dict(counts)}, median ratio {truth:.4f}, in {inside} of {len(covered)} intervals"


def plain_loop(path: Path, threads: int) -> float:
    """The median in milliseconds of a loop in one process, pinned to the same cores."""
    cores = ",".join(map(str, cores_for(threads)))
    command = [sys.executable, "-c", PLAIN_LOOP, str(path), cores, str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def side_by_side(path: Path, threads: int) -> dict[str, Array]:
    """The median of the same file by every way to measure it, in milliseconds, in turns."""
    ways: dict[str, list[float]] = {"loop": [], "beside": [], "loop again": [], "alone": []}
    for seed in range(SIDE_BY_SIDE):
        for way, medians in ways.items():
            if "loop" in way:
                medians.append(plain_loop(path, threads))
                continue
            models = {"net": path, "other": path} if way == "beside" else {"net": path}
            conditions = Conditions(threads=threads)
            report = measure(models, conditions=conditions, max_seconds=TURN_SECONDS, seed=seed)
            medians.append(report.models[0].median_ms)
    return {way: np.array(medians) for way, medians in ways.items()}


def gap(one: Array, other: Array) -> str:
    """By how much two ways to measure differ: the median with its standard error, and the middle half."""
    ratios = np.log(one / other)
    low, middle, high = np.expm1(np.quantile(ratios, [0.25, 0.5, 0.75]))
    error = 1.2533 * 1.4826 * np.median(np.abs(ratios - np.median(ratios))) / np.sqrt(len(ratios))
    return f"{middle:+.1%} \N{PLUS-MINUS SIGN} {error:.1%} (middle half {low:+.1%} to {high:+.1%})"


def worker_start(folder: Path) -> float:
    """Seconds from starting a worker to its readiness, the median of five."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        with IsolatedModel(folder / "start.log", threads=1, timeout=60) as worker:
            worker.wait_until_ready()
            seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="0 compares with plain loops only")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print(describe())
    print(f"load average {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "")
    with tempfile.TemporaryDirectory(prefix="edgewise-bench-") as name:
        folder = Path(name)
        net = conv_net(folder / "net.onnx", LAYERS)
        if options.runs:
            print_power(net, conv_net(folder / "more.onnx", LAYERS + 1), options.runs, options.threads)
        print_medians(side_by_side(net, options.threads))
        print(f"a worker starts:  {worker_start(folder):.2f} s")


def print_power(net: Path, more: Path, runs: int, threads: int) -> None:
    print("the same file twice")
    same = pairs(net, net, runs, threads)
    print(f"one layer more: {1 / LAYERS:.1%} more work")
    different = pairs(net, more, runs, threads)
    reports = same + different
    seconds = [report.seconds for report in reports]
    print(f"same file:        {verdicts(same)}")
    print(f"{1 / LAYERS:.0%} more work:     {verdicts(different)}")
    print(f"noise floor:      median {np.median([r.noise_floor for r in reports]):.2%}")
    print(f"two models take:  {np.median(seconds):.1f} s, at most {max(seconds):.1f} s")


def print_medians(ways: dict[str, Array]) -> None:
    loops = np.sqrt(ways["loop"] * ways["loop again"])  # one before and one after
    print(f"median, beside another model against alone:        {gap(ways['beside'], ways['alone'])}")
    print(f"median, against plain loops:                       {gap(ways['beside'], loops)}")
    print(f"rival: a plain loop against the next plain loop:   {gap(ways['loop again'], ways['loop'])}")


if __name__ == "__main__":
    main()
