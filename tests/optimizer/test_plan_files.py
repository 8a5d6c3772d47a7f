"""A plan in a file: people can read it, edit it, and get back exactly what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import planned
from rewrites import build

from edgewise.calibration.target import TENSORRT, X86
from edgewise.optimizer import files, plan_files
from edgewise.optimizer.cli import run
from edgewise.optimizer.plan_files import load_plan, make_plan, parse_plan, plan_text, save_plan
from edgewise.passes.quant_plan import NodePlan, QuantPlan, ValuePlan
from edgewise.runtime.errors import EdgewiseError, InputError

NET = """g (float[N, 16, 8, 8] x) => (float[N, 4] y)
    { c = Conv<pads = [1, 1, 1, 1]>(x, w, b) r = Relu(c) g = GlobalAveragePool(r) s = Softmax(g)
      f = Flatten(s) y = Gemm(f, m) }"""


def normal(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def net(**change: Any) -> ir.Model:
    return build(NET, **{"w": normal(16, 16, 3, 3), "b": normal(16), "m": normal(16, 4), **change})


@pytest.mark.parametrize("target", [X86, TENSORRT], ids=lambda t: t.name)
def test_comes_back(target: Any, tmp_path: Path) -> None:
    model = net()
    plan = planned(model, target)
    assert plan.reasons
    path = save_plan(plan, tmp_path / "plan.yaml", model)
    assert load_plan(path, model) == plan


def test_can_be_read() -> None:
    """A line for every value and node, none longer than a screen but those of scales, at the end."""
    model = net()
    plan = planned(model)
    text = plan_text(plan, model)
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(lines) == len(plan.values) + len(plan.nodes) + len(
        [v for v in plan.values if v.axis is not None]
    )
    body, scales = text.split("\nchannel_scales:\n")
    assert max(map(len, body.splitlines())) < 130
    assert scales.count("\n") == 2
    for word in ("zero_point", "channel_scales", "folded", "integer", "edgewise quantize MODEL --plan"):
        assert word in text.split("\nplan: 1")[0]  # explained at the top
    assert set(yaml.safe_load(text)) >= {
        "edgewise",
        "model",
        "target",
        "activations",
        "weights",
        "biases",
        "nodes",
    }
    for value in plan.values:
        assert value.why in text


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=200)
scales = st.floats(2.0**-120, 2.0**120, width=32)


@st.composite
def plans(draw: Any) -> QuantPlan:
    values = [
        ValuePlan(f"{name}.{i}", dtype, (scale,), zero, why=why)
        for i, (name, dtype, scale, zero, why) in enumerate(
            draw(
                st.lists(
                    st.tuples(
                        names,
                        st.sampled_from(["uint8", "int16", "uint16"]),
                        scales,
                        st.integers(0, 255),
                        names,
                    ),
                    max_size=4,
                )
            )
        )
    ]
    rows = draw(st.lists(st.lists(scales, min_size=1, max_size=5).map(tuple), max_size=3))
    weights = [ValuePlan(f"{draw(names)}.w{i}", "int8", row, axis=i) for i, row in enumerate(rows)]
    nodes = [
        NodePlan(
            f"{draw(names)}.n{i}",
            draw(names),
            draw(st.sampled_from(["int8", "float"])),
            draw(st.just("") | names),
        )
        for i in range(draw(st.integers(0, 3)))
    ]
    return QuantPlan(draw(names), (*values, *weights), tuple(nodes))


@settings(deadline=None, max_examples=60)
@given(plans())
def test_every_plan_survives_its_file(plan: QuantPlan) -> None:
    """Whatever the names, and every scale to the last bit; what fits a model is another question."""
    model = net()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_files, "check_plan", lambda plan, model: plan.check())
        assert parse_plan(plan_text(plan, model), model) == plan


def test_scale_as_people_write_it() -> None:
    model = net()
    plan = planned(model)
    text = plan_text(plan, model)
    line = next(line for line in text.splitlines() if line.startswith("- {name: x,"))
    for written, number in (("1e-2", 0.01), ("'0.5'", 0.5), ("[2]", 2.0)):
        edited = line.replace(line.split("scale: ")[1].split(",")[0], written)
        assert parse_plan(text.replace(line, edited), model).values[0].scale == (float(np.float32(number)),)


BAD: dict[str, tuple[str, str, str]] = {
    "another model": ("model: ", "model: 1", "for another model"),
    "no YAML": ("activations:", "activations: [", "it is no YAML"),
    "another format": ("plan: 1", "plan: 9", "format 9, this edgewise reads 1"),
    "unknown section": ("biases:", "bias:", "'bias' means nothing"),
    "section is no list": ("nodes:\n", "nodes: 3\ntarget: x86\nedgewise:\n", "nodes is a list of entries"),
    "unknown value": ("name: x,", "name: xx,", "value 'xx': the model's main graph has no value"),
    "name that YAML reads otherwise": ("name: x,", "name: 12,", "name 12, which is no text: quote it"),
    "unknown field": ("name: x,", "name: x, bits: 8,", "'bits' means nothing"),
    "scale is no number": ("scale: ", "scale: wide, why: ", "'x': scale .*wide.* is no number"),
    "form": ("form: int8", "form: int3", "form 'int3'"),
    "weight without its scales": ("- {name: w, scale", "- {name: ww, scale", "written in channel_scales"),
    "scales twice": (
        "channel_scales:\n",
        "channel_scales:\n- {name: w, scale: [1.0]}\n",
        "two entries for one",
    ),
    "scales of nothing": (
        "channel_scales:\n",
        "channel_scales:\n- {name: x, scale: [1.0]}\n",
        "of 'x': no weight",
    ),
    "target": ("target: x86", "target: abacus", "unknown target 'abacus'"),
}


@pytest.mark.parametrize(("old", "new", "message"), BAD.values(), ids=BAD)
def test_edited_into_nonsense(old: str, new: str, message: str, tmp_path: Path) -> None:
    model = net()
    text = plan_text(planned(model), model)
    head, body = text.split("\n\n", 1)
    assert old in body
    path = tmp_path / "plan.yaml"
    path.write_text(f"{head}\n\n{body.replace(old, new, 1)}")
    with pytest.raises(InputError, match=message) as error:
        load_plan(path, model)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "3", "[1, 2]", "a: b", "\x00", "{"])
def test_what_is_no_plan(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"no quantization plan|no YAML"):
        load_plan(path, net())


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_plan(tmp_path / "none.yaml", net())
    (tmp_path / "image").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="no text"):
        load_plan(tmp_path / "image", net())


class TestJob:
    def saved(self, folder: Path, model: ir.Model | None = None) -> Path:
        return files.save(model or net(), folder / "net.onnx")

    def test_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path, out = self.saved(tmp_path), tmp_path / "plan.yaml"
        code = run(
            ["plan", str(path), "--data", "random", "-o", str(out), "--json", str(tmp_path / "r.json")]
        )
        assert code == 0
        assert "nodes in int8 for" in capsys.readouterr().out
        assert "channel_scales" in out.read_text()
        report = json.loads((tmp_path / "r.json").read_text())
        assert report["quantized"] == sum(n["form"] != "float" for n in report["plan"]["nodes"])
        assert run(["plan", str(path), "--data", "random", "-o", str(out)]) == 2  # it exists

    def test_samples_or_a_table(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="--data, or a table"):
            make_plan(self.saved(tmp_path), tmp_path / "plan.yaml")

    def test_model_that_is_quantized_already(self, tmp_path: Path) -> None:
        text = """g (float[1, 4] x) => (float[1, 4] y)
            { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(w, s, t)
              y = MatMul(d, v) }"""
        weights = {"s": np.float32(0.1), "z": np.uint8(0), "t": np.int8(0), "w": np.ones((4, 4), np.int8)}
        path = self.saved(tmp_path, build(text, **weights))
        with pytest.raises(EdgewiseError, match="already quantized: start from the float model"):
            make_plan(path, tmp_path / "plan.yaml", data="random")
        assert not (tmp_path / "plan.yaml").exists()
