"""What is installed is what is in the folders: every module, every data file, and the types."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("runtime", "passes", "calibration", "training", "training/operators", "optimizer", "models")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel built through the source distribution, so that no stale build folder leaks in."""
    out = tmp_path_factory.mktemp("dist")
    # setuptools is in the test environment, so that the build needs no network.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_holds_every_module(wheel: set[str], package: str) -> None:
    modules = {f"edgewise/{p.relative_to(ROOT)}" for p in (ROOT / package).glob("**/*.py")}
    assert modules
    assert modules <= wheel
    assert f"edgewise/{package}/py.typed" in wheel


@pytest.mark.parametrize(("folder", "suffixes"), [("models", {".npz", ".json"}), ("optimizer/page", {".j2"})])
def test_wheel_holds_the_demo_model_and_the_page(wheel: set[str], folder: str, suffixes: set[str]) -> None:
    data = {f"edgewise/{folder}/{p.name}" for p in (ROOT / folder).iterdir() if p.suffix in suffixes}
    assert data
    assert data <= wheel


def test_wheel_holds_nothing_else(wheel: set[str]) -> None:
    assert all(name.startswith(("edgewise/", "edgewise-")) for name in wheel)
    assert not any("tests/" in name or "benchmarks/" in name for name in wheel)
