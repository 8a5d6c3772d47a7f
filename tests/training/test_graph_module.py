"""An ONNX graph as a torch module: the same numbers, gradients, and the way back."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")

import torch
from rewrites import build, constants, normal
from torch.nn import functional as nn

from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Array, Evaluator
from edgewise.training.graph_module import GraphModule, as_tensors, unsupported
from edgewise.training.program import Execution

_run_step = Execution.run_step
RNG = np.random.default_rng(0)

# float32 sums of some hundred products, in another order than onnxruntime's
CLOSE = 1e-5

NET = """
    net (float[N, 3, 8, 8] x) => (float[N, 5] y)
    {
        c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
        n = BatchNormalization <momentum = 0.8> (c, scale, shift, mean, var)
        r = Relu (n)
        p = GlobalAveragePool (r)
        s = Shape <end = 1> (x)
        to = Concat <axis = 0> (s, rest)
        f = Reshape (p, to)
        half = Constant <value_float = 0.5> ()
        h = Mul (f, half)
        y = Gemm <transB = 1> (h, v, u)
    }"""


def net(**more: Array) -> ir.Model:
    weights = {
        "w": normal(4, 3, 3, 3),
        "b": normal(4, seed=1),
        "scale": normal(4, seed=2),
        "shift": normal(4, seed=3),
        "mean": normal(4, seed=4),
        "var": np.abs(normal(4, seed=5)) + 0.5,
        "rest": np.array([-1], np.int64),
        "v": normal(5, 4, seed=6),
        "u": normal(5, seed=7),
    }
    return build(NET, **{**weights, **more})


def assert_same(model: ir.Model, feed: dict[str, Array], tolerance: float = CLOSE) -> None:
    """The outputs are onnxruntime's, relative to the largest."""
    wanted = Evaluator(model, threads=1, optimize=False).run(feed)
    with torch.no_grad():
        found = GraphModule(model).eval()(as_tensors(feed))
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        np.testing.assert_allclose(
            found[name].detach().numpy(), want, rtol=0, atol=tolerance * np.abs(want).max()
        )


@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_are_those_of_onnxruntime(batch: int) -> None:
    assert_same(net(), {"x": normal(batch, 3, 8, 8)})


def test_a_fixed_batch_that_only_the_shapes_declare_may_be_larger() -> None:
    model = build("f (float[1, 3] x) => (float[1, 2] y) { y = MatMul (x, w) }", w=normal(3, 2))
    assert GraphModule(model)({"x": torch.ones(7, 3)})["y"].shape == (7, 2)


def test_float_initializers_and_constants_are_the_parameters() -> None:
    module = GraphModule(net())
    assert set(module.weights) == {"w", "b", "scale", "shift", "v", "u", "half"}
    assert set(module.statistics) == {"mean", "var"}
    assert set(map(id, module.parameters())) == set(map(id, module.weights.values()))


def test_float16_weights_are_parameters_of_their_own_type() -> None:
    model = build(
        "f (float16[N, 3] x) => (float16[N, 2] y) { y = MatMul (x, w) }", w=normal(3, 2).astype(np.float16)
    )
    module = GraphModule(model)
    assert module.weights["w"].dtype == torch.float16
    assert module(as_tensors({"x": normal(2, 3).astype(np.float16)}))["y"].dtype == torch.float16


def test_what_sets_a_node_up_is_no_parameter() -> None:
    model = build(
        "f (float[N, 3] x) => (float[N, 3] y) { c = Clip (x, low, high)  y = Pow (c, two) }",
        low=np.float32(0),
        high=np.float32(6),
        two=np.float32(2),
    )
    assert not GraphModule(model).weights
    assert_same(model, {"x": 9 * normal(4, 3)})


def test_gradients_are_the_differences_of_the_loss() -> None:
    """Central differences in float64: their error is of order 1e-6 squared, and rounding's 1e-16 / 1e-6."""
    module, x = GraphModule(net()).eval().double(), torch.from_numpy(normal(2, 3, 8, 8)).double()
    weights = dict(module.weights)
    module({"x": x})["y"].square().sum().backward()
    with torch.no_grad():
        for name in ("w", "scale", "half", "v"):
            weight, step = weights[name], 1e-6
            place = (0,) * weight.dim()
            losses = []
            for sign in (1, -2):
                weight[place] += sign * step
                losses.append(module({"x": x})["y"].square().sum())
            weight[place] += step
            difference = (losses[0] - losses[1]) / (2 * step)
            assert weight.grad is not None
            torch.testing.assert_close(weight.grad[place], difference, rtol=1e-6, atol=1e-6)


