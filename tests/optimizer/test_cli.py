"""The command line: exit codes, one line for every mistake, nothing left behind, and what is printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgewise.optimizer import cli, files
from edgewise.optimizer.recipe import Recipe
from edgewise.runtime.errors import EdgewiseError

COMMANDS = (
    "optimize",
    "export",
    "inspect",
    "calibrate",
    "plan",
    "quantize",
    "prune",
    "distill",
    "finetune",
    "bench",
    "profile",
    "compare",
    "passes",
    "demo",
)


@pytest.fixture
def work(model_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a model, samples and a recipe that does not measure."""
    folder = model_path.parent
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")
    labels = np.arange(len(images)) % 5
    np.savez(folder / "data.npz", image=images, labels=labels)
    recipe = Recipe(passes=("drop-identity", "fuse-batch-norm"), benchmark=None, max_drop=1.0)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return folder


def run(command: str) -> int:
    """Run one command line, without a shell."""
    return cli.run(command.split())


def listing(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# What people see


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n  {command} " in shown
    assert "..." not in shown.split("Commands:")[1]  # every short help fits its line


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("") == 0
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{command} --help") == 0
    assert "--json FILE" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("edgewise 0.")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from edgewise.optimizer import cli; cli.run(['--help']); "
        "heavy = {'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'torch', 'pydantic', 'rich.table'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0


def test_the_package_imports_nothing_heavy_and_offers_everything() -> None:
    code = (
        "import sys, edgewise.optimizer as o; "
        "assert not {'numpy', 'onnx', 'typer', 'rich'} & set(sys.modules); "
        "assert all(callable(getattr(o, name)) for name in o.__all__); "
        "assert set(o.__all__) <= set(dir(o)); "
        "import edgewise.optimizer.jobs, edgewise.optimizer.torch_export; "
        "assert all(callable(getattr(o, name)) for name in o.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgewise.optimizer", "passes", "--jsom", "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("edgewise: No such option")
    assert len(done.stderr.splitlines()) == 1


def test_optimize(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("optimize net.onnx -o out.onnx --recipe recipe.yaml") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "fuse-batch-norm" in shown.out
    assert "with --data" in " ".join(shown.out.split())
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "BatchNormalization" not in {n.op_type for n in files.load("out.onnx").graph}
    assert listing(work) == {"net.onnx", "data.npz", "recipe.yaml", "out.onnx"}


def test_optimize_with_samples_and_report(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (work / "net.onnx").read_bytes()
    command = (
        "optimize net.onnx -o out.onnx --recipe recipe.yaml --data data.npz --report r --seed 3 --json -"
    )
    assert run(command) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["score"]["metric"] == "top1"
    assert data["recipe"]["seed"] == 3
    assert data["table"]
    assert "QuantizeLinear" in {n.op_type for n in files.load("out.onnx").graph}
    assert json.loads((work / "r" / "report.json").read_text())["output"]["path"] == "out.onnx"
    assert (work / "net.onnx").read_bytes() == before


def test_json_beside_the_table(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect net.onnx --json facts.json") == 0
    assert json.loads((work / "facts.json").read_text())["parameters"] == 597
    assert "parameters" in capsys.readouterr().out
    assert run("inspect net.onnx --json facts.json") == 0  # facts of an earlier run are replaced


def test_inspect_shows_how_a_model_was_made(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("optimize net.onnx -o out.onnx --recipe recipe.yaml") == 0
    capsys.readouterr()
    assert run("inspect out.onnx --json -") == 0
    metadata = json.loads(capsys.readouterr().out)["metadata"]
    assert metadata["input.sha256"] == files.sha256(work / "net.onnx")
    assert json.loads(metadata["recipe"])["max_drop"] == 1.0
    assert metadata["version"]


def test_calibrate_then_quantize(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("calibrate net.onnx --data data.npz -o table.npz --recipe recipe.yaml") == 0
    assert "64 from data.npz" in capsys.readouterr().out
    assert run("quantize net.onnx --table table.npz -o int8.onnx --recipe recipe.yaml") == 0
    assert "judge it with --data" in " ".join(capsys.readouterr().out.split())
    assert (work / "int8.onnx").exists()


def test_prune(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune net.onnx -o small.onnx --json -") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["output"]["parameters"] < data["input"]["parameters"]
    small = files.load(work / "small.onnx")
    (conv,) = [n for n in small.graph if n.op_type == "Conv"]
    weight = conv.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    assert weight.const_value.shape[0] == 12


def test_compare(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare net.onnx net.onnx --data data.npz --json -") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["differences"][0]["relative"] == 0
    assert data["score"]["before"] == data["score"]["after"]
    assert run("compare net.onnx net.onnx") == 0
    assert "seeded" in capsys.readouterr().out


def test_bench(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench net.onnx --max-seconds 0.1 --precision 0.9 --threads 1 --batch 3") == 0
    shown = capsys.readouterr().out
    assert "median ms" in shown
    assert "[3, 3, 8, 8]" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_bench_of_many_conditions(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "bench net.onnx --max-seconds 0.1 --threads 1,2 --batch 1,2 --concurrency 1,2 --no-spinning"
    assert run(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "threads  batch  at once  model" in " ".join(lines)
    assert sum("net" in line.split() for line in lines) == 8
    assert max(map(len, lines)) <= 80


def test_bench_as_a_gate(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is the same, the time it took then is made up: a tenth, and tenfold."""
    assert run("bench net.onnx --max-seconds 0.1 --threads 1 --json old.json") == 0
    result = json.loads(Path("old.json").read_text())
    (model,) = result["reports"][0]["models"]

    def set_times(factor: float) -> None:
        times = {key: factor * model[key] for key in ("median_ms", "low_ms", "high_ms")}
        result["reports"][0]["models"] = [{**model, **times}]
        Path("old.json").write_text(json.dumps(result))

    gate = "bench net.onnx --max-seconds 0.1 --threads 1 --baseline old.json --fail-if-slower 50%"
    set_times(1e-3)
    assert run(gate) == 1
    captured = capsys.readouterr()
    assert "slower than in the baseline" in captured.err
    assert "against the baseline" in captured.out
    set_times(1e3)
    assert run(gate) == 0
    assert "faster" in capsys.readouterr().out


def test_bench_finishes_the_others(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.onnx").write_bytes(Path("net.onnx").read_bytes()[:300])
    assert run("bench net.onnx broken.onnx --max-seconds 0.1 --threads 1") == 1
    captured = capsys.readouterr()
    assert "broken failed:" in captured.out
    assert "broken.onnx failed on cpu" in captured.err
    assert "median ms" in captured.out


def test_export_and_optimize_a_torch_module(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="export needs torch")
    (work / "my_net_e.py").write_text(
        "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())\n"
    )
    assert run("export my_net_e:net --input x=1x4 --dynamic x:0=n -o net2.onnx --json -") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["n", 4]}]
    assert len(data["checks"]) == 2
    assert run("optimize my_net_e:net --input x=1x4 -o out.onnx --recipe recipe.yaml") == 0
    assert [o.name for o in files.load("out.onnx").graph.inputs] == ["x"]
    assert "my_net_e:net" in capsys.readouterr().out  # not the temporary file it was exported to


def test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("passes --json -") == 0
    listed = {p["name"]: p for p in json.loads(capsys.readouterr().out)["passes"]}
    assert listed["drop-identity"]["contract"] == "exact"
    assert listed["insert-qdq"]["contract"] == "lossy"
    assert all(p["about"] for p in listed.values())


# What goes wrong


def truncated(work: Path) -> None:
    (work / "bad.onnx").write_bytes((work / "net.onnx").read_bytes()[:1500])


def changed(work: Path, op_type: str, domain: str) -> None:
    proto = onnx.load(work / "net.onnx")
    proto.graph.node[2].op_type, proto.graph.node[2].domain = op_type, domain
    if domain:
        proto.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    onnx.save(proto, work / "bad.onnx")


def external(work: Path, location: str) -> None:
    proto = onnx.load(work / "net.onnx")
    onnx.save(proto, work / "bad.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (work / "w.bin").unlink()
    proto = onnx.load(work / "bad.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        tensor.external_data[0].value = location
    onnx.save(proto, work / "bad.onnx")


def nan(work: Path) -> None:
    proto = onnx.load(work / "net.onnx")
    array = np.full((5, 16), np.nan, np.float32)
    (tensor,) = [t for t in proto.graph.initializer if t.name == "fc_w"]
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, "fc_w"))
    onnx.save(proto, work / "bad.onnx")


MODELS = {
    "missing": (lambda work: None, "no such file"),
    "a folder": (lambda work: (work / "bad.onnx").mkdir(), "is a folder"),
    "empty": (lambda work: (work / "bad.onnx").touch(), "is empty"),
    "truncated": (truncated, "damaged"),
    "no ONNX": (lambda work: (work / "bad.onnx").write_text("hello"), "no ONNX model"),
    "corrupt": (lambda work: (work / "bad.onnx").write_bytes(os.urandom(4000)), "no ONNX model"),
    "external data missing": (lambda work: external(work, "w.bin"), "w.bin is missing"),
    "external data outside": (lambda work: external(work, "../w.bin"), "outside the model's folder"),
    "NaN weights": (nan, "'fc_w' holds NaN"),
}
RUNTIME_MODELS = {
    "unknown operator": (lambda work: changed(work, "Frobnicate", ""), "Frobnicate"),
    "unknown domain": (lambda work: changed(work, "Relu", "com.example"), "com.example"),
}
USES = (
    "optimize {} -o out.onnx",
    "inspect {}",
    "calibrate {} --data data.npz -o out.npz",
    "quantize {} --data data.npz -o out.onnx",
    "prune {} -o out.onnx",
    "bench {} --max-seconds 0.1",
    "compare net.onnx {}",
)


def assert_refused(
    command: str, message: str, work: Path, capsys: pytest.CaptureFixture[str], code: int = 2
) -> None:
    """The command gives one line with `message`, the exit code, and leaves the folder as it was."""
    before = listing(work)
    assert run(command) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("edgewise: ")
    assert len(shown.err.splitlines()) == 1
    assert message in shown.err
    assert listing(work) == before


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", MODELS)
def test_models_that_cannot_be_read(
    kind: str, use: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = MODELS[kind]
    damage(work)
    assert_refused(use.format("bad.onnx"), message, work, capsys)


@pytest.mark.parametrize("use", [use for use in USES if not use.startswith(("inspect", "bench"))])
@pytest.mark.parametrize("kind", RUNTIME_MODELS)
def test_models_that_do_not_run(kind: str, use: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = RUNTIME_MODELS[kind]
    damage(work)
    assert_refused(use.format("bad.onnx"), message, work, capsys)


@pytest.mark.parametrize("kind", RUNTIME_MODELS)
def test_inspect_shows_what_does_not_run(kind: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = RUNTIME_MODELS[kind]
    damage(work)
    assert run("inspect bad.onnx") == 0
    assert message in capsys.readouterr().out


X = np.zeros((4, 3, 8, 8), np.float32)
SAMPLES = {
    "name": ({"picture": X, "other": X}, "image"),
    "dtype": ({"image": X.astype(np.complex64)}, "complex64"),
    "text": ({"image": np.full((4, 3, 8, 8), "a")}, "image"),
    "rank": ({"image": X[0, 0]}, "image"),
    "size": ({"image": X[..., :7]}, "image"),
    "NaN": ({"image": X + np.nan}, "NaN"),
    "no samples": ({"image": X[:0]}, "holds no samples"),
    "too few labels": ({"image": X, "labels": np.zeros(3)}, "labels"),
    "pickle": ({"image": np.array([{}], object)}, "never loaded"),
}


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("use", ["optimize", "quantize"])
def test_samples_that_do_not_fit(kind: str, use: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays, message = SAMPLES[kind]
    np.savez(work / "bad.npz", **arrays)
    assert_refused(f"{use} net.onnx -o out.onnx --data bad.npz", message, work, capsys)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere", "does not exist"),
        ("empty", "no samples"),
        ("net.onnx", "no known kind"),
        ("broken.npz", "broken.npz"),
        ("images", "--preprocess"),
        ("nomodule_y:f", "nomodule_y"),
        ("math:nothing", "nothing"),
        ("broken_samples:f", "broken_samples"),
        ("failing_samples:f", "failing_samples"),
    ],
)
def test_data_that_is_none(data: str, message: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "empty").mkdir()
    (work / "images").mkdir()
    (work / "images" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (work / "broken.npz").write_bytes(b"PK\x03\x04nothing")
    (work / "broken_samples.py").write_text("def f(:\n")
    (work / "failing_samples.py").write_text("def f():\n    yield {'image': open('gone')}\n")
    (work / "__pycache__").mkdir()
    assert_refused(f"optimize net.onnx -o out.onnx --data {data}", message, work, capsys)


def test_samples_of_a_function_beside_the_model(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "my_samples.py").write_text(
        "import numpy as np\n"
        "def f():\n"
        "    for i in range(8):\n"
        "        yield {'image': np.full((1, 3, 8, 8), i, np.float32)}\n"
    )
    command = [sys.executable, "-m", "edgewise.optimizer"]
    done = subprocess.run(
        [*command, "compare", "net.onnx", "net.onnx", "--data", "my_samples:f", "--json", "-"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1"},  # as the installed command: not from the folder
    )
    assert done.stderr == ""
    assert "8 samples" in done.stdout


OPTIONS = {
    "optimize net.onnx -o net.onnx": "never touched",
    "optimize net.onnx -o net.onnx --force": "never touched",
    "optimize net.onnx -o data.npz": "exists",
    "optimize net.onnx -o nowhere/out.onnx": "no folder",
    "optimize net.onnx -o .": "is a folder",
    "optimize net.onnx -o out.onnx --report net.onnx": "net.onnx",
    "optimize net.onnx -o out.onnx --json nowhere/x.json": "cannot be written",
    "optimize net.onnx -o out.onnx --target toaster": "target",
    "optimize net.onnx -o out.onnx --target cuda": "pip install onnxruntime-gpu",
    "optimize net.onnx -o out.onnx --threads 0": "threads",
    "optimize net.onnx -o out.onnx --threads many": "--threads",
    "optimize net.onnx -o out.onnx --max-drop -1": "max_drop",
    "optimize net.onnx -o out.onnx --recipe nowhere.yaml": "nowhere.yaml",
    "optimize net.onnx -o out.onnx --recipe data.npz": "data.npz",
    "optimize net.onnx -o out.onnx --data data.npz --metric best": "best",
    "optimize net.onnx -o out.onnx --data data.npz --metric math:pi": "math:pi",
    "optimize net.onnx -o out.onnx --data data.npz --preprocess resize=3": "preprocess",
    "optimize net.onnx -o out.onnx --preprocess resise=3": "resise",
    "optimize net.onnx": "--output",
    "optimize": "MODEL",
    "quantize net.onnx -o out.onnx": "--table",
    "quantize net.onnx -o out.onnx --table nowhere.npz": "nowhere.npz",
    "quantize net.onnx -o out.onnx --table data.npz": "no calibration table",
    "calibrate net.onnx -o out.npz --data nowhere": "nowhere",
    "calibrate net.onnx -o recipe.yaml --data data.npz": "exists",
    "prune net.onnx -o data.npz": "exists",
    "bench": "MODEL",
    "bench net.onnx --ep toaster": "unknown execution provider",
    "bench net.onnx --ep cpu,cuda": "pip install onnxruntime-gpu",
    "bench net.onnx --batch 0": "--batch",
    "bench net.onnx --threads 0": "--threads",
    "bench net.onnx --threads 1,two": "--threads",
    "bench net.onnx --concurrency 0": "--concurrency",
    "bench net.onnx --cores 4096": "core 4096",
    "bench net.onnx --timeout 0": "timeout",
    "bench net.onnx --fail-if-slower fast": "--fail-if-slower",
    "bench net.onnx --fail-if-slower -1%": "--fail-if-slower",
    "bench net.onnx --baseline nowhere.json": "nowhere.json",
    "bench net.onnx --baseline recipe.yaml": "no result of",
    "bench net.onnx --report net.onnx": "net.onnx",
    "bench net.onnx nowhere.onnx": "nowhere.onnx: no such file",
    "bench net.onnx --max-seconds 0": "max_seconds",
    "compare net.onnx": "B",
    "compare net.onnx net.onnx --metric best --data data.npz": "best",
    "frobnicate": "frobnicate",
    "inspect net.onnx --frobnicate": "--frobnicate",
    "export nomodule_z:net --input x=1x3 -o out.onnx": "nomodule_z",
    "export math:pi --input x=1x3 -o out.onnx": "math",
    "export my_net --input x=1x3 -o out.onnx": "my_net",
    "export math:pi -o out.onnx": "--input",
    "export collections:OrderedDict --input x=1xthree -o out.onnx": "1xthree",
    "export collections:OrderedDict --input x=1x3 --dynamic x=batch -o out.onnx": "x=batch",
    "export math:pi --input x=1x3 -o net.onnx": "exists",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_mistakes_on_the_command_line(command: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(command, OPTIONS[command], work, capsys)


def test_models_with_other_inputs_or_outputs(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = files.load("net.onnx")
    model.graph.outputs[0].name = "logits"
    files.save(model, "outputs.onnx")
    model.graph.inputs[0].name = "picture"
    files.save(model, "inputs.onnx")
    assert_refused("compare net.onnx outputs.onnx", "no output 'scores'", work, capsys)
    assert_refused("compare net.onnx inputs.onnx", "takes picture", work, capsys)


def test_a_batch_that_is_fixed(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = files.load("net.onnx")
    model.graph.inputs[0].shape = ir.Shape((1, 3, 8, 8))
    files.save(model, "fixed.onnx")
    assert_refused("bench fixed.onnx --batch 4", "fixed in the model", work, capsys)


def test_a_table_of_another_model(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("calibrate net.onnx --data data.npz -o table.npz --recipe recipe.yaml") == 0
    model = files.load("net.onnx")
    array = model.graph.initializers["fc_w"].const_value
    assert array is not None
    model.graph.initializers["fc_w"].const_value = ir.tensor(array.numpy() * 2, name="fc_w")
    files.save(model, "other.onnx")
    capsys.readouterr()
    command = "quantize other.onnx --table table.npz -o int8.onnx --recipe recipe.yaml"
    assert_refused(command, "another model", work, capsys)


def test_no_torch(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for command in ("export collections:OrderedDict", "optimize collections:OrderedDict"):
        assert_refused(f"{command} --input x=1x3 -o out.onnx", "edgewise[torch]", work, capsys)
    assert run("inspect net.onnx") == 0


def test_no_onnxruntime(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert_refused("optimize net.onnx -o out.onnx", "pip install onnxruntime", work, capsys)


# What fails without being the user's mistake


def test_int8_that_loses_too_much_is_not_written(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "__pycache__").mkdir()
    recipe = Recipe(passes=("fuse-batch-norm",), benchmark=None, max_drop=0.0)
    (work / "strict.yaml").write_text(recipe.to_yaml())
    (work / "my_metric_d.py").write_text(
        "calls = []\ndef falls(outputs, labels):\n    calls.append(0)\n    return -len(calls)\n"
    )
    command = "quantize net.onnx -o out.onnx --data data.npz --recipe strict.yaml --metric my_metric_d:falls"
    assert run(command) == 0
    assert "no int8: my_metric_d:falls fell from" in " ".join(capsys.readouterr().out.split())
    assert "QuantizeLinear" not in {n.op_type for n in files.load("out.onnx").graph}


def test_nothing_to_quantize(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] y) { y = Sin (x) }'
    onnx.save(onnx.parser.parse_model(text), work / "sin.onnx")
    np.savez(work / "x.npz", x=np.ones((4, 4), np.float32))
    assert_refused("quantize sin.onnx -o out.onnx --data x.npz", "can be int8", work, capsys, code=1)


def test_a_bug_keeps_its_traceback(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("edgewise.optimizer.inspection.inspect", broken)
    with pytest.raises(ZeroDivisionError):
        run("inspect net.onnx")


def test_a_failed_job_is_exit_code_1(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise EdgewiseError("no\nluck")

    monkeypatch.setattr("edgewise.optimizer.inspection.inspect", failing)
    assert_refused("inspect net.onnx", "no luck", work, capsys, code=1)


def test_an_interrupt_is_quiet(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgewise.optimizer.inspection.inspect", interrupted)
    assert run("inspect net.onnx") == 130
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(work: Path, number: int) -> None:
    (work / "slow_samples.py").write_text(
        "import pathlib, time\n"
        "def f():\n"
        "    pathlib.Path('started').touch()\n"
        "    time.sleep(60)\n"
        "    yield {}\n"
    )
    temporary = work / "tmp"
    temporary.mkdir()
    arguments = ("optimize", "net.onnx", "-o", "out.onnx", "--data", "slow_samples:f")
    process = subprocess.Popen(
        [sys.executable, "-m", "edgewise.optimizer", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    for _ in range(600):
        if (work / "started").exists():
            break
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "")
    assert not list(temporary.glob("*edgewise*"))
    assert not [p for p in work.iterdir() if p.name.startswith((".edgewise", "out"))]


# Where the time goes


def test_profile_of_one_model(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile net.onnx --threads 1 --runs 2 --no-peaks --top 3 --json profile.json") == 0
    text = capsys.readouterr().out
    assert text.startswith("net: ")
    assert "convolution" in text
    assert max(map(len, text.splitlines())) <= 80
    data = json.loads((work / "profile.json").read_text())
    assert len(data["profiles"]) == 1
    assert data["difference"] is None


def test_profile_of_two_models(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune net.onnx -o pruned.onnx --recipe recipe.yaml") == 0
    capsys.readouterr()
    options = "--threads 1 --runs 2 --no-peaks --data data.npz --batch 8 --json -"
    assert run(f"profile net.onnx pruned.onnx {options}") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["names"] == ["net", "pruned"]
    assert data["difference"]["sentences"]
    assert data["inputs"].startswith("image float32[8, 3, 8, 8]")


def test_profile_refuses(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused("profile missing.onnx", "missing.onnx", work, capsys)
    assert_refused("profile net.onnx --runs 1", "--runs", work, capsys)
    assert_refused("profile net.onnx --ep tpu", "unknown execution provider", work, capsys)
    assert_refused("profile net.onnx net.onnx net.onnx", "unexpected extra argument", work, capsys)
