"""What int8 cannot be made of, and jobs that are cut short: a clear word, no bad file, nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

from edgewise.calibration.partial import Partial
from edgewise.optimizer import cli, files
from edgewise.optimizer.metrics import fidelity
from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.evaluate import Evaluator

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Capsys = pytest.CaptureFixture[str]

OLD = b"what was here before"
RECIPE = "benchmark: null\nthreads: 1\n"


@pytest.fixture(autouse=True)
def work(model_path: Path, images: Array, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with net.onnx, its samples, a recipe that does not measure, and a file where the output goes.

    Whatever a test does in it: nothing but the file that was asked for is there in the end.
    """
    folder = model_path.parent
    monkeypatch.chdir(folder)
    np.savez("data.npz", image=images)
    Path("recipe.yaml").write_text(RECIPE)
    Path("out.onnx").write_bytes(OLD)
    yield folder
    assert not [p.name for p in folder.iterdir() if p.name.startswith((".edgewise", "out.onnx."))]


def run(command: str) -> int:
    return cli.run(f"{command} --recipe recipe.yaml".split())


def refused(command: str, capsys: Capsys, code: int) -> str:
    """The one line with which the command fails; the file that was there is as it was."""
    assert run(f"{command} --force") == code
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("edgewise: ")
    assert Path("out.onnx").read_bytes() == OLD
    return line


def written(command: str, capsys: Capsys) -> str:
    """All that the command prints when it writes a model that runs."""
    assert run(f"{command} -o out.onnx --force") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    Evaluator(files.load("out.onnx"))
    return " ".join(shown.out.split())


def operators(path: str = "out.onnx") -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def change_weights(change: Callable[[str, Array], None]) -> None:
    """net.onnx with weights that `change` writes to."""
    proto = onnx.load("net.onnx")
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).copy()
        change(tensor.name, array)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, "net.onnx")


def save_net(body: str, opset: int = 17, **weights: Array) -> None:
    """A net of vectors, 8 to 8, and samples for it."""
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[N,8] x) => (float[N,8] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in weights.items())
    onnx.save(proto, "net.onnx")
    rng = np.random.default_rng(0)
    np.savez("data.npz", x=rng.standard_normal((64, 8)).astype(np.float32))


