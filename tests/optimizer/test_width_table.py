"""A table of widths: what it says between its points, and that a measured one tells of the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build, normal

from edgewise.optimizer import cache
from edgewise.optimizer.layer_models import points_of, side_by_side
from edgewise.optimizer.pricing import ByTime
from edgewise.optimizer.width_probe import Bench, UnknownLayersError, _axis, _plausible, measure_widths
from edgewise.optimizer.width_table import Kind, Timing, WidthTable
from edgewise.passes.channels import ChannelGraph
from edgewise.passes.graph import opset
from edgewise.passes.infer_shapes import shapes_on
from edgewise.runtime.costs import Call, Operand
from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.evaluate import Evaluator, input_specs, seeded_feed
from edgewise.training.costs import Macs, layers_of
from edgewise.training.selection import Bill, achieved, select, uniform

TEXT = """
net (float[1, 3, 12, 12] x) => (float[1, 5] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
    r = Relu(a)
    d = Conv<group = 16, pads = [1, 1, 1, 1]>(r, w2)
    b = Conv<pads = [1, 1, 1, 1]>(d, w3)
    s = Add(b, a)
    m = ReduceMean<axes = [2, 3], keepdims = 0>(s)
    y = Gemm<transB = 1>(m, w4)
}
"""
NOTHING = Call("Relu", (Operand("float32", (1, 2)),), (Operand("float32", (1, 2)),))


def net() -> ir.Model:
    return build(
        TEXT,
        w1=normal(16, 3, 3, 3),
        b1=normal(16),
        w2=normal(16, 1, 3, 3),
        w3=normal(16, 16, 3, 3),
        w4=normal(5, 16),
    )


def kinds(model: ir.Model) -> dict[str, Kind]:
    """The kind of every node, by first output."""
    graph = ChannelGraph.of(model.graph, opset(model))
    feed = seeded_feed(input_specs(model), size=1)
    shapes = shapes_on(model, {name: array.shape for name, array in feed.items()})
    return {str(k.outputs[0].value.name): Kind.of(graph, k) for k in layers_of(graph, shapes)}


def test_between_points_times_are_linear() -> None:
    timing = Timing(((4, 8), (4, 8, 16)), (1.0, 2.0, 4.0, 2.0, 4.0, 8.0), ((1.0, 1.0), (8.0, 8.0)))
    assert timing.at((8, 16), NOTHING) == 8
    assert timing.at((6, 4), NOTHING) == 1.5
    assert timing.at((6, 12), NOTHING) == pytest.approx((3 + 6) / 2)


def test_within_a_block_a_width_takes_as_long_as_the_block() -> None:
    timing = Timing(((16, 64), (4, 10)), (1.0, 2.0, 4.0, 8.0), ((8.0, 8.0),), (16, 8))
    assert timing.at((48, 8), NOTHING) == timing.at((33, 8), NOTHING) > timing.at((32, 8), NOTHING)
    assert timing.at((64, 9), NOTHING) == timing.at((64, 10), NOTHING) == 8.0


def test_beyond_its_ends_a_grid_is_flat() -> None:
    timing = Timing(((4, 8),), (1.0, 2.0), ((2.0, 2.0),))
    assert [timing.at((width,), NOTHING) for width in (2, 4, 9)] == [1.0, 1.0, 2.0]


def test_the_network_corrects_what_layers_take_alone() -> None:
    timing = Timing(((8, 16),), (1.0, 2.0), ((1.0, 3.0), (2.0, 4.0)))
    assert [timing.at((width,), NOTHING) for width in (8, 12, 16)] == [3.0, 3.5, 4.0]


def test_without_a_grid_times_go_with_the_bytes() -> None:
    timing = Timing((), (), ((16.0, 1.0),))
    assert timing.at((), NOTHING) == 1.0
    wide = Call("Relu", *((Operand("float32", (1, 6)),),) * 2)
    assert timing.at((), wide) == 3.0, "beyond the widest in proportion"


def test_layers_of_one_shape_are_one_kind() -> None:
    found = kinds(net())
    assert found["a"].text != found["b"].text
    assert (len(found["a"].variables), len(found["b"].variables)) == (2, 1), (
        "the sum makes one of b's two ends"
    )
    twins = build(
        "net (float[1, 8, 4, 4] x) => (float[1, 8, 4, 4] y) { a = Conv(x, v) b = Conv(a, w) y = Conv(b, u) }",
        v=normal(8, 8, 1, 1),
        w=normal(8, 8, 1, 1),
        u=normal(8, 8, 1, 1),
    )
    found = kinds(twins)
    assert found["a"].text == found["b"].text == found["y"].text
    assert [len(kind.variables) for kind in found.values()] == [2, 2, 2]


def test_all_widths_follow_from_the_variables() -> None:
    kind = kinds(net())["d"]
    assert kind.layer.call(kind.widths((8,))).outputs[0].shape == (1, 8, 12, 12)
    assert kind.layer.call(kind.widths((8,))).inputs[1].shape == (8, 1, 3, 3)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", ["a", "d", "b", "y"])
def test_layers_side_by_side_run(name: str, int8: bool) -> None:
    kind = kinds(net())[name]
    points = points_of(((4, 8, 16),) * len(kind.variables))
    made = side_by_side(kind, points, 17, int8=int8)
    outputs = Evaluator(made).run(seeded_feed(input_specs(made)))
    assert {array.shape[1] for array in outputs.values()} == {4, 8, 16}
    assert len(outputs) == len(points)


def test_widths_of_an_axis_are_all_that_come_up_or_the_finest() -> None:
    assert _axis(16, 16, 4, 10) == (4, 8, 12, 16)
    assert _axis(18, 18, 4, 10) == (4, 8, 12, 16, 18)
    assert _axis(4 * 18, 18, 4, 24) == (12, *range(16, 72, 4), 72)
    wide = _axis(960, 960, 4, 10)
    assert len(wide) == 10, wide
    assert all(width % 16 == 0 for width in wide)


def test_what_was_disturbed_is_not_believed() -> None:
    """An odd width may be slower than the next, as here by half, but not by ten times."""
    assert _plausible((1.0, 3.0, 2.0, 40.0, 4.0, 4.0), ((4, 8), (4, 6, 8))) == (1.0, 3.0, 2.0, 8.0, 4.0, 4.0)


@pytest.mark.slow  # it measures
def test_a_measured_table_tells_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEWISE_CACHE", str(tmp_path))
    model = net()
    feed = seeded_feed(input_specs(model), size=1)
    steps: list[tuple[int, int]] = []
    table = measure_widths(model, feed, Bench(threads=1), lambda done, of: steps.append((done, of)))
    assert steps[0][0] == 0
    assert steps[-1][0] == steps[-1][1]
    assert WidthTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    graph = ChannelGraph.of(model.graph, opset(model))
    assert len(list(table.parts(graph))) == 7
    assert Bill.of(graph, table).whole > 0
    grids = {timing.axes for timing in table.timings.values()}
    assert {((3,), (4, 8, 12, 16)), ((4, 8, 12, 16),), ((4, 8, 12, 16), (4, 5)), ()} == grids
    stored = sorted(tmp_path.glob("widths-*.json"))
    assert len(stored) == 4
    assert cache.folder() == tmp_path
    disturbed, calm = (json.loads(file.read_text())["ms"] for file in stored[:2])
    stored[0].write_text(json.dumps({"ms": [1e3 * ms for ms in disturbed]}))
    stored[1].write_text(json.dumps({"ms": [1e-3 * ms for ms in calm]}))
    measure_widths(model, feed, Bench(threads=1))
    assert max(json.loads(stored[0].read_text())["ms"]) < 100 * max(disturbed), "it is measured again"
    assert json.loads(stored[1].read_text())["ms"] == [1e-3 * ms for ms in calm], "what was calm stays"


def test_a_table_is_a_cost(tmp_path: Path) -> None:
    """Widths cost what the table says, so those leave that save it."""
    model = net()
    graph = ChannelGraph.of(model.graph, opset(model))
    scores = {group.name: np.arange(float(group.size)) for group in graph.groups}
    feed = seeded_feed(input_specs(model), size=1)
    shapes = shapes_on(model, {name: array.shape for name, array in feed.items()})
    kind = kinds(model)["b"]
    steps = Timing(((4, 8, 12, 16),), (1.0, 1.0, 4.0, 4.0), ((4.0, 4.0),))
    table = WidthTable("here", "cpu", 1, shapes, {kind.text: steps})
    plan = select(model, scores, table, 0.5)
    assert achieved(model, plan, table) == 0.25
    assert len(plan) == 8, "another four would save nothing"
    assert achieved(model, uniform(model, scores, 0.25, multiple=4), table) == 1.0
    assert achieved(model, plan, Macs(shapes)) < 0.5


def test_a_form_of_other_layers_tells_nothing_of_the_model() -> None:
    """What computes there is called otherwise, so that nobody knows which layer took what."""
    model = net()
    feed = seeded_feed(input_specs(model), size=1)

    def renamed(form: ir.Model) -> ir.Model:
        other = form.clone()
        for node in other.graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.name = f"{value.name}.other"
        first = other.graph.node(0)
        extra = ir.node("Conv", [first.inputs[0], *first.inputs[1:]], first.attributes)
        extra.outputs[0].name = "extra"
        other.graph.insert_before(first, extra)
        other.graph.outputs.append(extra.outputs[0])
        extra.outputs[0].type = first.outputs[0].type
        extra.outputs[0].shape = first.outputs[0].shape
        return other

    bench = Bench(threads=1, int8=True, form=renamed)
    with pytest.raises(UnknownLayersError, match="other layers"):
        measure_widths(model, feed, bench)
    assert isinstance(ByTime(feed, bench)(model), WidthTable)  # those of the model in float stand for them


def test_a_model_that_does_not_run_is_refused() -> None:
    with pytest.raises(EdgewiseError, match="could not be profiled"):
        measure_widths(net(), {"x": normal(1, 3, 12, 12), "z": normal(1)}, Bench())
