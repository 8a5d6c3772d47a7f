"""A torch module becomes an .onnx file with the same outputs, or one line says why not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.optimizer.torch_target import (
    DTYPES,
    batch_axes,
    is_torch_target,
    module_at,
    parse_axes,
    parse_inputs,
)
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Evaluator, TensorSpec
from edgewise.runtime.foreign import reason

torch = pytest.importorskip("torch", reason="export needs torch")
pytest.importorskip("onnxscript", reason="export needs onnxscript")

from torch import Tensor, nn  # noqa: E402 - needs torch

from edgewise.models.digits import load_digits, load_digits_net  # noqa: E402
from edgewise.optimizer.torch_export import ExportReport, export, export_module, to_model  # noqa: E402


class TwoInputs(nn.Module):
    """Outputs of every form: by key, nested, None, an input itself, and a key that an input has as well."""

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
        return {"difference": a - b, "same": a, "parts": (a * b, [b + 1]), "nothing": None, "a": 2 * a}


class Tokens(nn.Module):
    """An embedding with positions: integers in, two axes that may be free, one input without effect."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 4)
        self.places = nn.Parameter(torch.randn(16, 4))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        summed: Tensor = self.words(ids) + self.places[: ids.shape[1]]
        return summed


class BatchOfTwo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(2, 3)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        print("tracing")  # noqa: T201 - what a user's module may do
        return x if x.sum() > 0 else 2 * x


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.dropout(x, 0.5, True)


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Returning(nn.Module):
    def __init__(self, result: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> Any:
        return self.result(x)


class Pair(NamedTuple):
    mean: Tensor
    spread: Tensor


def names(values: Any) -> list[str]:
    return [v.name for v in values]


def shapes(values: Any) -> list[str]:
    return [str(v.shape) for v in values]


# What the user writes


@given(
    st.lists(st.integers(1, 4096), max_size=5),
    st.sampled_from(DTYPES),
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,8}", fullmatch=True),
)
@settings(deadline=None, max_examples=20)
def test_inputs_read_what_is_written(shape: list[int], dtype: str, name: str) -> None:
    text = f"{name}={'x'.join(map(str, shape))}:{dtype}"
    assert parse_inputs([text]) == (TensorSpec(name, np.dtype(dtype), tuple(shape)),)


def test_inputs_are_float_unless_said() -> None:
    assert parse_inputs(["x=2x3", "t="]) == (
        TensorSpec("x", np.dtype("float32"), (2, 3)),
        TensorSpec("t", np.dtype("float32"), ()),
    )


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "say what goes into the module"),
        (["x"], "not of the form"),
        (["x=1,3"], "not of the form"),
        (["x=Nx3"], "not of the form"),
        (["=1x3"], "not of the form"),
        (["x=1x3:complex64"], "no type 'complex64'"),
        (["x=1x0"], "length 0"),
        (["x=1", "y=1", "x=2"], "'x' is given twice"),
    ],
)
def test_inputs_that_make_no_sense(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_inputs(texts)


def test_axes_count_from_both_ends() -> None:
    specs = parse_inputs(["x=2x3x8x8", "y=2x5"])
    axes = parse_axes(["x:0=n", "x:-1=width", "y:0=n"], specs)
    assert axes == {"x": {0: "n", 3: "width"}, "y": {0: "n"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x:0", "not of the form"),
        ("x:first=n", "not of the form"),
        ("x:0=2", "not of the form"),
        ("z:0=n", "the inputs are x, y"),
        ("x:2=n", "x has 2 axes"),
        ("y:0=n", "lengths 2 and 4"),
    ],
)
def test_axes_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_axes(["x:0=n", text], parse_inputs(["x=2x3", "y=4"]))


@pytest.mark.parametrize(
    ("texts", "free"),
    [(["x=2x3", "y=2"], True), (["x=2x3", "y=3"], False), (["x=2x3", "t="], False), (["t="], False)],
)
def test_batch_is_the_first_axis_that_all_share(texts: list[str], free: bool) -> None:
    specs = parse_inputs(texts)
    assert batch_axes(specs) == ({s.name: {0: "batch"} for s in specs} if free else {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("net:make", True),
        ("package.net:Net", True),
        ("model.onnx", False),
        ("folder/net:make", False),
        ("C:\\model.onnx", False),
        (":make", False),
        ("net:", False),
    ],
)
def test_targets_are_told_from_files(text: str, expected: bool) -> None:
    assert is_torch_target(text) is expected


def test_a_file_is_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net:make").write_text("")
    assert not is_torch_target("net:make")


# Where the module comes from


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Write a module `users_net` into the working folder; it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text: str) -> None:
        (tmp_path / "users_net.py").write_text(f"from torch import nn\n{text}\n")

    yield write
    sys.modules.pop("users_net", None)


