"""fuse-batch-norm: every layer it folds into, from both sides, and every case it must leave alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from rewrites import ConvCase, build, constants, convolutions, operators, refusal, rewritten

from edgewise.passes.fuse_batch_norm import FuseBatchNorm
from edgewise.runtime.evaluate import Array

RULE = FuseBatchNorm()
RNG = np.random.default_rng(0)
NORM = "BatchNormalization"


def normal(*shape: int, dtype: type = np.float32) -> Array:
    return RNG.standard_normal(shape).astype(dtype)


def norm(channels: int, dtype: type = np.float32) -> dict[str, Array]:
    """Parameters as training leaves them: variances of the order of one."""
    variance = RNG.uniform(0.5, 2.0, channels).astype(dtype)
    return {**{k: normal(channels, dtype=dtype) for k in ("g", "s", "m")}, "v": variance}


def conv_norm(**weights: Array) -> ir.Model:
    text = f"g (float[N, 2, 6, 6] x) => (float[N, 3, 4, 4] y) {{ c = Conv(x, w) y = {NORM}(c, g, s, m, v) }}"
    return build(text, **{"w": normal(3, 2, 3, 3), **norm(3), **weights})


@given(convolutions())
@settings(deadline=None, max_examples=30)
def test_after_a_convolution(case: ConvCase) -> None:
    model = build(
        f"g ({case.declared(case.inputs)} x) => (float[] y)"
        f"{{ c = {case.text.format('x')} y = {NORM}<epsilon = 0.01>(c, g, s, m, v) }}",
        **case.weights,
        **norm(case.outputs),
    )
    after, outcome = rewritten(model, RULE)
    assert operators(after) == [case.operator]
    assert outcome.edits == 1


@given(convolutions(padded=False, transposed=False))
@settings(deadline=None, max_examples=20)
def test_before_a_convolution(case: ConvCase) -> None:
    model = build(
        f"g ({case.declared(case.inputs)} x) => (float[] y)"
        f"{{ n = {NORM}(x, g, s, m, v) y = {case.text.format('n')} }}",
        **case.weights,
        **norm(case.inputs),
    )
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Conv"]
    assert after.graph.outputs[0].name == "y"


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_before_a_convolution_that_pads_by_itself(auto_pad: str) -> None:
    text = (
        "g (float[N, 2, 6, 6] x) => (float[N, 3, H, W] y)"
        f'{{ n = {NORM}(x, g, s, m, v) y = Conv<auto_pad = "{auto_pad}">(n, w) }}'
    )
    model = build(text, w=normal(3, 2, 3, 3), **norm(2))
    if auto_pad == "VALID":
        assert operators(rewritten(model, RULE)[0]) == ["Conv"]
    else:
        assert refusal(model, RULE) == "padding would meet the shift"


def test_before_padding_needs_a_zero_shift() -> None:
    text = (
        "g (float[N, 2, 6, 6] x) => (float[N, 3, 6, 6] y)"
        f"{{ n = {NORM}(x, g, s, m, v) y = Conv<pads = [1, 1, 1, 1]>(n, w) }}"
    )
    weights = {"w": normal(3, 2, 3, 3), **norm(2)}
    assert refusal(build(text, **weights), RULE) == "padding would meet the shift"
    zero = np.zeros(2, np.float32)
    after, _ = rewritten(build(text, **{**weights, "m": zero, "s": zero}), RULE)
    assert operators(after) == ["Conv"]
    assert len(after.graph.node(0).inputs) == 2  # a zero bias is none


def test_before_a_transposed_convolution_needs_a_zero_shift() -> None:
    text = (
        "g (float[N, 4, 5, 5] x) => (float[N, 6, H, W] y)"
        f"{{ n = {NORM}(x, g, s, m, v) y = ConvTranspose<group = 2, strides = [2, 2]>(n, w) }}"
    )
    weights = {"w": normal(4, 3, 2, 2), **norm(4)}
    assert refusal(build(text, **weights), RULE) == "ConvTranspose would spread the shift unevenly"
    zero = np.zeros(4, np.float32)
    after, _ = rewritten(build(text, **{**weights, "m": zero, "s": zero}), RULE)
    assert operators(after) == ["ConvTranspose"]


# C of Gemm broadcasts to [M, N] in each of these shapes; None leaves it out.
@pytest.mark.parametrize("bias", [None, (), (1,), (5,), (1, 5), (4, 1), (4, 5)])
@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_after_gemm(trans_a: int, trans_b: int, bias: tuple[int, ...] | None) -> None:
    x = "float[3, 4] x" if trans_a else "float[4, 3] x"
    weights = {"w": normal(5, 3) if trans_b else normal(3, 5)}
    if bias is not None:
        weights["b"] = normal(*bias)
    attributes = f"transA = {trans_a}, transB = {trans_b}, alpha = 0.5, beta = 3.0"
    text = (
        f"g ({x}) => (float[4, 5] y)"
        f"{{ c = Gemm<{attributes}>(x, {', '.join(weights)}) y = {NORM}(c, g, s, m, v) }}"
    )
    after, _ = rewritten(build(text, **weights, **norm(5)), RULE)
    assert operators(after) == ["Gemm"]


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_before_gemm_of_every_float_type(dtype: type, trans_b: int) -> None:
    kind = {np.float16: "float16", np.float32: "float", np.float64: "double"}[dtype]
    text = (
        f"g ({kind}[N, 3] x) => ({kind}[N, 5] y)"
        f"{{ n = {NORM}(x, g, s, m, v) y = Gemm<transB = {trans_b}, alpha = 0.5, beta = 3.0>(n, w, b) }}"
    )
    w = normal(5, 3, dtype=dtype) if trans_b else normal(3, 5, dtype=dtype)
    after, _ = rewritten(build(text, w=w, b=normal(5, dtype=dtype), **norm(3, dtype)), RULE)
    assert operators(after) == ["Gemm"]
    assert {a.dtype for a in constants(after).values()} == {np.dtype(dtype)}


def test_before_gemm_that_transposes_its_data() -> None:
    text = f"g (float[4, 3] x) => (float[3, 5] y) {{ n = {NORM}(x, g, s, m, v) y = Gemm<transA = 1>(n, w) }}"
    reason = refusal(build(text, w=normal(4, 5), **norm(3)), RULE)
    assert reason == "the layer's channels are not known to lie on axis 1"


MATMULS = {
    "after": "c = MatMul(x, w) y = BatchNormalization(c, g, s, m, v)",
    "after bias": "c = MatMul(x, w) d = Add(c, b) y = BatchNormalization(d, g, s, m, v)",
    "after bias first": "c = MatMul(x, w) d = Add(b, c) y = BatchNormalization(d, g, s, m, v)",
    "before": "n = BatchNormalization(x, g, s, m, v) y = MatMul(n, w)",
    "before bias": "n = BatchNormalization(x, g, s, m, v) c = MatMul(n, w) y = Add(c, b)",
}


@pytest.mark.parametrize("body", MATMULS.values(), ids=MATMULS)
def test_matmul_has_its_bias_in_an_add_or_becomes_gemm(body: str) -> None:
    weights = {"w": normal(5, 5), **norm(5), **({"b": normal(1, 5)} if "Add" in body else {})}
    after, _ = rewritten(build(f"g (float[N, 5] x) => (float[N, 5] y) {{ {body} }}", **weights), RULE)
    assert operators(after) == (["MatMul", "Add"] if "Add" in body else ["Gemm"])


def test_matmul_of_another_rank() -> None:
    """Batch normalization works on axis 1, and a MatMul makes the last axis."""
    text = f"g (float[N, 4, 3] x) => (float[N, 4, 4] y) {{ c = MatMul(x, w) y = {NORM}(c, g, s, m, v) }}"
    model = build(text, w=normal(3, 4), **norm(4))
    assert refusal(model, RULE) == "the layer's channels are not known to lie on axis 1"


def test_matmul_of_unknown_rank() -> None:
    text = (
        "g (float[N, K] x, int64[R] r) => (float[P, 4] y)"
        f"{{ z = Reshape(x, r) c = MatMul(z, w) y = {NORM}(c, g, s, m, v) }}"
    )
    model = build(text, shapes=False, w=normal(3, 4), **norm(4))
    assert refusal(model, RULE) == "the layer's channels are not known to lie on axis 1"


def test_two_layers_prefer_the_one_before() -> None:
    text = (
        "g (float[N, 2, 6, 6] x) => (float[N, 4, 6, 6] y)"
        f"{{ c = Conv(x, w) n = {NORM}(c, g, s, m, v) y = Conv<pads = [1, 1, 1, 1]>(n, u) }}"
    )
    after, _ = rewritten(build(text, w=normal(3, 2, 1, 1), u=normal(4, 3, 3, 3), **norm(3)), RULE)
    assert operators(after) == ["Conv", "Conv"]


def test_the_layer_after_takes_what_the_one_before_cannot() -> None:
    text = (
        "g (float[N, 2, 6, 6] x) => (float[N, 4, 6, 6] y, float[N, 3, 6, 6] c)"
        f"{{ c = Conv(x, w) n = {NORM}(c, g, s, m, v) y = Conv(n, u) }}"
    )
    after, _ = rewritten(build(text, w=normal(3, 2, 1, 1), u=normal(4, 3, 1, 1), **norm(3)), RULE)
    assert operators(after) == ["Conv", "Conv"]


def test_names_of_weights_and_outputs_stay() -> None:
    after, _ = rewritten(conv_norm(), RULE)
    assert set(constants(after)) == {"w", "c.bias"}
    assert [v.name for v in after.graph.outputs] == ["y"]


def test_a_shared_weight_is_copied() -> None:
    text = (
        "g (float[N, 2, 6, 6] x) => (float[N, 3, 6, 6] y, float[N, 3, 6, 6] z)"
        f"{{ c = Conv(x, w, b) y = {NORM}(c, g, s, m, v) z = Conv(x, w, b) }}"
    )
    model = build(text, w=normal(3, 2, 1, 1), b=normal(3), **norm(3))
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Conv", "Conv"]
    assert set(constants(after)) == {"w", "b", "c.weight", "c.bias"}
    np.testing.assert_array_equal(constants(after)["w"], constants(model)["w"])


def test_constant_nodes_are_weights_too() -> None:
    text = (
        "g (float[N, 2] x) => (float[N, 2] y)"
        "{ w = Constant<value = float[2, 2] {1.0, 2.0, 3.0, 4.0}>() c = Gemm(x, w)"
        f"  y = {NORM}(c, g, s, m, v) }}"
    )
    after, _ = rewritten(build(text, **norm(2)), RULE)
    assert operators(after) == ["Gemm"]


def test_inside_a_subgraph_with_weights_from_outside() -> None:
    branch = f"c = Conv(x, w) n = {NORM}(c, g, s, m, v)"
    text = (
        "g (float[N, 2, 6, 6] x, bool k) => (float[N, 3, 6, 6] y) { y = If (k) <"
        f"then_branch = t () => (float[N, 3, 6, 6] o) {{ {branch} o = Relu(n) }},"
        "else_branch = e () => (float[N, 3, 6, 6] o2) { o2 = Conv(x, w) }> }"
    )
    after, outcome = rewritten(build(text, w=normal(3, 2, 1, 1), **norm(3)), RULE)
    assert outcome.edits == 1
    (branch_graph, _) = after.graph.subgraphs()
    assert [n.op_type for n in branch_graph] == ["Conv", "Relu"]
    assert set(constants(after)) == {"w"}  # the other branch reads it


def test_layer_outside_of_the_subgraph() -> None:
    text = (
        "g (float[N, 2, 6, 6] x, bool k) => (float[N, 3, 6, 6] y) { c = Conv(x, w) y = If (k) <"
        f"then_branch = t () => (float[N, 3, 6, 6] o) {{ n = {NORM}(c, g, s, m, v) o = Relu(n) }},"
        "else_branch = e () => (float[N, 3, 6, 6] o2) { o2 = Conv(x, u) }> }"
    )
    model = build(text, w=normal(3, 2, 1, 1), u=normal(3, 2, 1, 1), **norm(3))
    assert refusal(model, RULE) == "the layer is in another graph"


def test_training_mode() -> None:
    text = (
        "g (float[3, 2, 6, 6] x) => (float[3, 3, 6, 6] y)"
        f"{{ c = Conv(x, w) y, rm, rv = {NORM}<training_mode = 1>(c, g, s, m, v) }}"
    )
    model = build(text, w=normal(3, 2, 1, 1), **norm(3))
    assert refusal(model, RULE) == "BatchNormalization is in training mode"


def test_training_mode_before_opset_14() -> None:
    text = (
        "g (float[3, 2, 6, 6] x) => (float[3, 3, 6, 6] y)"
        f"{{ c = Conv(x, w) y, rm, rv, sm, sv = {NORM}(c, g, s, m, v) }}"
    )
    model = build(text, opset=9, w=normal(3, 2, 1, 1), **norm(3))
    assert refusal(model, RULE) == "BatchNormalization is in training mode"


def test_statistics_per_position() -> None:
    text = (
        f"g (float[3, 2] x) => (float[3, 3] y) {{ c = Gemm(x, w, b) y = {NORM}<spatial = 0>(c, g, s, m, v) }}"
    )
    model = build(text, opset=8, w=normal(2, 3), b=normal(3), **norm(3))
    assert refusal(model, RULE) == "BatchNormalization normalizes every position on its own"


@pytest.mark.parametrize("outputs", ["float[N, 3, 6, 6] c", "float[N, 3, 6, 6] r"])
def test_other_users_of_the_layer(outputs: str) -> None:
    text = (
        f"g (float[N, 2, 6, 6] x) => (float[N, 3, 6, 6] y, {outputs})"
        f"{{ c = Conv(x, w) y = {NORM}(c, g, s, m, v) r = Relu(c) }}"
    )
    assert (
        refusal(build(text, w=normal(3, 2, 1, 1), **norm(3)), RULE) == "the layer's output has another user"
    )


@pytest.mark.parametrize(
    ("dynamic", "reason"),
    [("w", "weight is not constant"), ("v", "BatchNormalization parameters are not constant")],
)
def test_parameters_that_a_caller_may_override(dynamic: str, reason: str) -> None:
    model = conv_norm()
    model.graph.inputs.append(model.graph.initializers[dynamic])
    assert refusal(model, RULE) == reason


def test_bias_of_gemm_that_is_computed() -> None:
    text = (
        f"g (float[N, 2] x, float[3] b) => (float[N, 3] y) {{ c = Gemm(x, w, b) y = {NORM}(c, g, s, m, v) }}"
    )
    assert refusal(build(text, w=normal(2, 3), **norm(3)), RULE) == "bias is not constant"


def test_folded_weights_overflow() -> None:
    """A variance of zero and a large scale, in float16: 3e4 / sqrt(1e-5) is past 65504."""
    parameters = {**norm(2, np.float16), "g": np.full(2, 3e4, np.float16), "v": np.zeros(2, np.float16)}
    text = f"g (float16[N, 2] x) => (float16[N, 2] y) {{ c = Gemm(x, w) y = {NORM}(c, g, s, m, v) }}"
    model = build(text, w=np.ones((2, 2), np.float16), **parameters)
    assert refusal(model, RULE) == "folded weights would overflow"


@pytest.mark.parametrize("broken", [{"v": np.full(3, -1, np.float32)}, {"g": np.full(3, np.nan, np.float32)}])
def test_scales_that_are_not_finite(broken: dict[str, Array]) -> None:
    assert refusal(conv_norm(**broken), RULE) == "folded weights would overflow"


def test_folded_weights_lose_their_bits() -> None:
    """float16 has steps of 6e-8 among its subnormals, which leaves 1e-6 only four bits."""
    parameters = {**norm(2, np.float16), "g": np.full(2, 1e-3, np.float16)}
    text = f"g (float16[N, 2] x) => (float16[N, 2] y) {{ c = Gemm(x, w) y = {NORM}(c, g, s, m, v) }}"
    model = build(text, w=normal(2, 2, dtype=np.float16) * np.float16(1e-3), **parameters)
    assert refusal(model, RULE) == "folded weights would lose precision"


def test_a_dead_channel_does_not_stop_the_others() -> None:
    """Scales that training has driven among the subnormals, beside others of the order of one."""
    rewritten_model, _ = rewritten(conv_norm(g=np.array([1e-42, 1, 1], np.float32)), RULE)
    assert operators(rewritten_model) == ["Conv"]


@pytest.mark.parametrize("body", ["r = Relu(x) y = {}(r, g, s, m, v)", "n = {}(x, g, s, m, v) y = Relu(n)"])
def test_nothing_to_fold_into(body: str) -> None:
    model = build(f"g (float[N, 3, 6, 6] x) => (float[N, 3, 6, 6] y) {{ {body.format(NORM)} }}", **norm(3))
    assert refusal(model, RULE) == ""


def test_layer_that_reads_the_result_as_its_weight() -> None:
    text = (
        f"g (float[3, 3] x, float[N, 3] z) => (float[N, 3] y){{ n = {NORM}(x, g, s, m, v) y = MatMul(z, n) }}"
    )
    assert refusal(build(text, **norm(3)), RULE) == ""
