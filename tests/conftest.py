"""What all tests share: where the corpus of real models is, if it is anywhere."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell's background jobs inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Workers share the cores: each is given one, or threads that wait for work keep another worker from its own.
os.environ["OMP_NUM_THREADS"] = "1"

# The gate must not depend on luck; --hypothesis-profile=explore looks for examples that nobody saw yet.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured in another run must not answer for this one."""
    monkeypatch.setenv("EDGEWISE_CACHE", "")


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of real models and data named by EDGEWISE_CORPUS."""
    folder = os.environ.get("EDGEWISE_CORPUS")
    if not folder:
        pytest.skip("EDGEWISE_CORPUS is not set: no real models to test on")
    return Path(folder)


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order(request: pytest.FixtureRequest) -> None:
    """A test file's random numbers start anew in each test: it sees the same whatever ran before it."""
    rng = getattr(request.module, "RNG", None)
    if isinstance(rng, np.random.Generator):
        rng.bit_generator.state = np.random.default_rng(0).bit_generator.state
