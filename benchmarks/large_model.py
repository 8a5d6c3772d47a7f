"""Memory and time of the exact chain, without comparing outputs, on a model of more than 2 GiB.

python benchmarks/large_model.py FOLDER [--layers 4] [--width 11648] [--half]

A model of dense layers is written into FOLDER, its weights piece by piece beside it (`--half`: half of all
neurons are zero, so that smaller weights have to be made). A process of its own loads it, runs the chain and
writes the result; its memory is read from /proc every few milliseconds (Linux). Of that memory `anonymous` is
what the process itself asked for; pages of mapped files count in `resident` too, but the kernel takes them
back when it needs them. The bound for both is 1.3 times the largest tensor and 1 GiB. At the end what was
written is read and compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from edgewise.optimizer import files
from edgewise.optimizer.pipeline import Reference, run_passes
from edgewise.optimizer.recipe import Recipe

Looks = list[tuple[float, dict[str, int]]]
"""Moments, each with bytes of memory by kind."""

_ROWS = 256  # written at a time
_CHUNK = 2**24  # bytes hashed at a time
_PAUSE = 0.004  # seconds between two looks at the memory
_FIELDS = ("VmRSS", "RssAnon", "RssFile")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=11648, help="4 layers of it are just above 2 GiB")
    parser.add_argument(
        "--half", action="store_true", help="half of the neurons of all but the last layer are zero"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    kind = "half" if options.half else "full"
    source = options.folder / f"large-{options.layers}-{options.width}-{kind}.onnx"
    out = source.with_suffix(".exact.onnx")
    if options.child:
        child(source, out)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        make(source, options.layers, options.width, half=options.half)
    report(source, out, *watched([*sys.argv, "--child"]))


def make(path: Path, layers: int, width: int, *, half: bool) -> None:
    """Dense layers with Relu between them; weights go to the file a few rows at a time."""
    rng, data = np.random.default_rng(0), path.with_suffix(".data")
    nodes, tensors, value = [], [], "x"
    with open(data, "wb") as file:
        for i in range(layers):
            dead = slice(0, width // 2 if half and i + 1 < layers else 0)
            tensors.append(_external(f"w{i}", [width, width], data.name, file.tell()))
            for start in range(0, width, _ROWS):
                rows = rng.standard_normal((min(_ROWS, width - start), width), np.float32)
                rows *= np.float32(np.sqrt(2 / width))
                rows[:, dead] = 0
                file.write(rows.tobytes())
            tensors.append(_external(f"b{i}", [width], data.name, file.tell()))
            bias = rng.standard_normal(width, np.float32)
            bias[dead] = 0
            file.write(bias.tobytes())
            nodes.append(helper.make_node("MatMul", [value, f"w{i}"], [f"m{i}"]))
            nodes.append(helper.make_node("Add", [f"m{i}", f"b{i}"], [f"a{i}"]))
            nodes.append(helper.make_node("Relu", [f"a{i}"], [f"r{i}"]))
            value = f"r{i}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", width]) for n in ("x", value)]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)


def _external(name: str, dims: list[int], location: str, offset: int) -> TensorProto:
    """A tensor whose numbers are in a file, from `offset` on."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", 4 * int(np.prod(dims)))):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def child(source: Path, out: Path) -> None:
    """Load, run the chain, save; print the moments at which each begins and ends."""
    moments = [time.monotonic()]
    model = files.load(source)
    moments.append(time.monotonic())
    after, steps = run_passes(model, Recipe().chain, Reference(model, ()))
    moments.append(time.monotonic())
    files.save(after, out, force=True)
    moments.append(time.monotonic())
    told = {
        "edits": [f"{s.step} ({s.edits})" for s in steps if s.status == "applied"],
        "rolled back": [f"{s.step}: {s.reason}" for s in steps if s.status == "rolled back"],
        "slow steps": [f"{s.step} {s.seconds:.1f} s" for s in steps if s.seconds > 0.5],
    }
    print(json.dumps([moments, told]))


def watched(command: list[str]) -> tuple[list[float], dict[str, list[str]], Looks]:
    """Run a command of this file: what it tells, and the memory it had."""
    looks: Looks = []
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            if (look := _memory(process.pid)) is not None:
                looks.append((time.monotonic(), look))
            time.sleep(_PAUSE)
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"the chain failed with status {process.returncode}")
    moments, told = json.loads(said.splitlines()[-1])
    return moments, told, looks


def _memory(pid: int) -> dict[str, int] | None:
    """Bytes by field of /proc/PID/status, None once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = (line.split(":") for line in lines if line.startswith(_FIELDS))
    return {name: int(text.split()[0]) * 1024 for name, text in found} or None


def report(source: Path, out: Path, moments: list[float], told: dict[str, list[str]], looks: Looks) -> None:
    model = files.load(source)
    largest = max(t.nbytes for _, t in files.tensors(model))
    size = files.file_bytes(source) / 2**30
    print(f"{source.name}: {size:.2f} GiB, largest tensor {largest / 2**20:,.0f} MiB")
    print(f"bound: 1.3 x largest + 1 GiB = {(1.3 * largest + 2**30) / 2**20:,.0f} MiB")
    stages = ("load", "chain", "save")
    for stage, start, end in zip(stages, moments[:-1], moments[1:], strict=True):
        print(f"  {stage:6} {end - start:6.1f} s  {_peaks(looks, start, end)}")
    print(f"  all    {moments[-1] - moments[0]:6.1f} s  {_peaks(looks, 0, moments[-1])}")
    for what, steps in told.items():
        print(f"{what}: {', '.join(steps) or 'none'}")
    written = files.load(out)
    external = sum(isinstance(t, ir.ExternalTensor) for _, t in files.tensors(written))
    same = sorted(hashes(model)) == sorted(hashes(written))
    size = files.file_bytes(out) / 2**30
    print(f"written: {size:.2f} GiB, {external} external tensors, {'the same' if same else 'other'} weights")


def _peaks(looks: Looks, start: float, end: float) -> str:
    """The most of every kind of memory between two moments, in MiB."""
    own = [look for moment, look in looks if start <= moment <= end]
    most = {field: max((look.get(field, 0) for look in own), default=0) / 2**20 for field in _FIELDS}
    return (
        f"resident at most {most['VmRSS']:,.0f} MiB, anonymous {most['RssAnon']:,.0f}, "
        f"mapped files {most['RssFile']:,.0f}"
    )


def hashes(model: ir.Model) -> Iterator[str]:
    """SHA-256 of every tensor, read piece by piece."""
    for _, tensor in files.tensors(model):
        flat = tensor.numpy().reshape(-1).view(np.uint8)
        digest = hashlib.sha256(str(tensor.shape).encode())
        for start in range(0, len(flat), _CHUNK):
            digest.update(flat[start : start + _CHUNK].data)
        yield digest.hexdigest()


if __name__ == "__main__":
    main()