@pytest.mark.parametrize(
    "text", ["make = nn.ReLU", "make = nn.ReLU()", "def make():\n    return nn.ReLU()"], ids=str.split
)
def test_module_from_the_working_folder(user_module: Callable[[str], None], text: str) -> None:
    user_module(text)
    assert isinstance(module_at("users_net:make"), nn.ReLU)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("make = 3", "has no function 'make'"),
        ("make = dict", "gives dict, not a torch.nn.Module"),
        ("def make():\n    raise KeyError('weights')", r"users_net:make failed: 'weights' \(KeyError\)"),
        ("def make(width): pass", "failed: .*missing 1 required positional argument"),
        ("def make():\n    raise SystemExit(3)", r"failed: 3 \(SystemExit\)"),
        ("def make(:", "invalid syntax"),
        ("1 / 0", r"cannot be imported: division by zero \(ZeroDivisionError\)"),
        ("import no_such_package", "No module named 'no_such_package'"),
    ],
)
def test_module_that_cannot_be_made(user_module: Callable[[str], None], text: str, message: str) -> None:
    user_module(text)
    with pytest.raises(InputError, match=message) as caught:
        module_at("users_net:make")
    assert "\n" not in str(caught.value)


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"export needs torch: pip install 'edgewise\[torch\]'"):
        to_model("net:make", ["x=1x3"])


def test_reason_is_that_of_the_first_error() -> None:
    root = ValueError("Found a conflict:\n - x is 2\n - y is 3")
    error = RuntimeError("Export failed. Next steps: ...")
    error.__cause__ = root
    assert reason(error) == "Found a conflict: x is 2 (ValueError)"
    assert reason(ValueError()) == "ValueError"


# The digits network, once


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport]:
    path = tmp_path_factory.mktemp("export") / "digits.onnx"
    return path, export("edgewise.models.digits:load_digits_net", ["image=1x1x8x8"], path)


def test_digits_report(digits_file: tuple[Path, ExportReport]) -> None:
    path, report = digits_file
    assert report.path == str(path)
    assert report.bytes == path.stat().st_size
    assert report.opset >= 18
    assert report.inputs == (TensorSpec("image", np.dtype("float32"), ("batch", 1, 8, 8)),)
    assert report.outputs == ("output",)
    assert report.notes == ()
    assert [c.shapes for c in report.checks] == [{"image": (1, 1, 8, 8)}, {"image": (3, 1, 8, 8)}]
    assert all(c.error <= 1e-4 for c in report.checks)
    plain = report.to_dict()
    assert plain["inputs"] == [{"name": "image", "dtype": "float32", "shape": ["batch", 1, 8, 8]}]
    assert plain["checks"][1]["shapes"] == {"image": [3, 1, 8, 8]}


def test_digits_answers_are_torchs(digits_file: tuple[Path, ExportReport]) -> None:
    images = load_digits().test_images
    with torch.no_grad():
        expected = load_digits_net()(torch.from_numpy(images)).numpy()
    actual = Evaluator(digits_file[0]).run({"image": images})["output"]
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(actual.argmax(1), expected.argmax(1))


def test_file_holds_no_traces_of_the_source(digits_file: tuple[Path, ExportReport]) -> None:
    model = ir.load(digits_file[0])
    items: list[Any] = [model, model.graph, *model.graph, *model.graph.inputs, *model.graph.outputs]
    items += [*model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]
    assert not any(item.metadata_props or item.doc_string for item in items)
    data = digits_file[0].read_bytes()
    assert str(Path.cwd()).encode() not in data
    assert b"digits_net.py" not in data


def test_existing_file_needs_force(
    digits_file: tuple[Path, ExportReport], user_module: Callable[[str], None]
) -> None:
    before = digits_file[0].read_bytes()
    user_module("raise RuntimeError('called for nothing')")
    with pytest.raises(InputError, match="exists"):
        export("users_net:make", ["x=1x3"], digits_file[0])
    assert digits_file[0].read_bytes() == before


# Modules of every kind


def test_inputs_by_name_and_outputs_of_every_form(capfd: pytest.CaptureFixture[str]) -> None:
    made = export_module(TwoInputs(), ["b=1x3", "a=1x3"])  # not the order of forward
    graph = made.model.graph
    assert names(graph.inputs) == ["a", "b"]
    assert names(graph.outputs) == ["difference", "same", "parts_0", "parts_1_0", "a_output"]
    assert set(shapes(graph.inputs)) == set(shapes(graph.outputs)) == {"[batch,3]"}
    feed = {"a": np.full((4, 3), 5, np.float32), "b": np.full((4, 3), 2, np.float32)}
    found = Evaluator(made.model).run(feed)
    assert {name: array[0, 0] for name, array in found.items()} == {
        "difference": 3,
        "same": 5,
        "parts_0": 10,
        "parts_1_0": 3,
        "a_output": 10,
    }
    assert capfd.readouterr() == ("", "")


