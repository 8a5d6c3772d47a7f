"""Attention, rotary position embedding, and Einsum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from edgewise.training.operators.call import Call, Operator
from edgewise.training.operators.tensors import beside, dtype_of


def attention(call: Call) -> tuple[Tensor | None, ...]:
    """Scaled dot products of heads [batch, heads, length, size], or of [batch, length, heads * size]."""
    flat = call.input(0).dim() == 3
    heads, groups = call.attr("q_num_heads"), call.attr("kv_num_heads")
    query = _heads(call.input(0), heads)
    key, value = _heads(call.input(1), groups), _heads(call.input(2), groups)
    key, value = _after_past(key, call.optional(4)), _after_past(value, call.optional(5))
    shared = query.shape[1] // key.shape[1]  # query heads that share a head of keys and values
    keys, values = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)

    scale = math.sqrt(call.attr("scale") or 1 / math.sqrt(query.shape[-1]))
    product = (query * scale) @ (keys * scale).transpose(-1, -2)
    bias = _bias(call, product, key.shape[2])
    capped, masked = _capped_and_masked(call, product, bias)
    precision = call.attr("softmax_precision")
    probabilities = _softmax(masked, masked.dtype if precision is None else dtype_of(call, precision))
    probabilities = probabilities.to(query.dtype)
    out = probabilities @ values
    shown = (product, capped, masked, probabilities)[call.attr("qk_matmul_output_mode", 0)]
    return out.transpose(1, 2).flatten(2) if flat else out, key, value, shown


def _heads(x: Tensor, heads: int | None) -> Tensor:
    return x if heads is None or x.dim() == 4 else torch.unflatten(x, 2, (heads, -1)).transpose(1, 2)


def _after_past(new: Tensor, past: Tensor | None) -> Tensor:
    return new if past is None else torch.cat([past, new], 2)


def _capped_and_masked(call: Call, product: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    cap = call.attr("softcap", 0.0)
    capped = cap * torch.tanh(product / cap) if cap else product
    return capped, capped + bias


def _bias(call: Call, product: Tensor, total: int) -> Tensor:
    """What is added to the products: the mask, and minus infinity where nothing may be attended."""
    bias = product.new_zeros(())
    mask, lengths = call.optional(3), call.optional(6)
    if mask is not None:
        (mask,) = beside(product, mask)
        bias = _forbidden(product, ~mask) if mask.dtype == torch.bool else mask.to(product.dtype)
        bias = torch.nn.functional.pad(bias, (0, total - bias.shape[-1]), value=-math.inf)
    steps, queries = torch.arange(total, device=product.device), product.shape[2]
    offset = torch.tensor(total - call.input(1).shape[-2] if call.optional(4) is not None else 0)
    if lengths is not None:
        lengths = lengths.reshape(-1, 1, 1, 1).to(product.device)
        bias = bias + _forbidden(product, steps >= lengths)
        offset = lengths - queries
    places = torch.arange(queries, device=product.device).unsqueeze(1) + offset.to(product.device)
    left = call.attr("left_window_size", -1)
    right = 0 if call.attr("is_causal", 0) else call.attr("right_window_size", -1)
    if left >= 0:
        bias = bias + _forbidden(product, steps < places - left)
    return bias + _forbidden(product, steps > places + right) if right >= 0 else bias


def _forbidden(product: Tensor, where: Tensor) -> Tensor:
    return product.new_zeros(where.shape).masked_fill(where, -math.inf)


def _softmax(scores: Tensor, precision: torch.dtype) -> Tensor:
    """Softmax over the last axis; a row that may attend to nothing is zero."""
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).to(precision).softmax(-1).masked_fill(empty, 0.0)


def rotary_embedding(call: Call) -> Tensor:
    """Turn pairs of numbers of every head by the angle of their position."""
    data, positions = call.input(0), call.optional(3)
    x = data.transpose(1, 2) if data.dim() == 4 else torch.unflatten(data, 2, (call.attr("num_heads"), -1))
    cos, sin = call.input(1), call.input(2)
    if positions is not None:
        (positions,) = beside(cos, positions)
        cos, sin = cos[positions], sin[positions]
    turned = _turned(call, x, cos.unsqueeze(2), sin.unsqueeze(2))
    return turned.transpose(1, 2) if data.dim() == 4 else turned.flatten(2)


def _turned(call: Call, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, length, heads, size]; beyond `rotary_embedding_dim` a head stays as it is."""
    turning = call.attr("rotary_embedding_dim", 0) or x.shape[-1]
    part, rest = x[..., :turning], x[..., turning:]
    interleaved = bool(call.attr("interleaved", 0))
    first, second = (part[..., 0::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
    pair = (cos * first - sin * second, sin * first + cos * second)
    return torch.cat([torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), rest], -1)


def einsum(call: Call) -> Tensor:
    result: Tensor = torch.einsum(call.attr("equation"), *(t for t in call.inputs if t is not None))
    return result


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {"Attention": attention, "Einsum": einsum, "RotaryEmbedding": rotary_embedding}
)
