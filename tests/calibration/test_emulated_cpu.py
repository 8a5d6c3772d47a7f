"""On a processor without VNNI, which qemu emulates: a plain int8 file breaks, the repaired one does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from quantized import decibels, inserted, planned, run
from rewrites import build

from edgewise.calibration.emulation import Emulator
from edgewise.calibration.saturation import portable, saturation, unsigned_weights
from edgewise.calibration.target import X86_VNNI
from edgewise.runtime.evaluate import Array
from edgewise.runtime.session import serialize

RNG = np.random.default_rng(0)
QEMU = shutil.which("qemu-x86_64")
PROGRAM = """
import sys
import numpy, onnxruntime
feed = dict(numpy.load("feed.npz"))
for name in sys.argv[1:]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(name + ".onnx", options, providers=["CPUExecutionProvider"])
    numpy.save(name + ".npy", session.run(None, feed)[0])
"""


def net() -> ir.Model:
    """Three layers of positive weights, as large side by side as alone: every channel saturates."""
    shapes = {"u": (16, 16, 3, 3), "v": (16, 16, 1, 1), "w": (16, 8)}
    weights = {n: (RNG.random(s) / s[1]).astype(np.float32) for n, s in shapes.items()}
    graph = """g (float[N, 16, 8, 8] x) => (float[N, 8] y) {
        a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, u)
        b = Relu (a)
        c = Conv <kernel_shape = [1, 1]> (b, v)
        d = GlobalAveragePool (c)
        e = Flatten (d)
        y = MatMul (e, w)
    }"""
    return build(graph, **weights)


def run_without_vnni(folder: Path, models: dict[str, ir.Model], feed: dict[str, Array]) -> dict[str, Array]:
    """The outputs of every model in onnxruntime on a Haswell."""
    for name, model in models.items():
        (folder / f"{name}.onnx").write_bytes(serialize(model))
    np.savez(folder / "feed.npz", **feed)  # type: ignore[arg-type]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    command = [str(QEMU), "-cpu", "Haswell", sys.executable, "-B", "-c", PROGRAM, *models]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | one_thread,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: np.load(folder / f"{name}.npy") for name in models}


@pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 is not installed: no processor to emulate")
def test_plain_file_breaks_without_vnni_and_the_repaired_does_not(tmp_path: Path) -> None:
    model = net()
    samples = [{"x": RNG.random((1, 16, 8, 8)).astype(np.float32)} for _ in range(8)]
    plan = planned(model, X86_VNNI, samples)
    repaired = portable(plan, saturation(model, plan, samples, threads=1))
    models = {"plain": inserted(model, plan), "repaired": inserted(model, repaired)}
    feed = {"x": RNG.random((16, 16, 8, 8)).astype(np.float32)}
    there = run_without_vnni(tmp_path, models, feed)
    expected = run(model, feed)
    vnni = {
        name: run(inserted(model, unsigned_weights(p, model)), feed)
        for name, p in {"plain": plan, "repaired": repaired}.items()
    }
    assert decibels(expected, vnni["plain"]) > 15
    assert decibels(expected, there["plain"]) < 0  # nothing of the signal is left
    assert decibels(expected, there["repaired"]) > decibels(expected, vnni["plain"]) - 6  # of 8 bits, one
    np.testing.assert_allclose(there["repaired"], vnni["repaired"], rtol=1e-6)
    for name, made in models.items():
        np.testing.assert_allclose(there[name], Emulator(made, threads=1).run(feed)["y"], rtol=1e-6)
