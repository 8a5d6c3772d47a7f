"""Samples: every form they come in, and a word for everything that does not fit the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgewise.calibration.data import Preprocess, Samples, from_arrays, open_samples
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import TensorSpec

Array = np.ndarray


def spec(
    name: str = "x", shape: tuple[int | str | None, ...] = ("N", 3), dtype: Any = np.float32
) -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)


def numbers(*shape: int, dtype: Any = np.float32) -> Array:
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


def values(samples: Samples, name: str = "x") -> list[list[Any]]:
    return [feed[name].tolist() for feed in samples]


def save(path: Path, **arrays: Array) -> str:
    np.savez(path, **arrays)
    return str(path)


# Shapes


@pytest.mark.parametrize(
    ("model", "array", "count", "sample"),
    [
        (("N", 3), (5, 3), 5, (1, 3)),
        ((None, 3), (5, 3), 5, (1, 3)),
        ((1, 3), (5, 3), 5, (1, 3)),
        ((2, 3), (4, 3), 2, (2, 3)),
        ((2, 3), (5, 3), 2, (2, 3)),  # one row is left over
        (("N", 3), (5, 2, 3), 5, (2, 3)),  # whole samples
        ((2, 3), (5, 2, 3), 5, (2, 3)),
        (("N", 3), (3,), 1, (1, 3)),  # one row
        (("N", "T"), (5, 7), 5, (1, 7)),
        ((), (4,), 4, ()),
        ((), (), 1, ()),
    ],
)
def test_samples_are_cut_along_the_leading_axis(
    model: tuple, array: tuple[int, ...], count: int, sample: tuple[int, ...]
) -> None:
    data = numbers(*array)
    samples = from_arrays({"x": data}, [spec(shape=model)])
    assert len(samples) == count
    assert all(feed["x"].shape == sample for feed in samples)
    flat = np.concatenate([feed["x"].ravel() for feed in samples])
    np.testing.assert_array_equal(flat, data.ravel()[: flat.size])


@pytest.mark.parametrize(
    ("model", "array"),
    [
        (("N", 3), (5, 4)),
        ((2, 3), (3,)),
        (("N", 3, 8, 8), (8, 8)),
        (("N", 3), (2, 2, 2, 3)),
        (("N", 3, 8, 8), (5, 8, 8, 3)),
    ],
)
def test_shapes_that_do_not_fit(model: tuple, array: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"input 'x' of shape .* the model takes"):
        from_arrays({"x": numbers(*array)}, [spec(shape=model)])


def test_too_few_rows() -> None:
    with pytest.raises(InputError, match="no samples, or fewer rows"):
        from_arrays({"x": numbers(3, 3)}, [spec(shape=(4, 3))])


def test_inputs_must_hold_as_many_samples() -> None:
    specs = [spec("x", ("N", 3)), spec("h", (2, "N", 4))]
    samples = from_arrays({"x": numbers(5, 3), "h": numbers(10, 1, 4)}, specs)
    assert (len(samples), samples[4]["h"].shape) == (5, (2, 1, 4))
    with pytest.raises(InputError, match=r"different numbers of samples: {'x': 5, 'h': 4}"):
        from_arrays({"x": numbers(5, 3), "h": numbers(8, 1, 4)}, specs)


# Names


def test_names_must_fit_and_both_sides_are_listed() -> None:
    specs = [spec("ids"), spec("mask")]
    for held in ({"ids"}, {"ids", "mask", "extra"}, {"id", "mask"}):
        with pytest.raises(InputError) as caught:
            from_arrays({name: numbers(2, 3) for name in held}, specs)
        assert f"holds {', '.join(sorted(held))}; the model takes ids, mask" in str(caught.value)


def test_the_only_array_fits_the_only_input() -> None:
    assert values(from_arrays({"anything": numbers(1, 3)}, [spec()])) == [[[0, 1, 2]]]


# Types


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.uint8, np.bool_])
def test_numbers_become_floats(dtype: Any) -> None:
    feed = from_arrays({"x": np.array([[0, 1, 1]], dtype)}, [spec()])[0]
    assert (feed["x"].dtype, feed["x"].tolist()) == (np.float32, [[0, 1, 1]])


def test_integers_of_another_width_are_converted_where_they_fit() -> None:
    samples = from_arrays({"x": np.array([[1, 2, 3], [1, 2, 300]])}, [spec(dtype=np.uint8)])
    assert samples[0]["x"].dtype == np.uint8
    with pytest.raises(InputError, match="sample 1: input 'x' holds numbers that uint8 does not"):
        samples[1]


@pytest.mark.parametrize(
    ("have", "want"),
    [(np.float32, np.int64), (np.int64, np.bool_), ("U3", np.float32), (np.complex64, np.float32)],
)
def test_other_types_are_refused(have: Any, want: Any) -> None:
    with pytest.raises(InputError, match="the model takes"):
        from_arrays({"x": np.zeros((1, 3)).astype(have)}, [spec(dtype=want)])


def test_strings_are_taken_where_the_model_takes_them() -> None:
    samples = from_arrays({"x": np.array([["a", "b", "c"]])}, [spec(dtype=object)])
    assert samples[0]["x"].tolist() == [["a", "b", "c"]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_samples_that_are_not_finite_are_named(bad: float) -> None:
    array = np.ones((4, 3))
    array[2, 1] = bad
    samples = from_arrays({"x": array}, [spec()])
    assert len(list(samples.take([0, 1, 3]))) == 3
    with pytest.raises(InputError, match="sample 2: input 'x' holds NaN or infinity"):
        list(samples)


# Labels


def test_labels_follow_the_samples() -> None:
    samples = from_arrays({"x": numbers(4, 3)}, [spec()], np.array([9, 8, 7, 6]))
    assert samples.take([3, 1]).labels.tolist() == [6, 8]
    assert samples.labels.tolist() == [9, 8, 7, 6]


def test_labels_of_a_fixed_batch_are_one_a_row() -> None:
    samples = from_arrays({"x": numbers(5, 3)}, [spec(shape=(2, 3))], np.arange(5))
    assert samples.labels.tolist() == [0, 1, 2, 3]
    assert samples.take([1]).labels.tolist() == [2, 3]


def test_labels_may_be_arrays() -> None:
    samples = from_arrays({"x": numbers(3, 3)}, [spec()], numbers(3, 2, 2))
    assert samples.take([2]).labels.tolist() == [[[8, 9], [10, 11]]]


def test_labels_of_another_length_are_refused() -> None:
    with pytest.raises(InputError, match="3 labels for 4 samples"):
        from_arrays({"x": numbers(4, 3)}, [spec()], np.arange(3))


# Taking and batching


def test_taking_is_lazy_and_composes() -> None:
    samples = from_arrays({"x": numbers(6, 1)}, [spec(shape=("N", 1))])
    taken = samples.take([5, 3, 1]).take([2, 0])
    assert values(taken) == [[[1]], [[5]]]
    assert len(samples.take([])) == 0


def test_some_of_the_inputs() -> None:
    both = [spec("a"), spec("b")]
    samples = from_arrays({"a": numbers(4, 3), "b": numbers(4, 3)}, both, labels=np.arange(4)).only(both[1:])
    assert [list(feed) for feed in samples] == [["b"]] * 4
    assert samples.labels.tolist() == [0, 1, 2, 3]
    assert len(list(samples.batches(4))) == 1


def test_batches() -> None:
    samples = from_arrays({"x": numbers(5, 1)}, [spec(shape=("N", 1))])
    assert [b["x"].ravel().tolist() for b in samples.batches(2)] == [[0, 1], [2, 3], [4]]
    fixed = from_arrays({"x": numbers(4, 1)}, [spec(shape=(1, 1))])
    assert [len(b["x"]) for b in fixed.batches(8)] == [1, 1, 1, 1]


def test_batches_hold_samples_of_one_shape(tmp_path: Path) -> None:
    for i, width in enumerate((2, 2, 3, 2)):
        np.save(tmp_path / f"{i}.npy", np.ones((1, width), np.float32))
    samples = open_samples(str(tmp_path), [spec(shape=("N", "T"))])
    assert [b["x"].shape for b in samples.batches(8)] == [(2, 2), (1, 3), (1, 2)]


# Files


def test_npz(tmp_path: Path) -> None:
    source = save(tmp_path / "d.npz", x=numbers(4, 3), m=numbers(4, 2), labels=np.arange(4))
    samples = open_samples(source, [spec(), spec("m", ("N", 2))])
    assert (len(samples), samples.source, samples.random) == (4, source, False)
    assert values(samples, "m") == [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]]
    assert samples.labels.tolist() == [0, 1, 2, 3]
    assert values(samples) == values(samples)  # a second time


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["npy", "npz", "compressed"])
def test_rows_are_read_from_every_kind_of_file(tmp_path: Path, kind: str, order: Any) -> None:
    array = np.asarray(np.random.default_rng(0).standard_normal((50, 4, 5)), order=order)
    path = tmp_path / ("d.npy" if kind == "npy" else "d.npz")
    {"npy": np.save, "npz": np.savez, "compressed": np.savez_compressed}[kind](path, array)
    samples = open_samples(str(path), [spec(shape=("N", 4, 5), dtype=np.float64)])
    for i in (0, 7, 8, 49, 3):
        np.testing.assert_array_equal(samples[i]["x"], array[i : i + 1])


def test_labels_is_an_input_where_the_model_says_so(tmp_path: Path) -> None:
    source = save(tmp_path / "d.npz", labels=numbers(4, 3))
    samples = open_samples(source, [spec("labels")])
    assert (len(samples), samples.labels) == (4, None)


def test_folder_of_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    save(tmp_path / "b.npz", x=numbers(2, 3) + 10, labels=np.array([1, 2]))
    save(tmp_path / "a.npz", x=numbers(3), labels=np.array(0))
    (tmp_path / "notes.txt").write_text("ignored")
    samples = open_samples(str(tmp_path), [spec()])
    assert values(samples) == [[[0, 1, 2]], [[10, 11, 12]], [[13, 14, 15]]]
    assert samples.labels.tolist() == [0, 1, 2]
    assert values(samples.take([2, 0])) == [[[13, 14, 15]], [[0, 1, 2]]]


def test_labels_in_some_files_only(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", x=numbers(1, 3), labels=np.array([1]))
    save(tmp_path / "b.npz", x=numbers(1, 3))
    with pytest.raises(InputError, match="for all samples"):
        open_samples(str(tmp_path), [spec()])


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object))
    np.savez(tmp_path / "o.npz", x=np.array([{}], dtype=object))
    for name in ("o.npy", "o.npz"):
        with pytest.raises(InputError, match="Python objects, which are never loaded"):
            open_samples(str(tmp_path / name), [spec()])


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    good = Path(save(tmp_path / "good.npz", x=numbers(500, 3))).read_bytes()
    (tmp_path / "text.npz").write_text("not an archive")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "cut.npz").write_bytes(good[:1000])
    for name in ("text.npz", "empty.npy", "cut.npz"):
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            open_samples(str(tmp_path / name), [spec()])
    np.savez(tmp_path / "nothing.npz")
    with pytest.raises(InputError, match="holds nothing; the model takes x"):
        open_samples(str(tmp_path / "nothing.npz"), [spec()])
    for missing in ("missing.npz", "missing", "data.csv"):
        with pytest.raises(InputError, match=r"does not exist: samples are an \.npz"):
            open_samples(str(tmp_path / missing), [spec()])
    (tmp_path / "data.csv").touch()
    with pytest.raises(InputError, match="of no known kind"):
        open_samples(str(tmp_path / "data.csv"), [spec()])


def test_a_file_that_ends_too_early_is_named_when_it_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", numbers(50, 3))
    data = (tmp_path / "d.npy").read_bytes()
    (tmp_path / "d.npy").write_bytes(data[:-20])
    samples = open_samples(str(tmp_path / "d.npy"), [spec()])
    assert values(samples.take([0])) == [[[0, 1, 2]]]
    with pytest.raises(InputError, match=r"d\.npy ends too early"):
        list(samples)


def test_folders_without_samples(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no samples"):
        open_samples(str(tmp_path), [spec()])
    save(tmp_path / "a.npz", x=numbers(1, 3))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="images and arrays"):
        open_samples(str(tmp_path), [spec()])


# Images


def images(folder: Path, *names: str, size: int = 8) -> str:
    for value, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (size, size), (value, 0, 255)).save(folder / name)
    return str(folder)


def test_images_in_folders_of_classes(tmp_path: Path) -> None:
    source = images(tmp_path, "cat/1.png", "cat/2.png", "dog/1.png")
    samples = open_samples(source, [spec(shape=(1, 3, 4, 4))], preprocess=Preprocess(crop=4))
    assert samples.labels.tolist() == [0, 0, 1]
    assert [feed["x"][0, :, 0, 0].tolist() for feed in samples] == [[0, 0, 255], [1, 0, 255], [2, 0, 255]]


def test_images_for_a_fixed_batch_and_for_integers(tmp_path: Path) -> None:
    source = images(tmp_path, "1.png", "2.png", "3.png")
    samples = open_samples(
        source, [spec(shape=(2, 8, 8, 3), dtype=np.uint8)], preprocess=Preprocess(layout="nhwc")
    )
    assert (len(samples), samples.labels, samples[0]["x"].dtype) == (1, None, np.uint8)


def test_pixels_are_not_normalized(tmp_path: Path) -> None:
    source = images(tmp_path, "1.png")
    for options in (Preprocess(scale=255), Preprocess(mean=(1, 2, 3)), Preprocess(std=(2,))):
        with pytest.raises(InputError, match="'x' takes raw pixels and normalizes them itself: leave scale"):
            open_samples(source, [spec(shape=(1, 3, 8, 8), dtype=np.uint8)], preprocess=options)
        assert len(open_samples(source, [spec(shape=(1, 3, 8, 8))], preprocess=options)) == 1


def test_images_that_do_not_fit(tmp_path: Path) -> None:
    source = images(tmp_path, "1.png")
    with pytest.raises(InputError, match="pass --preprocess"):
        open_samples(source, [spec(shape=(1, 3, 8, 8))])
    with pytest.raises(InputError, match=r"\(1, 3, 8, 8\), the model takes \(1, 3, 4, 4\): set resize, crop"):
        open_samples(source, [spec(shape=(1, 3, 4, 4))], preprocess=Preprocess())
    with pytest.raises(InputError, match="images feed one input, the model has a, b"):
        open_samples(source, [spec("a"), spec("b")], preprocess=Preprocess())


def test_preprocessing_without_images(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npz", x=numbers(1, 3))
    for place in (source, str(tmp_path), "random"):
        with pytest.raises(InputError, match="leave it out"):
            open_samples(place, [spec()], preprocess=Preprocess())


# Functions


MODULE = """
import numpy as np
calls = 0

