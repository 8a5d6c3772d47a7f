"""The README's commands, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest
from PIL import Image

from edgewise.optimizer.cli import run
from edgewise.runtime.latency import LatencyReport, measure

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKE_NET = """
import torch


def make_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 7, stride=8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
"""
NET = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,8,8] image) => (float[N,5] scores)
{
    c = Conv <pads = [1, 1, 1, 1]> (image, w1)
    r = Relu (c)
    p = GlobalAveragePool (r)
    f = Flatten (p)
    scores = Gemm <transB = 1> (f, w2)
}
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[list[str]]:
    """The arguments of every edgewise command of the shell blocks that needs files."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    words = [[w.strip('"') for w in re.findall(r'"[^"]*"|\S+', line)] for line in lines]
    return [w[1:] for w in words if w[:1] == ["edgewise"]]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the README's commands name."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(NET)
    for name, shape in (("w1", (16, 3, 3, 3)), ("w2", (5, 16))):
        weights = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weights, name))
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "samples.npz", image=rng.standard_normal((48, 3, 8, 8)).astype(np.float32))
    (tmp_path / "images").mkdir()
    for i in range(4):
        pixels = rng.integers(0, 256, (300, 280, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text(MAKE_NET, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def _measurements_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast the files are is not asked here, and to be sure of it takes long."""

    def short(*args: Any, **options: Any) -> LatencyReport:
        return measure(*args, **options | {"max_seconds": 0.5, "precision": 0.9})

    for module in ("optimization", "placing"):
        monkeypatch.setattr(f"edgewise.optimizer.{module}.measure", short)


@pytest.mark.parametrize("command", commands(), ids=lambda c: " ".join(c)[:40])
def test_command(command: list[str], workplace: Path) -> None:
    assert run(command) == 0
    assert (workplace / command[command.index("-o") + 1]).is_file()


def test_python(workplace: Path) -> None:
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert (workplace / "small.onnx").is_file()


def test_commands_were_found() -> None:
    assert len(commands()) >= 2


@pytest.mark.parametrize("name", re.findall(r"\| `edgewise (\w+)", README))
def test_table_names_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


def test_gate_runs_the_readme() -> None:
    """The two promises of one line each are what the gate runs in fresh environments."""
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for extra in ('".[torch]"', '-e ".[dev]"'):
        assert f"pip install -c constraints.txt {extra}" in README
        assert f"install -q -c constraints.txt {extra}" in gate
