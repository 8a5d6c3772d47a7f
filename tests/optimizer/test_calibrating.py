"""`edgewise calibrate` as a command: memory, workers, tables merged, interruptions, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgewise.calibration.table import CalibrationTable
from edgewise.optimizer import cli


@pytest.fixture(autouse=True)
def _work(model_path: Path, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """net.onnx and its samples, whole and in two parts."""
    np.savez(tmp_path / "all.npz", image=images[:24])
    np.savez(tmp_path / "first.npz", image=images[:9])
    np.savez(tmp_path / "rest.npz", image=images[9:24])
    (tmp_path / "recipe.yaml").write_text("benchmark: null\nthreads: 1\n")
    monkeypatch.chdir(tmp_path)


def run(command: str) -> int:
    return cli.run([*command.split()])


def calibrate(data: str, table: str, options: str = "") -> CalibrationTable:
    command = f"calibrate net.onnx --data {data}.npz -o {table}.npz --recipe recipe.yaml {options}"
    assert run(command) == 0
    return CalibrationTable.load(f"{table}.npz")


def test_merged_tables_are_the_table_of_all_samples(capsys: pytest.CaptureFixture[str]) -> None:
    whole = calibrate("all", "whole")
    calibrate("first", "a")
    calibrate("rest", "b")
    for order in ("a.npz b.npz", "b.npz a.npz"):
        assert run(f"calibrate --merge {order} -o merged.npz --force") == 0
        assert Path("merged.npz").read_bytes() == Path("whole.npz").read_bytes()
        out = " ".join(capsys.readouterr().out.split())
        assert whole.digest in out
        assert "24 from" in out


@pytest.mark.parametrize("options", ["--memory 0.001", "--memory 1M", "--workers 2"])
def test_memory_and_workers_do_not_show(options: str) -> None:
    assert calibrate("all", "t", options).digest == calibrate("all", "plain").digest


def test_an_interrupted_command_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgewise.calibration import partial
    from edgewise.calibration.sharding import Alone

    class Interrupted(Alone):
        def send(self, worker: int, positions: np.ndarray) -> None:
            if positions[0] > 0:
                raise KeyboardInterrupt
            super().send(worker, positions[:5])

    with monkeypatch.context() as patch:
        patch.setattr("edgewise.optimizer.jobs.crew_of", lambda *_: Interrupted)
        assert run("calibrate net.onnx --data all.npz -o t.npz --recipe recipe.yaml") == 130
    assert partial.Partial.load(Path("t.npz.part")).done.sum() == 5
    capsys.readouterr()
    assert calibrate("all", "t").digest == calibrate("all", "plain").digest
    assert "went on from t.npz.part: it held 5 of 24 samples" in " ".join(capsys.readouterr().out.split())
    assert not Path("t.npz.part").exists()


def test_trouble_in_the_samples_is_told(images: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("all.npz", image=np.zeros_like(images[:4]))
    calibrate("all", "t")
    out = " ".join(capsys.readouterr().out.split())
    assert "one number and nothing else was seen in" in out
    assert "image (0)" in out
    assert "percentile ranges want 20000 elements" in out


REFUSED = {
    "calibrate net.onnx -o t.npz": "takes one MODEL and --data",
    "calibrate net.onnx net.onnx --data all.npz -o t.npz": "takes one MODEL and --data",
    "calibrate --merge all.npz first.npz -o t.npz": "all.npz is no calibration table",
    "calibrate --merge missing.npz -o t.npz": "missing.npz: no such calibration table",
    "calibrate --merge missing.npz -o recipe.yaml": "exists",
    "calibrate net.onnx --data all.npz -o t.npz --workers 0": "--workers",
    "calibrate net.onnx --data all.npz -o t.npz --memory lots": "no size such as",
    "calibrate net.onnx --data all.npz -o t.npz --memory 4K": "no size such as",
}


@pytest.mark.parametrize("command", REFUSED)
def test_bad_input_is_refused_with_a_word(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command) == 2
    assert REFUSED[command] in capsys.readouterr().err
    assert not Path("t.npz").exists()


def test_tables_of_two_models_do_not_merge(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate("all", "a")
    loaded = CalibrationTable.load("a.npz")
    CalibrationTable("another", loaded.samples, loaded.sketches).save("b.npz")
    assert run("calibrate --merge a.npz b.npz -o t.npz") == 2
    assert "different models" in capsys.readouterr().err
