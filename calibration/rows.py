"""Arrays in .npy and .npz files, read a few rows at a time."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import EllipsisType
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from edgewise.runtime.errors import InputError

Array = npt.NDArray[Any]

_UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Rows(Protocol):
    """What an array and an array in a file have in common: slices of the first axis, or `...` for all."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, rows: slice | EllipsisType, /) -> Array: ...


def open_rows(path: Path) -> dict[str, Rows]:
    """The arrays of an .npz file by name, or that of an .npy file by the file's name.

    Only headers are read. Raises `InputError` on a file that is missing, damaged or holds pickled objects.
    """
    try:
        if path.suffix.lower() == ".npy":
            return {path.stem: FileRows(lambda: path.open("rb"), str(path))}
        archive = zipfile.ZipFile(path)
        members = [name for name in archive.namelist() if name.endswith(".npy")]
        return {name[: -len(".npy")]: _member(archive, name, path) for name in members}
    except _UNREADABLE as error:
        raise InputError(f"{path} cannot be read ({error}): save it again with numpy") from error


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> FileRows:
    return FileRows(lambda: archive.open(name), f"{path}, array {name[: -len('.npy')]!r},")


class FileRows:
    """One array in numpy's file format (version 1 or 2), possibly compressed; rows in order are cheap."""

    def __init__(self, open_file: Callable[[], IO[bytes]], where: str) -> None:
        self._where = where
        self._file = open_file()
        read_header = _HEADERS.get(np.lib.format.read_magic(self._file))
        if read_header is None:
            raise InputError(f"{where} is of a type that no model takes: save plain numbers")
        self.shape, self._columns_first, self.dtype = read_header(self._file)
        if self.dtype.hasobject:
            raise InputError(f"{where} holds Python objects, which are never loaded: save plain numbers")
        self._start = self._file.tell()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def __getitem__(self, rows: slice | EllipsisType) -> Array:
        if rows is ...:
            return self._whole()
        if self._columns_first:  # rows are not contiguous
            return self._whole()[rows]
        first, last, _ = rows.indices(self.shape[0])
        inner = self.shape[1:]
        return self._read(first * math.prod(inner), (max(last - first, 0), *inner))

    def _whole(self) -> Array:
        if self._columns_first:
            return self._read(0, self.shape[::-1]).T
        return self._read(0, self.shape)

    def _read(self, start: int, shape: tuple[int, ...]) -> Array:
        """The elements from the `start`-th on, in file order."""
        size = self.dtype.itemsize
        wanted = math.prod(shape) * size
        try:
            self._file.seek(self._start + start * size)
            data = self._file.read(wanted)
        except _UNREADABLE as error:
            raise InputError(f"{self._where} cannot be read ({error}): save it again with numpy") from error
        if len(data) < wanted:
            raise InputError(f"{self._where} ends too early: save it again with numpy")
        return np.frombuffer(data, self.dtype).reshape(shape)
