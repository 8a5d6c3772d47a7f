"""How much faster image generators become while their images stay what they are.

The generators that edgewise ships, trained on digits, pruned on latents and judged on others by the peak
signal-to-noise ratio against the images of the original. Beside them `quantize_static` by its defaults.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from corpus import Array
from int8_files import theirs as uniform
from int8_jobs import Row, Setting
from int8_latency import raced
from int8_nets import CALIBRATE, JUDGE, Net
from prune_files import left, ours
from uniform_int8 import DEFAULTS

from edgewise.models.generators import GENERATORS, load_generator
from edgewise.optimizer import files
from edgewise.optimizer.image_metrics import psnr
from edgewise.optimizer.torch_export import to_model
from edgewise.runtime.evaluate import Evaluator

_DECIBELS, _FASTER = 30.0, 2.0
_EFFORT = 0.15  # which makes it minutes for a generator
_LATENTS, _JUDGES = 4096, 256
_STATIC = "quantize_static"


def generator(name: str, folder: Path) -> Net:
    """One of `GENERATORS` as an .onnx file, with latents."""
    path, facts = folder / f"{name}.onnx", GENERATORS[name]
    if not path.exists():
        files.save(to_model(load_generator(name), facts.inputs), path)

    def latents(part: str) -> Iterator[Mapping[str, Array]]:
        drawn = facts.feed(_LATENTS, seed=0 if part == CALIBRATE else 1)
        return ({key: array[i : i + 1] for key, array in drawn.items()} for i in range(_LATENTS))

    return Net(name, path, latents)


def generator_rows(name: str, setting: Setting) -> list[Row]:
    """A line for edgewise in float, one for float or int8 as it sees fit, and one for the rival."""
    net = generator(name, setting.folder)
    by = {"metric": "psnr", "min_metric": _DECIBELS, "effort": _EFFORT}
    made = {
        "edgewise, float": ours(net, setting, "pruned", **by),
        "edgewise, int8 too": ours(net, setting, "together", int8=True, **by),
    }
    paths = {key: m.path for key, m in made.items() if not m.failure}
    if setting.rivals:
        feeds = net.feeds(CALIBRATE, _JUDGES)
        (static,) = uniform(net.path, feeds, [DEFAULTS], setting, "generators")
        paths |= {} if static.failure else {_STATIC: static.path}
    judges = net.feeds(JUDGE, _JUDGES)
    report = raced({"float": net.path, **paths}, judges[0], setting, setting.max_seconds)
    failed: list[Row] = [
        {"model": name, "file": key, "failure": m.failure} for key, m in made.items() if m.failure
    ]
    rows: list[Row] = []
    for ratio in report.ratios:
        quality = decibels(net.path, paths[ratio.name], judges)
        rows.append(
            {
                "model": name,
                "file": ratio.name,
                **left(net.path, paths[ratio.name]),
                "PSNR dB": quality,
                "x": ratio.speedup,
                "interval": f"{ratio.low:.2f} - {ratio.high:.2f}",
                "reached": None
                if ratio.name == _STATIC
                else ratio.speedup >= _FASTER and quality >= _DECIBELS,
            }
        )
    return rows + failed


def decibels(original: Path, after: Path, judges: Sequence[Mapping[str, Array]]) -> float:
    """The peak signal-to-noise ratio of the images, as `--metric psnr` has it."""
    before, now = ([Evaluator(path).run(feed) for feed in judges] for path in (original, after))
    joined = (
        {key: np.concatenate([out[key] for out in found]) for key in found[0]} for found in (now, before)
    )
    return float(psnr(*joined, None))


def generator_summary(rows: Sequence[Row]) -> list[str]:
    """Which generators are fast enough and good enough, by any of edgewise's files."""
    good = {str(row["model"]) for row in rows if row.get("reached")}
    short = dict.fromkeys(str(row["model"]) for row in rows if row["model"] not in good)
    missed = f"{len(good)} of {len(good) + len(short)}; missed: {', '.join(short) or 'none'}"
    return [f"{_FASTER:.0f}x at {_DECIBELS:.0f} dB: {missed}"]
