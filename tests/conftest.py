"""What all tests share: where the corpus of real models is, if it is anywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of real models and data named by EDGEWISE_CORPUS."""
    folder = os.environ.get("EDGEWISE_CORPUS")
    if not folder:
        pytest.skip("EDGEWISE_CORPUS is not set: no real models to test on")
    return Path(folder)
