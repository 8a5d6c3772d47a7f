"""Samples as batches."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from edgewise.calibration.data import Samples, from_arrays, from_function
from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.evaluate import TensorSpec
from edgewise.training.batches import Batch, Stack, are_images, varied

RNG = np.random.default_rng(0)


def _samples(count: int = 10, *, labels: bool = False) -> Samples:
    array = np.arange(count * 6, dtype=np.float32).reshape(count, 2, 3)
    specs = (TensorSpec("x", np.dtype(np.float32), ("N", 2, 3)),)
    return from_arrays({"x": array}, specs, np.arange(count) if labels else None)


def _numbers(stack: Stack, size: int, seed: int) -> list[int]:
    steps = stack.steps(size, np.random.default_rng(seed))
    return [int(n) for step in steps for batch in step for n in batch.numbers]


@pytest.mark.parametrize("memory", [2**20, 0])
def test_every_sample_comes_once_an_epoch_in_memory_or_from_a_file(memory: int) -> None:
    stack = Stack.of(_samples(labels=True), memory)
    assert isinstance(stack.buckets[0]["x"], np.memmap) == (memory == 0)
    assert sorted(_numbers(stack, 4, 0)) == list(range(10))
    assert _numbers(stack, 4, 0) == _numbers(stack, 4, 0) != _numbers(stack, 4, 1)
    for step in stack.steps(4, np.random.default_rng(0)):
        for batch in step:
            assert np.array_equal(batch.feed["x"][:, 0, 0], 6 * batch.numbers)
            assert batch.labels is not None
            assert np.array_equal(batch.labels, batch.numbers)


def test_a_model_of_one_sample_a_run_gets_one() -> None:
    stack = Stack.of(_samples(3), 2**20, at_once=1)
    assert [len(batch.feed["x"]) for step in stack.steps(3, RNG) for batch in step] == [1, 1, 1]


def test_samples_of_several_shapes_share_a_step_but_no_batch() -> None:
    specs = (TensorSpec("x", np.dtype(np.float32), ("N", "L")),)
    rows = [{"x": np.full((1, 2 + i % 2), i, np.float32)} for i in range(6)]
    stack = Stack.of(from_function(lambda: rows, specs, "rows"), 2**20)
    (step,) = stack.steps(6, RNG)
    assert [batch.feed["x"].shape for batch in step] == [(3, 2), (3, 3)]
    assert all(np.array_equal(batch.feed["x"][:, 0], batch.numbers) for batch in step)


def test_targets_follow_their_samples() -> None:
    stack = Stack.of(_samples(), 2**20).with_targets(lambda b: {"y": b.feed["x"][:, 0] + 1}, 3, 2**20)
    for step in stack.steps(4, RNG):
        for batch in step:
            assert batch.targets is not None
            assert np.array_equal(batch.targets["y"], batch.feed["x"][:, 0] + 1)


def test_no_samples_are_refused() -> None:
    with pytest.raises(Exception, match="no samples"):
        Stack.of(_samples().take([]), 2**20)


@pytest.mark.parametrize("shape", [(6, 3, 16, 16), (6, 16, 16, 3)])
def test_images_are_moved_and_mirrored_not_changed(shape: tuple[int, ...]) -> None:
    # Pixels say where they come from: down the sum of rows, to the right that of columns.
    height, width = (2, 3) if shape[1] == 3 else (1, 2)
    down, right = (
        np.arange(16, dtype=np.float32).reshape([-1 if i == a else 1 for i in range(4)])
        for a in (height, width)
    )
    image = np.broadcast_to(100 * down + right, shape)
    batch = Batch({"x": image.astype(np.uint16)}, np.arange(6))
    moved = varied(batch, np.random.default_rng(3), flips=True).feed["x"]
    assert moved.shape == shape
    assert set(np.unique(moved)) <= set(np.unique(image).astype(int))
    rows = np.moveaxis(moved // 100, height, 1).reshape(6, 16, -1)[:, :, 0].astype(int)
    assert (np.diff(rows, axis=1) >= 0).all()  # never upside down
    assert (np.abs(rows - np.arange(16)) <= 2).all()  # an eighth of 16
    columns = np.moveaxis(moved % 100, width, 1).reshape(6, 16, -1)[:, :, 0].astype(int)
    mirrored = (np.diff(columns, axis=1) <= 0).all(1)
    assert 0 < mirrored.sum() < 6
    straight = varied(batch, np.random.default_rng(3), flips=False).feed["x"] % 100
    assert (
        np.diff(np.moveaxis(straight.astype(int), width, 1).reshape(6, 16, -1)[:, :, 0], axis=1) >= 0
    ).all()


@pytest.mark.parametrize("shape", [(8, 1, 32, 32), (8, 32, 32, 3)])
@pytest.mark.parametrize(("seed", "pastes"), [(2, False), (5, True)])
def test_mixtures_say_of_what_they_are(seed: int, pastes: bool, shape: tuple[int, ...]) -> None:
    flat = np.broadcast_to(np.arange(8, dtype=np.float32).reshape(8, 1, 1, 1), shape)
    batch = Batch({"x": flat}, np.arange(8), labels=np.arange(8))
    mixed = varied(batch, np.random.default_rng(seed), flips=True)
    assert mixed.labels is not None
    assert mixed.others is not None
    assert mixed.share is not None
    assert ((mixed.share >= 0) & (mixed.share < 1)).all()
    pixels = mixed.feed["x"].reshape(8, -1)
    expected = mixed.share * mixed.labels + (1 - mixed.share) * mixed.others
    if not pastes:
        np.testing.assert_allclose(pixels, np.broadcast_to(expected[:, None], pixels.shape), atol=1e-5)
        return
    own, other = (pixels == labels[:, None] for labels in (mixed.labels, mixed.others))
    assert (own | other).all()
    # A side of the rectangle is right to a pixel of 32, so its area is to two.
    apart = mixed.labels != mixed.others
    np.testing.assert_allclose(own.mean(1)[apart], mixed.share[apart], atol=2 / 32)


def test_what_is_no_image_is_known() -> None:
    assert are_images({"x": np.zeros((1, 3, 8, 8), np.float32)})
    assert not are_images({"x": np.zeros((1, 100, 1, 1), np.float32)})
    assert not are_images({"x": np.zeros((1, 100, 8, 8), np.float32)})
    assert not are_images({"x": np.zeros((1, 3, 8, 8), np.int64)})
    assert not are_images({"x": np.zeros((1, 3, 8, 8), np.float32), "t": np.zeros((1,), np.float32)})


def test_answers_that_memory_does_not_hold_are_asked_for_again() -> None:
    stack = Stack.of(_samples(), 2**20)
    assert stack.with_targets(lambda b: {"y": b.feed["x"]}, 3, 10 * 24 - 1).targets is None
    assert stack.with_targets(lambda b: {"y": b.feed["x"]}, 3, 10 * 24).targets is not None


def test_a_file_that_finds_no_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(EdgewiseError, match="TMPDIR"):
        Stack.of(_samples(), 0)
