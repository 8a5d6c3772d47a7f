"""The operators of the trainable graph: torch functions by ONNX operator.

A key is the operator's type, with the domain in front where that is not the default one
(`com.microsoft.Gelu`). Adding a family = one file with `OPERATORS`, one line in `_FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from edgewise.training.operators import (
    activation,
    attention,
    casting,
    control_flow,
    convolution,
    detection,
    elementwise,
    generation,
    indexing,
    logic,
    losses,
    normalization,
    padding,
    pooling,
    products,
    quantization,
    recurrent,
    reduction,
    resize,
    sequences,
    shape,
    spectra,
    trigonometry,
)
from edgewise.training.operators.call import Operator

_FAMILIES: tuple[Mapping[str, Operator], ...] = (
    activation.OPERATORS,
    attention.OPERATORS,
    casting.OPERATORS,
    control_flow.OPERATORS,
    convolution.OPERATORS,
    detection.OPERATORS,
    elementwise.OPERATORS,
    generation.OPERATORS,
    indexing.OPERATORS,
    logic.OPERATORS,
    losses.OPERATORS,
    normalization.OPERATORS,
    padding.OPERATORS,
    pooling.OPERATORS,
    products.OPERATORS,
    quantization.OPERATORS,
    recurrent.OPERATORS,
    reduction.OPERATORS,
    resize.OPERATORS,
    sequences.OPERATORS,
    shape.OPERATORS,
    spectra.OPERATORS,
    trigonometry.OPERATORS,
)


def _merged(families: tuple[Mapping[str, Operator], ...]) -> Mapping[str, Operator]:
    table: dict[str, Operator] = {}
    for family in families:
        twice = table.keys() & family.keys()
        if twice:
            raise ValueError(f"operators in two families: {sorted(twice)}")
        table.update(family)
    return MappingProxyType(table)


OPERATORS: Mapping[str, Operator] = _merged(_FAMILIES)
