"""Graphs collected from the tests of runtimes, some broken on purpose: right, or a clear error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgewise.optimizer.files import load
from edgewise.optimizer.pipeline import Reference, run_passes
from edgewise.optimizer.probe import probe_feeds
from edgewise.optimizer.recipe import Recipe
from edgewise.runtime.errors import InputError

SHARDS = 16


def graphs() -> list[Path]:
    folder = os.environ.get("EDGEWISE_CORPUS")
    return sorted((Path(folder) / "graphs").rglob("*.onnx")) if folder else []


def outcome(path: Path) -> str:
    """Run the exact chain, strictly; what went wrong, or nothing.

    `InputError` is the clear error: the file cannot be read, or onnxruntime cannot run the original. A
    step that was rolled back is right: onnxruntime has fusions that break valid graphs.
    """
    try:
        model = load(path)
        reference = Reference(model, probe_feeds(model, None), threads=1)
    except InputError as error:
        return "" if str(error) and "\n" not in str(error) else f"{path.name}: unclear error {error}"
    after, _ = run_passes(model, Recipe().chain, reference, strict=True)
    error = reference.error_of(after)
    return f"{path.name}: {error}" if error > reference.tolerance else ""


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_graphs_stay_right(shard: int, corpus: Path) -> None:
    found = graphs()
    assert len(found) > 500
    assert [text for path in found[shard::SHARDS] if (text := outcome(path))] == []
