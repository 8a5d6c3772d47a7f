"""The loop: best weights, restarts, resuming, the same result twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from rewrites import build, normal
from small_nets import classifier, constants, disturbed, images

from edgewise.calibration.data import from_arrays
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import input_specs
from edgewise.training.batches import Batch, Stack
from edgewise.training.distillation import distill
from edgewise.training.graph_module import GraphModule
from edgewise.training.options import DivergedError, Epoch, Interrupted, Trained, TrainOptions
from edgewise.training.trainer import Answer, train, trainable

OPTIONS = TrainOptions(epochs=3, batch=16, learning_rate=5e-3)


def _distilled(options: TrainOptions, checkpoint: Path | None = None, **more: object) -> Trained:
    teacher = classifier()
    student = disturbed(teacher, 0.5)
    samples, held_back = images(teacher, 48), images(teacher, 32, seed=2)
    return distill(teacher, student, samples, held_back, options, checkpoint=checkpoint, threads=1, **more)  # type: ignore[arg-type]


def _same(one: ir.Model, other: ir.Model) -> bool:
    ours, theirs = constants(one), constants(other)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n]) for n in ours)


def test_what_is_no_weight_is_not_trained() -> None:
    names = trainable(classifier())
    assert set(names) == {"w1", "w2", "w3", "b3", "g1", "b1", "g2", "b2"}
    assert set(trainable(classifier(), ("w*", "?1"))) == {"b3", "g2", "b2"}


def test_a_training_is_the_same_twice_and_another_with_another_seed() -> None:
    first = _distilled(OPTIONS)
    assert _same(first.model, _distilled(OPTIONS).model)
    assert not _same(first.model, _distilled(replace(OPTIONS, seed=1)).model)


def test_the_statistics_of_batch_norms_move_and_frozen_weights_stay() -> None:
    before = constants(disturbed(classifier(), 0.5))
    after = constants(_distilled(replace(OPTIONS, freeze=("w1", "*2"))).model)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {"m1", "v1", "w3", "g1"} <= moved
    assert not moved & {"w1", "w2", "g2", "b2"}


def test_statistics_that_are_frozen_all_the_way_stay() -> None:
    before = constants(disturbed(classifier(), 0.5))
    after = constants(_distilled(replace(OPTIONS, frozen=1.0)).model)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {"w1", "g1", "b1"} <= moved
    assert not moved & {"m1", "v1", "m2", "v2"}


def test_a_limit_in_steps_or_seconds_ends_a_training() -> None:
    assert len(_distilled(replace(OPTIONS, epochs=None, steps=4)).history.epochs) == 3  # 3 steps an epoch
    assert _distilled(replace(OPTIONS, epochs=None, max_seconds=0.2)).history.epochs[-1].learning_rate < 5e-3


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(optimizer: str, tmp_path: Path) -> None:
    options = replace(OPTIONS, optimizer=optimizer, learning_rate=5e-3 if optimizer == "adamw" else 0.05)  # type: ignore[arg-type]
    whole = _distilled(options)

    def stop(epoch: Epoch) -> None:
        # The checkpoint of an epoch is written behind its report: stop in the middle of the run.
        if epoch.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        _distilled(options, tmp_path / "run.npz", progress=stop)
    assert [e.number for e in stopped.value.trained.history.epochs] == [0, 1, 2]
    again: list[int] = []
    resumed = _distilled(options, tmp_path / "run.npz", progress=lambda e: again.append(e.number))
    assert again == [2, 3]
    assert _same(resumed.model, whole.model)
    finished = _distilled(options, tmp_path / "run.npz", progress=lambda e: again.append(e.number))
    assert again == [2, 3]
    assert _same(finished.model, whole.model)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.npz"
    _distilled(replace(OPTIONS, epochs=1), file)
    with pytest.raises(InputError, match="another training"):
        _distilled(replace(OPTIONS, epochs=2), file)
    file.write_bytes(b"nothing")
    with pytest.raises(InputError, match="no checkpoint"):
        _distilled(OPTIONS, file)


def test_interrupted_keeps_the_best_so_far() -> None:
    def stop(epoch: Epoch) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        _distilled(OPTIONS, progress=stop)
    history = stopped.value.trained.history
    assert history.ended == "interrupted"
    assert history.best.number == 1
    assert not _same(stopped.value.trained.model, disturbed(classifier(), 0.5))


def test_patience_ends_a_training_that_does_not_get_better() -> None:
    options = replace(OPTIONS, epochs=50, patience=2, learning_rate=1e-12, inner=0.0, freeze=("g*", "b*"))
    history = _distilled(options).history
    assert len(history.epochs) < 50
    assert history.ended == "patience is over"


class _Bowl:
    """The sum of squares of all weights; no number from step `breaks` on until step `good`."""

    def __init__(self, module: GraphModule, breaks: int = 10**9, good: int = 10**9) -> None:
        self._module, self._breaks, self._good, self.calls = module, breaks, good, 0

    def __call__(self, batch: Batch) -> Answer:
        loss = torch.stack([w.square().sum() for w in self._module.weights.values()]).sum()
        if self._module.training:
            self.calls += 1
            if self._breaks <= self.calls < self._good:
                loss = loss * torch.nan
        return Answer(loss, 0.0)


def _bowl(breaks: int, good: int) -> Trained:
    model = classifier()
    module = GraphModule(model)
    stack = Stack.of(images(model, 32), 2**20)
    return train(model, module, _Bowl(module, breaks, good), stack, stack, OPTIONS, threads=1)


def test_what_explodes_starts_again_from_the_best_weights_at_half_the_rate() -> None:
    history = _bowl(3, 4).history
    assert [e.number for e in history.epochs] == [0, 1, 2, 3]
    assert history.best.number == 3
    calm = _bowl(10**9, 10**9).history
    assert 0 < history.epochs[-2].learning_rate < calm.epochs[-2].learning_rate


def test_what_explodes_three_times_is_an_error_that_holds_the_best_weights() -> None:
    with pytest.raises(DivergedError, match="lower learning rate") as error:
        _bowl(3, 10**9)
    trained = error.value.trained
    assert trained.history.best.number == 1
    assert not _same(trained.model, classifier())


def test_a_model_that_gives_no_numbers_is_refused() -> None:
    teacher, broken = classifier(), classifier()
    broken.graph.initializers["w2"].const_value = ir.Tensor(np.full((8, 8, 3, 3), np.nan, np.float32))
    with pytest.raises(EdgewiseError, match="before training"):
        distill(teacher, broken, images(teacher, 16), images(teacher, 16), OPTIONS)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(InputError, match="frozen"):
        _distilled(replace(OPTIONS, freeze=("*",)))


def test_threads_of_torch_are_as_before() -> None:
    before = torch.get_num_threads()
    _distilled(replace(OPTIONS, epochs=1))
    assert torch.get_num_threads() == before


def test_frozen_weights_gather_no_gradients() -> None:
    model = classifier()
    module = GraphModule(model)
    stack = Stack.of(images(model, 16), 2**20)
    train(model, module, _Bowl(module), stack, stack, replace(OPTIONS, freeze=("w*",)), threads=1)
    assert {name for name, w in module.weights.items() if w.grad is None} == {"w1", "w2", "w3"}


def test_weights_of_integers_are_refused_with_a_word() -> None:
    text = """g (float[N, 4] x) => (float[N, 4] y) { w = DequantizeLinear(q, s) y = MatMul(x, w) }"""
    model = build(text, 17, q=np.ones((4, 4), np.int8), s=np.array(0.1, np.float32))
    samples = from_arrays({"x": normal(8, 4)}, input_specs(model))
    with pytest.raises(InputError, match="weights are integers"):
        distill(model, model, samples, samples, OPTIONS)


def test_outputs_that_no_weight_moves_are_an_error() -> None:
    class Constant:
        def __call__(self, batch: Batch) -> Answer:
            return Answer(torch.ones(()), 0.0)

    model = classifier()
    stack = Stack.of(images(model, 16), 2**20)
    with pytest.raises(EdgewiseError, match="smoothly"):
        train(model, GraphModule(model), Constant(), stack, stack, OPTIONS)


def test_a_checkpoint_cut_short_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.npz"
    _distilled(replace(OPTIONS, epochs=1), file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError, match="no checkpoint"):
        _distilled(replace(OPTIONS, epochs=1), file)


def test_interrupted_in_the_last_phase_has_the_history_of_both() -> None:
    def stop(epoch: Epoch) -> None:
        if epoch.phase == "end to end":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        _distilled(replace(OPTIONS, blockwise=0.5, epochs=4), progress=stop)
    history = stopped.value.trained.history
    assert {epoch.phase for epoch in history.epochs} == {"block by block", "end to end"}
    assert history.ended == "interrupted"
