"""infer-shapes: what follows from the inputs is written down, what the file merely notes is not believed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build, rewritten

from edgewise.passes.base import Refused
from edgewise.passes.graph import move_initializers
from edgewise.passes.infer_shapes import InferShapes, infer_shapes, symbol_of


def shapes(graph: ir.Graph) -> dict[str, str]:
    return {v.name or "": str(v.shape) for node in graph for v in node.outputs}


def plain(text: str, **weights: np.ndarray) -> ir.Model:
    return build(text, shapes=False, **weights)


def test_shapes_and_types() -> None:
    model = plain(
        "g (float[N, 3] x) => (float[N, 5] y) { a = MatMul(x, w) i = Cast<to = 6>(a) y = Cast<to = 1>(i) }",
        w=np.zeros((3, 5), np.float32),
    )
    after, outcome = rewritten(model, InferShapes())
    assert outcome.edits == 2  # the output already declares its own
    assert shapes(after.graph) == {"a": "[N,5]", "i": "[N,5]", "y": "[N,5]"}
    assert after.graph.node(1).outputs[0].dtype == ir.DataType.INT32


def test_values_that_shapes_are_computed_from() -> None:
    body = "s = Shape(x) n = Gather(s, zero) t = Concat<axis = 0>(n, rest) a = Reshape(x, t) y = Neg(a)"
    model = plain(
        f"g (float[4, 2, 3] x) => (float[A, B] y) {{ {body} }}", zero=np.int64([0]), rest=np.int64([-1])
    )
    infer_shapes(model)
    assert shapes(model.graph)["a"] == "[4,6]"


def test_the_interface_keeps_what_it_declares() -> None:
    model = plain("g (float[N, 3] x) => (float[A, B] y) { y = Neg(x) }")
    assert infer_shapes(model) == 0
    assert shapes(model.graph) == {"y": "[A,B]"}


def test_a_stale_note_is_corrected() -> None:
    """A batch made dynamic by hand: the inner values still say one."""
    model = plain("g (float[N, 3] x) => (float[1, 3] y) { a = Neg(x) y = Neg(a) }")
    model.graph.node(0).outputs[0].shape = ir.Shape([1, 3])
    assert infer_shapes(model) == 1
    assert shapes(model.graph) == {"a": "[N,3]", "y": "[1,3]"}


@pytest.mark.parametrize("dim", ["?", "-1", "None", -1])
def test_dimensions_that_say_nothing(dim: str | int) -> None:
    """Some exporters call every unknown dimension the same, which makes none of them equal."""
    model = plain("g (float[A, B] x) => (float[C, D] y) { a = Neg(x) y = Neg(a) }")
    model.graph.inputs[0].shape = ir.Shape([dim, dim])
    infer_shapes(model)
    first, second = model.graph.node(0).outputs[0].shape or ()
    assert isinstance(first, ir.SymbolicDim)
    assert isinstance(second, ir.SymbolicDim)
    assert first.value is None or first.value != second.value
    assert model.graph.inputs[0].shape == ir.Shape([dim, dim])


@pytest.mark.parametrize(
    ("dim", "name"),
    [("N", "N"), ("p2o.0", "p2o.0"), ("n // 2", "n // 2"), ("?", None), ("-1", None), ("None", None)],
)
def test_names_of_dimensions(dim: str, name: str | None) -> None:
    assert symbol_of(ir.SymbolicDim(dim)) == name
    assert symbol_of(ir.SymbolicDim(None)) is None
    assert symbol_of(3) is None


def test_inside_branches() -> None:
    model = plain(
        """g (bool c, float[N, 3] x) => (float[A, B] y) {
            i = If(c) <then_branch = t () => (float[P, Q] a) { a = Transpose(x) },
                       else_branch = e () => (float[P, Q] b) { k = Neg(x) b = Transpose(k) }>
            y = Neg(i)
        }"""
    )
    infer_shapes(model)
    bodies = {name: a.as_graph() for name, a in model.graph.node(0).attributes.items()}
    assert shapes(bodies["else_branch"]) == {"k": "[N,3]", "b": "[3,N]"}
    assert shapes(model.graph)["i"] == "[3,N]"


@pytest.mark.parametrize("width", [2, 3000])
def test_weights_inside_branches(width: int) -> None:
    """Small ones, of which shapes may be made, and large ones."""
    model = plain(
        f"""g (bool c, float[N, {width}] x) => (float[A, B] y) {{
            i = If(c) <then_branch = t () => (float[P, Q] a) {{ k = Add(x, w) a = Reshape(k, s) }},
                       else_branch = e () => (float[P, Q] b) {{ b = Transpose(x) }}>
            y = Neg(i)
        }}""",
        w=np.ones((1, width), np.float32),
        s=np.int64([width, -1]),
    )
    branch = model.graph.node(0).attributes["then_branch"].as_graph()
    move_initializers(model.graph, branch)
    infer_shapes(model)
    assert shapes(branch)["k"] == f"[N,{width}]"
    assert shapes(branch)["a"].startswith(f"[{width},")
    assert model.graph.node(0).outputs[0].dtype == ir.DataType.FLOAT


def test_a_foreign_operator_keeps_its_note() -> None:
    """Nothing is known of it but what the file says; what follows from that is inferred."""
    model = plain("g (float[2] x) => (float[A] y) { a = Neg(x) b = Neg(a) y = Neg(b) }")
    foreign = model.graph.node(0)
    foreign.domain, foreign.outputs[0].shape = "custom", ir.Shape([7])
    foreign.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    assert infer_shapes(model) == 1
    assert shapes(model.graph) == {"a": "[7]", "b": "[7]", "y": "[A]"}


def test_large_weights_are_not_copied() -> None:
    model = plain(
        "g (float[N, 300] x) => (float[A, B] y) { a = MatMul(x, w) y = Neg(a) }",
        w=np.zeros((300, 400), np.float32),
    )
    tensor = model.graph.initializers["w"].const_value
    infer_shapes(model)
    assert model.graph.initializers["w"].const_value is tensor
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert shapes(model.graph)["a"] == "[N,400]"


def test_small_weights_outside_the_file(tmp_path: Path) -> None:
    model = plain("g (float[2, 3] x) => (float[A] y) { a = Reshape(x, s) y = Neg(a) }", s=np.int64([6]))
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    loaded = ir.load(tmp_path / "m.onnx")
    assert isinstance(loaded.graph.initializers["s"].const_value, ir.ExternalTensor)
    infer_shapes(loaded)
    assert shapes(loaded.graph)["a"] == "[6]"


def test_what_inference_cannot_handle_stays_unknown() -> None:
    """The product does not fit; what does not depend on it is known."""
    body = "a = MatMul(x, x) y = Neg(a) b = Neg(x) z = Neg(b)"
    model = plain(f"g (float[2, 3] x) => (float[A, B] y, float[C, D] z) {{ {body} }}")
    infer_shapes(model)
    assert model.graph.node(0).outputs[0].shape is None
    assert shapes(model.graph)["b"] == "[2,3]"


def test_a_model_inference_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("onnx.shape_inference.infer_shapes", fail)
    model = plain("g (float[2] x) => (float[2] y) { a = Neg(x) y = Neg(a) }")
    with pytest.raises(Refused):
        infer_shapes(model)
    outcome = InferShapes().apply(model)
    assert outcome.edits == 0
    assert outcome.refused == {"onnx's shape inference cannot read the model": 1}