def square(seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((8, 8)).astype(np.float32)


QUANTIZE = "quantize net.onnx --data data.npz"
BLIND = "cannot tell a good model from a broken one"

# Samples


@pytest.mark.parametrize("number", [0.3, 0.0])
def test_samples_that_are_all_alike(number: float, images: Array, capsys: Capsys) -> None:
    np.savez("data.npz", image=np.full_like(images, number))
    told = written(QUANTIZE, capsys)
    assert f"one number and nothing else was seen in 1 value: image ({number:g})" in told
    assert BLIND in told


@pytest.mark.parametrize("count", [1, 2])
def test_hardly_any_samples(count: int, images: Array, capsys: Capsys) -> None:
    np.savez("data.npz", image=images[:count])
    told = written(QUANTIZE, capsys)
    assert f"{count} sample{'s' * (count > 1)} cannot stand for all that the model will meet" in told
    assert BLIND in told


def test_fewer_samples_than_the_method_needs(images: Array, capsys: Capsys) -> None:
    Path("recipe.yaml").write_text(f"{RECIPE}quantize: {{methods: [entropy]}}\n")
    np.savez("data.npz", image=images[:40])
    assert "entropy ranges want 4080 elements, and fewer were seen of 1 value: p" in written(QUANTIZE, capsys)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_samples_with_nan_or_infinity(number: float, images: Array, capsys: Capsys) -> None:
    images[5, 0, 0, 0] = number
    np.savez("data.npz", image=images)
    assert "sample 5: input 'image' holds NaN or infinity" in refused(f"{QUANTIZE} -o out.onnx", capsys, 2)


def test_samples_beyond_float32_inside(images: Array, capsys: Capsys) -> None:
    np.savez("data.npz", image=np.full_like(images, 3e38))
    line = refused(f"{QUANTIZE} -o out.onnx", capsys, 1)
    assert "was not quantized" in line
    assert "NaN or infinity was seen in 2 values: p" in line


def test_samples_unlike_those_of_the_table(images: Array, capsys: Capsys) -> None:
    assert run("calibrate net.onnx --data data.npz -o table.npz") == 0
    assert "beyond all" not in written(f"{QUANTIZE} --table table.npz", capsys)
    np.savez("data.npz", image=images * 30)
    told = written(f"{QUANTIZE} --table table.npz", capsys)
    assert "elements beyond all that was calibrated with were seen in 3 values: " in told
    Path("table.npz").unlink()


# Activations


@pytest.mark.parametrize(
    ("body", "value"),
    [
        ("a = MatMul(x, w) b = Log(a) y = MatMul(b, v)", "b"),
        ("a = MatMul(x, w) b = Sqrt(a) y = MatMul(b, v)", "b"),
        ("a = MatMul(x, w) r = Relu(a) b = Div(a, r) y = MatMul(b, v)", "b"),
    ],
)
def test_activations_with_nan_or_infinity(body: str, value: str, capsys: Capsys) -> None:
    save_net(body, w=square(1), v=square(2))
    told = written(QUANTIZE, capsys)
    assert f"NaN or infinity was seen in 1 value: {value} (" in told
    assert "NaN or infinity is in output 'y' of the model itself" in told
    last = next(n for n in onnx.load("out.onnx").graph.node if "y" in n.output)
    assert (last.op_type, last.input[0]) == ("MatMul", "b")  # in float, on what was not finite


def test_nan_in_the_original_hides_no_error_elsewhere() -> None:
    original, found = np.float32([[np.nan, 1, 2, np.inf]]), np.float32([[7, 1, 2, 7]])
    assert fidelity({"y": found}, {"y": original}, None) == 1.0
    found[0, 2] = 3
    assert fidelity({"y": found}, {"y": original}, None) == 1 - 1 / 5
    found[0, 1] = np.nan
    with pytest.raises(EdgewiseError, match="NaN or infinity where the original's do not"):
        fidelity({"y": found}, {"y": original}, None)


def test_nan_that_int8_brings_is_refused(capsys: Capsys) -> None:
    """What is a little above zero in float is below it on the grid of the weights, and has no root."""
    save_net("a = MatMul(x, w) y = Sqrt(a)", w=square(1))
    Path("recipe.yaml").write_text(f"{RECIPE}quantize: {{methods: [minmax], ladder: []}}\n")
    told = written(f"{QUANTIZE} --metric fidelity", capsys)
    assert "hold NaN or infinity where the original's do not" in told
    assert "QuantizeLinear" not in operators()


# Weights


def dead(name: str, array: Array) -> None:
    if name.startswith("conv"):
        array[2] = 0


def enormous(name: str, array: Array) -> None:
    if name == "conv_w":
        array[2] *= 1e20


def overflowing(name: str, array: Array) -> None:
    if name == "fc_w":
        array[2] *= 1e38


def vanishing(name: str, array: Array) -> None:
    if name == "conv_w":
        array[2] *= 1e-42


def nothing(name: str, array: Array) -> None:
    if name in ("conv_w", "fc_w"):
        array[:] = 0


@pytest.mark.parametrize("change", [dead, enormous, overflowing, vanishing, nothing])
@pytest.mark.parametrize("options", ["", "--fast", "--metric fidelity"])
def test_channels_out_of_all_proportion(change: Callable[..., None], options: str, capsys: Capsys) -> None:
    change_weights(change)
    written(f"{QUANTIZE} {options}", capsys)
    proto = onnx.load("out.onnx")
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer]
    assert all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f")
    scales = {node.input[1] for node in proto.graph.node if node.op_type.endswith("Linear")}
    assert all(
        (a > 0).all() for a, t in zip(arrays, proto.graph.initializer, strict=True) if t.name in scales
    )


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_weights_with_nan_or_infinity(number: float, capsys: Capsys) -> None:
    def change(name: str, array: Array) -> None:
        if name == "fc_w":
            array[0, 0] = number

    change_weights(change)
    assert "weight 'fc_w' holds NaN or infinity" in refused(f"{QUANTIZE} -o out.onnx", capsys, 2)


