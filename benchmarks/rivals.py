"""One peer's simplifier on one file, in a Python environment of its own.

PYTHON -P benchmarks/rivals.py onnxslim|onnxsim|onnxscript IN.onnx OUT.onnx

writes what the peer makes of IN with its default settings, and prints a line of JSON: its version, and the
seconds of the call alone. Everything is imported, and warmed up on a graph of two nodes, before the clock
starts.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.parser

RIVALS = ("onnxslim", "onnxsim", "onnxscript")

_PATIENCE = 300.0  # seconds

_WARM_UP = """<ir_version: 8, opset_import: ["": 16]>
    agraph (float[2] x) => (float[2] y) {
        a = Constant<value_floats = [1.0, 2.0]> ()
        b = Add(a, a)
        y = Mul(x, b)
    }"""


@dataclass(frozen=True)
class Attempt:
    """What became of a peer's run: seconds and version, or the line in which it failed."""

    seconds: float = 0.0
    version: str = ""
    failure: str = ""


def attempt(python: str, rival: str, source: Path, out: Path) -> Attempt:
    """Run this file in the environment of `python`."""
    return answer([python, "-P", __file__, rival, str(source), str(out)], _PATIENCE)


def answer(command: list[str], patience: float) -> Attempt:
    """What a peer's own process says in its last line of JSON, within so many seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=False)
    except OSError as error:
        return Attempt(failure=str(error))
    except subprocess.TimeoutExpired:
        return Attempt(failure=f"no result in {patience:.0f} s")
    if done.returncode < 0:
        return Attempt(failure=f"killed by signal {-done.returncode}")
    if done.returncode:
        return Attempt(failure=(done.stderr.strip().splitlines() or ["no reason given"])[-1])
    return Attempt(**json.loads(done.stdout.splitlines()[-1]))


def simplifier(rival: str) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """The peer's own function, with its defaults; its answer on whether the outputs agree is not asked."""
    if rival == "onnxslim":
        import onnxslim

        return onnxslim.slim
    if rival == "onnxsim":
        import onnxsim

        return lambda model: onnxsim.simplify(model)[0]
    from onnxscript import optimizer

    return optimizer.optimize


def main() -> None:
    rival, source, out = sys.argv[1:]
    simplify = simplifier(rival)
    simplify(onnx.parser.parse_model(_WARM_UP))
    model = onnx.load(source)
    start = time.perf_counter()
    result = simplify(model)
    seconds = time.perf_counter() - start
    onnx.save(result, out)
    print(json.dumps({"seconds": seconds, "version": importlib.metadata.version(rival)}))


if __name__ == "__main__":
    main()
