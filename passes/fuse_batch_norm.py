"""Fold batch normalization into the layer before it, or else into the one after it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused, Rule
from edgewise.passes.graph import Array, attribute, constant_of
from edgewise.passes.linear import Channels, first_success, fold_into_consumer, fold_into_producer


@dataclass(frozen=True)
class FuseBatchNorm(Rule):
    """Fold the BatchNormalization of inference into a Conv, ConvTranspose, Gemm or MatMul next to it.

    Given:   BN(z) = s * z + t  per channel, with s = scale / sqrt(var + epsilon), t = B - mean * s,
             and a layer L(x) = W x + b with constant W and b
    Result:  BN(L(x)) = (s W) x + (s b + t)      s along the output channels of W
             L(BN(x)) = (W s) x + (b + W t)      s along its input channels, where no zero padding
                                                 takes part in W t
    The layer before is preferred: padding does not matter there. A MatMul of rank 2 becomes a Gemm when
    it gains a bias. All numbers are computed in float64 and rounded once.

    A normalization that finds no layer stays: onnxruntime runs it in one sweep over the data, and the Mul
    and Add it could be lowered to in two.
    """

    name = "fuse-batch-norm"
    op_types = ("BatchNormalization",)

    def rewrite(self, node: ir.Node) -> bool:
        data = node.inputs[0]
        if data is None:
            return False
        check_inference(node)
        scale, shift = scale_and_shift(node)

        def vectors(channels: Channels) -> tuple[Array, Array]:
            if channels.axis != 1:
                raise Refused("the layer's channels are not known to lie on axis 1")
            if scale.shape != (channels.size,):
                raise Refused("channel counts differ")
            return scale, shift

        return first_success(
            lambda: fold_into_producer(node, data, vectors), lambda: fold_into_consumer(node, data, vectors)
        )


def check_inference(node: ir.Node) -> None:
    """Training mode, by its attribute since opset 14 and by its further outputs before."""
    if attribute(node, "training_mode", 0) or any(v.name for v in node.outputs[1:]):
        raise Refused("BatchNormalization is in training mode")
    if not attribute(node, "spatial", 1):
        raise Refused("BatchNormalization normalizes every position on its own")
    if "is_test" in node.attributes or "consumed_inputs" in node.attributes:
        raise Refused("BatchNormalization of an opset before 7")


def scale_and_shift(node: ir.Node) -> tuple[Array, Array]:
    """Scale and shift per channel, float64; not finite where the variance is negative."""
    constants = [constant_of(v) for v in node.inputs[1:5]]
    gamma, beta, mean, variance = (None if c is None else c.astype(np.float64) for c in constants)
    if gamma is None or beta is None or mean is None or variance is None:
        raise Refused("BatchNormalization parameters are not constant")
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
        return scale, beta - mean * scale
