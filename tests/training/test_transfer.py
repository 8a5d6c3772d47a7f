"""A new head on an old body."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build, normal
from small_nets import classifier, constants, images

from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator
from edgewise.training.distillation import finetune
from edgewise.training.options import TrainOptions
from edgewise.training.transfer import replace_head

X = np.random.default_rng(0).standard_normal((5, 4, 6, 6)).astype(np.float32)

HEADS = {
    "matmul": "p = GlobalAveragePool(x) f = Flatten(p) m = MatMul(f, w) a = Add(m, b) y = Softmax(a)",
    "convolution": "p = GlobalAveragePool(x) c = Conv(p, k, b) f = Flatten(c) y = Softmax(f)",
    "convolution before the pooling": "c = Conv(x, k, b) r = Relu(c) p = GlobalAveragePool(r) y = Flatten(p)",
    "reshape": "p = GlobalAveragePool(x) c = Conv(p, k, b) y = Reshape(c, s)",
}


def _net(text: str) -> ir.Model:
    weights = {"w": normal(4, 10), "k": normal(10, 4, 1, 1), "b": normal(10), "s": np.array([-1, 10])}
    used = {name: array for name, array in weights.items() if f" {name})" in text or f" {name}," in text}
    return build(f"g (float[N, 4, 6, 6] x) => (float[N, 10] y) {{ {text} }}", 17, **used)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("classes", [3, 12])
def test_the_head_has_as_many_classes(head: str, classes: int) -> None:
    model = _net(HEADS[head])
    changed = replace_head(model, classes, seed=1)
    assert list(changed.graph.outputs[0].shape or ())[1] == classes
    found = Evaluator(changed).run({"x": X})["y"]
    assert found.shape == (5, classes)
    if "Softmax" in HEADS[head]:
        np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    assert Evaluator(model).run({"x": X})["y"].shape == (5, 10)  # the original is as it was
    same, other = replace_head(model, classes, seed=1), replace_head(model, classes, seed=2)
    assert np.array_equal(Evaluator(same).run({"x": X})["y"], found)
    assert not np.array_equal(Evaluator(other).run({"x": X})["y"], found)


def test_the_body_stays_and_the_new_head_learns() -> None:
    model = classifier(classes=7, softmax=True)
    changed = replace_head(model, 4)
    before, after = constants(model), constants(changed)
    assert all(np.array_equal(before[n], after[n]) for n in before if n not in ("w3", "b3"))
    assert after["w3"].shape == (4, 8)
    samples, held_back = images(changed, 128, classes=4), images(changed, 64, seed=2, classes=4)
    options = TrainOptions(epochs=15, batch=16, learning_rate=1e-2, freeze=("w1", "w2"))
    history = finetune(changed, samples, held_back, options, threads=1).history
    assert history.best.score > history.start.score + 0.2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("y = Mul(x, x)", "Mul"),
        ("p = GlobalAveragePool(x) y = Flatten(p)", "leads to it"),
        (
            "p = GlobalAveragePool(x) f = Flatten(p) g = MatMul(f, w) y = Abs(g)",
            "Abs",
        ),
    ],
)
def test_why_there_is_no_head(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        replace_head(_net(text), 3)


def test_a_head_that_is_read_twice_or_has_no_classes_is_refused() -> None:
    shared = "p = GlobalAveragePool(x) f = Flatten(p) g = MatMul(f, w) t = MatMul(f, w) y = Identity(t)"
    with pytest.raises(InputError, match="elsewhere"):
        replace_head(_net(shared), 3)
    with pytest.raises(InputError, match="two classes"):
        replace_head(classifier(), 1)
