"""Calibration tables: bound to a model, merged, written whole, read back or refused with a word."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from edgewise.calibration.sketch import Sketch
from edgewise.calibration.table import CalibrationTable
from edgewise.passes.fingerprint import fingerprint
from edgewise.runtime.errors import InputError


def sketch(seed: int) -> Sketch:
    return Sketch.of(np.random.default_rng(seed).standard_normal(500).astype(np.float32))


def table(seed: int = 0, *, names: tuple[str, ...] = ("x", "conv/out"), key: str = "abc") -> CalibrationTable:
    return CalibrationTable(key, 3, {name: sketch(seed + i) for i, name in enumerate(names)})


def test_merging_adds_samples_and_sketches() -> None:
    merged = table(0).merge(table(10))
    assert merged.samples == 6
    assert merged.sketches["conv/out"] == sketch(1) + sketch(11)
    assert merged == table(10).merge(table(0))


def test_tables_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(InputError, match="different models"):
        table().merge(table(key="other"))
    with pytest.raises(InputError, match="'extra'"):
        table().merge(table(names=("x", "conv/out", "extra")))


def test_a_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        table().sketches["x"] = Sketch()  # type: ignore[index]


def test_ranges_of_all_values() -> None:
    ranges = table().ranges("minmax")
    assert ranges == {
        "x": (sketch(0).minimum, sketch(0).maximum),
        "conv/out": (sketch(1).minimum, sketch(1).maximum),
    }
    symmetric = table().ranges("mse", bits=4, symmetric=True)["x"]
    assert symmetric[0] == -symmetric[1]


@pytest.mark.parametrize("names", [(), ("x",), ("x", "naïve/ü", "with space")])
def test_saving_and_loading_change_nothing(tmp_path: Path, names: tuple[str, ...]) -> None:
    path = table(names=names).save(tmp_path / "table.npz")
    assert CalibrationTable.load(path) == table(names=names)
    assert [p.name for p in tmp_path.iterdir()] == ["table.npz"]


def test_empty_and_non_finite_sketches_survive_saving(tmp_path: Path) -> None:
    odd = CalibrationTable(
        "abc", 1, {"never": Sketch(), "nan": Sketch.of(np.array([np.nan, np.inf], np.float32))}
    )
    assert CalibrationTable.load(odd.save(tmp_path / "odd")) == odd


def test_saving_replaces_and_keeps_the_name_as_given(tmp_path: Path) -> None:
    path = tmp_path / "table.cal"
    table(0).save(path)
    table(1).save(path)
    assert CalibrationTable.load(path) == table(1)


def test_a_table_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        table().save(tmp_path / "missing" / "table.npz")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        table().save(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_files_that_are_no_table_are_refused(tmp_path: Path) -> None:
    good = table().save(tmp_path / "good.npz").read_bytes()
    files = {
        "empty": b"",
        "text": b"not a table",
        "truncated": good[: len(good) // 2],
        "damaged": good[:300] + bytes(64) + good[364:],
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match="no calibration table"):
            CalibrationTable.load(tmp_path / name)
    with pytest.raises(InputError, match="no such calibration table"):
        CalibrationTable.load(tmp_path / "missing")


def test_archives_with_other_contents_are_refused(tmp_path: Path) -> None:
    table().save(tmp_path / "good.npz")
    good = dict(np.load(tmp_path / "good.npz"))
    changes: dict[str, dict[str, np.ndarray]] = {
        "no calibration table": {"counts": good["counts"][:-1]},
        "no calibration table, or": {"names": good["names"][:1]},
        "no calibration table, or a damaged": {"bins": good["bins"].astype(np.int64)},
        "has format 99": {"version": np.array(99)},
    }
    for message, change in changes.items():
        np.savez(tmp_path / "changed.npz", **{**good, **change})
        with pytest.raises(InputError, match=message):
            CalibrationTable.load(tmp_path / "changed.npz")


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "pickle.npz", version=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="no calibration table"):
        CalibrationTable.load(tmp_path / "pickle.npz")


def test_a_table_knows_its_model() -> None:
    def model(name: str) -> ir.Model:
        graph = f"g (float[1, 3] x) => (float[1, 3] {name}) {{ {name} = Relu(x) }}"
        return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {graph}'))

    mine = CalibrationTable(fingerprint(model("y")), 1, {})
    mine.check(model("y"))
    with pytest.raises(InputError, match="another model"):
        mine.check(model("z"))


def test_a_table_of_an_earlier_version_says_what_to_do(tmp_path: Path) -> None:
    table().save(tmp_path / "new.npz")
    old = {k: v for k, v in np.load(tmp_path / "new.npz").items() if k not in ("lows", "highs", "arrays")}
    np.savez(tmp_path / "old.npz", **{**old, "version": np.array(1)})
    with pytest.raises(InputError, match=r"has format 1, this edgewise reads 2: calibrate again"):
        CalibrationTable.load(tmp_path / "old.npz")


def test_sums_of_any_size_survive_saving(tmp_path: Path) -> None:
    ends = [np.array([-3e38, 1e-45], np.float32), np.array([3e38], np.float32)]
    wide = CalibrationTable("abc", 2, {"x": Sketch.of(ends[0]) + Sketch.of(ends[1])})
    loaded = CalibrationTable.load(wide.save(tmp_path / "wide.npz"))
    assert loaded == wide
    assert loaded.sketches["x"].highs == wide.sketches["x"].highs > 2**149


def test_a_table_can_be_sent_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(table())) == table()
