"""Training through rounding: what comes out is rounded to what was trained with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
from rewrites import build, normal
from small_nets import constants, images

from edgewise.calibration.collect import collect
from edgewise.calibration.plan import QuantOptions, observed_values, plan
from edgewise.calibration.target import TARGETS
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.passes.quant_plan import QuantPlan
from edgewise.runtime.evaluate import Evaluator
from edgewise.training.options import TrainOptions
from edgewise.training.quantization_aware import heal, on_grids, through

NET = """g (float[N, 1, 8, 8] x) => (float[N, 4] y) {
    c1 = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(r1, w2, b2)
    r2 = Relu(c2)
    p = GlobalAveragePool(r2)
    f = Flatten(p)
    y = Gemm<transB = 1>(f, w3, b3)
}"""


def _net() -> ir.Model:
    weights = {"w1": normal(8, 1, 3, 3, seed=1) / 2, "b1": normal(8, seed=2) / 9}
    weights |= {"w2": normal(8, 8, 3, 3, seed=3) / 6, "b2": normal(8, seed=4) / 9}
    return build(NET, 17, **weights, w3=normal(4, 8, seed=5), b3=normal(4, seed=6) / 9)


def _plan(model: ir.Model, per_channel: bool = True) -> QuantPlan:
    target = next(iter(TARGETS.values()))
    options = QuantOptions(per_channel=per_channel)
    table = collect(model, images(model, 32), observed_values(model, options, target))
    return plan(model, table, options, target)


def _coarse(whole: QuantPlan) -> QuantPlan:
    """The grids of weights 16 times as coarse: rounding hurts."""
    grids = (
        replace(v, scale=tuple(16 * s for s in v.scale)) if v.name[0] == "w" else v for v in whole.values
    )
    return replace(whole, values=tuple(grids))


def _noise(one: ir.Model, other: ir.Model, x: np.ndarray) -> float:
    expected, found = Evaluator(one).run({"x": x})["y"], Evaluator(other).run({"x": x})["y"]
    return float(np.square(expected - found).mean() / np.square(expected).mean())


def test_through_is_what_the_plan_makes_of_the_model() -> None:
    model = _net()
    for chosen in (_plan(model), _plan(model, per_channel=False)):
        x = np.concatenate([feed["x"] for feed in images(model, 16, seed=3)])
        student = through(model, chosen)
        assert _noise(InsertQdq(chosen).on(model), student, x) < 1e-5
        assert {"w1", "w2", "w3", "b1", "b2", "b3"} <= constants(student).keys()
        assert all(np.array_equal(constants(student)[n], a) for n, a in constants(model).items())


def test_a_net_that_rounding_hurts_is_healed_to_the_integers_trained_with() -> None:
    model = _net()
    chosen = _coarse(_plan(model))
    options = TrainOptions(epochs=12, batch=16, learning_rate=5e-3, inner=0.0)
    trained = heal(model, chosen, images(model, 128), images(model, 64, seed=2), options, threads=1)
    x = np.concatenate([feed["x"] for feed in images(model, 64, seed=3)])
    before, after = InsertQdq(chosen).on(model), InsertQdq(chosen).on(trained.model)
    assert _noise(model, after, x) < 0.5 * _noise(model, before, x)
    # The healed floats lie on their grids: through the rounding they are themselves.
    weights, grids = constants(trained.model), {v.name: v for v in chosen.values}
    rounded = [name for name in ("w1", "w2", "w3") if name in grids]
    assert len(rounded) >= 2
    for name in rounded:
        grid = grids[name]
        steps = weights[name] / np.array(grid.scale).reshape(-1, *[1] * (weights[name].ndim - 1))
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
    assert all(
        np.array_equal(constants(on_grids(model, trained.model, chosen))[n], weights[n]) for n in weights
    )
    assert trained.history.best.held_back < trained.history.start.held_back
