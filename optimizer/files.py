"""Model files: read with every defect named, written beside the target and renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from google.protobuf.message import DecodeError

from edgewise.optimizer import stream
from edgewise.passes.base import PassError
from edgewise.passes.verify import Signature, check
from edgewise.runtime.errors import InputError
from edgewise.runtime.session import weight_bytes

_ONE_FILE_LIMIT = int(1.9 * 2**30)  # protobuf stops at 2 GiB; the graph itself needs some of it
_PIECE = 2**22  # numbers
_SMALL = 2**20  # bytes: what is not worth a map of its own
_WEIGHTED_OPS = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "LSTM", "GRU", "RNN", "Gather"}
)
_DAMAGES = (DecodeError, ValueError, TypeError, KeyError, RuntimeError, AssertionError)


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read an .onnx file; external data is mapped, not read.

    Raises `InputError` on a file that is missing, empty, truncated or no ONNX model, on external data
    that is missing, too short or outside the model's folder, and on weights that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file" if not path.exists() else f"{path} is a folder, not a model")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty: export or copy it again")
    try:
        model = ir.load(path)
        _map_anew(model)
        model.graph.sort()  # runtimes take nodes in any order, passes do not
        check(model, Signature.of(model))
        for value, tensor in tensors(model):
            _check_tensor(path, value, tensor)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (*_DAMAGES, PassError) as error:
        raise InputError(f"{path} {_diagnosis(error)}") from error
    if not model.graph.outputs:
        raise InputError(f"{path} is no ONNX model: it has no outputs")
    return model


def _diagnosis(error: BaseException) -> str:
    """One line from the error at the root."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, NotImplementedError):
        return f"holds what edgewise cannot read: {text.split('. ')[0]}"
    return f"is no ONNX model, or a damaged one ({text[:120]}): export or copy it again"


class _MappedTensor(ir.ExternalTensor):
    """External data that is mapped for as long as somebody holds the array, and not from then on.

    What was read of a mapped file counts as memory of the process until it is unmapped.
    """

    __slots__ = ()

    def numpy(self) -> npt.NDArray[Any]:
        if self.dtype.bitwidth < 8 or self.nbytes < _SMALL:
            return super().numpy()
        self._check_validity()
        self._check_path_containment()
        kind = np.dtype(self.dtype.numpy()).newbyteorder("<")
        mapped = np.memmap(self.path, kind, "r", self.offset or 0, self.shape.numpy())
        return mapped.view(np.ndarray)


def _map_anew(model: ir.Model) -> None:
    """Let external data of the initializers be mapped only where it is looked at."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            held = value.const_value
            if isinstance(held, ir.ExternalTensor):
                value.const_value = _MappedTensor(
                    held.location,
                    held.offset,
                    held.length,
                    held.dtype,
                    shape=held.shape,
                    name=held.name,
                    doc_string=held.doc_string,
                    metadata_props=held.metadata_props,
                    base_dir=held.base_dir,
                )


def tensors(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Every initializer and constant in an attribute, with the value that holds it."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value
        for node in graph:
            for attr in node.attributes.values():
                if attr.type == ir.AttributeType.TENSOR and not attr.is_ref():
                    yield node.outputs[0], attr.as_tensor()


def _check_tensor(path: Path, value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """A tensor must hold as many numbers as it says, and a weight finite ones: attention masks are not."""
    if isinstance(tensor, ir.ExternalTensor):
        _check_external(path, tensor)
    array = tensor.numpy()
    if tensor.dtype.is_floating_point() and _is_weight(value) and not _is_finite(array):
        raise InputError(
            f"{path}: weight {value.name!r} holds NaN or infinity: train or export the model again"
        )


def _is_finite(array: npt.NDArray[Any]) -> bool:
    """Looked at piece by piece, for every look takes memory of its own."""
    flat = array.reshape(-1)
    return all(np.isfinite(flat[i : i + _PIECE]).all() for i in range(0, flat.size, _PIECE))


def _check_external(path: Path, tensor: ir.ExternalTensor) -> None:
    """External data must lie in the model's folder (ONNX specification, external data) and be complete."""
    folder = path.resolve().parent
    data = (folder / os.fspath(tensor.location)).resolve()
    if not data.is_relative_to(folder):
        raise InputError(
            f"{path}: the external data of {tensor.name!r} lies outside the model's folder: {data}"
        )
    if not data.is_file():
        raise InputError(f"{path}: external data {data.name} is missing; put it beside the model")
    length = tensor.nbytes if tensor.length is None else tensor.length
    if length != tensor.nbytes:
        raise InputError(
            f"{path}: tensor {tensor.name!r} has {length} bytes of external data, and its shape "
            f"{tensor.nbytes}; export it again"
        )
    if data.stat().st_size < (tensor.offset or 0) + length:
        raise InputError(
            f"{path}: external data {data.name} ends before tensor {tensor.name!r}; copy it again"
        )


