"""What a device needs of a model, asked for on the command line: done and verified, or nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from PIL import Image

from edgewise.calibration.data import Preprocess, from_arrays
from edgewise.optimizer import cli, files, optimize, quantize
from edgewise.optimizer.interface import adapt
from edgewise.optimizer.recipe import Quantize, Recipe
from edgewise.passes.uint8_input import Uint8Input
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Evaluator, input_specs

NORMAL = "scale=255,mean=0.485/0.456/0.406,std=0.229/0.224/0.225"
QUICK = Recipe(benchmark=None, threads=1)
TWO = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 3] x, float[n, 3] u) => (float[n, 3] scores, float[n, 3] features) {
    h = Mul(x, x) scores = Neg(h) features = Add(h, u)
}"""
NEW = """<ir_version: 10, opset_import: ["" : 20]>
g (float[n, 4] x) => (float[n, 1] y) { a = Gelu(x) k = Constant<value_ints = [1]>() y = ReduceMax(a, k) }"""


@pytest.fixture
def work(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the classifier, twelve images of two classes, and a recipe that does not measure."""
    folder = model_path.parent
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")
    rng = np.random.default_rng(5)
    for number in range(12):
        target = folder / "images" / ("cat", "dog")[number % 2] / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(target)
    (folder / "recipe.yaml").write_text(Recipe(benchmark=None, threads=1, max_drop=1.0).to_yaml())
    onnx.save(onnx.parser.parse_model(TWO), folder / "two.onnx")
    onnx.save(onnx.parser.parse_model(NEW), folder / "new.onnx")
    return folder


def run(command: str) -> int:
    return cli.run(command.split())


def made(command: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """The report of a run that ends well and writes out.onnx."""
    assert run(f"optimize {command} -o out.onnx --recipe recipe.yaml --json -") == 0
    data: dict[str, object] = json.loads(capsys.readouterr().out)
    return data


def describe(path: str) -> list[str]:
    return [f"{v.name} {v.dtype} {v.shape}" for v in files.load(path).graph.inputs]


def assert_fails(command: str, message: str, capsys: pytest.CaptureFixture[str], code: int = 2) -> None:
    before = {p.name for p in Path().iterdir()}
    assert run(f"optimize {command} -o out.onnx --recipe recipe.yaml") == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert message in shown.err
    assert {p.name for p in Path().iterdir()} == before


# Sizes and outputs


def test_a_size_is_fixed(work: Path, images: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    data = made("net.onnx --fix-dim N=2", capsys)
    assert data["changes"] == [
        "input image: float32 [N, 3, 8, 8] -> float32 [2, 3, 8, 8]",
        "output scores: float32 [N, 5] -> float32 [2, 5]",
    ]
    assert describe("out.onnx") == ["image FLOAT [2,3,8,8]"]
    before = Evaluator("net.onnx").run({"image": images[:2]})["scores"]
    after = Evaluator("out.onnx").run({"image": images[:2]})["scores"]
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    assert data["recipe"]["fix_dims"] == ["N=2"]  # type: ignore[index]
    assert data["input"]["sha256"] == files.sha256("net.onnx")  # type: ignore[index]


def test_samples_for_a_size_that_is_fixed(
    work: Path, images: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(work / "data.npz", image=images)
    data = made("net.onnx --fix-dim image.0=4 --data data.npz", capsys)
    assert data["candidates"][-1]["name"] == "int8"  # type: ignore[index]
    assert data["score"]["samples"] == 16  # type: ignore[index]
    assert describe("out.onnx") == ["image FLOAT [4,3,8,8]"]


def test_outputs_are_cut_with_the_inputs_that_only_they_need(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = made("two.onnx --outputs scores", capsys)
    assert data["changes"] == ["input u: float32 [n, 3] -> cut", "output features: float32 [n, 3] -> cut"]
    model = files.load("out.onnx")
    assert [v.name for v in (*model.graph.inputs, *model.graph.outputs)] == ["x", "scores"]


@pytest.mark.parametrize("names", [("x",), ("x", "u")])
def test_samples_with_and_without_inputs_that_are_cut(
    names: tuple[str, ...], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(work / "data.npz", **{name: np.ones((4, 3), np.float32) for name in names})
    data = made("two.onnx --outputs scores --data data.npz", capsys)
    assert data["score"]["after"] == 1  # type: ignore[index]


# Pixels


@pytest.mark.parametrize(("layout", "shape"), [("nhwc", "[N,8,8,3]"), ("nchw", "[N,3,8,8]")])
def test_pixels_give_what_normalized_images_gave(
    layout: str, shape: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = "resize=8,crop=8"
    data = made(f"net.onnx --uint8-input {layout} --data images --preprocess {cut},{NORMAL}", capsys)
    assert describe("out.onnx") == [f"image UINT8 {shape}"]
    assert data["changes"][0].startswith("input image: float32 [N, 3, 8, 8] -> uint8 [N, ")  # type: ignore[index]
    assert data["changes"][1].startswith("normalized inside: scale=255.0,mean=0.485")  # type: ignore[index]
    assert data["score"]["metric"] == "top1"  # type: ignore[index]
    assert "QuantizeLinear" in {n.op_type for n in files.load("out.onnx").graph}
    exact = f"optimize net.onnx -o exact.onnx --no-benchmark --uint8-input {layout} --preprocess {NORMAL}"
    assert run(exact.replace("--no-benchmark", "--recipe recipe.yaml")) == 0
    one = next(iter(Path("images/cat").iterdir()))
    whole = Preprocess.parse(f"{cut},{NORMAL}")
    before = Evaluator("net.onnx").run({"image": whole.load(one)[None]})["scores"]
    pixels = whole.pixels(layout).load(one)[None].astype(np.uint8)
    after = Evaluator("exact.onnx").run({"image": pixels})["scores"]
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_pixels_as_arrays(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    np.savez(work / "pixels.npz", image=pixels)
    data = made(f"net.onnx --uint8-input nhwc --preprocess {NORMAL} --data pixels.npz", capsys)
    assert data["score"]["samples"] == 40  # type: ignore[index]


def test_the_file_is_used_as_any_other(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pixels in, without normalization; who normalizes is told so."""
    made(f"net.onnx --uint8-input nchw --preprocess {NORMAL}", capsys)
    cut = "--data images --preprocess resize=8,crop=8"
    assert run(f"compare out.onnx out.onnx {cut} --json -") == 0
    assert json.loads(capsys.readouterr().out)["score"]["metric"] == "top1"
    assert run(f"bench out.onnx {cut} --max-seconds 0.1 --threads 1") == 0
    assert "uint8" in capsys.readouterr().out
    assert run(f"bench out.onnx {cut},{NORMAL}") == 2
    assert "leave scale, mean and std" in capsys.readouterr().err
    assert run(f"compare net.onnx out.onnx {cut}") == 2
    assert "normalizes raw pixels itself" in capsys.readouterr().err


def test_floats_are_no_pixels(work: Path, images: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(work / "floats.npz", image=images)
    assert_fails("net.onnx --uint8-input nchw --data floats.npz", "samples are raw pixels", capsys)


def test_samples_opened_for_the_original(model_path: Path, images: np.ndarray, tmp_path: Path) -> None:
    samples = from_arrays({"image": images}, input_specs(files.load(model_path)))
    with pytest.raises(InputError, match="other inputs"):
        optimize(
            model_path, tmp_path / "out.onnx", data=samples, recipe=QUICK.with_options(uint8_input="nhwc")
        )


def test_arrays_opened_with_more_inputs(work: Path) -> None:
    samples = from_arrays(
        {"x": np.ones((4, 3), np.float32), "u": np.zeros((4, 3), np.float32)},
        input_specs(files.load("two.onnx")),
    )
    report = optimize("two.onnx", "out.onnx", data=samples, recipe=QUICK.with_options(outputs=("scores",)))
    assert report.score is not None
    assert report.score.after == 1


def test_a_table_for_a_model_that_takes_pixels(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Recipe(benchmark=None, threads=1, max_drop=1.0, uint8_input="nhwc").to_yaml()
    (work / "pixels.yaml").write_text(text)
    options = f"--recipe pixels.yaml --preprocess resize=8,crop=8,{NORMAL}"
    assert run(f"calibrate net.onnx --data images -o table.npz {options}") == 0
    assert run(f"quantize net.onnx --table table.npz --data images -o int8.onnx {options}") == 0
    assert describe("int8.onnx") == ["image UINT8 [N,8,8,3]"]
    assert "QuantizeLinear" in {n.op_type for n in files.load("int8.onnx").graph}


# Runtimes


def test_a_runtime_that_lacks_operators(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = made("new.onnx --runtime 1.11", capsys)
    assert data["changes"] == ["opset: 20 -> 16", "IR version: 10 -> 8"]
    model = files.load("out.onnx")
    assert (model.opset_imports[""], model.ir_version) == (16, 8)
    assert "Gelu" not in {n.op_type for n in model.graph}
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    before, after = (Evaluator(path).run({"x": x})["y"] for path in ("new.onnx", "out.onnx"))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


def test_the_chain_upgrades_no_further_than_the_runtime(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = onnx.load("net.onnx")
    proto.opset_import[0].version = 13
    onnx.save(proto, "old.onnx")
    for runtime, opset in (("1.6", 13), ("1.9", 15), ("1.16", 16)):
        data = made(f"old.onnx --runtime {runtime} --force", capsys)
        assert data["output"]["opset"] == opset  # type: ignore[index]


def test_int8_for_an_old_runtime(work: Path, images: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(work / "data.npz", image=images)
    made("net.onnx --runtime 1.8 --data data.npz", capsys)
    model = files.load("out.onnx")
    assert (model.opset_imports[""], model.ir_version) == (14, 7)
    assert "QuantizeLinear" in {n.op_type for n in model.graph}
    onnx.checker.check_model("out.onnx", full_check=True)


def test_an_operator_that_no_runtime_of_that_age_has(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[2, 2] x) => (float[2, 2] y) { y = Trilu (x) }'
    onnx.save(onnx.parser.parse_model(text), "tri.onnx")
    message = "not for onnxruntime 1.6: Trilu of operator set 14 has no older form"
    assert_fails("tri.onnx --runtime 1.6", message, capsys, code=1)


# The rest


def test_debug_strings_go(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proto = onnx.load("net.onnx")
    proto.doc_string = proto.graph.node[0].doc_string = "File train.py, line 3"
    proto.metadata_props.add(key="names", value="{0: 'cat'}")
    onnx.save(proto, "noisy.onnx")
    data = made("noisy.onnx --strip", capsys)
    assert data["changes"] == ["debug strings: 2 removed"]
    assert b"train.py" not in Path("out.onnx").read_bytes()
    assert files.load("out.onnx").metadata_props["names"] == "{0: 'cat'}"


def test_the_format_of_onnxruntime_beside_it(
    work: Path, images: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    data = made("net.onnx --emit ort", capsys)
    assert data["ort"]["model"] == "out.ort"  # type: ignore[index]
    assert data["ort"]["error"] < 1e-5  # type: ignore[index]
    assert "ai.onnx;13" in data["ort"]["required"]  # type: ignore[index]
    listed = Path("out.required_operators.config").read_text()
    assert "Operators of out.ort" in listed
    first, second = (Evaluator(path).run({"image": images})["scores"] for path in ("out.onnx", "out.ort"))
    np.testing.assert_allclose(second, first, rtol=1e-4, atol=1e-5)


def test_a_format_that_cannot_be_written(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise EdgewiseError("the .ort file answers otherwise")

    monkeypatch.setattr("edgewise.optimizer.optimization.emit_ort", failing)
    assert_fails("net.onnx --emit ort", "answers otherwise", capsys, code=1)


@pytest.mark.parametrize("name", ["out.ort", "out.required_operators.config"])
def test_what_exists_beside_it_is_kept(name: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(name).write_text("mine")
    assert_fails("net.onnx --emit ort", f"{name} exists", capsys)
    assert Path(name).read_text() == "mine"


def test_all_of_it_at_once(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        "net.onnx --fix-dim N=1 --outputs scores --uint8-input nhwc --runtime 1.12 --strip --emit ort "
        f"--data images --preprocess resize=8,crop=8,{NORMAL}"
    )
    assert run(f"optimize {command} -o out.onnx --recipe recipe.yaml --report r --json all.json") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    plain = " ".join(shown.split())
    assert "as asked input image: float32 [N, 3, 8, 8] -> uint8 [1, 8, 8, 3]" in plain
    assert "written: out.ort" in plain
    assert "the changes that were asked for" in plain
    assert describe("out.onnx") == ["image UINT8 [1,8,8,3]"]
    changes = json.loads(Path("all.json").read_text())["changes"]
    assert json.loads(Path("r/report.json").read_text())["changes"] == changes
    assert "## Changed as asked" in Path("r/report.md").read_text()


def test_other_jobs_do_what_the_recipe_asks(model_path: Path, tmp_path: Path, images: np.ndarray) -> None:
    recipe = Recipe(
        benchmark=None,
        threads=1,
        max_drop=1.0,
        quantize=Quantize(methods=("minmax",)),
        fix_dims=("N=1",),
        runtime="1.8",
        emit="ort",
    )
    np.savez(tmp_path / "data.npz", image=images)
    report = quantize(model_path, tmp_path / "out.onnx", data=str(tmp_path / "data.npz"), recipe=recipe)
    model = files.load(tmp_path / "out.onnx")
    assert (str(model.graph.inputs[0].shape), model.opset_imports[""]) == ("[1,3,8,8]", 14)
    assert report.changes[0].endswith("[1, 3, 8, 8]")
    assert report.ort is not None
    assert (tmp_path / "out.ort").exists()


def test_measured_against_the_input_as_it_was_asked_for(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "measured.yaml").write_text("benchmark: {max_seconds: 0.1, precision: 0.9}\nthreads: 1\n")
    command = "optimize net.onnx -o out.onnx --recipe measured.yaml --fix-dim N=1 --json -"
    assert run(command) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["latency"]["models"][0]["name"] == "input"
    assert data["latency"]["models"][0]["path"].endswith(".as-asked.onnx")
    assert data["input"]["path"] == "net.onnx"


def test_nothing_is_asked() -> None:
    model = ir.from_proto(onnx.parser.parse_model(TWO))
    adapted = adapt(model, Recipe())
    assert adapted.model is model
    assert adapted.changes == ()


def test_what_is_so_already_is_no_change(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert made("net.onnx --runtime 1.16 --outputs scores --strip", capsys)["changes"] == []


def test_a_model_that_answers_otherwise_is_not_written(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stands for a defect of a pass: the caller is told of another normalization than the model has."""
    float_pixels = Uint8Input.float_pixels
    monkeypatch.setattr(Uint8Input, "float_pixels", lambda self, m, p: 2 * float_pixels(self, m, p))
    message = "answers otherwise than it came"
    assert_fails(f"net.onnx --uint8-input nchw --preprocess {NORMAL}", message, capsys, code=1)


MISTAKES = {
    "--fix-dim batch=1": "--fix-dim: there is no open dimension 'batch', only N",
    "--fix-dim N": "'N' is not NAME=SIZE",
    "--fix-dim N=0": "is not NAME=SIZE",
    "--fix-dim image.1=4": "is 3 already",
    "--fix-dim N=1 --fix-dim N=2": "two sizes",
    "--outputs logits": "--outputs: there is no output 'logits', only scores",
    "--outputs a,,b": "no list of names",
    "--uint8-input chw": "uint8_input",
    "--uint8-input nchw --preprocess mean=1/2": "mean has 2 numbers for 3 channels",
    "--uint8-input nchw --preprocess channels=gray,mean=1/2": "mean",
    "--runtime newest": "no version of onnxruntime such as 1.16",
    "--runtime 1.2": "older than 1.6",
    "--emit tflite": "emit",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes(options: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_fails(f"net.onnx {options}", MISTAKES[options], capsys)


def test_an_image_that_is_none(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_fails("two.onnx --uint8-input nchw", "--uint8-input: one float input of rank 4", capsys)


def test_an_output_that_is_named_like_the_other_format(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("optimize net.onnx -o out.ort --emit ort") == 2
    assert "let its name end otherwise" in capsys.readouterr().err