def dicts():
    global calls
    calls += 1
    for i in range(4):
        yield {"x": np.full((1, 3), i)}

def pairs():
    return [({"x": np.full((2, 3), i)}, [i, i + 10]) for i in range(2)]

def one_row():
    yield {"x": np.zeros(3)}, 5

def numbers():
    yield 3

def ragged():
    yield {"x": [[1], [2, 3]]}

def nothing():
    yield from ()

def none():
    return None

shrinking = iter([4, 4, 2])
def shrinks():
    for i in range(next(shrinking)):
        yield {"x": np.full((1, 3), i)}

constant = 7
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"samples_of_{tmp_path.name}"  # modules stay imported: each test has its own
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_functions_are_read_as_a_stream(module: str) -> None:
    samples = open_samples(f"{module}:dicts", [spec()])
    assert len(samples) == 4
    assert [feed["x"][0, 0] for feed in samples] == [0, 1, 2, 3]
    imported = __import__(module)
    assert imported.calls == 2  # counted, then read
    assert [feed["x"][0, 0] for feed in samples.take([1, 3])] == [1, 3]
    assert imported.calls == 3
    assert [samples[i]["x"][0, 0] for i in (2, 2, 0)] == [2, 2, 0]


def test_functions_may_yield_labels_and_stacks(module: str) -> None:
    samples = open_samples(f"{module}:pairs", [spec()])
    assert [feed["x"][0, 0] for feed in samples] == [0, 0, 1, 1]
    assert samples.labels.tolist() == [0, 10, 1, 11]
    assert open_samples(f"{module}:one_row", [spec()]).labels.tolist() == [5]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("numbers", "item 0: expected a dict of arrays"),
        ("ragged", "item 0 holds what numpy makes no array of"),
        ("nothing", "holds no samples"),
        ("none", "must yield dicts of arrays, not return NoneType"),
        ("constant", "has no function 'constant'"),
        ("missing", "has no function 'missing'"),
    ],
)
def test_functions_that_cannot_be_used(module: str, function: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_samples(f"{module}:{function}", [spec()])


def test_functions_that_yield_less_the_next_time(module: str) -> None:
    samples = open_samples(f"{module}:shrinks", [spec()])
    assert len(list(samples)) == 4
    with pytest.raises(InputError, match="fewer samples when it was called again"):
        list(samples)


def test_modules_that_are_not_there() -> None:
    with pytest.raises(InputError, match="No module named 'no_such_module_anywhere'"):
        open_samples("no_such_module_anywhere:f", [spec()])


# Random


def test_random_samples_are_seeded_and_say_what_they_are() -> None:
    specs = [spec("x", ("N", 3, "H", "N")), spec("i", (2, None), np.int64)]
    samples = open_samples("random:5", specs, seed=1)
    assert (len(samples), samples.random) == (5, True)
    assert (samples[0]["x"].shape, samples[0]["i"].shape) == ((1, 3, 64, 1), (2, 64))
    same, other = open_samples("random:5", specs, seed=1), open_samples("random:5", specs, seed=7)
    np.testing.assert_array_equal(samples[3]["x"], same[3]["x"])
    assert not np.array_equal(samples[3]["x"], other[3]["x"])
    assert not np.array_equal(samples[3]["x"], samples[4]["x"])
    assert len(open_samples("random", specs)) == 16
