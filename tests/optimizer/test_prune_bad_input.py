"""What cannot be pruned, distilled or trained: one clear line, no output, nothing left behind."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="what trains needs torch")

import onnx
import onnx_ir as ir
from small_nets import classifier, images

from edgewise.calibration.data import Samples
from edgewise.optimizer import cli, files, pruning
from edgewise.runtime.evaluate import Evaluator

Capsys = pytest.CaptureFixture[str]

OLD = b"what was here before"
METRICS = """
import numpy as np

def raises(outputs, labels):
    raise RuntimeError("no weights for my metric\\nand a second line")

def nan(outputs, labels):
    return float("nan")

def constant(outputs, labels):
    return 0.5

def text(outputs, labels):
    return "good"

def mean(outputs, labels):
    return float(np.mean(outputs["y"]))
"""

PRUNE = "prune net.onnx -o out.onnx --no-benchmark --threads 1"
MACS = f"{PRUNE} --data data.npz --max-macs 50% --recover none --metric fidelity"
DISTILL = "distill net.onnx student.onnx -o out.onnx --no-benchmark --threads 1"
FINETUNE = "finetune net.onnx -o out.onnx --no-benchmark --threads 1"
TAUGHT = f"{DISTILL} --data data.npz --epochs 1"
TUNED = f"{FINETUNE} --data labels.npz --epochs 1"


def save(model: ir.Model, name: str) -> None:
    files.save(model, name, force=True)


def save_samples(samples: Samples, name: str) -> None:
    pixels = np.concatenate([feed["x"] for feed in samples])
    labels = {} if samples.labels is None else {"labels": samples.labels}
    np.savez(name, x=pixels, **labels)


def save_net(name: str, signature: str, body: str, **weights: np.ndarray) -> None:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {signature} {{ {body} }}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in weights.items())
    onnx.save(proto, name)


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with two nets, samples with labels and without, and metrics.

    Whatever a test does in it: nothing but the file that was asked for is there in the end.
    """
    folder, scratch = tmp_path / "work", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    net = classifier(16)
    save(net, "net.onnx")
    save(classifier(8, seed=1), "student.onnx")
    save_samples(images(net, 64), "data.npz")
    save_samples(images(net, 64, classes=4), "labels.npz")
    (folder / "scorer_of_pruning.py").write_text(METRICS)
    known = {path.name for path in folder.iterdir()}
    yield folder
    new = {path.name for path in folder.iterdir()} - known - {"out.onnx", "__pycache__"}
    assert {name for name in new if not name.endswith((".npz", ".onnx", ".yaml"))} == set()
    assert not [name for name in new if "part" in name or name.startswith(".")]
    assert not list(scratch.glob("edgewise*"))


def refused(command: str, capsys: Capsys, code: int) -> str:
    """The one line with which the command fails."""
    assert cli.run(command.split()) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("edgewise: ")
    assert not Path("out.onnx").exists()
    return line


# What is asked for

