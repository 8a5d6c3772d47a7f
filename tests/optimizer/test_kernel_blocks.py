"""The blocks in which kernels work, seen in times that are made up."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build, normal

from edgewise.optimizer.kernel_blocks import Alone, Blocks, kernel_blocks
from edgewise.optimizer.layer_models import Grid, points_of
from edgewise.optimizer.width_table import Kind
from edgewise.passes.channels import ChannelGraph
from edgewise.passes.graph import opset
from edgewise.passes.infer_shapes import shapes_on
from edgewise.training.costs import layers_of

TEXT = """
net (float[1, 3, 6, 6] x) => (float[1, 5, 4, 4] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w1)
    b = Conv<pads = [1, 1, 1, 1]>(a, w2)
    r = Relu(b)
    y = Conv(r, w3)
}
"""


def net(width: int) -> ir.Model:
    weights = {"w1": normal(width, 3, 3, 3), "w2": normal(width, width, 3, 3), "w3": normal(5, width, 3, 3)}
    return build(TEXT, **weights)


def kinds(model: ir.Model, shape: tuple[int, ...] = (1, 3, 6, 6)) -> list[Kind]:
    graph = ChannelGraph.of(model.graph, opset(model))
    return [Kind.of(graph, layer) for layer in layers_of(graph, shapes_on(model, {"x": shape}))]


def both(blocks: Blocks) -> tuple[int, int]:
    """Of what a convolution reads and of what it writes."""
    assert len(blocks) == 2
    return blocks["Conv", False], blocks["Conv", True]


def stairs(read: int, written: int, noise: float = 0.0, seed: int = 0) -> tuple[list[Grid], Alone]:
    """A way to time layers whose kernels work in these blocks, and the grids that it is asked for."""
    asked: list[Grid] = []
    rng = np.random.default_rng(seed)

    def alone(_: Kind, grid: Grid) -> tuple[float, ...]:
        asked.append(grid)
        ideal = [(1 + -(-a // read) * read) * (1 + -(-b // written) * written) for a, b in points_of(grid)]
        return tuple(np.array(ideal) * (1 + noise * rng.random(len(ideal))))

    return asked, alone


@settings(max_examples=30, deadline=None)
@given(
    read=st.sampled_from([1, 4, 8, 16, 32]),
    written=st.sampled_from([1, 4, 8, 16, 32]),
    width=st.sampled_from([48, 64, 96]),
    seed=st.integers(0, 9),
)
def test_blocks_are_found(read: int, written: int, width: int, seed: int) -> None:
    """Also where times are two percent off, while a block of 8 in 96 is eight. Widths come in fours."""
    _, alone = stairs(read, written, 0.02, seed)
    seen = tuple(block if block > 4 else 1 for block in (read, written))
    assert both(kernel_blocks(kinds(net(width)), alone)) == seen


def test_the_narrowest_layer_that_is_wide_enough_is_asked() -> None:
    asked, alone = stairs(8, 16)
    several = [*kinds(net(128)), *kinds(net(64)), *kinds(net(32))]
    assert both(kernel_blocks(several, alone)) == (8, 16)
    assert [max(map(max, grid)) for grid in asked] == [64, 64]


def test_where_nothing_is_wide_or_can_be_timed_there_are_no_blocks() -> None:
    asked, alone = stairs(8, 16)
    assert kernel_blocks(kinds(net(32)), alone) == {}
    assert not asked
    assert both(kernel_blocks(kinds(net(64)), lambda kind, grid: ())) == (1, 1)


def test_times_that_say_nothing_make_no_blocks() -> None:
    flat = kernel_blocks(kinds(net(64)), lambda kind, grid: (1.0,) * len(points_of(grid)))
    assert both(flat) == (1, 1)


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_block(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = kernel_blocks(kinds(net(64)), lambda kind, grid: tuple(rng.random(len(points_of(grid)))))
    assert both(found) == (1, 1)


def test_blocks_are_of_what_is_read_and_written_in_whatever_order_they_come() -> None:
    """Of w @ x the weight, whose first axis is the output's, comes first."""
    text = """
    net (float[3, 7] x) => (float[5, 7] y) {
        a = MatMul(w1, x)
        b = MatMul(w2, a)
        y = MatMul(w3, b)
    }
    """
    found = kinds(build(text, w1=normal(64, 3), w2=normal(64, 64), w3=normal(5, 64)), (3, 7))
    assert [kind.written for kind in found] == [(True, False)] * 3
    _, alone = stairs(8, 16)  # of the axes in their order
    assert kernel_blocks(found, alone) == {("MatMul", True): 8, ("MatMul", False): 16}