# Models


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("y = Sin(x)", "Sin has no int8 kernel"),
        ("y = Identity(x)", "its neighbours are in float"),
        ("a = Sin(x) b = Relu(a) c = Identity(b) d = Relu(c) y = Abs(d)", "no int8 kernel"),
    ],
)
@pytest.mark.parametrize(
    "use", ["quantize {} -o out.onnx", "plan {} -o out.onnx", "calibrate {} -o out.onnx"]
)
def test_nothing_to_quantize(body: str, why: str, use: str, capsys: Capsys) -> None:
    save_net(body)
    line = refused(use.format("net.onnx --data data.npz"), capsys, 1)
    assert "none of its operators can be int8" in line
    assert why in line


def test_a_model_that_is_empty(capsys: Capsys) -> None:
    Path("net.onnx").write_bytes(b"")
    assert "net.onnx is empty" in refused(f"{QUANTIZE} -o out.onnx", capsys, 2)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), "net.onnx")
    assert "it has no outputs" in refused(f"{QUANTIZE} -o out.onnx", capsys, 2)


@pytest.mark.parametrize("use", ["quantize", "plan"])
def test_a_model_that_is_quantized(use: str, capsys: Capsys) -> None:
    written(QUANTIZE, capsys)
    Path("out.onnx").rename("net.onnx")
    Path("out.onnx").write_bytes(OLD)
    line = refused(f"{use} net.onnx --data data.npz -o out.onnx", capsys, 1)
    assert "already quantized: start from the float model" in line


def test_a_real_model_that_is_quantized(corpus: Path, capsys: Capsys) -> None:
    model = corpus / "models" / "mnv1_050_160_tf_qdq.onnx"
    line = refused(f"quantize {model} --data random -o out.onnx", capsys, 1)
    assert "already quantized: start from the float model" in line


@pytest.mark.parametrize("opset", [7, 12])
def test_an_old_opset_that_nothing_raises(opset: int, capsys: Capsys) -> None:
    save_net("y = MatMul(x, w)", opset, w=square(1))
    Path("recipe.yaml").write_text(f"{RECIPE}passes: []\n")
    assert "opset below 13: upgrade the model" in refused(f"{QUANTIZE} -o out.onnx", capsys, 1)
    Path("recipe.yaml").write_text(f"{RECIPE}passes: [upgrade-opset]\n")
    written(QUANTIZE, capsys)
    assert "QuantizeLinear" in operators()


# Tables


def damaged(change: Callable[[dict[str, Any]], None]) -> None:
    """table.npz with arrays that `change` writes to."""
    assert run("calibrate net.onnx --data data.npz -o table.npz") == 0
    arrays = dict(np.load("table.npz"))
    change(arrays)
    np.savez("table.npz", **arrays)


TABLES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "counts below zero": lambda t: t.update(counts=-t["counts"]),
    "counts of nothing": lambda t: t.update(counts=t["counts"] * 0),
    "more in bins than seen": lambda t: t.update(counts=t["counts"] * 10**9),
    "bins out of order": lambda t: t.update(bins=t["bins"][::-1]),
    "NaN": lambda t: t.update(minimum=t["minimum"] * np.nan),
    "infinity": lambda t: t.update(maximum=t["maximum"] * np.inf),
    "least above greatest": lambda t: t.update(minimum=t["maximum"], maximum=t["minimum"]),
    "one name for all": lambda t: t.update(names=np.array(["r"] * len(t["names"]))),
    "sizes": lambda t: t.update(sizes=t["sizes"] * 0),
    "an array is missing": lambda t: t.pop("bins"),
    "numbers of another kind": lambda t: t.update(counts=t["counts"].astype(float)),
    "sums that are none": lambda t: t.update(lows=np.array(["zz"] * len(t["lows"]))),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_that_is_damaged(kind: str, capsys: Capsys) -> None:
    damaged(TABLES[kind])
    capsys.readouterr()
    line = refused("quantize net.onnx --table table.npz -o out.onnx", capsys, 2)
    assert "table.npz is no calibration table, or a damaged one: calibrate again" in line


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_table_that_is_cut(keep: float, capsys: Capsys) -> None:
    damaged(lambda _: None)
    capsys.readouterr()
    data = Path("table.npz").read_bytes()
    Path("table.npz").write_bytes(data[: int(len(data) * keep)])
    assert "damaged one" in refused("quantize net.onnx --table table.npz -o out.onnx", capsys, 2)


