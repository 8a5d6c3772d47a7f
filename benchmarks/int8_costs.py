"""What int8 costs: time and memory of calibration, the whole command, and what other CPUs lose."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import calibration_cost
import numpy as np
import portable
from corpus import Classifier
from int8_files import theirs
from int8_jobs import Row, Setting
from int8_nets import CALIBRATE, Net

from edgewise.calibration.ranges import METHODS

_FEW, _MANY = 16, 64
_SAMPLES = 64
_EMULATED = 100  # images
_RECIPES = ("QDQ u8s8 channel 7 bits", "QDQ u8u8 channel Percentile", "QDQ u8u8 channel Entropy")


def calibration_rows(net: Net, setting: Setting) -> list[Row]:
    """Time over plain inference and peak memory, for every method of edgewise's and of onnxruntime's."""
    path = calibration_cost.prepared(net.path, setting.folder)
    plain = {count: calibration_cost.measure(path, "plain", "", count) for count in (_FEW, _MANY)}
    runs = [("plain", "", _MANY), *(("edgewise", method, _MANY) for method in METHODS)]
    runs += [("onnxruntime", method, _FEW) for method in calibration_cost.PEERS]
    rows: list[Row] = []
    for tool, method, more in runs:
        few = calibration_cost.measure(path, tool, method, _FEW)
        many = few if more == _FEW else calibration_cost.measure(path, tool, method, more)
        about = {"model": net.title or net.name, "tool": tool, "method": method, "samples": more}
        figures = {"x plain": many[0] / plain[more][0], "peak MB": many[1], f"peak MB at {_FEW}": few[1]}
        rows.append({**about, **figures})
    return rows


def calibration_summary(rows: Sequence[Row]) -> list[str]:
    """The slowest method and the largest memory."""
    mine = [row for row in rows if row["tool"] == "edgewise"]
    if not mine:
        return []
    slowest, largest = max(row["x plain"] for row in mine), max(row["peak MB"] for row in mine)
    return [
        f"slowest method of edgewise: {slowest:.2f} x plain inference (reach: 2.0)",
        f"largest peak memory of edgewise: {largest:,.0f} MB (reach: 1,000 on ResNet-50)",
    ]


def command_rows(net: Net, setting: Setting) -> list[Row]:
    """Seconds of the whole `edgewise quantize` with 64 samples, on all cores, and of the rivals' scripts."""
    feeds = net.feeds(CALIBRATE, _SAMPLES)
    data = setting.folder / f"{net.name}-{len(feeds)}.npz"
    np.savez(data, **{name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]})
    rows = [command(net, data, options, setting) for options in ((), ("--fast",))]
    for recipe in _RECIPES:
        start = time.perf_counter()
        (made,) = theirs(net.path, feeds, [recipe], setting, "command")
        rows.append(_command_row(net, f"quantize_static {recipe}", time.perf_counter() - start, made.failure))
    return rows


def command(net: Net, data: Path, options: Sequence[str], setting: Setting) -> Row:
    """The installed command, from start to end."""
    tool, out = Path(sys.executable).with_name("edgewise"), setting.folder / f"{net.name}.command.onnx"
    line = [str(tool), "quantize", str(net.path), "-o", str(out), "--data", str(data), "--force", *options]
    start = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    why = (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else ""
    return _command_row(net, " ".join(["edgewise quantize", *options]), seconds, why)


def _command_row(net: Net, what: str, seconds: float, failure: str) -> Row:
    return {"model": net.title or net.name, "command": what, "seconds": seconds, "failure": failure}


_PORTABLE = (
    "model",
    "file",
    "widened",
    "VNNI top-1 %",
    "its dB",
    "no VNNI top-1 %",
    "no VNNI dB",
    "lost",
    "s",
)


def portable_rows(classifier: Classifier, setting: Setting) -> list[Row]:
    """What CPUs without VNNI lose; where this one has it, by fewer images in emulated integers."""
    emulate = 0 if portable.saturates_here() else _EMULATED
    options = argparse.Namespace(samples=setting.samples, images=setting.images, emulate=emulate)
    return [dict(zip(_PORTABLE, row, strict=True)) for row in portable.rows(classifier, options)]


def portable_summary(rows: Sequence[Row]) -> list[str]:
    """The largest loss after the repair."""
    lost = [float(row["lost"]) for row in rows if row["file"] == "portable"]
    return [f"largest loss after portable: {max(lost):+.2f} points (reach: 0.2)"] if lost else []
