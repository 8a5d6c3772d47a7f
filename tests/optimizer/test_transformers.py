"""fuse-for-onnxruntime: what onnxruntime's tool fuses answers as before, or it is rolled back."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from edgewise.optimizer import transformers as module
from edgewise.optimizer.optimization import optimize
from edgewise.optimizer.pipeline import Reference, StepReport, run_step
from edgewise.optimizer.recipe import Recipe
from edgewise.optimizer.report import Report
from edgewise.optimizer.transformers import KINDS, FuseForOnnxruntime, fused_by_onnxruntime
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Array, Evaluator, Feed
from edgewise.runtime.session import serialize

WIDTH, HEADS = 16, 2
ENCODER = """<ir_version: 8, opset_import: ["" : 17]>
encoder (float[N, L, 16] x, int64[N, L] attention_mask) => (float[N, L, 16] y)
{
    x0 = LayerNormalization <axis = -1> (x, g0, b0)
    q0 = MatMul (x0, wq)  q1 = Add (q0, bq)  q2 = Reshape (q1, split)
    q = Transpose <perm = [0, 2, 1, 3]> (q2)
    k0 = MatMul (x0, wk)  k1 = Add (k0, bk)  k2 = Reshape (k1, split)
    k = Transpose <perm = [0, 2, 3, 1]> (k2)
    v0 = MatMul (x0, wv)  v1 = Add (v0, bv)  v2 = Reshape (v1, split)
    v = Transpose <perm = [0, 2, 1, 3]> (v2)
    m1 = Unsqueeze (attention_mask, first)  m2 = Unsqueeze (m1, second)
    m3 = Cast <to = 1> (m2)  m4 = Sub (one, m3)  mask = Mul (m4, low)
    s0 = MatMul (q, k)  s1 = Div (s0, root)  s2 = Add (s1, mask)
    p = Softmax <axis = -1> (s2)
    o0 = MatMul (p, v)  o1 = Transpose <perm = [0, 2, 1, 3]> (o0)  o2 = Reshape (o1, join)
    o3 = MatMul (o2, wo)  o4 = Add (o3, bo)  o5 = Add (o4, x0)
    h = LayerNormalization <axis = -1> (o5, g1, b1)
    f0 = MatMul (h, wf)  f1 = Add (f0, bf)
    e0 = Div (f1, sqrt2)  e1 = Erf (e0)  e2 = Add (e1, one)  e3 = Mul (f1, e2)  f2 = Mul (e3, half)
    f3 = MatMul (f2, wp)  f4 = Add (f3, bp)  f5 = Add (f4, h)
    y = LayerNormalization <axis = -1> (f5, g2, b2)
}"""


def weights() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    square = {f"w{n}": rng.standard_normal((WIDTH, WIDTH)) / 4 for n in "qkvofp"}
    vectors = {f"b{n}": rng.standard_normal(WIDTH) for n in "qkvofp012"}
    scales = {f"g{n}": rng.random(WIDTH) + 0.5 for n in "012"}
    numbers = {"one": 1.0, "low": -10000.0, "root": (WIDTH / HEADS) ** 0.5, "sqrt2": 2**0.5, "half": 0.5}
    floats = {name: np.float32(a) for name, a in {**square, **vectors, **scales, **numbers}.items()}
    shapes = {"split": [0, 0, HEADS, WIDTH // HEADS], "join": [0, 0, WIDTH], "first": [1], "second": [2]}
    return {name: np.asarray(a) for name, a in floats.items()} | {n: np.array(s) for n, s in shapes.items()}


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """One layer of BERT with two heads, as it was written for years."""
    proto = onnx.parser.parse_model(ENCODER)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in weights().items())
    onnx.checker.check_model(proto, full_check=True)
    path = tmp_path / "encoder.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture
def feed() -> Feed:
    """Two sentences, of which one has words hidden at both ends."""
    mask = np.ones((2, 6), np.int64)
    mask[1, [0, 1, 5]] = 0
    rng = np.random.default_rng(1)
    return {"x": rng.standard_normal((2, 6, WIDTH)).astype(np.float32), "attention_mask": mask}


def fused(source: Path, kind: str = "bert", **options: object) -> tuple[Report, StepReport]:
    """What `optimize` makes of it, and what became of the fusions."""
    recipe = Recipe(benchmark=None, threads=1).with_options(fuse_for_onnxruntime=kind)
    report = optimize(source, source.with_name("fused.onnx"), recipe=recipe, **options)  # type: ignore[arg-type]
    (first, *_) = report.steps
    return report, first


def test_an_encoder(encoder: Path, feed: Feed, tmp_path: Path) -> None:
    before = encoder.read_bytes()
    report, step = fused(encoder, f"bert{{heads: {HEADS}, hidden: {WIDTH}}}")
    assert step.step == f"fuse-for-onnxruntime{{heads: {HEADS}, hidden: {WIDTH}}}"
    assert step.status == "applied"
    assert step.error is not None
    assert step.error < 1e-5
    assert encoder.read_bytes() == before
    written = ir.load(tmp_path / "fused.onnx")
    counts = Counter(node.op_type for node in written.graph if node.domain == "com.microsoft")
    assert {"Attention": 1, "SkipLayerNormalization": 2}.items() <= counts.items()
    assert written.opset_imports["com.microsoft"] == 1
    assert report.output.nodes < report.input.nodes / 4
    expected, actual = Evaluator(encoder).run(feed), Evaluator(tmp_path / "fused.onnx").run(feed)
    np.testing.assert_allclose(actual["y"], expected["y"], rtol=1e-4, atol=1e-5)


def test_heads_are_found_in_the_graph(encoder: Path, tmp_path: Path) -> None:
    fused(encoder)
    assert "Attention" in [node.op_type for node in ir.load(tmp_path / "fused.onnx").graph]


def test_inputs_and_outputs_stay(encoder: Path) -> None:
    model = ir.load(encoder)
    fused = fused_by_onnxruntime(model, "bert")
    assert [(v.name, str(v.type), str(v.shape)) for v in fused.graph.inputs] == [
        (v.name, str(v.type), str(v.shape)) for v in model.graph.inputs
    ]


def test_as_a_step(encoder: Path, feed: Feed) -> None:
    """It is a pass: applied, checked and told of like any other."""
    model = ir.load(encoder)
    before = serialize(model)
    kept, report = run_step(model, FuseForOnnxruntime("bert"), Reference(model, [feed]), strict=True)
    assert report.status == "applied"
    assert report.edits >= 3
    assert report.error is not None
    assert "Attention" in {node.op_type for node in kept.graph}
    assert serialize(model) == before
    _, again = run_step(kept, FuseForOnnxruntime("bert"), Reference(model, [feed]), strict=True)
    assert again.status == "no change"


def test_a_step_that_answers_otherwise_is_rolled_back(
    encoder: Path, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    model = ir.load(encoder)
    kept, report = run_step(model, FuseForOnnxruntime("bert"), Reference(model, [feed]), strict=True)
    assert kept is model
    assert report.status == "rolled back"
    assert "outputs differ" in report.reason


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for a defect of the tool: the weights of a norm are others."""
    make = fused_by_onnxruntime

    def wrong(model: ir.Model, kind: str, *, heads: int = 0, hidden: int = 0) -> ir.Model:
        fused = make(model, kind, heads=heads, hidden=hidden)
        fused.graph.initializers["g2"].const_value = ir.tensor(np.full(WIDTH, 9, np.float32), name="g2")
        return fused

    monkeypatch.setattr(module, "fused_by_onnxruntime", wrong)


