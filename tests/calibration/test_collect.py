"""Collecting: every asked value of every sample, once, in any grouping, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from edgewise.calibration.collect import collect
from edgewise.calibration.sketch import Sketch
from edgewise.passes.fingerprint import fingerprint
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator, Feed

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float[N, 3, 8, 8] x) => (float[N, 4, 1, 1] y)
<float[4, 3, 3, 3] w = {WEIGHT}>
{
    c = Conv <pads = [1, 1, 1, 1]> (x, w)
    r = Relu (c)
    n = Neg (r)
    s = Shape (n)
    f = Cast <to = 1> (s)
    y = GlobalAveragePool (n)
}""".replace("WEIGHT", ", ".join(str(n % 7 - 3) for n in range(108)))


def model(text: str = TEXT) -> ir.Model:
    """Without noted types and shapes of inner values, as many exporters leave them out."""
    return ir.from_proto(onnx.parser.parse_model(text))


def feeds(count: int, seed: int = 0) -> list[Feed]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


VALUES = ("x", "c", "r", "n", "y")


def test_sketches_are_those_of_the_values() -> None:
    table = collect(model(), feeds(3), VALUES)
    expected: dict[str, Sketch] = {name: Sketch() for name in VALUES}
    tapped = model()
    tapped.graph.outputs.extend(v for node in tapped.graph for v in node.outputs if v.name in "crn")
    evaluator = Evaluator(tapped)
    for feed in feeds(3):
        for name, array in {**evaluator.run(feed), **feed}.items():
            expected[name] += Sketch.of(array)
    assert dict(table.sketches) == expected
    assert table.samples == 3
    assert table.fingerprint == fingerprint(model())
    assert table.sketches["r"].minimum == 0 > table.sketches["c"].minimum


def test_shards_merge_to_the_serial_table() -> None:
    net = model()
    samples = feeds(7)
    whole = collect(net, samples, VALUES)
    parts = [collect(net, part, VALUES) for part in (samples[4:], samples[:1], samples[1:4])]
    assert parts[0].merge(parts[1]).merge(parts[2]) == whole


@pytest.mark.parametrize("memory", [1, 2000])
def test_groups_of_values_give_the_same_table(memory: int) -> None:
    """One value a run, or two; 1,024 bytes each but for the last. The samples are still read once."""

    def once() -> Iterator[Feed]:
        yield from feeds(4)

    net = model()
    assert collect(net, once(), VALUES, memory=memory) == collect(net, feeds(4), VALUES)


def test_only_what_is_needed_runs() -> None:
    """The part behind the last asked value is left out, even where it fails."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[1, 4] x) => (float[K] y)
    <int64[1] k = {7}>
    { r = Relu (x)  y = Reshape (r, k) }"""
    samples = [{"x": np.ones((1, 4), np.float32)}]
    assert collect(model(text), samples, ["r"]).sketches["r"].count == 4
    with pytest.raises(InputError, match="does not run on these inputs"):
        collect(model(text), samples, ["y"])


def test_values_without_floats_are_left_out() -> None:
    table = collect(model(), feeds(2), ["s", "f", "n"])
    assert list(table.sketches) == ["f", "n"]
    assert table.sketches["f"].maximum == 8


def test_sequences_are_left_out() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[2, 4] x) => (float[1, 4] y)
    <int64 i = {0}>
    { q = SplitToSequence <axis = 0> (x)  y = SequenceAt (q, i) }"""
    table = collect(model(text), [{"x": np.ones((2, 4), np.float32)}], ["q", "y"])
    assert list(table.sketches) == ["y"]


def test_values_that_are_empty_at_times() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[N] x) => (float[M] y)
    <float zero = {0}>
    { b = Greater (x, zero)  y = Compress (x, b) }"""
    positive, negative = ({"x": np.array([sign * 2.0], np.float32)} for sign in (1, -1))
    assert collect(model(text), [negative], ["y"]).sketches["y"] == Sketch()
    assert collect(model(text), [negative, positive], ["y"]).sketches["y"].count == 1


def test_what_is_not_finite_is_counted() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[N] x) => (float[N] y) { y = Log (x) }"""
    sketch = collect(model(text), [{"x": np.array([-1, 0, 1], np.float32)}], ["y"]).sketches["y"]
    assert (sketch.nans, sketch.infs, sketch.count, sketch.maximum) == (1, 1, 1, 0)


def test_half_precision_is_sketched() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float16[N] x) => (float16[N] y) { y = Neg (x) }"""
    table = collect(model(text), [{"x": np.array([1.5], np.float16)}], ["x", "y"])
    assert (table.sketches["x"].maximum, table.sketches["y"].minimum) == (1.5, -1.5)


def test_values_of_other_graphs_are_refused() -> None:
    for name in ("nowhere", "w"):
        with pytest.raises(InputError, match=f"no value named '{name}'"):
            collect(model(), feeds(1), ["r", name])


def test_no_samples_is_an_error() -> None:
    with pytest.raises(InputError, match="no samples"):
        collect(model(), [], ["r"])


def test_samples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="does not run on these inputs"):
        collect(model(), [{"x": np.ones((1, 2, 8, 8), np.float32)}], ["r"])


def test_progress_is_told_and_the_model_left_alone() -> None:
    net = model()
    before = ir.to_proto(net).SerializeToString()
    heard: list[int] = []
    collect(net, feeds(3), ["x", "r"], progress=heard.append)
    assert heard == [1, 2, 3]
    assert ir.to_proto(net).SerializeToString() == before


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_does_not_show(threads: int) -> None:
    heard: list[int] = []
    table = collect(model(), feeds(9), VALUES, threads=threads, progress=heard.append)
    assert table == collect(model(), feeds(9), VALUES, threads=3)
    assert heard == list(range(1, 10))


def test_a_sample_that_cannot_be_read_stops_all_threads() -> None:
    read = 0

    def endless() -> Iterator[Feed]:
        nonlocal read
        for feed in feeds(5):
            read += 1
            yield feed
        raise InputError("sample 5 is damaged")

    with pytest.raises(InputError, match="sample 5 is damaged"):
        collect(model(), endless(), VALUES, threads=4)
    assert read == 5


def test_an_interrupt_leaves_the_rest_unread() -> None:
    def interrupted(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    stream = iter(feeds(50))
    with pytest.raises(KeyboardInterrupt):
        collect(model(), stream, VALUES, threads=2, progress=interrupted)
    assert len(list(stream)) >= 40


def test_inputs_alone_need_no_run() -> None:
    table = collect(model(), feeds(2), ["x", "x"])
    assert list(table.sketches) == ["x"]
    assert table.sketches["x"].count == 2 * 3 * 64