def test_gradients_reach_weights_through_integer_shapes() -> None:
    """The shape of a weight is no constant to be computed once: the weight may be another the next time."""
    model = build(
        """f (float[N, 6] x) => (float[A, B] y)
        { m = MatMul (x, w)  s = Shape (w)  t = Reshape (m, s)  y = Mul (t, t) }""",
        w=normal(6, 4),
    )
    module = GraphModule(model)
    module({"x": torch.ones(6, 6)})["y"].sum().backward()
    assert module.weights["w"].grad is not None


def test_what_follows_from_integers_alone_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(
        """f (float[N, 6] x) => (float[N, A, B] y)
        { front = Constant <value_ints = [-1]> ()  s = Concat <axis = 0> (front, rest)
          t = Add (s, zero)  y = Reshape (x, t) }""",
        rest=np.array([2, 3], np.int64),
        zero=np.zeros(3, np.int64),
    )
    module = GraphModule(model)
    seen: list[str] = []
    monkeypatch.setattr(
        "edgewise.training.program.Execution.run_step",
        lambda self, step: seen.append(step.node.op_type) or _run_step(self, step),
    )
    assert module({"x": torch.ones(5, 6)})["y"].shape == (5, 2, 3)
    assert seen == ["Reshape"]


def test_training_takes_the_statistics_of_the_batch_and_moves_the_stored_ones() -> None:
    module, x = GraphModule(net()), torch.from_numpy(normal(4, 3, 8, 8))
    before = {name: numbers.clone() for name, numbers in module.statistics.items()}
    with module.train().watch(["c", "n"]) as seen, torch.no_grad():
        module({"x": x})
    c = seen["c"]
    moved = nn.batch_norm(c, None, None, training=True)
    scale, shift = (module.weights[name].reshape(1, -1, 1, 1) for name in ("scale", "shift"))
    torch.testing.assert_close(seen["n"], moved * scale + shift)
    mean = 0.8 * before["mean"] + 0.2 * c.mean(dim=(0, 2, 3))
    variance = 0.8 * before["var"] + 0.2 * c.var(dim=(0, 2, 3))
    torch.testing.assert_close(module.statistics["mean"], mean)
    torch.testing.assert_close(module.statistics["var"], variance)


def test_inference_leaves_the_statistics() -> None:
    model = net()
    module = GraphModule(model).eval()
    module({"x": torch.ones(2, 3, 8, 8)})
    np.testing.assert_array_equal(module.statistics["mean"], constants(model)["mean"])


def test_write_back_gives_a_model_of_the_new_numbers_and_leaves_the_old_one() -> None:
    model, feed = net(), {"x": normal(2, 3, 8, 8)}
    old = constants(model)
    module = GraphModule(model).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(as_tensors(feed))["y"].square().mean().backward()
    optimizer.step()
    written = module.write_back()
    assert [node.op_type for node in written.graph] == [node.op_type for node in model.graph]
    for name, array in constants(model).items():
        np.testing.assert_array_equal(array, old[name])
    assert not np.allclose(constants(written)["w"], old["w"])
    assert not np.allclose(constants(written)["mean"], old["mean"])
    np.testing.assert_array_equal(constants(written)["rest"], old["rest"])
    wanted = module.eval()(as_tensors(feed))["y"].detach().numpy()
    np.testing.assert_allclose(
        Evaluator(written).run(feed)["y"], wanted, rtol=0, atol=CLOSE * abs(wanted).max()
    )


def test_write_back_writes_constant_nodes() -> None:
    module = GraphModule(net())
    with torch.no_grad():
        module.weights["half"].fill_(0.25)
    (node,) = (node for node in module.write_back().graph if node.op_type == "Constant")
    assert node.attributes["value"].as_tensor().numpy() == np.float32(0.25)


def test_a_hook_sees_and_replaces_a_value_until_it_is_removed() -> None:
    module, x = GraphModule(net()).eval(), torch.ones(2, 3, 8, 8)
    plain = module({"x": x})["y"]
    handles = [module.register_value_hook(name, torch.zeros_like) for name in ("f", "u")]
    assert not module({"x": x})["y"].any()
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(module({"x": x})["y"], plain)


def test_watch_keeps_the_graph_of_gradients() -> None:
    module = GraphModule(net()).eval()
    with module.watch(["x", "r"]) as seen:
        module({"x": torch.ones(2, 3, 8, 8)})
    assert seen["x"].shape == (2, 3, 8, 8)
    (gradient,) = torch.autograd.grad(seen["r"].sum(), [module.weights["b"]])
    assert gradient.shape == (4,)


