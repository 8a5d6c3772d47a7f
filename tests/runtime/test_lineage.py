"""Executed graphs as onnxruntime makes them, told in the nodes of the file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgewise.runtime.lineage import lineage, weight_of_convolution

HEADER = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1, "com.microsoft.nchwc": 1]>'
Parts = dict[str, tuple[str, ...]]


def graph(text: str) -> ir.Graph:
    """The graph of `text`; each node is named after its first output, in capitals."""
    parsed = ir.from_proto(onnx.parser.parse_model(HEADER + text)).graph
    for node in parsed:
        node.name = node.name or (node.outputs[0].name or "").upper()
    return parsed


def executed(text: str, **names: str) -> ir.Graph:
    """A graph that stands for what onnxruntime executes; `names` gives nodes theirs, by first output."""
    parsed = graph(text)
    for node in parsed:
        node.name = names.get(node.outputs[0].name or "", node.name)
    return parsed


RESIDUAL = """g (float[1, 8, 4, 4] x) => (float[1, 8, 4, 4] y) <float[8, 8, 1, 1] w> {
    a = Conv(x, w) b = Relu(a) c = Conv(b, w) d = Add(c, b) y = Relu(d)
}"""


class TestLineage:
    def test_a_graph_that_is_executed_as_it_is(self) -> None:
        file = graph("g (float[4] x) => (float[4] y) { a = Exp(x) y = Neg(a) }")
        assert lineage(file, file) == {"A": ("A",), "Y": ("Y",)}

    def test_a_fusion_that_keeps_the_last_value(self) -> None:
        file = graph("g (float[4] x) => (float[4] y) { a = Exp(x) b = Neg(a) y = Abs(b) }")
        run = executed("g (float[4] x) => (float[4] y) { a = Exp(x) y = com.microsoft.NegAbs(a) }")
        assert lineage(file, run) == {"A": ("A",), "Y": ("B", "Y")}

    def test_a_fusion_of_two_branches(self) -> None:
        file = graph("g (float[4] x) => (float[4] y) { a = Exp(x) b = Neg(a) c = Abs(a) y = Mul(b, c) }")
        run = executed("g (float[4] x) => (float[4] y) { a = Exp(x) y = com.microsoft.Gelu(a) }")
        assert lineage(file, run) == {"A": ("A",), "Y": ("B", "C", "Y")}

    def test_a_value_that_is_renamed_is_found_by_the_name_of_its_node(self) -> None:
        file = graph("g (float[4] x) => (float[4] y) { a = Exp(x) y = Neg(a) }")
        run = executed(
            "g (float[4] x) => (float[4] y) { t = com.microsoft.Exp(x) y = Neg(t) }", t="a_token_7"
        )
        assert lineage(file, run) == {"a_token_7": ("A",), "Y": ("Y",)}

    def test_or_by_the_name_of_the_node_it_was(self) -> None:
        file = graph("g (float[4] x) => (float[4] y) { a = Exp(x) y = Neg(a) }")
        run = executed("g (float[4] x) => (float[4] y) { t = Exp(x) y = Neg(t) }", t="A/Fused")
        assert lineage(file, run) == {"A/Fused": ("A",), "Y": ("Y",)}

    def test_inserted_nodes_stand_for_nothing(self) -> None:
        file = graph("g (float[4] x) => (float[4] y) { y = Neg(x) }")
        run = executed(
            "g (float[4] x) => (float[4] y) { s = ReorderInput(x) t = Neg(s) y = ReorderOutput(t) }",
            s="ReorderInput",
            t="y_nchwc",
        )
        assert lineage(file, run) == {"ReorderInput": (), "y_nchwc": ("Y",), "Y": ()}

    def test_a_sum_and_an_activation_inside_a_blocked_convolution(self) -> None:
        run = executed(
            """g (float[1, 8, 4, 4] x) => (float[1, 8, 4, 4] y) <float[8, 8, 1, 1] w> {
                s = com.microsoft.nchwc.Conv <activation = "Relu"> (x, w)
                t = com.microsoft.nchwc.Conv <activation = "Relu"> (s, w, , s)
                y = com.microsoft.nchwc.ReorderOutput(t)
            }""",
            s="b_nchwc",
            t="c_nchwc",
        )
        assert lineage(graph(RESIDUAL), run) == {"b_nchwc": ("A", "B"), "c_nchwc": ("C", "D", "Y"), "Y": ()}

    def test_an_operator_on_quantized_values_takes_in_the_quantization_behind_it(self) -> None:
        text = """g (uint8[1, 2, 4, 4] x) => (uint8[1, 2, 4, 4] y)
            <float s = {0.1}, uint8 z = {0}, float[2, 2, 1, 1] w = {1, 2, 3, 4}> {
            a = DequantizeLinear(x, s, z) b = Conv(a, w) c = Relu(b) d = QuantizeLinear(c, s, z)
            e = DequantizeLinear(d, s, z) f = Conv(e, w) y = QuantizeLinear(f, s, z)
        }"""
        run = executed(
            """g (uint8[1, 2, 4, 4] x) => (uint8[1, 2, 4, 4] y)
                <float s = {0.1}, uint8 z = {0}, int8[2, 2, 1, 1] w = {1, 2, 3, 4}> {
                p = QLinearConv(x, s, z, w, s, z, s, z) q = QLinearConv(p, s, z, w, s, z, s, z)
                y = Transpose(q)
            }""",
            p="B_token_1",
            q="F_token_2",
            y="Transpose",
        )
        assert lineage(graph(text), run) == {
            "B_token_1": ("A", "B", "C", "D"),
            "F_token_2": ("E", "F", "Y"),
            "Transpose": (),
        }

    def test_constants_are_left_out(self) -> None:
        file = graph("g (float[1] x) => (float[1] y) { c = Constant<value_floats = [1.0]>() y = Add(x, c) }")
        run = executed("g (float[1] x) => (float[1] y) <float[1] c = {1}> { y = Add(x, c) }")
        assert lineage(file, run) == {"Y": ("Y",)}

    def test_what_a_body_reads_belongs_to_nobody_else(self) -> None:
        text = """g (bool c, float[4] x) => (float[4] y) {
            a = Exp(x)
            y = If(c) <
                then_branch = t () => (float[4] p) { p = Neg(a) },
                else_branch = e () => (float[4] q) { q = Identity(a) }
            >
        }"""
        assert lineage(graph(text), graph(text)) == {"A": ("A",), "Y": ("Y",)}
        folded = graph(text)
        folded.remove(folded[0], safe=False)
        assert lineage(graph(text), folded) == {"Y": ("A", "Y")}


class TestWeightOfConvolution:
    TEXT = """g (float[1, 2, 4, 4] x, float[2, 2, 1, 1] v) => (float[1, 2, 4, 4] y)
        <float[2, 2, 1, 1] w = {1, 2, 3, 4}, int8[2, 2, 1, 2] q = {1, 2, 3, 4, 5, 6, 7, 8}, float s = {1}> {
        a = Conv(x, w) d = DequantizeLinear(q, s) b = Conv(a, d) c = Conv(b, v) y = Relu(c)
    }"""

    def test_is_constant_or_dequantized_or_not_known(self) -> None:
        found = {node.name: weight_of_convolution(node) for node in graph(self.TEXT)}
        assert found == {"A": 4, "D": None, "B": 8, "C": None, "Y": None}

    def test_of_a_constant_node(self) -> None:
        file = graph(
            """g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y) {
                w = Constant<value = float[1, 1, 1, 1] {2}>() y = Conv(x, w)
            }"""
        )
        assert weight_of_convolution(file[1]) == 1


def by_onnxruntime(file: Path, folder: Path) -> tuple[ir.Graph, Parts]:
    """The file, its nodes named, and its lineage in what onnxruntime makes of it here."""
    model = ir.load(file)
    for i, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{i}"
    ir.save(model.clone(), folder / "named.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "executed.onnx")
    ort.InferenceSession(folder / "named.onnx", options, providers=["CPUExecutionProvider"])
    return model.graph, lineage(model.graph, ir.load(folder / "executed.onnx").graph)


NETS = (
    "cifar_resnet20",
    "dtln_1",
    "mlperftiny_ad_autoencoder",
    "mlperftiny_ic_resnet8",
    "mnv1_050_160_tf_qdq",
    "silero_vad",
    "squeezenet_fp16",
    "ultraface_rfb_320",
)


@pytest.mark.parametrize("name", NETS)
def test_every_node_of_a_real_file_runs_in_one_place(corpus: Path, tmp_path: Path, name: str) -> None:
    file, parts = by_onnxruntime(corpus / "models" / f"{name}.onnx", tmp_path)
    counts = Counter(node for nodes in parts.values() for node in nodes)
    assert set(counts) == {node.name for node in file if node.op_type != "Constant"}
    assert set(counts.values()) == {1}
