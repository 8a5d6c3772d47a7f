"""Results that took long, kept between runs as small JSON files; without them all works the same, slower."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgewise.optimizer.version import VERSION

_VARIABLE = "EDGEWISE_CACHE"


def folder() -> Path | None:
    """Where results are kept: $EDGEWISE_CACHE, else `edgewise` in $XDG_CACHE_HOME or ~/.cache.

    None where EDGEWISE_CACHE is set to nothing, or no home is known: then nothing is kept.
    """
    if _VARIABLE in os.environ:
        chosen = os.environ[_VARIABLE]
        return Path(chosen) if chosen else None
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # the convention wants a relative one to be ignored
        return Path(shared) / "edgewise"
    try:
        return Path.home() / ".cache" / "edgewise"
    except RuntimeError:
        return None


def key_of(kind: str, *parts: str | bytes) -> str:
    """A name for the result of a `kind` of question about `parts`, by this version of edgewise."""
    digest = hashlib.sha256()
    for part in (VERSION, *parts):
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return f"{kind}-{digest.hexdigest()}"


def load(key: str) -> dict[str, Any] | None:
    """What was stored under `key`, or None where nothing is, or nothing that can be read."""
    root = folder()
    if root is None:
        return None
    try:
        data = json.loads((root / f"{key}.json").read_text("utf-8"))
    except (OSError, ValueError):  # the latter from bytes that are no UTF-8, or no JSON
        return None
    return data if isinstance(data, dict) else None


def store(key: str, data: Mapping[str, Any]) -> None:
    """Keep `data`, plain JSON, for the next `load`; where it cannot be written, it is not kept."""
    root = folder()
    if root is None:
        return
    text = json.dumps(data)
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=root, suffix=".tmp")
    except OSError:
        return
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(unfinished, root / f"{key}.json")
    except OSError:
        os.unlink(unfinished)