def test_bodies_see_the_values_and_weights_around_them() -> None:
    model = build(
        """f (float[2] x, bool c) => (float[2] y)
        {
            z = Add (x, w)
            y = If (c) <
                then_branch = yes () => (float[2] a) { a = Mul (z, w) },
                else_branch = no () => (float[2] b) { two = Constant <value_float = 2.0> () b = Mul (z, two) }
            >
        }""",
        w=normal(2),
    )
    for condition in (True, False):
        assert_same(model, {"x": normal(2, seed=1), "c": np.array(condition)})
    module = GraphModule(model)
    module({"x": torch.ones(2), "c": torch.tensor(False)})["y"].sum().backward()
    torch.testing.assert_close(module.weights["w"].grad, torch.full((2,), 2.0))
    assert module.weights["two"].grad is not None


def test_shapes_and_settings_stay_behind_when_the_module_moves() -> None:
    """The meta device has no numbers: whatever asks it for one, or mixes devices, raises."""
    model = build(
        """f (float[N, 6] x) => (float[A, B] y)
        {
            c = Clip (x, low, high)
            p = Pow (c, two)
            s = Shape (p)
            d = Div (s, halves)
            t = Mul (d, halves)
            y = Reshape (p, t)
        }""",
        low=np.float32(0),
        high=np.float32(6),
        two=np.float32(2),
        halves=np.array([1, 2], np.int64),
    )
    for built, feed in ((model, {"x": torch.ones(4, 6)}), (net(), {"x": torch.ones(4, 3, 8, 8)})):
        module = GraphModule(built)
        here = module(feed)["y"]
        there = module.to("meta")({"x": feed["x"].to("meta")})["y"]
        assert there.device.type == "meta"
        assert there.shape == here.shape


def test_a_missing_operator_is_named() -> None:
    model = build("f (float[N] x) => (float[N] y) { y = com.example.Strange (x) }", shapes=False)
    assert unsupported(model) == ("com.example.Strange",)
    assert not unsupported(net())
    with pytest.raises(InputError, match=r"Strange 'y'.*com\.example\.Strange"):
        GraphModule(model)


def test_a_missing_input_and_an_unknown_value_are_named() -> None:
    module = GraphModule(net())
    with pytest.raises(InputError, match="input 'x' is missing"):
        module({})
    with pytest.raises(InputError, match="no value 'nowhere'"):
        module.register_value_hook("nowhere", torch.zeros_like)


def test_an_error_of_torch_says_at_which_node() -> None:
    with pytest.raises(RuntimeError) as caught:
        GraphModule(net())({"x": torch.ones(2, 7, 8, 8)})
    assert "Conv 'c'" in caught.value.__notes__[0]


def test_two_runs_are_the_same() -> None:
    feed = as_tensors({"x": normal(2, 3, 8, 8)})
    modules = [GraphModule(net()) for _ in range(2)]
    for module in modules:
        module(feed)["y"].square().sum().backward()
    first, second = (dict(module.weights) for module in modules)
    for name, weight in first.items():
        assert weight.grad is not None
        assert torch.equal(weight.grad, second[name].grad)


def test_gradients_of_a_real_net_are_the_differences_of_its_loss(corpus: Path) -> None:
    """Along the gradient of all weights together, in float64. A kink of a Relu in the way costs 1e-4."""
    module = GraphModule(ir.load(corpus / "models" / "mlperftiny_ic_resnet8.onnx")).eval().double()
    (name,) = (value.name for value in module.write_back().graph.inputs)
    feed = {name: torch.from_numpy(RNG.uniform(0, 255, (1, 32, 32, 3)))}

    def loss() -> torch.Tensor:
        (output,) = module(feed).values()
        return output.log().sum()

    weights = [w for w in module.parameters() if w.numel() > 1]
    gradients = torch.autograd.grad(loss(), weights)
    norm = torch.sqrt(sum((g.square().sum() for g in gradients), torch.zeros(())))
    step = 1e-7
    with torch.no_grad():
        losses = []
        for sign in (1, -2):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight += sign * step * gradient / norm
            losses.append(loss())
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), norm, rtol=1e-4, atol=0)


def test_a_copy_has_numbers_of_its_own_and_no_hooks() -> None:
    text = "g (float[N, 3] x) => (float[N, 3] y) { z = MatMul(x, w) y = BatchNormalization(z, s, b, m, v) }"
    ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
    module = GraphModule(build(text, 17, w=normal(3, 3), s=ones, b=zeros, m=zeros, v=ones)).double().eval()
    module.weights["w"].requires_grad_(False)
    module.register_value_hook("y", lambda value: value * 0)
    other = copy.deepcopy(module)
    assert not other.training
    assert other.weights["w"].dtype == torch.float64
    assert not other.weights["w"].requires_grad
    x = torch.from_numpy(normal(4, 3)).double()
    assert other({"x": x})["y"].abs().sum() > 0
    other.weights["w"].data.zero_()
    other.statistics["m"].add_(1)
    assert module.weights["w"].abs().sum() > 0
    assert torch.equal(module.statistics["m"], torch.zeros(3, dtype=torch.float64))
