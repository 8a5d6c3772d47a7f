"""What one call of an executed node costs: its multiply-accumulates, its bytes, and its kind of work.

Pure functions of the operator, the shapes and the attributes. The operators are those of ONNX and
those that onnxruntime puts in their place (its domains com.microsoft, com.microsoft.nchwc and
com.ms.internal.nhwc).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

Shape = tuple[int, ...]
Kind = Literal[
    "convolution",
    "group convolution",
    "depthwise convolution",
    "matrix product",
    "attention",
    "recurrent",
    "quantize/dequantize",
    "layout",
    "join/slice",
    "pooling",
    "normalization",
    "elementwise",
    "copy between devices",
    "control flow",
    "other",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

_ITEM_BYTES = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
}
# Where an operator reads its weight. A convolution's data is its first input.
_WEIGHTS = {
    "Conv": 1,
    "FusedConv": 1,
    "NhwcConv": 1,
    "NhwcFusedConv": 1,
    "ConvInteger": 1,
    "ConvTranspose": 1,
    "QLinearConv": 3,
    "QLinearConvTranspose": 3,
}
_TRANSPOSED = frozenset({"ConvTranspose", "QLinearConvTranspose"})
_PRODUCTS = frozenset(
    {
        "MatMul",
        "Gemm",
        "FusedMatMul",
        "FusedMatMulActivation",
        "FusedGemm",
        "GemmFastGelu",
        "GemmFloat8",
        "TransposeMatMul",
        "QGemm",
        "QLinearMatMul",
        "MatMulInteger",
        "MatMulInteger16",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "MatMulNBits",
        "MatMulBnb4",
    }
)
_RECURRENT = frozenset({"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"})
_ATTENTION = frozenset(
    {
        "Attention",
        "QAttention",
        "MultiHeadAttention",
        "DecoderMaskedMultiHeadAttention",
        "PackedAttention",
        "PackedMultiHeadAttention",
        "GroupQueryAttention",
        "SparseAttention",
    }
)
_UNCOUNTED = frozenset({"Einsum", "QMoE", "MoE", "DeformConv", "BeamSearch", "GreedySearch"})
_QUANTIZES_ITS_INPUT = frozenset({"DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})
_VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Size"})
_READS_A_PART = frozenset({"Slice", "Gather", "GatherElements", "GatherND", "EmbedLayerNormalization"})


def _table(**kinds: str) -> Mapping[str, str]:
    return MappingProxyType({op: kind for kind, ops in kinds.items() for op in ops.split()})


_KIND_OF_OP = _table(
    quantize="QuantizeLinear DequantizeLinear DynamicQuantizeLinear",
    layout=(
        "Transpose ReorderInput ReorderOutput Reshape Flatten Squeeze Unsqueeze Identity "
        "DepthToSpace SpaceToDepth"
    ),
    join=(
        "Concat QLinearConcat Split SplitToSequence Slice Gather GatherElements GatherND ScatterElements "
        "ScatterND Scatter Pad Tile Expand ConcatFromSequence"
    ),
    pooling=(
        "MaxPool AveragePool LpPool GlobalMaxPool GlobalAveragePool GlobalLpPool NhwcMaxPool "
        "QLinearAveragePool QLinearGlobalAveragePool MaxRoiPool RoiAlign "
        "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum "
        "ReduceLogSumExp ReduceSumSquare QLinearReduceMean ArgMax ArgMin"
    ),
    normalization=(
        "BatchNormalization InstanceNormalization LayerNormalization SimplifiedLayerNormalization "
        "SkipLayerNormalization SkipSimplifiedLayerNormalization EmbedLayerNormalization GroupNormalization "
        "GroupNorm SkipGroupNorm RMSNormalization LRN LpNormalization MeanVarianceNormalization "
        "Softmax LogSoftmax Hardmax QLinearSoftmax"
    ),
    elementwise=(
        "Add Sub Mul Div Neg Abs Exp Log Sqrt Reciprocal Pow Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh "
        "Acosh Atanh Erf Floor Ceil Round Sign Min Max Sum Mean Mod Clip Relu LeakyRelu PRelu Elu Selu Celu "
        "ThresholdedRelu Sigmoid HardSigmoid HardSwish Tanh Softplus Softsign Gelu FastGelu BiasGelu "
        "QuickGelu BiasAdd Mish Swish Where Not And Or Xor Equal Less LessOrEqual Greater GreaterOrEqual "
        "IsNaN IsInf BitShift Cast Affine ScaledTanh ParametricSoftplus "
        "QLinearAdd QLinearMul QLinearSigmoid QLinearLeakyRelu QLinearWhere"
    ),
    copy="MemcpyFromHost MemcpyToHost",
    control="If Loop Scan",
)
_LONG_NAMES: Mapping[str, Kind] = MappingProxyType(
    {
        "quantize": "quantize/dequantize",
        "layout": "layout",
        "join": "join/slice",
        "pooling": "pooling",
        "normalization": "normalization",
        "elementwise": "elementwise",
        "copy": "copy between devices",
        "control": "control flow",
    }
)


@dataclass(frozen=True)
class Operand:
    """A tensor that a call reads or writes."""

    dtype: str
    shape: Shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * _ITEM_BYTES.get(self.dtype, 0)


@dataclass(frozen=True)
class Call:
    """One call of a node: its inputs by position, None where one is absent or not known."""

    op_type: str
    inputs: tuple[Operand | None, ...]
    outputs: tuple[Operand, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def operand(self, index: int) -> Operand | None:
        return self.inputs[index] if index < len(self.inputs) else None

    @property
    def weight(self) -> Operand | None:
        """The weight of a convolution."""
        return self.operand(_WEIGHTS[self.op_type]) if self.op_type in _WEIGHTS else None


def kind(call: Call) -> Kind:
    """What sort of work it is. A convolution is depthwise where every channel is convolved alone."""
    if call.op_type in _WEIGHTS:
        return _kind_of_convolution(call)
    if call.op_type in _PRODUCTS:
        return "matrix product"
    if call.op_type in _RECURRENT:
        return "recurrent"
    if call.op_type in _ATTENTION:
        return "attention"
    return _LONG_NAMES[_KIND_OF_OP[call.op_type]] if call.op_type in _KIND_OF_OP else "other"


def _kind_of_convolution(call: Call) -> Kind:
    groups = call.attributes.get("group", 1)
    if groups == 1:
        return "convolution"
    weight = call.weight
    if weight is None or len(weight.shape) < 2:
        return "group convolution"
    channels_a_group = weight.shape[0] // groups if call.op_type in _TRANSPOSED else weight.shape[1]
    return "depthwise convolution" if channels_a_group == 1 else "group convolution"


def computes_in(call: Call) -> str:
    """The type its arithmetic takes: that of the data, or of the weight that the data is quantized for."""
    if call.op_type in _QUANTIZES_ITS_INPUT:
        return "uint8"
    given = [o for o in (*call.inputs, *call.outputs) if o is not None]
    data = next((o for o in given if o.size > 1), None)  # a scale may come before the data
    return data.dtype if data is not None else given[0].dtype if given else ""


def moved_bytes(call: Call) -> int:
    """Bytes it reads and writes, each once, weights included; none where only a shape changes."""
    if call.op_type in _VIEWS:
        return 0
    written = sum(o.bytes for o in call.outputs)
    if call.op_type in _READS_A_PART:
        return 2 * written
    return written + sum(o.bytes for o in call.inputs if o is not None)


def macs(call: Call) -> int | None:
    """Multiply-accumulates of convolutions, products, attention and recurrent layers, 0 for all other work.

    None where a shape that decides it is not known, or the operator is not counted.
    """
    if call.op_type in _WEIGHTS:
        return _macs_of_convolution(call)
    if call.op_type in _PRODUCTS:
        return _macs_of_product(call)
    if call.op_type in _RECURRENT:
        return _macs_of_recurrent(call)
    if call.op_type in _ATTENTION:
        return _macs_of_attention(call)
    return None if call.op_type in _UNCOUNTED else 0


def _macs_of_convolution(call: Call) -> int | None:
    """Every position of the output (of the input, if transposed) takes the whole weight once.

    The leading axis of the weight is the channels of that tensor in every layout, first or last.
    """
    weight, data = call.weight, call.operand(0)
    positions = data if call.op_type in _TRANSPOSED else next(iter(call.outputs), None)
    if weight is None or positions is None or not weight.size:
        return None
    return positions.size // weight.shape[0] * weight.size


def _macs_of_product(call: Call) -> int | None:
    """Every number of the output is a sum over the inner dimension of the first factor."""
    first = call.operand(0)
    if first is None or not first.shape or not call.outputs:
        return None
    transposed = call.attributes.get("transA", 0) and len(first.shape) > 1
    return call.outputs[0].size * first.shape[-2 if transposed else -1]


def _macs_of_recurrent(call: Call) -> int | None:
    """Every step of every sequence takes the weights of the input and those of the recurrence once."""
    data, weight, recurrence = (call.operand(i) for i in range(3))
    if data is None or weight is None or recurrence is None or len(data.shape) != 3:
        return None
    return data.shape[0] * data.shape[1] * (weight.size + recurrence.size)


def _macs_of_attention(call: Call) -> int | None:
    """Scores (queries x keys) and their product with the values; projections where the node has weights.

    None for forms with a past, whose length shows in no shape here, for packed forms, and for queries
    that share keys.
    """
    past = {"Attention": 4, "QAttention": 8, "MultiHeadAttention": 6}.get(call.op_type)
    shapes = [() if o is None else o.shape for o in (call.operand(i) for i in range(3))]
    if past is None or call.operand(past) is not None or len(shapes[0]) != 3:
        return None
    batch, queries, width = shapes[0]
    if len(shapes[1]) == 2 and shapes[1][0] == width:
        return batch * queries * _macs_of_a_token(call, queries, width, shapes[1][1])
    if len(shapes[1]) != 3 or len(shapes[2]) != 3 or shapes[1][2] != width:
        return None
    return batch * queries * shapes[1][1] * (width + shapes[2][2])


def _macs_of_a_token(call: Call, length: int, width: int, projected: int) -> int:
    """One weight holds the projections to queries, keys and values, side by side."""
    query, _, value = call.attributes.get("qkv_hidden_sizes") or (projected // 3,) * 3
    return width * projected + length * int(query + value)
