"""Models that every pass is run on: small graphs for what networks are made of, and real ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
from onnx import numpy_helper
from PIL import Image, ImageDraw, ImageFont

from edgewise.runtime.evaluate import Feed, input_specs, seeded_feed

# Weights are drawn with a seed. Of a tensor named *_half the first half of the filters is zero, of one named
# *_twin the second half equals the first, *_zero is all zero and *_fill a half throughout.
GRAPHS: Mapping[str, str] = MappingProxyType(
    {
        "conv_chain": """
            agraph (float[N, 3, 9, 9] x) => (float[N, 5] y)
            <float[8, 3, 3, 3] w1_half, float[8] b1_half, float[8] g, float[8] s, float[8] m, float[8] v_pos,
             float[6, 8, 3, 3] w2, float[5, 6] w3, float[5] b3>
            {
                c1 = Conv <pads = [1, 1, 1, 1]> (x, w1_half, b1_half)
                n1 = BatchNormalization (c1, g, s, m, v_pos)
                r1 = Relu (n1)
                i1 = Identity (r1)
                d1 = Dropout (i1)
                c2 = Conv <strides = [2, 2]> (d1, w2)
                r2 = Relu (c2)
                p2 = GlobalAveragePool (r2)
                f2 = Flatten <axis = 1> (p2)
                y = Gemm <transB = 1> (f2, w3, b3)
            }""",
        "residual": """
            agraph (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y)
            <float[8, 4, 1, 1] w1_half, float[8] b1_half, float[8, 8, 3, 3] w2_half, float[8] b2_half,
             float[4, 8, 1, 1] w3, float[4] b3>
            {
                c1 = Conv (x, w1_half, b1_half)
                r1 = Relu (c1)
                c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2_half, b2_half)
                a = Add (r1, c2)
                r2 = Relu (a)
                y = Conv (r2, w3, b3)
            }""",
        "branches": """
            agraph (float[N, 4, 8, 8] x) => (float[N, 3, 8, 8] y)
            <float[4, 4, 3, 3] w3, float[4] b3, float[4, 4, 1, 1] w1, float[4] g, float[4] s, float[4] m,
             float[4] v_pos, float[6, 4, 1, 1] p, float[6, 4, 1, 1] q, float[16, 12, 1, 1] wide,
             float[3, 16, 1, 1] narrow>
            {
                c3 = Conv <pads = [1, 1, 1, 1]> (x, w3, b3)
                c1 = Conv (x, w1)
                i = BatchNormalization (x, g, s, m, v_pos)
                t = Add (c3, c1)
                u = Add (t, i)
                r = Relu (u)
                a = Conv (r, p)
                b = Conv (r, q)
                ra = Relu (a)
                rb = Relu (b)
                c = Concat <axis = 1> (ra, rb)
                h = Conv (c, wide)
                y = Conv (h, narrow)
            }""",
        "concat_depthwise": """
            agraph (float[1, 4, 8, 8] x) => (float[1, 3, 8, 8] y)
            <float[6, 4, 1, 1] w1_half, float[6] b1_half, float[4, 1, 3, 3] wd, float[4] bd,
             float[3, 10, 1, 1] w2, float[3] b2>
            {
                a = Conv (x, w1_half, b1_half)
                ra = Relu (a)
                b = Conv <group = 4, pads = [1, 1, 1, 1]> (x, wd, bd)
                rb = Clip (b)
                c = Concat <axis = 1> (ra, rb)
                y = Conv (c, w2, b2)
            }""",
        "scaled": """
            agraph (float[N, 3, 8, 8] x) => (float[N, 6, 4, 4] y)
            <float[6, 3, 3, 3] w, float[1, 6, 1, 1] k, float[6, 1, 1] t, float[1] z>
            {
                pads = Constant <value_ints = [0, 0, 1, 1, 0, 0, 1, 1]> ()
                p = Pad (x, pads)
                c = Conv (p, w)
                m = Mul (c, k)
                a = Add (m, t)
                q = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)
                y = Add (q, z)
            }""",
        "dense": """
            agraph (float[N, 7] x) => (float[N, 4] y, float[N, 4] log)
            <float[7, 9] w1, float[9] b1, float[9, 4] w2, float[4] b2>
            {
                h = MatMul (x, w1)
                hb = Add (h, b1)
                r = Relu (hb)
                o = MatMul (r, w2)
                ob = Add (b2, o)
                y = Softmax <axis = -1> (ob)
                o2 = MatMul (r, w2)
                ob2 = Add (b2, o2)
                log = LogSoftmax <axis = -1> (ob2)
            }""",
        "shapes": """
            agraph (float[N, 2, 3] x) => (float[N, 6] y, int64[3] s)
            {
                s = Shape (x)
                zero = Constant <value_int = 0> ()
                n = Gather <axis = 0> (s, zero)
                axes = Constant <value_ints = [0]> ()
                n1 = Unsqueeze (n, axes)
                rest = Constant <value_ints = [-1]> ()
                target = Concat <axis = 0> (n1, rest)
                y = Reshape (x, target)
            }""",
        "tangled": """
            agraph (float[2, 3, 4] x) => (float[2, 12] y, float[2, 12] z)
            {
                dead = Exp (x)
                s = Shape (x)
                first = Constant <value_ints = [0]> ()
                n = Gather (s, first)
                rest = Constant <value_ints = [-1]> ()
                target = Concat <axis = 0> (n, rest)
                long = Constant <value_ints = [24]> ()
                r1 = Reshape (x, long)
                r2 = Reshape (r1, target)
                k1 = Constant <value = float[1, 2] {3, 4}> ()
                k2 = Constant <value = float[1, 2] {3, 4}> ()
                p1 = Constant <value_ints = [1, 6]> ()
                p2 = Constant <value_ints = [1, 6]> ()
                w1 = Tile (k1, p1)
                w2 = Tile (k2, p2)
                a = Mul (r2, w1)
                yes = Constant <value = bool {1}> ()
                b = If (yes) <then_branch = left () => (float[2, 12] l) { l = Add (a, w2) },
                              else_branch = right () => (float[2, 12] r) { r = Sub (a, w2) }>
                y = Abs (b)
                u1 = Transpose <perm = [1, 0]> (y)
                u2 = Transpose <perm = [1, 0]> (u1)
                z = Neg (u2)
            }""",
        "old": """
            <ir_version: 3, opset_import: ["" : 9]>
            agraph (float[1, 3, 8, 8] x) => (float[1, 4, 6, 6] y)
            <float[4, 3, 3, 3] w, float[4] b>
            {
                c = Conv (x, w, b)
                y = Clip <min = 0.0, max = 6.0> (c)
            }""",
        "transposed": """
            agraph (float[1, 4, 5, 5] x) => (float[1, 3, 10, 10] y)
            <float[4, 6, 2, 2] w1, float[6] b1, float[6] g, float[6] s, float[6] m, float[6] v_pos,
             float[3, 6, 1, 1] w2>
            {
                u = ConvTranspose <strides = [2, 2]> (x, w1, b1)
                n = BatchNormalization (u, g, s, m, v_pos)
                t = Transpose <perm = [0, 2, 3, 1]> (n)
                back = Transpose <perm = [0, 3, 1, 2]> (t)
                l = LeakyRelu <alpha = 0.1> (back)
                y = Conv (l, w2)
            }""",
        "unfused": """
            agraph (float[N, 8, 4, 4] x) => (float[N, 8, 4, 4] y)
            {
                zero = Constant <value_float = 0.0> ()
                three = Constant <value_float = 3.0> ()
                six = Constant <value_float = 6.0> ()
                two = Constant <value_float = 2.0> ()
                small = Constant <value_float = 0.001> ()
                a = Add (x, three)
                c = Clip (a, zero, six)
                m = Mul (x, c)
                h = Div (m, six)
                mean = ReduceMean <axes = [2, 3], keepdims = 1> (h)
                d = Sub (h, mean)
                squared = Pow (d, two)
                v = ReduceMean <axes = [2, 3], keepdims = 1> (squared)
                ve = Add (v, small)
                deviation = Sqrt (ve)
                y = Div (d, deviation)
            }""",
        "layouts": """
            agraph (float[N, 4, 6, 6] x) => (float[N, 4, 1, 1] y, float[N, 6, 4, 6] w, float[N, 2, 6, 3] z)
            {
                one = Constant <value_ints = [1]> ()
                three = Constant <value_ints = [3]> ()
                four = Constant <value_ints = [4]> ()
                zero = Constant <value_ints = [0]> ()
                last = Constant <value_ints = [1]> ()
                t = Transpose <perm = [0, 2, 3, 1]> (x)
                e = Exp (t)
                b = Transpose <perm = [0, 3, 1, 2]> (e)
                rows = Slice (b, one, three, last)
                z = Slice (rows, zero, three, three)
                m = ReduceMean <axes = [2, 3], keepdims = 0> (b)
                axes = Constant <value_ints = [2, 3]> ()
                y = Unsqueeze (m, axes)
                r1 = Transpose <perm = [0, 2, 3, 1]> (x)
                w = Transpose <perm = [0, 1, 3, 2]> (r1)
            }""",
        "shuffled": """
            agraph (float[1, 4, 4, 4] x) => (float[1, 3, 2, 2] y)
            <float[8, 4, 1, 1] w1, float[3, 8, 3, 3] w2>
            {
                parted = Constant <value_ints = [1, 2, 4, 4, 4]> ()
                whole = Constant <value_ints = [1, 8, 4, 4]> ()
                c = Conv (x, w1)
                p = Reshape (c, parted)
                t = Transpose <perm = [0, 2, 1, 3, 4]> (p)
                s = Reshape (t, whole)
                r = Relu (s)
                y = Conv (r, w2)
            }""",
        "gated": """
            agraph (float[N, 4, 5, 5] x) => (float[N, 3, 5, 5] y)
            <float[8, 4, 1, 1] w1, float[8, 8, 1, 1] off_zero, float[8] b, float[3, 8, 1, 1] w2>
            {
                c = Conv (x, w1)
                p = GlobalAveragePool (c)
                g = Conv (p, off_zero, b)
                s = Sigmoid (g)
                m = Mul (c, s)
                y = Conv (m, w2)
            }""",
        "twins": """
            agraph (float[N, 3, 6, 6] x) => (float[N, 5, 6, 6] y)
            <float[12, 3, 3, 3] w1_twin, float[12] b1_twin, float[5, 12, 3, 3] w2>
            {
                c = Conv <pads = [1, 1, 1, 1]> (x, w1_twin, b1_twin)
                r = Relu (c)
                y = Conv <pads = [1, 1, 1, 1]> (r, w2)
            }""",
        "looped": """
            agraph (float[2, 3] x, float[2, 50] long) => (float[2, 3] y, float[2, 40] even)
            <float[50, 40] w_fill>
            {
                turns = Constant <value_int = 3> ()
                go_on = Constant <value = bool {1}> ()
                y = Loop (turns, go_on, x)
                    <body = b (int64 i, bool c, float[2, 3] v) => (bool d, float[2, 3] w)
                     { d = Identity (c) w = Add (v, x) }>
                m = MatMul (long, w_fill)
                even = Exp (m)
            }""",
        "squeezed": """
            agraph (float[5, 4, n] x) => (float[a, b, c, d] y)
            <float[1, 12, 4] w, float[1, 12, 3] r>
            {
                last = Constant <value_ints = [-1]> ()
                first = Constant <value_ints = [0]> ()
                one = Constant <value_ints = [1]> ()
                s = Shape (x)
                d = Gather (s, last)
                c = Equal (d, one)
                m = If (c) <then_branch = t () => (float[5, 4] a) { a = Squeeze (x, last) },
                            else_branch = e () => (float[5, 4, n] b) { b = Identity (x) }>
                u = Unsqueeze (m, first)
                y = LSTM <hidden_size = 3> (u, w, r)
            }""",
        "attention": """
            <ir_version: 11, opset_import: ["" : 23]>
            agraph (float[1, 6, 16] x) => (float[1, 6, 16] y)
            <float[16, 16] wq, float[16, 16] wk, float[16, 16] wv, float[1, 6, 4] angles>
            {
                split = Constant <value_ints = [0, 0, 2, 8]> ()
                join = Constant <value_ints = [0, 0, 16]> ()
                one = Constant <value_ints = [1]> ()
                root = Constant <value_float = 2.828427> ()
                f = Concat <axis = -1> (angles, angles)
                c0 = Cos (f)
                s0 = Sin (f)
                c = Unsqueeze (c0, one)
                s = Unsqueeze (s0, one)
                q0 = MatMul (x, wq)
                q1 = Reshape (q0, split)
                q = Transpose <perm = [0, 2, 1, 3]> (q1)
                left, right = Split <axis = -1, num_outputs = 2> (q)
                minus = Neg (right)
                turned = Concat <axis = -1> (minus, left)
                qc = Mul (q, c)
                qs = Mul (turned, s)
                qr = Add (qc, qs)
                k0 = MatMul (x, wk)
                k1 = Reshape (k0, split)
                k = Transpose <perm = [0, 2, 3, 1]> (k1)
                v0 = MatMul (x, wv)
                v1 = Reshape (v0, split)
                v = Transpose <perm = [0, 2, 1, 3]> (v1)
                a = MatMul (qr, k)
                b = Div (a, root)
                p = Softmax <axis = -1> (b)
                o0 = MatMul (p, v)
                o1 = Transpose <perm = [0, 2, 1, 3]> (o0)
                y = Reshape (o1, join)
            }""",
        "functions": """
            <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
            agraph (float[N, 4] x) => (float[N, 4] y)
            {
                h = local.gate <power = 2.0> (x)
                y = local.gate <power = 3.0> (h)
            }
            <domain: "local", opset_import: ["" : 17]>
            gate <power> (a) => (b)
            {
                p = Constant <value_float: float = @power> ()
                s = Sigmoid (a)
                t = Mul (a, s)
                b = Mul (t, p)
            }""",
        "recurrent": """
            agraph (float[5, N, 4] x) => (float[5, N, 2] y)
            <float[1, 24, 4] w, float[1, 24, 6] r, float[1, 48] b, float[1, 1, 6] h_zero, float[6, 2] out>
            {
                first = Constant <value_ints = [1]> ()
                one = Constant <value_ints = [1]> ()
                six = Constant <value_ints = [6]> ()
                s = Shape (x)
                n = Gather (s, first)
                size = Concat <axis = 0> (one, n, six)
                h = Expand (h_zero, size)
                all = LSTM <hidden_size = 6> (x, w, r, b, , h, h)
                seen = Squeeze (all, first)
                y = MatMul (seen, out)
            }""",
        "heads_merged": """
            agraph (float[2, 4, 5, 6] x) => (float[2, 4, 6, 5] y)
            {
                merged = Constant <value_ints = [8, 5, 6]> ()
                split = Constant <value_ints = [2, 4, 6, 5]> ()
                e = Exp (x)
                m = Reshape (e, merged)
                t = Transpose <perm = [0, 2, 1]> (m)
                s = Reshape (t, split)
                y = Relu (s)
            }""",
    }
)


def _text_image() -> npt.NDArray[np.float32]:
    """A line of text: without any, a text detector answers nothing but the noise of its rounding."""
    image = Image.new("L", (96, 96), "white")
    ImageDraw.Draw(image).text((6, 30), "edgewise", fill="black", font=ImageFont.load_default(20))
    grey = np.asarray(image, np.float32) / 255
    return np.broadcast_to((grey - 0.45) / 0.22, (1, 3, 96, 96)).copy()


# What input_specs cannot know of models with open dimensions or meaningful integers.
FEEDS: Mapping[str, Callable[[], Feed]] = MappingProxyType(
    {
        "squeezed": lambda: {"x": np.random.default_rng(0).standard_normal((5, 4, 1)).astype(np.float32)},
        "silero_vad": lambda: {
            "input": np.random.default_rng(0).standard_normal((1, 576)).astype(np.float32),
            "state": np.zeros((2, 1, 128), np.float32),
            "sr": np.array(16000, np.int64),
        },
        "ppocr_v2_cls": lambda: {
            "x": np.random.default_rng(0).standard_normal((2, 3, 48, 192)).astype(np.float32)
        },
        "ppocr_v4_det": lambda: {"x": _text_image()},
        "magika_v3_3": lambda: {
            "bytes": np.random.default_rng(0).integers(0, 256, (2, 2048)).astype(np.int32)
        },
    }
)


def corpus_models() -> list[Path]:
    """The real models, or none where EDGEWISE_CORPUS is not set."""
    folder = os.environ.get("EDGEWISE_CORPUS")
    return sorted((Path(folder) / "models").glob("*.onnx")) if folder else []


def names() -> list[str]:
    """Every model of the zoo."""
    return [*GRAPHS, *(p.stem for p in corpus_models())]


def build(name: str) -> ir.Model:
    """The model of that name."""
    if name in GRAPHS:
        return ir.from_proto(_parse(GRAPHS[name]))
    return ir.load(next(p for p in corpus_models() if p.stem == name))


def feed_of(name: str, model: ir.Model) -> Feed:
    """Inputs the model runs on."""
    return FEEDS[name]() if name in FEEDS else seeded_feed(input_specs(model))


def _parse(text: str) -> onnx.ModelProto:
    header = "" if text.lstrip().startswith("<") else '<ir_version: 8, opset_import: ["" : 17]>\n'
    # The parser reads weights only with their numbers, so they are declared as values and filled in here.
    model = onnx.parser.parse_model(header + text)
    rng = np.random.default_rng(7)
    for info in list(model.graph.value_info):
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        array = rng.standard_normal(shape).astype(np.float32) / max(1.0, np.sqrt(np.prod(shape[1:])))
        if info.name.endswith("_pos"):
            array = np.abs(array) + 0.5
        if info.name.endswith("_half"):
            array[: shape[0] // 2] = 0
        if info.name.endswith("_twin"):
            array[shape[0] // 2 :] = array[: shape[0] // 2]
        if info.name.endswith("_zero"):
            array[:] = 0
        if info.name.endswith("_fill"):
            array[:] = 0.5
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), info.name))
        if model.ir_version < 4:  # initializers had to be inputs
            model.graph.input.append(info)
    del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    return model