def _is_weight(value: ir.Value) -> bool:
    return any(use.node.op_type in _WEIGHTED_OPS and use.idx > 0 for use in value.uses())


def save(model: ir.Model, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write the model to one file, or with `<name>.data` beside it where protobuf's 2 GiB do not hold it.

    Nothing appears under `path` before it is complete. Raises `InputError` if `path` exists (unless
    `force`) or cannot be written.
    """
    path = Path(path)
    with write_folder(path, force=force) as folder:
        copy = model.clone()  # because saving re-points the tensors of the model that is saved
        _forget_inferable(copy)
        if weight_bytes(model) > _ONE_FILE_LIMIT:
            ir.save(copy, folder / path.name, external_data=f"{path.name}.data")
        else:
            stream.save(copy, folder / path.name)
    return path


def _forget_inferable(model: ir.Model) -> None:
    """Leave out types and shapes of inner values: tensors have their own, and readers infer the rest.

    Outputs of operators that are not ONNX's keep theirs.
    """
    for graph in model.graphs():
        inner = {v for node in graph if node.domain == "" for v in node.outputs}
        inner.update(graph.initializers.values())
        for value in inner.difference(graph.outputs, graph.inputs):
            value.shape = value.type = None


def check_writable(path: Path, *, force: bool, source: Path | None = None) -> None:
    """Raise `InputError` unless a file may be written to `path`; `source` is the input, which never is."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file in it")
    if source is not None and source.exists() and path.exists() and path.samefile(source):
        raise InputError(f"{path} is the input, which is never touched: choose another name")
    if path.exists() and not force:
        raise InputError(f"{path} exists: choose another name or pass --force")
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written: no permission to write in {path.parent}")


def make_folder(path: Path) -> None:
    """Make sure that the folder `path` exists; `InputError` if it cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be a folder: {error.strerror}") from error


@contextmanager
def write_folder(path: Path, *, force: bool) -> Iterator[Path]:
    """A folder beside `path`; what it holds at the end is renamed into the folder of `path`.

    The file named like `path` moves last, so that a reader never meets it without its companions.
    """
    check_writable(path, force=force)
    try:
        folder = Path(tempfile.mkdtemp(prefix=".edgewise-", dir=path.parent))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield folder
        for part in sorted(folder.iterdir(), key=lambda p: p.name == path.name):
            part.replace(path.parent / part.name)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str, *, force: bool) -> Path:
    """Write a text file, whole or not at all."""
    with write_folder(path, force=force) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")
    return path


def file_bytes(path: str | os.PathLike[str]) -> int:
    """Size of a model on disk, its external data included."""
    path = Path(path)
    found = (tensor for _, tensor in tensors(ir.load(path)))
    names = {os.fspath(t.location) for t in found if isinstance(t, ir.ExternalTensor)}
    return path.stat().st_size + sum((path.parent / n).stat().st_size for n in names)


def sha256(path: str | os.PathLike[str]) -> str:
    """Hash of the file itself, without external data."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
