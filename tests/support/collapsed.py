"""Networks whose int8 form is worthless: channels of one value differ by many binary orders."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from rewrites import build

from edgewise.runtime.evaluate import Array

WIDTH, CLASSES = 24, 10


def separable(act: str = "Relu({})", spread: int = 0, seed: int = 0) -> ir.Model:
    """Conv, depthwise Conv, Conv, averaged and classified, an activation behind each Conv.

    What a layer writes is multiplied by powers of two from -spread to spread, and what the next one reads is
    divided by them: for a positively homogeneous activation the outputs do not depend on `spread`.
    """
    text = f"""net (float[N, 3, 12, 12] x) => (float[N, {CLASSES}] y) {{
        a = Conv<pads = [1, 1, 1, 1]>(x, w0, b0)  a1 = {act.format("a")}
        d = Conv<group = {WIDTH}, pads = [1, 1, 1, 1]>(a1, w1, b1)  d1 = {act.format("d")}
        c = Conv(d1, w2, b2)  c1 = Relu(c)
        g = GlobalAveragePool(c1)  f = Flatten(g)  y = Gemm<transB = 1>(f, w3, b3)
    }}"""
    return build(text, **weights(spread, seed))


def weights(spread: int, seed: int) -> Mapping[str, Array]:
    rng = np.random.default_rng(seed)
    shapes = ((WIDTH, 3, 3, 3), (WIDTH, 1, 3, 3), (WIDTH, WIDTH, 1, 1), (CLASSES, WIDTH))
    made = {f"w{i}": _drawn(rng, shape) for i, shape in enumerate(shapes)}
    made |= {f"b{i}": 0.1 * _drawn(rng, shape[:1]) for i, shape in enumerate(shapes)}
    rng = np.random.default_rng(seed + 1)
    for layer in range(2):
        factor = np.exp2(rng.integers(-spread, spread + 1, WIDTH)).astype(np.float32)
        made[f"w{layer}"] *= factor[:, None, None, None]
        made[f"b{layer}"] *= factor
        made[f"w{layer + 1}"] /= factor[:, None, None, None] if layer == 0 else factor[None, :, None, None]
    return made


def _drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    fan_in = max(1, int(np.prod(shape[1:])))
    return (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)


def watched(model: ir.Model, name: str) -> ir.Model:
    """`model` with one of its values as the only output."""
    copy = model.clone()
    copy.graph.outputs[:] = [v for node in copy.graph for v in node.outputs if v.name == name]
    return copy
