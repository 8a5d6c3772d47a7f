"""Samples: what a model is calibrated, compared and measured with, read one at a time.

A sample is what the model takes in one run: one row of every input where the first dimension is 1 or
dynamic, B rows where it is fixed at B. An array with the rank of its input is a stack of rows, one with a
rank more a stack of samples, one with a rank less a single row; rows left over by B are not used.
"""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.calibration.images import Images, Preprocess, find_images
from edgewise.calibration.rows import Rows, open_rows
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Feed, TensorSpec, seeded_feed
from edgewise.runtime.foreign import foreign_code, import_callable

__all__ = ["Preprocess", "Samples", "from_arrays", "from_function", "open_samples"]

Array = npt.NDArray[Any]

_END = object()
_LABELS = "labels"
_RANDOM = re.compile(r"random(?::([1-9]\d*))?")
_FUNCTION = re.compile(r"([\w.]+):([\w.]+)")
_RANDOM_SAMPLES = 16
_RANDOM_SIZE = 64  # of dynamic dimensions but the first: divisible by the strides of a vision model
_FORMS = "an .npz or .npy file, a folder of them or of images, module:function, or random"


@dataclass(frozen=True)
class _Chunk:
    """What one file, or one call, holds: arrays by input name and perhaps a label for each row."""

    arrays: Mapping[str, Rows]
    labels: Array | None
    where: str