def test_a_table_without_the_values(capsys: Capsys) -> None:
    damaged(lambda t: t.update(names=np.array([f"v{i}" for i in range(len(t["names"]))])))
    capsys.readouterr()
    assert "range unknown" in refused("quantize net.onnx --table table.npz -o out.onnx", capsys, 1)


def test_a_table_of_another_model(capsys: Capsys) -> None:
    damaged(lambda _: None)
    change_weights(dead)
    capsys.readouterr()
    line = refused("quantize net.onnx --table table.npz -o out.onnx", capsys, 2)
    assert "belongs to another model: calibrate this one" in line


# Plans: what single entries may hold is tested where plans are read


Plan = dict[str, Any]
PLANS: dict[str, tuple[Callable[[Plan], Any], int, str]] = {
    "scale 0": (lambda p: p["activations"][0].update(scale=0), 2, "positive float32"),
    "scale below 0": (lambda p: p["activations"][0].update(scale=-1.0), 2, "positive float32"),
    "infinite scale": (lambda p: p["activations"][0].update(scale=float("inf")), 2, "positive float32"),
    "scale NaN": (lambda p: p["activations"][0].update(scale=float("nan")), 2, "positive float32"),
    "zero point": (lambda p: p["activations"][0].update(zero_point=256), 2, "is not in 0..255"),
    "zero point of no integer": (lambda p: p["activations"][0].update(zero_point=1.5), 2, "1.5"),
    "type": (lambda p: p["activations"][0].update(dtype="int3"), 2, "type 'int3' is none of"),
    "types that do not meet": (lambda p: p["activations"][0].update(dtype="int16"), 2, "different types"),
    "weights in 16 bits": (lambda p: p["weights"][0].update(dtype="uint16"), 2, "weights are int8 or uint8"),
    "unknown value": (
        lambda p: p["activations"].append({"name": "ghost", "dtype": "uint8", "scale": 0.1}),
        2,
        "'ghost': the model's main graph has no value",
    ),
    "unknown key": (lambda p: p["activations"][0].update(colour="red"), 2, "'colour' means nothing there"),
    "no type": (lambda p: p["activations"][0].pop("dtype"), 2, "its dtype is missing"),
    "a value too few": (lambda p: p["activations"].pop(0), 2, "has no grid: add an entry"),
    "all in float": (lambda p: [n.update(form="float") for n in p["nodes"]], 1, "leaves every node in float"),
    "another model": (lambda p: p.update(model="0" * 64), 2, "made for another model"),
    "no nodes": (lambda p: p.pop("nodes"), 1, "leaves every node in float"),
    "target": (lambda p: p.update(target="toaster"), 2, "unknown target 'toaster'"),
}


@pytest.mark.parametrize("kind", PLANS)
def test_a_plan_edited_into_nonsense(kind: str, capsys: Capsys) -> None:
    edit, code, word = PLANS[kind]
    assert run("plan net.onnx --data data.npz -o plan.yaml") == 0
    capsys.readouterr()
    plan = yaml.safe_load(Path("plan.yaml").read_text())
    edit(plan)
    Path("plan.yaml").write_text(yaml.safe_dump(plan))
    assert word in refused("quantize net.onnx --plan plan.yaml -o out.onnx", capsys, code)


@pytest.mark.parametrize("text", ["nodes: [}", "- 1", "", "\t: x", "!!python/object/apply:os.getcwd []"])
def test_a_plan_that_is_none(text: str, capsys: Capsys) -> None:
    Path("plan.yaml").write_text(text)
    line = refused("quantize net.onnx --plan plan.yaml -o out.onnx", capsys, 2)
    assert "plan.yaml: it is no " in line


# Bounds and metrics


def test_a_bound_of_nothing(capsys: Capsys) -> None:
    assert "no int8: fidelity fell" in written(f"{QUANTIZE} --metric fidelity --max-drop 0", capsys)
    assert "QuantizeLinear" not in operators()


