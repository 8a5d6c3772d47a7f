"""Losses that a graph computes itself."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as nn

from edgewise.training.operators.call import Call, Operator

_NEVER = -(2**31)  # no class has this number


def negative_log_likelihood(call: Call) -> Tensor:
    return _loss(call, call.input(0))


def softmax_cross_entropy(call: Call) -> Tensor | tuple[Tensor | None, ...]:
    log_probabilities = torch.log_softmax(call.input(0), 1)
    loss = _loss(call, log_probabilities)
    return loss if len(call.node.outputs) == 1 else (loss, log_probabilities)


def _loss(call: Call, log_probabilities: Tensor) -> Tensor:
    """The reduced loss of log-probabilities [batch, classes, ...], classes weighted by the third input."""
    return nn.nll_loss(
        log_probabilities,
        call.input(1).long(),
        call.optional(2),
        ignore_index=call.attr("ignore_index", _NEVER),
        reduction=call.attr("reduction", "mean"),
    )


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "NegativeLogLikelihoodLoss": negative_log_likelihood,
        "SoftmaxCrossEntropyLoss": softmax_cross_entropy,
    }
)
