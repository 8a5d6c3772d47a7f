"""quantize-weights: products with weights in blocks, as onnxruntime's operator and as the standard's."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from rewrites import build, decibels_kept, normal, operators, settled

from edgewise.passes.base import PassError
from edgewise.passes.quantize_weights import QuantizeWeights
from edgewise.runtime.session import serialize


def product(k: int = 256, n: int = 256, rows: str = "N", opset: int = 21) -> ir.Model:
    text = f"g (float[{rows}, {k}] x) => (float[{rows}, {n}] y) {{ y = MatMul(x, w) }}"
    return build(text, opset, w=normal(k, n))


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_product(bits: int, block: int, standard: bool) -> None:
    model = product()
    after, outcome = settled(model, QuantizeWeights(bits, block, standard))
    assert operators(after) == (["DequantizeLinear", "MatMul"] if standard else ["MatMulNBits"])
    assert outcome.edits == 1
    assert decibels_kept(model, after) > {4: 17, 8: 38}[bits]  # 6 dB a bit, less what large blocks cost
    assert len(serialize(after)) < len(serialize(model)) * {4: 0.2, 8: 0.35}[bits]


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_length_that_is_no_multiple_of_a_block(bits: int, standard: bool) -> None:
    model = product(k=300)
    after, _ = settled(model, QuantizeWeights(bits, 64, standard))
    assert decibels_kept(model, after) > {4: 17, 8: 38}[bits]


def test_gemm_keeps_its_bias() -> None:
    text = "g (float[N, 256] x) => (float[N, 256] y) { y = Gemm<transB = 1>(x, w, b) }"
    model = build(text, w=normal(256, 256), b=100 * normal(256))
    after, _ = settled(model, QuantizeWeights())
    assert operators(after) == ["MatMulNBits", "Add"]
    assert decibels_kept(model, after) > 30


def level(model: ir.Model) -> int:
    (node,) = [n for n in model.graph if n.op_type == "MatMulNBits"]
    return node.attributes["accuracy_level"].as_int()


def test_few_rows_are_multiplied_in_integers_and_many_in_floats() -> None:
    assert level(settled(product(rows="1"), QuantizeWeights())[0]) == 4
    assert level(settled(product(rows="N"), QuantizeWeights())[0]) == 4
    assert level(settled(product(rows="64"), QuantizeWeights())[0]) == 0
    assert level(settled(product(rows="N, 64"), QuantizeWeights())[0]) == 0


def test_refusals() -> None:
    for model, rule, reason in (
        (product(64, 64), QuantizeWeights(), "few weights are slower in blocks than in float"),
        (product(rows="64"), QuantizeWeights(8), "many rows are slower with 8 bits in blocks than in float"),
    ):
        after, outcome = settled(model, rule)
        assert dict(outcome.refused) == {reason: 1}
        assert operators(after) == operators(model)


def test_everything() -> None:
    rule = QuantizeWeights(8, everything=True)
    assert settled(product(64, 64, rows="64"), rule)[1].edits == 1


def test_standard_form_needs_its_operator_set() -> None:
    with pytest.raises(PassError, match="opset 21"):
        QuantizeWeights(standard=True).apply(product(opset=17))


@pytest.mark.parametrize("options", [{"bits": 5}, {"block": 48}])
def test_options(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="one of"):
        QuantizeWeights(**options)
