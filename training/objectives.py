"""What scores by gradients are the gradients of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from edgewise.calibration.data import Samples
from edgewise.passes.graph import attribute, opset

_SQUASHING = ("Softmax", "LogSoftmax")
_AXIS_IS_ONE = 13  # opset from which a Softmax normalizes one axis, not all behind it
_TINY = 1e-12

TEMPERATURE = 4.0
"""By which scores are divided before their distance is taken."""


@dataclass(frozen=True)
class Head:
    """An output, or what a Softmax makes the output of: then `axis` is the one it normalizes, else None.

    `classes` is how many scores a row has where a row is nothing but scores of classes, else None.
    """

    name: str
    axis: int | None
    classes: int | None = None


def heads(model: ir.Model) -> tuple[Head, ...]:
    """Those of the main graph's outputs; a Softmax counts where it ends the model and normalizes one axis."""
    return tuple(_head(value, opset(model)) for value in model.graph.outputs)


def _head(value: ir.Value, version: int) -> Head:
    node = value.producer()
    source = None if node is None or node.op_type not in _SQUASHING or node.domain else node.inputs[0]
    if node is None or source is None or source.producer() is None or version < _AXIS_IS_ONE:
        return Head(value.name or "", None, _classes(value, 1))
    axis = int(attribute(node, "axis", -1))
    return Head(source.name or "", axis, _classes(source, axis))


def _classes(scores: ir.Value, axis: int) -> int | None:
    """The size of an axis if no other but that of the rows has more than one entry."""
    dims = [] if scores.shape is None else [d if isinstance(d, int) else None for d in scores.shape]
    if not -len(dims) < axis < len(dims) or len(dims) < 2:
        return None
    size = dims.pop(axis)
    return size if all(d == 1 for d in dims[1:]) else None


def has_classes(samples: Samples, heads: Sequence[Head]) -> bool:
    """Whether the labels are class numbers, one a row, and there is one output to hold them against."""
    labels = samples.labels
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu" or len(heads) != 1:
        return False
    return bool(labels.min() >= 0 and labels.max() < (heads[0].classes or 0))


def cross_entropy(outputs: Mapping[str, Tensor], head: Head, labels: Tensor) -> Tensor:
    """Of the classes `labels`, a sum over rows; an output that no Softmax makes is taken for its input."""
    scores = outputs[head.name].movedim(1 if head.axis is None else head.axis, -1)
    return functional.cross_entropy(scores.flatten(0, -2), labels, reduction="sum")


def projection(outputs: Mapping[str, Tensor], heads: Sequence[Head], generator: torch.Generator) -> Tensor:
    """A sum of the outputs with random signs, whose squared gradients are expected to be those of a distance.

    Behind a Softmax with probabilities p it is the distance of 2 sqrt(p), to second order twice the
    Kullback-Leibler divergence. They are softened by a temperature (Hinton et al., 2015): a trained net is
    sure of most samples, whose divergence has next to no gradient. Of another output it is the square
    distance relative to the row's own energy.
    """
    total = torch.zeros(())
    for head in heads:
        values = outputs[head.name]
        if not values.is_floating_point():
            continue
        if head.axis is None:
            norm = values.detach().reshape(values.shape[:1].numel(), -1).norm(dim=1)
            values = values / (norm.reshape(values.shape[:1] + (1,) * (values.ndim - 1)) + _TINY)
        else:
            values = 2 * torch.exp(torch.log_softmax(values / TEMPERATURE, head.axis) / 2)
        signs = torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
        total = total + (values * signs).sum()
    return total