def test_a_mask_that_gets_lost_is_noticed(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up masks are ones, on which a model that ignores them answers the same."""

    def forgetful(model: ir.Model, kind: str, *, heads: int = 0, hidden: int = 0) -> ir.Model:
        made = model.clone()
        made.graph.initializers["low"].const_value = ir.tensor(np.float32(0), name="low")
        made.graph.insert_before(
            made.graph[0], ir.node("Gelu", [made.graph.inputs[0]], domain="com.microsoft")
        )
        made.graph.opset_imports["com.microsoft"] = 1
        made.graph[0].outputs[0].name = "unused"
        return made

    monkeypatch.setattr(module, "fused_by_onnxruntime", forgetful)
    _, step = fused(encoder)
    assert step.status == "rolled back"
    assert "outputs differ" in step.reason


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("word2vec", "no 'word2vec', only bart bert"),
        ("bert{layers: 3}", "no option 'layers'"),
        ("bert{heads}", "heads"),
    ],
)
def test_an_unknown_kind(encoder: Path, kind: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        fused(encoder, kind)


def test_a_width_that_the_heads_do_not_divide(encoder: Path) -> None:
    _, step = fused(encoder, "bert{heads: 3, hidden: 16}")
    assert step.status == "rolled back"
    assert "tool fails on this model as bert" in step.reason


def test_nothing_to_fuse(model_path: Path) -> None:
    report, step = fused(model_path)
    assert step.status == "no change"
    assert report.chosen == "exact"


def test_kinds_are_those_of_the_tool() -> None:
    command = [sys.executable, "-P", "-m", "onnxruntime.transformers.optimizer", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(KINDS) <= set(re.findall(r"[a-z0-9_]+", text))


def test_a_model_with_external_data(encoder: Path, tmp_path: Path) -> None:
    path = tmp_path / "external.onnx"
    proto = onnx.load(encoder)
    onnx.save(proto, path, save_as_external_data=True, location="external.data", size_threshold=0)
    _, step = fused(path)
    assert step.status == "applied"
    (tmp_path / "external.data").unlink()
    Evaluator(tmp_path / "fused.onnx")


def test_weights_too_large_for_one_file(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool is handed external data, and hands some back."""
    monkeypatch.setattr("edgewise.optimizer.files._ONE_FILE_LIMIT", 100)
    _, step = fused(encoder)
    assert step.status == "applied"
    assert (tmp_path / "fused.onnx.data").exists()
    Evaluator(tmp_path / "fused.onnx")
