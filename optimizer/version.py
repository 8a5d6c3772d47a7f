"""The version that is written into reports and models."""

from __future__ import annotations

import importlib.metadata

VERSION = importlib.metadata.version("edgewise")
