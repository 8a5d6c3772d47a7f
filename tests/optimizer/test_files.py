"""Every damage a model file can have gets its own line; nothing appears before it is whole."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgewise.optimizer import files
from edgewise.runtime.errors import InputError

Damage = Callable[[Path], None]


def external(path: Path, location: str = "net.data") -> None:
    """Move all weights of the model at `path` into a file beside it."""
    proto = onnx.load(path)
    onnx.save(proto, path, save_as_external_data=True, location="net.data", size_threshold=0)
    if location != "net.data":
        proto = onnx.load(path, load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                entry.value = location if entry.key == "location" else entry.value
        onnx.save(proto, path)


def poison(path: Path, name: str, value: float) -> None:
    proto = onnx.load(path)
    (tensor,) = [t for t in proto.graph.initializer if t.name == name]
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[0] = value
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, path)


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def missing_data(path: Path) -> None:
    external(path)
    (path.parent / "net.data").unlink()


def short_data(path: Path) -> None:
    external(path)
    cut(path.parent / "net.data", 0.5)


def long_data(path: Path) -> None:
    """A tensor that is said to go on where the next one begins."""
    external(path)
    proto = onnx.load(path, load_external_data=False)
    (entry,) = [e for e in proto.graph.initializer[0].external_data if e.key == "length"]
    entry.value = str(int(entry.value) + 4)
    onnx.save(proto, path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing": (lambda p: p.unlink(), "no such file"),
    "folder": (folder, "is a folder"),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "text": (lambda p: p.write_text("not a model, just words"), "no ONNX model"),
    "zeros": (lambda p: p.write_bytes(bytes(1000)), "no ONNX model"),
    "png": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + os.urandom(500)), "no ONNX model"),
    "html": (lambda p: p.write_text("<!DOCTYPE html><html>404 not found</html>"), "no ONNX model"),
    "truncated": (lambda p: cut(p, 0.7), "damaged"),
    "truncated early": (lambda p: cut(p, 0.02), "no ONNX model"),
    "external data missing": (missing_data, "net.data is missing"),
    "external data short": (short_data, "ends before tensor"),
    "external data of another length": (long_data, "bytes of external data"),
    "external data above": (lambda p: external(p, "../net.data"), "outside the model's folder"),
    "external data absolute": (lambda p: external(p, "/etc/passwd"), "outside the model's folder"),
    "NaN weight": (lambda p: poison(p, "conv_w", np.nan), "'conv_w' holds NaN"),
    "infinite weight": (lambda p: poison(p, "fc_w", np.inf), "'fc_w' holds NaN or infinity"),
    "NaN variance": (lambda p: poison(p, "variance", np.nan), "'variance' holds NaN"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_in_one_line(model_path: Path, kind: str) -> None:
    damage, message = DAMAGES[kind]
    damage(model_path)
    with pytest.raises(InputError, match=message) as caught:
        files.load(model_path)
    assert "\n" not in str(caught.value)
    assert "net" in str(caught.value)


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.9, 0.99])
def test_no_truncation_escapes(model_path: Path, keep: float) -> None:
    cut(model_path, keep)
    with pytest.raises(InputError):
        files.load(model_path)


def test_flipped_bytes_load_or_are_an_input_error(model_path: Path) -> None:
    """Whatever is flipped, no other exception comes out. Some flips still make a model."""
    good = model_path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        bad = bytearray(good)
        for place in rng.integers(0, 400, 3):
            bad[place] = int(rng.integers(0, 256))
        model_path.write_bytes(bytes(bad))
        try:
            files.load(model_path)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017 - any outcome but another exception is right


def test_external_data_is_read_and_saved_inside(model_path: Path, tmp_path: Path) -> None:
    whole = files.load(model_path)
    external(model_path)
    size = model_path.stat().st_size + (tmp_path / "net.data").stat().st_size
    assert files.file_bytes(model_path) == size
    out = files.save(files.load(model_path), tmp_path / "out.onnx")
    again = files.load(out)
    assert not [t for t in again.graph.initializers.values() if isinstance(t.const_value, ir.ExternalTensor)]
    for name, value in whole.graph.initializers.items():
        np.testing.assert_array_equal(
            value.const_value.numpy(), again.graph.initializers[name].const_value.numpy()
        )


def test_a_hard_link_to_external_data_is_no_crash(model_path: Path, tmp_path: Path) -> None:
    """Package managers and backups hard-link files; the data is where the model says it is."""
    external(model_path)
    os.link(tmp_path / "net.data", tmp_path / "other.data")
    with pytest.raises(InputError, match=r"net\.data"):
        files.load(model_path)


def test_external_data_in_a_relative_path(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    external(model_path)
    monkeypatch.chdir(model_path.parent)
    assert files.load("net.onnx").graph.outputs[0].name == "scores"


def test_more_than_one_file_holds_is_external(
    model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_ONE_FILE_LIMIT", 100)
    out = files.save(model, tmp_path / "big.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    loaded = files.load(out)
    np.testing.assert_array_equal(
        loaded.graph.initializers["conv_w"].const_value.numpy(),
        model.graph.initializers["conv_w"].const_value.numpy(),
    )
    # The model in memory still reads its own tensors, not the file that was written.
    out.unlink()
    (tmp_path / "big.onnx.data").unlink()
    assert np.isfinite(model.graph.initializers["conv_w"].const_value.numpy()).all()


def test_saving_over_the_data_in_use(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may be written over the external data its own tensors are mapped from."""
    monkeypatch.setattr(files, "_ONE_FILE_LIMIT", 100)
    files.save(files.load(model_path), tmp_path / "a.onnx")
    model = files.load(tmp_path / "a.onnx")
    before = model.graph.initializers["conv_w"].const_value.numpy().copy()
    files.save(model, tmp_path / "a.onnx", force=True)
    after = files.load(tmp_path / "a.onnx").graph.initializers["conv_w"].const_value.numpy()
    np.testing.assert_array_equal(before, after)


