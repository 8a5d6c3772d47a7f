"""Multiply-accumulates, bytes and kinds of calls whose shapes are known."""

from __future__ import annotations

from typing import Any

import pytest

from edgewise.runtime.costs import KINDS, Call, Kind, Operand, computes_in, kind, macs, moved_bytes

FLOAT, BYTES, SIGNED = "float32", "uint8", "int8"


def tensor(*shape: int, dtype: str = FLOAT) -> Operand:
    return Operand(dtype, shape)


def call(op: str, inputs: list[Operand | None], *outputs: Operand, **attributes: Any) -> Call:
    return Call(op, tuple(inputs), outputs, attributes)


SCALE, ZERO = tensor(), tensor(dtype=BYTES)
IMAGE = tensor(2, 8, 10, 12)


class TestConvolutions:
    @pytest.mark.parametrize("op", ["Conv", "FusedConv", "ConvInteger", "NhwcConv", "NhwcFusedConv"])
    def test_every_output_takes_the_weight_once(self, op: str) -> None:
        made = call(op, [IMAGE, tensor(16, 8, 3, 3)], tensor(2, 16, 10, 12))
        assert macs(made) == 2 * 10 * 12 * 16 * 8 * 9
        assert kind(made) == "convolution"

    def test_channels_last(self) -> None:
        inputs = [tensor(1, 10, 12, 8, dtype=BYTES), SCALE, ZERO, tensor(16, 8, 3, 3, dtype=SIGNED)]
        made = call("QLinearConv", inputs, tensor(1, 5, 6, 16, dtype=BYTES), channels_last=1, strides=[2, 2])
        assert macs(made) == 5 * 6 * 16 * 8 * 9
        assert computes_in(made) == "uint8"

    def test_groups(self) -> None:
        made = call("Conv", [IMAGE, tensor(16, 2, 1, 1)], tensor(2, 16, 10, 12), group=4)
        assert macs(made) == 2 * 10 * 12 * 16 * 2
        assert kind(made) == "group convolution"

    @pytest.mark.parametrize("multiplier", [1, 2])
    def test_depthwise(self, multiplier: int) -> None:
        out = 8 * multiplier
        made = call("Conv", [IMAGE, tensor(out, 1, 3, 3)], tensor(2, out, 10, 12), group=8)
        assert macs(made) == 2 * 10 * 12 * out * 9
        assert kind(made) == "depthwise convolution"

    def test_transposed_takes_it_at_every_input(self) -> None:
        made = call("ConvTranspose", [IMAGE, tensor(8, 4, 2, 2)], tensor(2, 4, 20, 24), strides=[2, 2])
        assert macs(made) == 2 * 8 * 10 * 12 * 4 * 4

    def test_transposed_in_groups(self) -> None:
        weight = tensor(8, 1, 2, 2)
        assert kind(call("ConvTranspose", [IMAGE, weight], IMAGE, group=8)) == "depthwise convolution"
        assert kind(call("ConvTranspose", [IMAGE, weight], IMAGE, group=2)) == "group convolution"

    def test_a_weight_that_is_not_known(self) -> None:
        assert macs(call("Conv", [IMAGE, None], IMAGE)) is None
        assert macs(call("QLinearConv", [IMAGE], IMAGE)) is None
        assert kind(call("Conv", [IMAGE, None], IMAGE, group=8)) == "group convolution"


class TestProducts:
    @pytest.mark.parametrize("op", ["MatMul", "FusedMatMul", "MatMulInteger", "QLinearMatMul", "MatMulNBits"])
    def test_every_output_is_a_sum_over_the_inner_dimension(self, op: str) -> None:
        made = call(op, [tensor(4, 6, 32)], tensor(4, 6, 7))
        assert macs(made) == 4 * 6 * 7 * 32
        assert kind(made) == "matrix product"

    @pytest.mark.parametrize("op", ["Gemm", "FusedGemm", "QGemm", "FusedMatMul"])
    def test_transposed(self, op: str) -> None:
        assert macs(call(op, [tensor(32, 6)], tensor(6, 7), transA=1)) == 6 * 7 * 32
        assert macs(call(op, [tensor(6, 32)], tensor(6, 7), transA=0)) == 6 * 7 * 32

    def test_of_vectors(self) -> None:
        assert macs(call("MatMul", [tensor(32), tensor(32)], tensor())) == 32

    def test_of_what_it_quantizes_itself(self) -> None:
        made = call("DynamicQuantizeMatMul", [tensor(6, 32), tensor(32, 7, dtype=SIGNED)], tensor(6, 7))
        assert macs(made) == 6 * 7 * 32
        assert computes_in(made) == "uint8"

    def test_of_unknown_factors(self) -> None:
        assert macs(call("MatMul", [None], tensor(6, 7))) is None