def test_integers_and_two_free_axes() -> None:
    made = export_module(
        Tokens(), ["ids=1x5:int64", "mask=1x5:bool"], dynamic=["ids:0=batch", "ids:1=length"]
    )
    assert shapes(made.model.graph.inputs) == ["[batch,length]", "[1,5]"]
    assert [c.shapes["ids"] for c in made.checks] == [(1, 5), (3, 10)]
    feed = {"ids": np.full((2, 16), 49), "mask": np.ones((1, 5), bool)}
    assert Evaluator(made.model).run(feed)["output"].shape == (2, 16, 4)


def test_free_axis_that_the_module_does_not_bear() -> None:
    with pytest.raises(InputError, match="does not run with ids=1x18:int64"):
        export_module(Tokens(), ["ids=1x9:int64"], dynamic=["ids:1=length"])


def test_fixed_batch_is_noted() -> None:
    made = export_module(BatchOfTwo(), ["x=2x3"])
    assert shapes(made.model.graph.inputs) == ["[2,3]"]
    assert len(made.checks) == 2
    (note,) = made.notes
    assert note.startswith("the batch size is fixed at 2: the module does not run with x=4x3")


def test_training_mode_comes_back_and_weights_are_copies() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout(), nn.ReLU(), nn.Conv2d(3, 2, 1))
    module[1].running_mean += 1
    module[1].running_var *= 4
    module.train()
    module[4].eval()
    modes = [m.training for m in module.modules()]
    state = {k: v.clone() for k, v in module.state_dict().items()}

    model = to_model(module, ["x=1x2x4x4"], dynamic=None, opset=21)

    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert model.opset_imports[""] == 21
    assert shapes(model.graph.inputs) == ["[1,2,4,4]"]
    x = np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype(np.float32)
    with torch.no_grad():
        expected = module.eval()(torch.from_numpy(x)).numpy()
        for parameter in module.parameters():
            parameter.zero_()
    actual = Evaluator(model).run({"x": x})["output"]
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_half_precision_and_named_fields() -> None:
    linear = nn.Linear(8, 4).half()
    module = nn.Sequential(linear, Returning(lambda x: Pair(x.mean(1), x)))
    model = to_model(module, ["x=2x8:float16"], dynamic=None)
    assert names(model.graph.outputs) == ["mean", "spread"]


def test_what_torch_cannot_export(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EdgewiseError, match=r"torch cannot export the module: .*data-dependent") as caught:
        export(Branching(), ["x=2x3"], tmp_path / "out.onnx", dynamic=None)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    printed = capfd.readouterr()
    assert set(printed.out.split()) == {"tracing"}  # what the module prints when run, nothing of torch
    assert printed.err == ""
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_differ(tmp_path: Path) -> None:
    with pytest.raises(
        EdgewiseError, match=r"output 'output' of the exported model is .* off torch's"
    ) as caught:
        export(Noisy(), ["x=8x8"], tmp_path / "out.onnx", dynamic=None)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "inputs", "message"),
    [
        (nn.Linear(4, 2), ["x=1x5"], "the module does not run with x=1x5:float32: .*RuntimeError"),
        (nn.Embedding(4, 2), ["ids=1x5"], "the module does not run with ids=1x5:float32"),
        (Sum(), ["x=1x5"], "missing a required argument: 'y'"),
        (Sum(), ["p=1", "q=1", "r=1"], "too many positional arguments"),
        (Sum(), ["y=1", "q=1"], "input 'y' would go to parameter 'x'"),
        (Returning(lambda x: x.shape[0]), ["x=1x5"], "returns int"),
        (Returning(lambda x: (x, "text")), ["x=1x5"], "returns str"),
        (Returning(lambda x: None), ["x=1x5"], "returns NoneType"),
        (Returning(lambda x: {}), ["x=1x5"], "returns no tensor"),
        (Returning(lambda x: x.bfloat16()), ["x=1x5"], "unsupported ScalarType BFloat16"),
    ],
)
def test_modules_and_inputs_that_do_not_fit(module: nn.Module, inputs: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        export_module(module, inputs)
    assert "\n" not in str(caught.value)


def test_opset_that_torch_does_not_write() -> None:
    with pytest.raises(InputError, match="opset 17"):
        export_module(nn.ReLU(), ["x=1x3"], opset=17)