def test_infinite_constants_that_are_no_weights_are_fine(tmp_path: Path) -> None:
    """Attention masks add minus infinity."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x) => (float[2] y) <float[2] mask = {0, -inf}> { y = Add (x, mask) }
    """.replace("-inf", "0")
    proto = onnx.parser.parse_model(text)
    mask = onnx.numpy_helper.from_array(np.array([0, -np.inf], np.float32), "mask")
    proto.graph.initializer[0].CopyFrom(mask)
    onnx.save(proto, tmp_path / "m.onnx")
    files.load(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("net.onnx", "exists"),
        ("", "is a folder"),
        ("nowhere/out.onnx", "there is no folder"),
        ("net.onnx/out.onnx", "there is no folder"),
    ],
)
def test_targets_that_cannot_be_written(
    model: ir.Model, model_path: Path, tmp_path: Path, target: str, message: str
) -> None:
    before = model_path.read_bytes()
    with pytest.raises(InputError, match=message):
        files.save(model, tmp_path / target)
    assert model_path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(model: ir.Model, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(InputError, match="permission"):
        files.save(model, closed / "out.onnx")


def write_half(path: Path, error: BaseException) -> None:
    with files.write_folder(path, force=True) as scratch:
        (scratch / path.name).write_bytes(b"half")
        raise error


def test_a_failed_write_leaves_the_old_file_and_nothing_else(model_path: Path, tmp_path: Path) -> None:
    before = model_path.read_bytes()
    with pytest.raises(InputError, match="No space left"):
        write_half(model_path, OSError(28, "No space left on device"))
    assert model_path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "a", KeyboardInterrupt())
    assert not list(tmp_path.iterdir())


def test_the_input_is_never_the_output(model_path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.onnx"
    link.symlink_to(model_path)
    for target in (model_path, link):
        with pytest.raises(InputError, match="never touched"):
            files.check_writable(target, force=True, source=model_path)


def test_force_replaces(model: ir.Model, model_path: Path) -> None:
    model.graph.name = "other"
    files.save(model, model_path, force=True)
    assert files.load(model_path).graph.name == "other"


def test_text_is_written_whole(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a.txt", "größer", force=False)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "größer"
    with pytest.raises(InputError, match="exists"):
        files.write_text(tmp_path / "a.txt", "", force=False)


def test_the_written_file_is_as_open_as_any_other(model: ir.Model, tmp_path: Path) -> None:
    """A temporary folder is private; what is moved out of it must not be."""
    out = files.save(model, tmp_path / "out.onnx")
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert out.stat().st_mode == plain.stat().st_mode


def test_a_nan_beyond_the_first_piece_is_seen(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PIECE", 1)
    proto = onnx.load(model_path)
    (tensor,) = [t for t in proto.graph.initializer if t.name == "conv_w"]
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[-1] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, "conv_w"))
    onnx.save(proto, model_path)
    with pytest.raises(InputError, match="conv_w"):
        files.load(model_path)


def test_external_data_is_mapped_only_while_it_is_looked_at(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large tensors, that is; whoever holds an array can go on reading it."""
    monkeypatch.setattr(files, "_SMALL", 0)
    inside = onnx.numpy_helper.to_array(
        next(t for t in onnx.load(model_path).graph.initializer if t.name == "conv_w")
    )
    external(model_path)
    tensor = files.load(model_path).graph.initializers["conv_w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    array = tensor.numpy()
    np.testing.assert_array_equal(array, inside)
    assert array.dtype == inside.dtype
    mapped = weakref.ref(array.base)
    assert not array.flags.writeable
    assert tensor.raw is None
    del array
    assert mapped() is None