class _Chunks(Protocol):
    """Chunks that are opened when they are asked for."""

    def __iter__(self) -> Iterator[_Chunk]: ...

    def __getitem__(self, index: int, /) -> _Chunk: ...


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of a model, by input name, with the leading axis the model takes.

    `labels` has a row for every row of the samples, or None. `random` says that the numbers are made up.
    Reading raises `InputError` where a sample holds NaN or infinity or cannot be read.
    """

    source: str
    specs: tuple[TensorSpec, ...]
    labels: Array | None = field(repr=False)
    random: bool
    _chunks: _Chunks = field(repr=False)
    _starts: tuple[int, ...] = field(repr=False)  # of each chunk, in samples
    _indices: Array = field(repr=False)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Feed]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Feed:
        wanted = int(self._indices[index])
        number = bisect_right(self._starts, wanted) - 1
        chunk = self._chunks[number]
        where = f"{chunk.where}, sample {wanted - self._starts[number]}"
        return {
            spec.name: _fit(_cut(chunk.arrays[spec.name], spec, wanted - self._starts[number]), spec, where)
            for spec in self.specs
        }

    def take(self, indices: Iterable[int]) -> Samples:
        """The samples at these positions, in this order; still read one at a time."""
        chosen = np.fromiter(indices, np.int64)
        labels = self.labels
        if labels is not None and len(self):
            labels = labels.reshape(len(self), -1, *labels.shape[1:])[chosen].reshape(-1, *labels.shape[1:])
        return dataclasses.replace(self, labels=labels, _indices=self._indices[chosen])

    def only(self, specs: Sequence[TensorSpec]) -> Samples:
        """The same samples for some of the inputs."""
        return dataclasses.replace(self, specs=tuple(specs))

    def batches(self, size: int) -> Iterator[Feed]:
        """Feeds of up to `size` consecutive samples; of one where a first dimension is fixed."""
        if not all(spec.shape and not isinstance(spec.shape[0], int) for spec in self.specs):
            yield from self
            return
        waiting: list[Feed] = []
        for feed in self:
            if len(waiting) == size or (waiting and _shapes(waiting[0]) != _shapes(feed)):
                yield _joined(waiting)
                waiting = []
            waiting.append(feed)
        if waiting:
            yield _joined(waiting)


def _shapes(feed: Feed) -> list[tuple[int, ...]]:
    return [array.shape[1:] for array in feed.values()]


def _joined(feeds: Sequence[Feed]) -> Feed:
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def open_samples(
    source: str, specs: Sequence[TensorSpec], *, preprocess: Preprocess | None = None, seed: int = 0
) -> Samples:
    """Samples for the inputs `specs`, from one of:

    - an .npz file whose keys are the input names, with an optional key `labels`; an .npy file
    - a folder of such files, in the order of their names, each one sample or a stack
    - a folder of images, or of one sub-folder a class, with `preprocess`
    - `module:function`: called without arguments, it yields dicts of arrays, or pairs (dict, label), and
      yields the same again when it is called again
    - `random`, or `random:N` for N samples: made up from `seed`

    A model with a single input takes an array of any name if it is the only one. Floats and integers are
    converted where the model wants a float. Raises `InputError` on anything that does not fit the model.
    """
    path = Path(source)
    if preprocess is not None and not path.is_dir():
        raise InputError(f"preprocessing is for a folder of images, and {source} is none: leave it out")
    if match := _RANDOM.fullmatch(source):
        return _survey(source, specs, _Random(specs, seed, int(match[1] or _RANDOM_SAMPLES)), random=True)
    if path.is_dir():
        return _open_folder(source, specs, preprocess)
    if path.is_file() and path.suffix.lower() in (".npz", ".npy"):
        return _survey(source, specs, _Files([path], specs))
    if not path.exists() and _FUNCTION.fullmatch(source):
        return from_function(import_callable(source, source), specs, source)
    problem = "is of no known kind" if path.exists() else "does not exist"
    raise InputError(f"{source} {problem}: samples are {_FORMS}")


def from_arrays(
    arrays: Mapping[str, Array], specs: Sequence[TensorSpec], labels: Array | None = None
) -> Samples:
    """Samples from arrays in memory, by input name; see the module for their shapes."""
    chunk = _Chunk(_by_input(arrays, specs, "arrays"), labels, "arrays")
    return _survey("arrays", specs, [chunk])


def from_function(
    function: Callable[[], Iterable[object]], specs: Sequence[TensorSpec], source: str
) -> Samples:
    """Samples that `function` yields, as `module:function` does, under the name `source`."""
    return _survey(source, specs, _Calls(function, source, specs))


def _open_folder(source: str, specs: Sequence[TensorSpec], preprocess: Preprocess | None) -> Samples:
    folder = Path(source)
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".npz", ".npy") and p.name[0] != ".")
    images, _ = find_images(folder)
    if files and images:
        raise InputError(f"{source} holds images and arrays: keep one or the other")
    if files and preprocess is not None:
        raise InputError(f"preprocessing is for a folder of images, and {source} holds arrays: leave it out")
    if files:
        return _survey(source, specs, _Files(files, specs))
    if not images:
        raise InputError(f"{source} holds no samples: put .npz, .npy or image files there")
    return _open_images(source, specs, preprocess)


def _open_images(source: str, specs: Sequence[TensorSpec], preprocess: Preprocess | None) -> Samples:
    if preprocess is None:
        raise InputError(
            f"{source} holds images: pass --preprocess, e.g. "
            "resize=256,crop=224,scale=255,mean=0.485/0.456/0.406,std=0.229/0.224/0.225"
        )
    if len(specs) != 1:
        raise InputError(f"images feed one input, the model has {_names(specs)}: save its samples as .npz")
    if specs[0].dtype == np.uint8 and preprocess != preprocess.pixels(preprocess.layout):
        raise InputError(
            f"input {specs[0].name!r} takes raw pixels and normalizes them itself: leave scale, mean and std "
            "out of the preprocessing"
        )
    images, classes = find_images(Path(source))
    rows = Images(images, preprocess, specs[0].dtype)
    chunk = _Chunk({specs[0].name: rows}, None if classes is None else np.array(classes), source)
    try:
        return _survey(source, specs, [chunk])
    except InputError as error:
        raise InputError(f"{error}: set resize, crop, channels or layout of the preprocessing") from None


class _Files:
    """A chunk a file; the last one stays open."""

    def __init__(self, paths: Sequence[Path], specs: Sequence[TensorSpec]) -> None:
        self._paths = paths
        self._specs = specs
        self._last: tuple[int, _Chunk] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # another process opens the files itself

    def __iter__(self) -> Iterator[_Chunk]:
        return (self[i] for i in range(len(self._paths)))

    def __getitem__(self, index: int) -> _Chunk:
        if self._last is None or self._last[0] != index:
            self._last = (index, self._open(self._paths[index]))
        return self._last[1]

    def _open(self, path: Path) -> _Chunk:
        arrays = open_rows(path)
        labels = None if _is_input(_LABELS, self._specs) else arrays.pop(_LABELS, None)
        named = _by_input(arrays, self._specs, str(path))
        return _Chunk(named, None if labels is None else np.atleast_1d(labels[...]), str(path))


class _Calls:
    """The chunks a function yields; one before the last that was asked for means calling it again."""

    def __init__(self, function: Callable[[], Any], source: str, specs: Sequence[TensorSpec]) -> None:
        self._function = function
        self._source = source
        self._specs = specs
        self._ahead: Iterator[_Chunk] = iter(())
        self._last: tuple[int, _Chunk] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": iter(()), "_last": None}  # another process calls it itself

    def __iter__(self) -> Iterator[_Chunk]:
        return (self._chunk(item, i) for i, item in enumerate(self._items()))

    def _items(self) -> Iterator[object]:
        """What the function yields; what it raises becomes an `InputError`."""
        with foreign_code(f"{self._source} failed"):
            items = self._function()
        if not isinstance(items, Iterable):
            raise InputError(f"{self._source} must yield dicts of arrays, not return {type(items).__name__}")
        iterator = iter(items)
        while True:
            with foreign_code(f"{self._source} failed"):
                item = next(iterator, _END)
            if item is _END:
                return
            yield item

    def __getitem__(self, index: int) -> _Chunk:
        if self._last is None or index < self._last[0]:
            self._ahead, self._last = iter(self), None
        while self._last is None or self._last[0] < index:
            number = 0 if self._last is None else self._last[0] + 1
            chunk = next(self._ahead, None)
            if chunk is None:
                raise InputError(f"{self._source} yielded fewer samples when it was called again")
            self._last = (number, chunk)
        return self._last[1]

    def _chunk(self, item: object, index: int) -> _Chunk:
        where = f"{self._source}, item {index}"
        feed, label = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
        if not isinstance(feed, Mapping):
            raise InputError(f"{where}: expected a dict of arrays, or a pair of it and a label")
        with foreign_code(f"{where} holds what numpy makes no array of"):
            arrays = {str(name): np.asarray(value) for name, value in feed.items()}
            labels = None if label is None else np.atleast_1d(np.asarray(label))
        return _Chunk(_by_input(arrays, self._specs, where), labels, where)


class _Random:
    """Seeded samples, each from a seed of its own."""

    def __init__(self, specs: Sequence[TensorSpec], seed: int, number: int) -> None:
        self._specs = [_one_row(spec, {s.shape[0] for s in specs if s.shape}) for spec in specs]
        self._seed = seed
        self._number = number

    def __iter__(self) -> Iterator[_Chunk]:
        return (self[i] for i in range(self._number))

    def __getitem__(self, index: int) -> _Chunk:
        feed = seeded_feed(self._specs, self._seed + index, _RANDOM_SIZE)
        return _Chunk(feed, None, f"random sample {index}")


def _one_row(spec: TensorSpec, batch: set[int | str | None]) -> TensorSpec:
    """The spec with 1 for its first dimension if that is dynamic, and wherever a symbol of `batch` stands."""
    shape = tuple(
        1 if not isinstance(d, int) and (i == 0 or (d is not None and d in batch)) else d
        for i, d in enumerate(spec.shape)
    )
    return dataclasses.replace(spec, shape=shape)


def _is_input(name: str, specs: Sequence[TensorSpec]) -> bool:
    return any(spec.name == name for spec in specs)


def _by_input(arrays: Mapping[str, Any], specs: Sequence[TensorSpec], where: str) -> Mapping[str, Any]:
    """The arrays under the names of the inputs; the only array fits the only input."""
    wanted = {spec.name for spec in specs}
    if len(specs) == len(arrays) == 1:
        return dict(zip(wanted, arrays.values(), strict=True))
    if arrays.keys() != wanted:
        held = ", ".join(sorted(arrays)) or "nothing"
        raise InputError(f"{where} holds {held}; the model takes {_names(specs)}")
    return arrays


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(sorted(spec.name for spec in specs)) or "nothing"


def _survey(
    source: str, specs: Sequence[TensorSpec], chunks: _Chunks | list[_Chunk], *, random: bool = False
) -> Samples:
    """Check every chunk against the model without reading more of it than needed, and count its samples."""
    counts: list[int] = []
    labels: list[Array | None] = []
    for chunk in chunks:
        counts.append(_count(chunk, specs))
        labels.append(_labels(chunk, specs, counts[-1]))
    if not counts:
        raise InputError(f"{source} holds no samples")
    return Samples(
        source=source,
        specs=tuple(specs),
        labels=_all_labels(labels, source),
        random=random,
        _chunks=chunks,
        _starts=tuple(accumulate(counts[:-1], initial=0)),
        _indices=np.arange(sum(counts)),
    )


def _count(chunk: _Chunk, specs: Sequence[TensorSpec]) -> int:
    """The number of samples in a chunk; `InputError` if an array does not fit its input."""
    counts = {}
    for spec in specs:
        rows = chunk.arrays[spec.name]
        where = f"{chunk.where}: input {spec.name!r}"
        _check_dtype(rows.dtype, spec, where)
        _check_shape(_sample_shape(rows, spec), spec, f"{where} of shape {rows.shape}")
        counts[spec.name] = _number(rows, spec)
    if len(set(counts.values())) != 1:
        raise InputError(f"{chunk.where}: inputs hold different numbers of samples: {counts}")
    number = next(iter(counts.values()))
    if number == 0:
        raise InputError(f"{chunk.where} holds no samples, or fewer rows than the model takes at once")
    return number


def _batch(spec: TensorSpec) -> int:
    """Rows of one sample."""
    return max(spec.shape[0], 1) if spec.shape and isinstance(spec.shape[0], int) else 1


def _number(rows: Rows, spec: TensorSpec) -> int:
    extra = len(rows.shape) - len(spec.shape)
    if extra == 1:
        return rows.shape[0]
    return rows.shape[0] // _batch(spec) if extra == 0 and rows.shape else 1


def _sample_shape(rows: Rows, spec: TensorSpec) -> tuple[int, ...]:
    extra = len(rows.shape) - len(spec.shape)
    if extra == 1:
        return rows.shape[1:]
    if extra == 0 and rows.shape:
        return (_batch(spec), *rows.shape[1:])
    return (1, *rows.shape) if extra == -1 else rows.shape


def _cut(rows: Rows, spec: TensorSpec, index: int) -> Array:
    """The array of one sample."""
    extra = len(rows.shape) - len(spec.shape)
    if extra == 1:
        return rows[index : index + 1].reshape(rows.shape[1:])
    if extra == 0 and rows.shape:
        return rows[index * _batch(spec) : (index + 1) * _batch(spec)]
    return rows[...][None] if extra == -1 else rows[...]


def _fit(array: Array, spec: TensorSpec, where: str) -> Array:
    """One sample as the model takes it: checked again, converted, contiguous."""
    where = f"{where}: input {spec.name!r}"
    _check_shape(array.shape, spec, where)
    with np.errstate(over="ignore", invalid="ignore"):
        fitted = np.ascontiguousarray(array.astype(spec.dtype, copy=False)).reshape(array.shape)
    if spec.dtype.kind in "iu" and not np.array_equal(fitted, array):
        raise InputError(f"{where} holds numbers that {spec.dtype} does not")
    if _is_float(spec.dtype) and not np.isfinite(fitted).all():
        raise InputError(f"{where} holds NaN or infinity: repair or remove the sample")
    return fitted


def _check_shape(shape: tuple[int, ...], spec: TensorSpec, where: str) -> None:
    fits = len(shape) == len(spec.shape) and all(
        not isinstance(want, int) or want == have for have, want in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("?" if d is None else str(d) for d in spec.shape)
        raise InputError(f"{where} makes samples of shape {shape}, the model takes ({wanted})")


def _check_dtype(have: np.dtype[Any], spec: TensorSpec, where: str) -> None:
    """Numbers become floats; nothing else changes its kind."""
    want = spec.dtype
    if want.kind == "O":
        fits = have.kind in "OUS"
    elif _is_float(want):
        fits = _is_float(have) or have.kind in "iub"
    else:
        fits = have.kind == want.kind or (want.kind in "iu" and have.kind in "iub")
    if not fits:
        raise InputError(f"{where} is {have}, the model takes {want}: convert the samples")


def _is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a float of any width; the kind of bfloat16 and the like is that of raw bytes."""
    named = dtype.kind == "V" and dtype.type is not np.void
    return dtype.kind == "f" or (named and ir.DataType.from_numpy(dtype).is_floating_point())


def _labels(chunk: _Chunk, specs: Sequence[TensorSpec], number: int) -> Array | None:
    """A label for each row the samples use; given for each row, or for each sample."""
    if chunk.labels is None:
        return None
    batch = _batch(specs[0])
    if len(chunk.labels) == number:
        return chunk.labels
    if len(chunk.labels) // batch == number:
        return chunk.labels[: number * batch]
    raise InputError(f"{chunk.where} holds {len(chunk.labels)} labels for {number} samples")


def _all_labels(labels: Sequence[Array | None], source: str) -> Array | None:
    given = [part for part in labels if part is not None]
    if not given:
        return None
    if len(given) < len(labels) or len({part.shape[1:] for part in given}) > 1:
        raise InputError(f"{source}: labels must be given for all samples, in one shape, or for none")
    return np.concatenate(given)
