"""The machine's peaks: that they are there, plausible, and read back."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from edgewise.runtime import peaks as module
from edgewise.runtime.peaks import Peaks, measure_peaks, measure_peaks_isolated
from edgewise.runtime.session import PROVIDERS, ProviderError, import_onnxruntime

PEAKS = Peaks("cpu", 1, 80.0, 170.0, 16.0, 17.0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CPU_SIZE", 128)
    monkeypatch.setattr(module, "_CPU_BYTES", 2**18)


@pytest.mark.usefixtures("small")
def test_the_cpu_has_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = measure_peaks("cpu", 1)
    rates = (found.float_gflops, found.int8_gops, found.float_copy_gbps, found.int8_copy_gbps)
    assert all(rate is not None and 0.01 < rate < 1e5 for rate in rates)
    assert (found.provider, found.threads) == ("cpu", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
def test_an_operator_that_does_not_run_has_none() -> None:
    model = module._product("MatMul", np.ones((4, 4), np.float32), np.ones((4, 4), np.float32))
    assert module._fastest(model, np.ones((4, 5), np.float32), "cpu", 1) is None


def test_in_a_process_of_its_own() -> None:
    found = measure_peaks_isolated("cpu", 1)
    assert found.float_gflops is not None
    assert found.float_gflops > 0.1


def test_by_type() -> None:
    assert [PEAKS.operations(t) for t in ("float32", "uint8", "int8", "float16")] == [80, 170, 170, None]
    assert [PEAKS.copy(t) for t in ("float32", "uint8", "int64")] == [16, 17, 16]


def test_as_json() -> None:
    assert Peaks.from_dict(json.loads(json.dumps(PEAKS.to_dict()))) == PEAKS


def test_a_provider_that_is_not_there() -> None:
    here = import_onnxruntime().get_available_providers()
    missing = next(short for short, (name, _) in PROVIDERS.items() if name not in here)
    with pytest.raises(ProviderError, match="pip install"):
        measure_peaks(missing)
    with pytest.raises(ProviderError, match="pip install"):
        measure_peaks_isolated(missing)


def test_on_a_gpu() -> None:
    if "CUDAExecutionProvider" not in import_onnxruntime().get_available_providers():
        pytest.skip("no GPU: onnxruntime here has no CUDA")
    found = measure_peaks_isolated("cuda")
    assert found.float_gflops is not None
    assert found.float_gflops > 100
