"""How samples reach a module: so many in a run as there is memory for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from rewrites import build, normal
from small_nets import classifier, constants, disturbed, images

from edgewise.calibration.data import Samples, from_arrays
from edgewise.passes.graph import Array
from edgewise.runtime.evaluate import TensorSpec
from edgewise.training.batches import Batch, Stack
from edgewise.training.distillation import distill
from edgewise.training.feeding import can_vary, runner, stacks
from edgewise.training.graph_module import GraphModule
from edgewise.training.options import TrainOptions

OPTIONS = TrainOptions(epochs=2, batch=16, learning_rate=1e-2)


def _wide() -> ir.Model:
    """Each of eight layers keeps its input for the gradient of its weight: 16 channels of 64 x 64."""
    text = "g (float[N, 16, 64, 64] x0) => (float[N, 16, 64, 64] x8) {"
    text += "".join(f"x{i + 1} = Conv<pads = [1, 1, 1, 1]>(x{i}, w{i})" for i in range(8)) + "}"
    return build(text, 17, **{f"w{i}": normal(16, 16, 3, 3, seed=i) for i in range(8)})


def _some(count: int, labels: Array | None = None, shape: tuple[int, ...] = (3, 8, 8)) -> Samples:
    specs = (TensorSpec("x", np.dtype(np.float32), ("N", *shape)),)
    return from_arrays({"x": normal(count, *shape)}, specs, labels)


def test_as_many_run_together_as_half_of_the_memory_holds() -> None:
    each = 16 * 64 * 64 * 4
    specs = (TensorSpec("x0", np.dtype(np.float32), ("N", 16, 64, 64)),)
    samples = from_arrays({"x0": normal(4, 16, 64, 64)}, specs)
    module = GraphModule(_wide())
    kept = 8 * each  # the inputs of the layers; on top come four times the largest
    for fits in (1, 3, 7):
        options = replace(OPTIONS, memory=2 * (kept + 4 * each) * fits + 1)
        assert [stack.at_once for stack in stacks(samples, samples, options, module)] == [fits, fits]


def test_the_answers_of_a_teacher_count() -> None:
    specs = (TensorSpec("x0", np.dtype(np.float32), ("N", 16, 64, 64)),)
    samples = from_arrays({"x0": normal(2, 16, 64, 64)}, specs)
    module, options = GraphModule(_wide()), replace(OPTIONS, memory=2**26)

    def teacher(batch: Batch) -> Mapping[str, Array]:
        return {f"inner{i}": batch.feed["x0"] for i in range(24)}

    alone, taught = (stacks(samples, samples, options, module, some)[0] for some in ((), (teacher,)))
    assert taught.at_once < alone.at_once


def test_a_step_in_parts_is_a_step_of_all() -> None:
    # Without a batch norm and with a loss that is a mean over rows, parts make no difference.
    teacher = classifier(softmax=True)
    module = GraphModule(teacher).eval()
    stack = Stack.of(images(teacher, 12), 2**20)
    rows = [batch.feed["x"] for batch in replace(stack, at_once=5).in_order(12)]
    assert [len(array) for array in rows] == [4, 4, 4]
    apart = np.concatenate([runner(module)(Batch({"x": r}, np.arange(len(r))))["y"] for r in rows])
    (whole,) = stack.in_order(12)
    np.testing.assert_allclose(apart, runner(module)(whole)["y"], atol=1e-5)


@pytest.mark.parametrize(("to", "runs_together"), [([1, 48], True), ([3, 16], True), ([1, 1, 48], True)])
def test_a_batch_of_one_that_is_written_into_a_graph_is_opened(to: list[int], runs_together: bool) -> None:
    text = "g (float[1, 3, 4, 4] x) => (float[a, b] y) { r = Reshape(x, to) y = Relu(r) }"
    module = GraphModule(build(text, 17, to=np.array(to)))
    specs = (TensorSpec("x", np.dtype(np.float32), (1, 3, 4, 4)),)
    samples = from_arrays({"x": normal(6, 1, 3, 4, 4)}, specs)
    found, _ = stacks(samples, samples, OPTIONS, module)
    assert (found.at_once > 1) == runs_together


def test_rows_that_are_mixed_run_alone() -> None:
    """The mean over all rows is another one where there are two."""
    text = "g (float[1, 3] x) => (float[1, 3] y) { m = ReduceMean<keepdims = 1>(x) y = Sub(x, m) }"
    specs = (TensorSpec("x", np.dtype(np.float32), (1, 3)),)
    samples = from_arrays({"x": normal(6, 1, 3)}, specs)
    found, _ = stacks(samples, samples, OPTIONS, GraphModule(build(text, 17)))
    assert found.at_once == 1


def test_little_memory_trains_as_well() -> None:
    teacher = classifier()
    student = disturbed(teacher, 0.5)
    options = replace(OPTIONS, memory=1)  # one sample a run
    history = distill(teacher, student, images(teacher, 32), images(teacher, 16, seed=2), options, threads=1)
    assert history.history.best.held_back < history.history.start.held_back


def test_a_batch_norm_of_one_number_a_channel_takes_what_is_stored() -> None:
    text = "g (float[N, 3] x) => (float[N, 3] y) { y = BatchNormalization(x, s, b, m, v) }"
    ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
    module = GraphModule(build(text, 17, s=ones, b=zeros, m=ones, v=ones)).train()
    y = module({"x": torch.full((1, 3), 5.0)})["y"]
    torch.testing.assert_close(y, torch.full((1, 3), 4.0), atol=1e-4, rtol=0)
    assert all(torch.equal(numbers, torch.ones(3)) for numbers in module.statistics.values())


@pytest.mark.parametrize(
    ("shape", "is_image"),
    [((3, 8, 8), True), ((8, 8, 1), True), ((100, 1, 1), False), ((100, 8, 8), False), ((64,), False)],
)
def test_images_are_varied_and_latents_are_not(shape: tuple[int, ...], is_image: bool) -> None:
    stack = Stack.of(_some(4, shape=shape), 2**20)
    assert can_vary(stack, OPTIONS) == is_image
    assert not can_vary(stack, replace(OPTIONS, augment="none"))


def test_images_whose_labels_tell_of_places_stay() -> None:
    assert can_vary(Stack.of(_some(4, np.arange(4)), 2**20), OPTIONS)
    assert not can_vary(Stack.of(_some(4, np.zeros((4, 8, 8), np.int64)), 2**20), OPTIONS)


def test_few_rows_leave_the_statistics_of_batch_norms() -> None:
    teacher = classifier()
    samples = images(teacher, 16)
    for memory, moves in ((1, False), (2**30, True)):
        options = replace(OPTIONS, epochs=1, memory=memory)
        student = disturbed(teacher, 0.5)
        after = constants(distill(teacher, student, samples, samples, options, threads=1).model)
        assert np.array_equal(after["m1"], constants(student)["m1"]) != moves
