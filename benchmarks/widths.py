"""What removing channels costs in speed when odd widths are left: `prune-channels` at several multiples.

python benchmarks/widths.py MODEL.onnx... prints, for each model, the speed relative to the input model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edgewise.optimizer import files
from edgewise.optimizer.pipeline import Reference, run_passes
from edgewise.optimizer.probe import probe_feeds
from edgewise.passes import EXACT_CHAIN, parse
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.latency import measure

MULTIPLES = (1, 2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--max-seconds", type=float, default=25.0)
    options = parser.parse_args()
    table = Table("model", *map(str, MULTIPLES), title="speed, by what widths are multiples of")
    for path in options.models:
        table.add_row(path.stem, *speeds(path, options.max_seconds))
    Console().print(table)


def speeds(path: Path, max_seconds: float) -> list[str]:
    """One paired run of the input and of what the chain makes of it at every multiple."""
    model = files.load(path)
    reference = Reference(model, probe_feeds(model, None))
    with tempfile.TemporaryDirectory() as folder:
        made = {"input": path}
        for multiple in MULTIPLES:
            after, _ = run_passes(model, [parse(spec) for spec in chain(multiple)], reference)
            made[str(multiple)] = files.save(after, Path(folder) / f"{multiple}.onnx")
        report = measure(
            made, feed=reference.feeds[0], conditions=Conditions(threads=1), max_seconds=max_seconds
        )
    return [f"{r.speedup:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in report.ratios]


def chain(multiple: int) -> list[str]:
    wanted = f"prune-channels{{multiple: {multiple}}}"
    return [wanted if spec.startswith("prune-channels") else spec for spec in EXACT_CHAIN]


if __name__ == "__main__":
    main()
