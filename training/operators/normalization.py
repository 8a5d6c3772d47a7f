"""Normalization: by batch, by instance, by group, by layer, by neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as nn

from edgewise.training.operators.call import Call, Operator

_FIRST_OF_WHOLE_CHANNELS = 21  # the opset since which GroupNormalization scales every channel by its own


def batch_normalization(call: Call) -> Tensor | tuple[Tensor | None, ...]:
    """By the stored statistics, or in training by those of the batch, which then move the stored ones.

    ONNX's momentum is the share of the old statistics that stays, torch's that of the new ones. As in
    torch, the stored variance is moved towards the unbiased one. One number a channel has no variance: then
    the stored statistics are taken.
    """
    x, scale, shift, mean, variance = (call.input(i) for i in range(5))
    if call.attr("training_mode", 0):
        return _by_the_batch(call, x)
    wide = x if variance.dtype == x.dtype else x.to(variance.dtype)  # since opset 15 they may differ
    if scale.dtype != wide.dtype:
        scale, shift = scale.to(wide.dtype), shift.to(wide.dtype)
    y = _by_statistics(call, wide, scale, shift, mean, variance)
    y = y if wide is x else y.to(x.dtype)
    return y if len(call.node.outputs) == 1 else (y, *(None,) * (len(call.node.outputs) - 1))


def _by_statistics(
    call: Call, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    epsilon: float = call.attr("epsilon", 1e-5)
    momentum: float = 1 - call.attr("momentum", 0.9)
    training = call.training and x.numel() > scale.numel()
    cudnn = torch.backends.cudnn.enabled
    if mean.requires_grad or variance.requires_grad:  # computed by the graph: nothing is stored
        if training:
            return torch.batch_norm(x, scale, shift, None, None, True, momentum, epsilon, cudnn)
        y = _normalized(x, _by_channel(mean, x), _by_channel(variance, x), epsilon)
        return y * _by_channel(scale, x) + _by_channel(shift, x)
    return torch.batch_norm(x, scale, shift, mean, variance, training, momentum, epsilon, cudnn)


def _by_the_batch(call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a node with training_mode says: the new statistics are outputs, the variance the biased one."""
    scale, shift, mean, variance = (call.input(i) for i in range(1, 5))
    momentum: float = call.attr("momentum", 0.9)
    new_variance, new_mean = torch.var_mean(x, dim=[0, *range(2, x.dim())], correction=0)
    y = _normalized(x, _by_channel(new_mean, x), _by_channel(new_variance, x), call.attr("epsilon", 1e-5))
    y = (y * _by_channel(scale, x) + _by_channel(shift, x)).to(x.dtype)
    return (
        y,
        mean * momentum + new_mean.detach() * (1 - momentum),
        variance * momentum + new_variance.detach() * (1 - momentum),
    )


def instance_normalization(call: Call) -> Tensor:
    x = call.input(0)
    epsilon = call.attr("epsilon", 1e-5)
    return torch.group_norm(
        x, x.shape[1], call.input(1), call.input(2), epsilon, torch.backends.cudnn.enabled
    )


def group_normalization(call: Call) -> Tensor:
    """Scale and shift are one number a group before opset 21, one a channel since."""
    x, scale, shift = call.input(0), call.input(1), call.input(2)
    groups, epsilon = call.attr("num_groups"), call.attr("epsilon", 1e-5)
    if call.opset < _FIRST_OF_WHOLE_CHANNELS:
        repeats = x.shape[1] // groups
        scale, shift = scale.repeat_interleave(repeats), shift.repeat_interleave(repeats)
    return torch.group_norm(x, groups, scale, shift, epsilon, torch.backends.cudnn.enabled)


def layer_normalization(call: Call) -> Tensor | tuple[Tensor | None, ...]:
    x, scale, shift = call.input(0), call.input(1), call.optional(2)
    axis, epsilon = call.attr("axis", -1) % x.dim(), call.attr("epsilon", 1e-5)
    shape = x.shape[axis:]
    if scale.shape == shape and (shift is None or shift.shape == shape):
        y = torch.layer_norm(x, shape, scale, shift, epsilon)
    else:  # they broadcast
        y = torch.layer_norm(x, shape, None, None, epsilon) * scale
        y = y if shift is None else y + shift
    if len(call.node.outputs) == 1:
        return y
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    variance, mean = torch.var_mean(wide, dim=tuple(range(axis, x.dim())), correction=0, keepdim=True)
    return y, mean, torch.rsqrt(variance + epsilon)


def rms_normalization(call: Call) -> Tensor:
    x, scale = call.input(0), call.input(1)
    axis, epsilon = call.attr("axis", -1) % x.dim(), call.attr("epsilon", 1e-5)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    power = wide.square().mean(dim=tuple(range(axis, x.dim())), keepdim=True)
    return (wide * torch.rsqrt(power + epsilon)).to(x.dtype) * scale


def local_response_normalization(call: Call) -> Tensor:
    """By the squares of `size` neighbouring channels; of an even number, one more after than before."""
    x, size = call.input(0), call.attr("size")
    alpha: float = call.attr("alpha", 1e-4)
    beta: float = call.attr("beta", 0.75)
    bias: float = call.attr("bias", 1.0)
    before = (size - 1) // 2
    squares = nn.pad(x.square(), (0, 0) * (x.dim() - 2) + (before, size - 1 - before))
    sums = torch.stack([squares.narrow(1, i, x.shape[1]) for i in range(size)]).sum(0)
    return x / torch.pow(bias + alpha / size * sums, beta)


def mean_variance_normalization(call: Call) -> Tensor:
    x, axes = call.input(0), call.attr("axes", (0, 2, 3))
    variance, mean = torch.var_mean(x, dim=axes, correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(variance) + 1e-9)


def lp_normalization(call: Call) -> Tensor:
    """A vector of norm zero stays as it is."""
    x, axis, p = call.input(0), call.attr("axis", -1), call.attr("p", 2)
    norm = torch.linalg.vector_norm(x, p, dim=axis, keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


def _normalized(x: Tensor, mean: Tensor, variance: Tensor, epsilon: float) -> Tensor:
    return (x - mean) * torch.rsqrt(variance + epsilon)


def _by_channel(numbers: Tensor, x: Tensor) -> Tensor:
    """One number a channel, shaped so that it broadcasts over `x`."""
    shape: Sequence[int] = (1, -1, *(1,) * (x.dim() - 2))
    return numbers.reshape(shape)


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "BatchNormalization": batch_normalization,
        "GroupNormalization": group_normalization,
        "InstanceNormalization": instance_normalization,
        "LRN": local_response_normalization,
        "LayerNormalization": layer_normalization,
        "LpNormalization": lp_normalization,
        "MeanVarianceNormalization": mean_variance_normalization,
        "RMSNormalization": rms_normalization,
    }
)
