"""The inputs every step is checked on: real ones if there are any, else ones the model runs on."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from edgewise.calibration.data import from_arrays
from edgewise.optimizer.probe import is_batched, probe_feeds
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator, TensorSpec, input_specs


def parse(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}'))


def test_samples_one_two_and_both() -> None:
    model = parse("g (float[N,2] x) => (float[N,2] y) { y = Relu (x) }")
    samples = from_arrays({"x": np.arange(8, dtype=np.float32).reshape(4, 2)}, input_specs(model))
    feeds = probe_feeds(model, samples)
    assert [f["x"].tolist() for f in feeds] == [[[0, 1]], [[2, 3]], [[0, 1], [2, 3]]]


def test_a_single_sample() -> None:
    model = parse("g (float[N,2] x) => (float[N,2] y) { y = Relu (x) }")
    feeds = probe_feeds(model, from_arrays({"x": np.ones((1, 2), np.float32)}, input_specs(model)))
    assert [f["x"].shape for f in feeds] == [(1, 2)]


def test_a_fixed_batch_is_kept() -> None:
    model = parse("g (float[2,3] x) => (float[2,3] y) { y = Relu (x) }")
    feeds = probe_feeds(model, from_arrays({"x": np.ones((6, 3), np.float32)}, input_specs(model)))
    assert {f["x"].shape for f in feeds} == {(2, 3)}


def test_samples_of_different_length_are_not_joined() -> None:
    """Sentences have lengths of their own: what cannot be stacked is checked one by one."""
    model = parse("g (float[N,L] x) => (float[N,L] y) { y = Relu (x) }")
    lengths = iter((3, 5))

    class Ragged:
        def __iter__(self) -> object:
            return iter([{"x": np.ones((1, next(lengths)), np.float32)} for _ in range(2)])

    feeds = probe_feeds(model, Ragged())  # type: ignore[arg-type]
    assert [f["x"].shape for f in feeds] == [(1, 3), (1, 5)]


def test_seeded_feeds_run_and_repeat(model: ir.Model) -> None:
    feeds = probe_feeds(model, None, seed=4)
    assert len(feeds) == 2
    assert [feed["image"].shape for feed in feeds] == [(1, 3, 8, 8), (2, 3, 8, 8)]
    assert not np.array_equal(feeds[0]["image"][0], feeds[1]["image"][0])
    again = probe_feeds(model, None, seed=4)
    np.testing.assert_array_equal(feeds[1]["image"], again[1]["image"])
    for feed in feeds:
        assert np.isfinite(Evaluator(model).run(feed)["scores"]).all()


def test_open_sizes_are_tried_until_one_runs() -> None:
    model = parse(
        """g (float[N,1,H,W] x) => (float[N,1,P,Q] y) <float[1,1,5,5] w = {
        1,1,1,1,1, 1,1,1,1,1, 1,1,1,1,1, 1,1,1,1,1, 1,1,1,1,1}> { y = Conv (x, w) }"""
    )
    assert [feed["x"].shape for feed in probe_feeds(model, None)] == [(1, 1, 8, 8), (2, 1, 8, 8)]


def test_a_batch_that_must_be_one() -> None:
    """The batch is declared open, but the graph reshapes to one row."""
    model = parse(
        "g (float[N,4] x) => (float[1,4] y) <int64[2] s = {1, 4}> { y = Reshape (x, s) }",
    )
    (feed, _) = probe_feeds(model, None)
    assert feed["x"].shape == (1, 4)


def test_no_inputs_at_all() -> None:
    model = parse("g () => (float[2] y) <float[2] c = {1, 2}> { y = Relu (c) }")
    feeds = probe_feeds(model, None)
    assert feeds
    assert all(not feed for feed in feeds)


def test_nothing_fits() -> None:
    model = parse(
        "g (float[A] x, float[B] z) => (float[7] y) <int64[1] s = {7}> { r = Reshape (x, s) y = Add (r, z) }"
    )
    with pytest.raises(InputError, match="pass samples with --data"):
        probe_feeds(model, None)


@pytest.mark.parametrize(
    ("shape", "batched"),
    [(("N", 3), True), ((None, 3), True), ((1, 3), False), ((4, "W"), False), ((), False)],
)
def test_is_batched(shape: tuple[int | str | None, ...], batched: bool) -> None:
    assert is_batched(TensorSpec("x", np.dtype("f4"), shape)) is batched