METRICS = {
    "raises": ("raise ValueError('no luck')", 2, "failed: no luck (ValueError)"),
    "raises_later": (
        "if calls.append(0) or len(calls) > 1: raise ValueError('no luck')\n return 1",
        2,
        "no luck",
    ),
    "nan": ("return float('nan')", 1, "gave nan"),
    "nan_later": ("return 1.0 if calls.append(0) or len(calls) < 2 else float('nan')", 1, "gave nan"),
    "leaves": ("raise SystemExit(3)", 2, "failed: 3 (SystemExit)"),
    "text": ("return 'good'", 2, "could not convert string"),
}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_that_fails(name: str, capsys: Capsys) -> None:
    body, code, word = METRICS[name]
    module = f"bad_metric_{name}"
    Path(f"{module}.py").write_text(f"calls = []\ndef f(outputs, labels):\n {body}\n")
    assert word in refused(f"{QUANTIZE} --metric {module}:f -o out.onnx", capsys, code)


def test_a_metric_that_sees_nothing(capsys: Capsys) -> None:
    Path("blind_metric.py").write_text("def f(outputs, labels):\n    return 0.5\n")
    told = written(f"{QUANTIZE} --metric blind_metric:f", capsys)
    assert "blind_metric:f is 0.5000 as well where every sample gets the outputs of the first" in told


# Interruptions

CUT_SHORT = """
import functools, os, sys
from edgewise.calibration import partial, sharding
from edgewise.optimizer import cli, jobs, ladder

def dying(self, worker, positions):
    if positions[0] >= 20:
        os.kill(os.getpid(), int(sys.argv[1]))
    send(self, worker, positions)

send, sharding.Alone.send = sharding.Alone.send, dying
jobs.collect_to = functools.partial(partial.collect_to, every=0)
ladder.collect_in = functools.partial(partial.collect_in, every=0)
sys.exit(cli.run(sys.argv[2:]))
"""
SLEEPING = """
import pathlib, time
calls = []
def metric(outputs, labels):
    calls.append(0)
    if len(calls) > 1 and pathlib.Path('sleep').exists():
        pathlib.Path('asleep').touch()
        time.sleep(60)
    return 1.0
"""
JOBS = {
    "quantize net.onnx --data data.npz -o out.onnx --force --recipe recipe.yaml": "out.onnx.table.part",
    "optimize net.onnx --data data.npz -o out.onnx --force --recipe recipe.yaml": "out.onnx.table.part",
    "calibrate net.onnx --data data.npz -o out.onnx --force --recipe recipe.yaml": "out.onnx.part",
}


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("command", JOBS)
def test_a_job_cut_short_while_it_calibrates_goes_on(
    command: str, number: int, work: Path, capsys: Capsys
) -> None:
    assert cli.run(command.split()) == 0
    undisturbed = Path("out.onnx").read_bytes()
    Path("out.onnx").write_bytes(OLD)
    Path("cut_short.py").write_text(CUT_SHORT)
    temporary = work / "tmp"
    temporary.mkdir()
    died = subprocess.run(
        [sys.executable, "cut_short.py", str(int(number)), *command.split()],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert died.returncode == (130 if number == signal.SIGINT else -number), died.stderr
    assert died.stderr == ""
    assert Path("out.onnx").read_bytes() == OLD
    assert number == signal.SIGKILL or not list(temporary.glob("*edgewise*"))
    part = JOBS[command]
    done = int(Partial.load(Path(part)).done.sum())
    assert 0 < done < 64
    capsys.readouterr()
    assert cli.run(command.split()) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"went on from {part}: it held {done} of " in told
    assert Path("out.onnx").read_bytes() == undisturbed
    assert not Path(part).exists()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_search_that_was_killed_does_not_calibrate_again(capsys: Capsys) -> None:
    Path("sleeping.py").write_text(SLEEPING)
    Path("sleep").touch()
    command = f"{QUANTIZE} -o out.onnx --force --metric sleeping:metric --recipe recipe.yaml".split()
    process = subprocess.Popen([sys.executable, "-m", "edgewise.optimizer", *command])
    while process.poll() is None and not Path("asleep").exists():
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert Path("out.onnx").read_bytes() == OLD
    Path("sleep").unlink()
    assert cli.run(command) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "went on from out.onnx.table.part: it held 48 of 48 samples" in told


def test_what_was_kept_of_other_samples_is_left_out_of_account(images: Array, capsys: Capsys) -> None:
    assert run("calibrate net.onnx --data data.npz -o other.npz") == 0
    Path("other.npz").rename("out.onnx.table.part")
    assert "started over: out.onnx.table.part is a calibration table, but no part of one" in written(
        QUANTIZE, capsys
    )