OPTIONS = {
    "no data": (f"{PRUNE} --max-macs 50%", "--data"),
    "options without a bound": (f"{PRUNE} --data data.npz --score taylor", "a bound is missing"),
    "int8 without a bound": (f"{PRUNE} --data data.npz --int8", "a bound is missing"),
    "two bounds": (f"{MACS} --ratio 0.5", "one bound counts, not max_macs and ratio"),
    "a drop and another bound": (f"{MACS} --max-drop 0.1", "one bound counts, not --max-drop and --max-macs"),
    "who taught judges": (f"{MACS} --validation data.npz", "--validation is data.npz like --data"),
    "who taught a student judges": (f"{TAUGHT} --validation data.npz", "--validation is data.npz"),
    "judges that are not there": (f"{TUNED} --validation none.npz", "none.npz"),
    "nothing stays": (f"{PRUNE} --data data.npz --max-macs 0", "greater than 0"),
    "more than all": (f"{PRUNE} --data data.npz --max-macs 150%", "less than or equal to 1"),
    "a share that is none": (f"{PRUNE} --data data.npz --max-macs abc", "no share such as"),
    "a share that is no number": (f"{PRUNE} --data data.npz --max-macs nan", "no share such as"),
    "all channels": (f"{PRUNE} --data data.npz --ratio 1", "less than 1"),
    "no channels": (f"{PRUNE} --data data.npz --ratio 0", "greater than 0"),
    "a bound that is no number": (f"{PRUNE} --data data.npz --min-metric nan", "finite"),
    "no time": (f"{PRUNE} --data data.npz --max-latency 0", "greater than 0"),
    "a size below zero": (f"{PRUNE} --data data.npz --max-size -1", "greater than 0"),
    "a drop below zero": (f"{PRUNE} --data data.npz --max-drop -0.1", "greater than or equal to 0"),
    "unknown score": (f"{MACS} --score nonsense", "prune.score"),
    "unknown recovery": (f"{PRUNE} --data data.npz --max-macs 50% --recover nonsense", "prune.recover"),
    "no effort": (f"{MACS} --effort 0", "prune.effort"),
    "endless effort": (f"{MACS} --effort inf", "prune.effort"),
    "no steps": (f"{MACS} --schedule 0", "prune.schedule"),
    "no workers": (f"{MACS} --workers 0", "prune.workers"),
    "no memory": (f"{MACS} --memory 0", "no size such as"),
    "hardly any memory": (f"{MACS} --memory 0.1", "prune.memory"),
    "unknown metric": (f"{MACS} --metric best", "none of top1"),
    "no such metric": (f"{MACS} --metric scorer_of_pruning:absent", "no function 'absent'"),
    "a metric that needs labels": (f"{MACS} --metric top1", "needs labels"),
    "no such model": (MACS.replace("net.onnx", "absent.onnx"), "absent.onnx"),
    "no such data": (MACS.replace("data.npz", "absent.npz"), "absent.npz"),
    "no such folder": (MACS.replace("out.onnx", "absent/out.onnx"), "there is no folder"),
    "distill without data": (DISTILL, "--data"),
    "no such teacher": (TAUGHT.replace("net.onnx", "absent.onnx"), "absent.onnx"),
    "int8 without labels that is told how": (f"{FINETUNE} --data data.npz --int8 --epochs 1", "no labels"),
    "over the student": (TAUGHT.replace("-o out.onnx", "-o student.onnx --force"), "never touched"),
    "over the teacher": (TAUGHT.replace("-o out.onnx", "-o net.onnx --force"), "never touched"),
    "no epochs": (f"{DISTILL} --data data.npz --epochs 0", "epochs has to be above zero"),
    "no temperature": (f"{TAUGHT} --temperature 0", "temperature has to be above zero"),
    "no rate": (f"{TAUGHT} --learning-rate 0", "learning_rate has to be above zero"),
    "a rate that is no number": (f"{TAUGHT} --learning-rate nan", "learning_rate has to be above zero"),
    "an empty batch": (f"{TAUGHT} --batch 0", "batch has to be above zero"),
    "finetune without data": (FINETUNE, "--data"),
    "no labels": (f"{FINETUNE} --data data.npz", "no labels to learn from"),
    "a head without labels": (f"{FINETUNE} --data data.npz --int8 --replace-head 3", "no labels"),
    "one class": (f"{TUNED} --replace-head 1", "two classes or more"),
    "unknown penalty": (f"{TUNED} --penalty l3=1e-3", "none of l1, l2, group-lasso, bn-scale"),
    "a penalty without strength": (f"{TUNED} --penalty l1", "no penalty such as"),
    "a penalty below zero": (f"{TUNED} --penalty l1=-1", "a number from zero on"),
    "an endless penalty": (f"{TUNED} --penalty l1=inf", "a number from zero on"),
    "everything frozen": (f"{TUNED} --freeze *", "all of them are frozen"),
    "nothing is called so": (f"{TUNED} --freeze bdoy.*", "bdoy.*"),
    "an option of another command": (f"{TUNED} --ratio 0.5", "--ratio"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_options_that_make_no_sense(kind: str, capsys: Capsys) -> None:
    command, words = OPTIONS[kind]
    assert words in refused(command, capsys, 2)


def test_an_unknown_score_is_answered_with_those_there_are(capsys: Capsys) -> None:
    line = refused(f"{MACS} --score nonsense", capsys, 2)
    assert all(name in line for name in ("reconstruction", "taylor", "magnitude-l1"))


@pytest.mark.parametrize("command", [MACS, TAUGHT, TUNED])
def test_what_is_there_is_replaced_with_force_only(command: str, capsys: Capsys) -> None:
    Path("out.onnx").write_bytes(OLD)
    assert cli.run(command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "out.onnx exists: choose another name or pass --force" in line
    assert Path("out.onnx").read_bytes() == OLD
    assert cli.run([*command.split(), "--force"]) == 0
    Evaluator(files.load("out.onnx"))


# Samples and metrics


@pytest.mark.parametrize(
    ("command", "data"), [(MACS, "data.npz"), (TAUGHT, "data.npz"), (TUNED, "labels.npz")]
)
def test_too_few_samples(command: str, data: str, capsys: Capsys) -> None:
    save_samples(images(classifier(16), 15, classes=4), data)
    assert "15 samples are too few to learn from some and judge by others" in refused(command, capsys, 1)


@pytest.mark.parametrize("command", [MACS, TAUGHT])
def test_samples_for_another_net(command: str, capsys: Capsys) -> None:
    np.savez("data.npz", x=np.zeros((64, 3, 8, 8), np.float32))
    assert "'x'" in refused(command, capsys, 2)


@pytest.mark.parametrize(
    ("metric", "code", "words"),
    [
        ("raises", 2, "metric scorer_of_pruning:raises failed: no weights for my metric"),
        ("nan", 1, "gave nan"),
        ("constant", 1, "cannot bound what pruning costs"),
        ("text", 2, "metric scorer_of_pruning:text failed"),
    ],
)
@pytest.mark.parametrize("bound", ["--max-macs 50%", "--max-drop 0.1"])
def test_metrics_that_tell_nothing(bound: str, metric: str, code: int, words: str, capsys: Capsys) -> None:
    command = f"{PRUNE} --data data.npz {bound} --recover none --metric scorer_of_pruning:{metric}"
    assert words in refused(command, capsys, code)


@pytest.mark.parametrize(("metric", "code"), [("raises", 2), ("nan", 1)])
@pytest.mark.parametrize("command", [TAUGHT, TUNED])
def test_metrics_that_tell_nothing_of_what_was_trained(
    command: str, metric: str, code: int, capsys: Capsys
) -> None:
    assert "metric scorer_of_pruning" in refused(
        f"{command} --metric scorer_of_pruning:{metric}", capsys, code
    )


def test_a_distillation_is_not_begun_where_the_metric_fails(
    capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metric is tried before the minutes of training, not behind them."""
    from edgewise.training import distillation

    def unreachable(*_: object, **__: object) -> None:
        raise AssertionError("training has begun")

    monkeypatch.setattr(distillation, "distill", unreachable)
    refused(f"{TAUGHT} --metric scorer_of_pruning:raises", capsys, 2)


def test_samples_that_are_alike(capsys: Capsys) -> None:
    np.savez("data.npz", x=np.ones((64, 1, 8, 8), np.float32))
    assert "agreement is the same when" in refused(f"{PRUNE} --data data.npz --max-macs 50%", capsys, 1)


# Bounds that cannot be kept


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        ("--max-macs 0.1%", "the bound cannot be reached"),
        ("--max-size 0.0001", "the bound cannot be reached"),
        ("--max-latency 0.00001", "the bound cannot be reached"),
        ("--min-metric 1.5", "no amount of pruning keeps fidelity at 1.5"),
    ],
)
def test_a_bound_out_of_reach(
    bound: str, words: str, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "_SECONDS", 0.1)
    command = f"{PRUNE} --data data.npz {bound} --recover none --metric fidelity"
    line = refused(command, capsys, 1)
    assert words in line
    assert "--best-effort" in line
    assert cli.run([*command.split(), "--best-effort"]) == 0
    assert words.removeprefix("the bound ") in " ".join(capsys.readouterr().out.split())
    assert len(Evaluator(files.load("out.onnx")).outputs) == 1


# Models


NOTHING = {
    "one layer": ("(float[N,8] x) => (float[N,8] y)", "y = MatMul(x, w)", "graph input: 8, graph output: 8"),
    "no weights": ("(float[N,8] x) => (float[N,8] y)", "y = Relu(x)", "no layer has channels"),
    "weights that come in": (
        "(float[N,8] x, float[8,8] v) => (float[N,8] y)",
        "m = MatMul(x, v) y = MatMul(m, v)",
        "no channel of the model can be removed",
    ),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_nothing_that_can_leave(kind: str, capsys: Capsys) -> None:
    signature, body, reason = NOTHING[kind]
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((8, 8)).astype(np.float32)} if "w" in body else {}
    save_net("net.onnx", signature, body, **weights)
    arrays = {"x": rng.standard_normal((64, 8)).astype(np.float32)}
    if " v" in signature:
        arrays["v"] = rng.standard_normal((64, 8, 8)).astype(np.float32)
    np.savez("data.npz", **arrays)
    line = refused(MACS, capsys, 1)
    assert "no channel of the model can be removed" in line
    assert reason in line


def test_a_teacher_of_other_inputs(capsys: Capsys) -> None:
    save_net("net.onnx", "(float[N,1,8,8] picture) => (float[N,1,8,8] y)", "y = Relu(picture)")
    line = refused(TAUGHT, capsys, 2)
    assert "net.onnx takes picture (float32), not x (float32)" in line


def test_a_teacher_of_other_outputs(capsys: Capsys) -> None:
    save_net("net.onnx", "(float[N,1,8,8] x) => (float[N,1,8,8] z)", "z = Relu(x)")
    assert "differ in their outputs: ['z'] and ['y']" in refused(TAUGHT, capsys, 2)


def test_a_teacher_of_other_classes(capsys: Capsys) -> None:
    save(classifier(classes=7), "net.onnx")
    line = refused(TAUGHT, capsys, 2)
    assert "7" in line
    assert "4" in line


def test_no_head_to_replace(capsys: Capsys) -> None:
    save_net("net.onnx", "(float[N,1,8,8] x) => (float[N,64] y)", "r = Relu(x) y = Flatten(r)")
    assert "output 'y' has no head to replace" in refused(f"{TUNED} --replace-head 3", capsys, 2)


def test_no_weights_to_train(capsys: Capsys) -> None:
    save_net("net.onnx", "(float[N,1,8,8] x) => (float[N,64] y)", "r = Relu(x) y = Flatten(r)")
    assert "no weights to train" in refused(TUNED, capsys, 2)


def test_an_operator_that_cannot_be_trained_through(capsys: Capsys) -> None:
    save_net(
        "net.onnx",
        "(float[N,1,8,8] x) => (float[N,4] y)",
        "f = Flatten(x) m = MatMul(f, w) i = Cast<to = 7>(m) t = TfIdfVectorizer<max_gram_length = 1, "
        'max_skip_count = 0, min_gram_length = 1, mode = "TF", ngram_counts = [0], '
        "ngram_indexes = [0, 1, 2, 3], pool_int64s = [0, 1, 2, 3]>(i) y = Add(m, t)",
        w=np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32),
    )
    line = refused(TUNED, capsys, 2)
    assert "TfIdfVectorizer" in line


@pytest.mark.parametrize("classes", [2, 3])
def test_labels_that_fit_no_class(classes: int, capsys: Capsys) -> None:
    assert f"labels from 0 to 3 for {classes} classes" in refused(
        f"{TUNED} --replace-head {classes}", capsys, 2
    )


def test_a_penalty_that_finds_nothing(capsys: Capsys) -> None:
    rng = np.random.default_rng(0)
    body = "f = Flatten(x) y = MatMul(f, w)"
    weights = rng.standard_normal((64, 4)).astype(np.float32)
    save_net("net.onnx", "(float[N,1,8,8] x) => (float[N,4] y)", body, w=weights)
    assert "the penalty bn-scale finds nothing" in refused(f"{TUNED} --penalty bn-scale=0.1", capsys, 2)


# Training


@pytest.mark.parametrize("command", [TAUGHT, TUNED])
def test_training_that_explodes(command: str, capsys: Capsys) -> None:
    line = refused(f"{command} --epochs 3 --learning-rate 1e30 --batch 8", capsys, 1)
    assert "training diverged" in line
    assert "choose a lower learning rate" in line


def test_a_model_that_gives_no_numbers(capsys: Capsys) -> None:
    rng = np.random.default_rng(0)
    save_net(
        "net.onnx",
        "(float[N,1,8,8] x) => (float[N,4] y)",
        "f = Flatten(x) m = MatMul(f, w) l = Log(m) y = MatMul(l, v)",
        w=rng.standard_normal((64, 16)).astype(np.float32),
        v=rng.standard_normal((16, 4)).astype(np.float32),
    )
    for command in (f"{PRUNE} --data data.npz --max-macs 50%", TAUGHT, TUNED):
        refused(command, capsys, 1)