@pytest.mark.parametrize(("op", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4), ("DynamicQuantizeLSTM", 4)])
def test_recurrent(op: str, gates: int) -> None:
    inputs = [tensor(5, 3, 20), tensor(2, gates * 8, 20), tensor(2, gates * 8, 8)]
    made = call(op, inputs, tensor(5, 2, 3, 8))
    assert macs(made) == 5 * 3 * 2 * gates * 8 * (20 + 8)
    assert kind(made) == "recurrent"
    assert macs(call(op, [tensor(5, 3, 20), None, None])) is None


class TestAttention:
    def test_with_its_projections(self) -> None:
        made = call("Attention", [tensor(2, 10, 32), tensor(32, 96)], tensor(2, 10, 32), num_heads=4)
        assert macs(made) == 2 * 10 * 32 * 96 + 2 * (2 * 10 * 10 * 32)
        assert kind(made) == "attention"

    def test_with_values_of_another_width(self) -> None:
        made = call("Attention", [tensor(1, 10, 32), tensor(32, 80)], qkv_hidden_sizes=[32, 32, 16])
        assert macs(made) == 10 * 32 * 80 + 10 * 10 * (32 + 16)

    def test_of_queries_keys_and_values(self) -> None:
        made = call("MultiHeadAttention", [tensor(2, 10, 32), tensor(2, 7, 32), tensor(2, 7, 16)])
        assert macs(made) == 2 * 10 * 7 * (32 + 16)

    def test_is_not_guessed(self) -> None:
        past = [tensor(1, 10, 32), tensor(32, 96), None, None, tensor(2, 1, 4, 5, 8)]
        assert macs(call("Attention", past)) is None
        assert macs(call("MultiHeadAttention", [tensor(1, 10, 4, 3, 8)])) is None
        shared_keys = [tensor(1, 10, 32), tensor(1, 10, 8), tensor(1, 10, 8)]
        assert macs(call("Attention", shared_keys)) is None
        assert macs(call("GroupQueryAttention", shared_keys)) is None


@pytest.mark.parametrize(("op", "count"), [("Relu", 0), ("Transpose", 0), ("Einsum", None), ("My", 0)])
def test_other_work(op: str, count: int | None) -> None:
    assert macs(call(op, [IMAGE], IMAGE)) == count


class TestBytes:
    def test_read_and_written_with_weights(self) -> None:
        made = call("Conv", [IMAGE, tensor(16, 8, 1, 1), None], tensor(2, 16, 10, 12))
        assert moved_bytes(made) == 4 * (2 * 8 * 120 + 128 + 2 * 16 * 120)

    def test_of_mixed_types(self) -> None:
        made = call("QuantizeLinear", [tensor(100), SCALE, ZERO], tensor(100, dtype=BYTES))
        assert moved_bytes(made) == 400 + 4 + 1 + 100

    def test_none_by_a_view(self) -> None:
        assert moved_bytes(call("Reshape", [IMAGE], IMAGE)) == 0

    def test_only_the_part_that_is_read(self) -> None:
        made = call("Gather", [tensor(30_000, 8), tensor(3, dtype="int64")], tensor(3, 8))
        assert moved_bytes(made) == 2 * 3 * 8 * 4


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("DequantizeLinear", "quantize/dequantize"),
        ("ReorderInput", "layout"),
        ("Reshape", "layout"),
        ("QLinearConcat", "join/slice"),
        ("NhwcMaxPool", "pooling"),
        ("SkipLayerNormalization", "normalization"),
        ("QLinearAdd", "elementwise"),
        ("MemcpyToHost", "copy between devices"),
        ("If", "control flow"),
        ("TRTKernel_graph_0", "other"),
    ],
)
def test_kinds(op: str, expected: Kind) -> None:
    assert kind(call(op, [IMAGE], IMAGE)) == expected
    assert expected in KINDS


def test_the_type_is_that_of_the_data() -> None:
    data = tensor(8, dtype=BYTES)
    assert computes_in(call("QLinearConcat", [SCALE, ZERO, data, SCALE, ZERO], data)) == "uint8"
    assert computes_in(call("Sin", [SCALE], SCALE)) == "float32"
    assert computes_in(call("Fused", [])) == ""
