"""Run a model on arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.runtime.errors import InputError
from edgewise.runtime.session import ModelSource, first_line, open_session, runtime_errors

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]

_DYNAMIC_SIZE = 2  # batch two shows what a batch of one hides
_INTEGER_LIMIT = 2  # ids below two lie in every embedding, and masks stay masks


@dataclass(frozen=True)
class TensorSpec:
    """An input that has to be fed. A dimension is a number, a symbol's name, or None if unknown."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


def input_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """The inputs without a default value; `InputError` on one that is no plain tensor."""
    required = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    return tuple(_spec(v) for v in required)


def _spec(value: ir.Value) -> TensorSpec:
    if not isinstance(value.type, ir.TensorType) or value.shape is None:
        raise InputError(f"input {value.name!r} is no tensor of known rank: pass --data with samples for it")
    dims = (d if isinstance(d, int) else d.value for d in value.shape)
    shape = tuple(None if isinstance(d, int) and d < 0 else d for d in dims)
    return TensorSpec(value.name or "", value.type.dtype.numpy(), shape)


class Evaluator:
    """A model that is loaded once and run on many feeds.

    `outputs` names the outputs wanted, all by default. The comparison of two models uses one thread
    pool of `threads` and no spinning, so that several evaluators may be open at once.
    """

    def __init__(
        self,
        model: ModelSource,
        *,
        outputs: Sequence[str] | None = None,
        provider: str = "cpu",
        threads: int | None = None,
        optimize: bool = True,
    ) -> None:
        self._session = open_session(
            model, provider=provider, threads=threads, optimize=optimize, spinning=False
        )
        self.outputs = tuple(outputs or (o.name for o in self._session.get_outputs()))

    def run(self, feed: Feed) -> dict[str, Any]:
        """Outputs by name: an array, or what onnxruntime gives for a sequence or a map."""
        try:
            values = self._session.run(list(self.outputs), dict(feed))
        except runtime_errors() as error:
            raise InputError(f"the model does not run on these inputs: {first_line(error)}") from error
        return dict(zip(self.outputs, values, strict=True))


def seeded_feed(specs: Sequence[TensorSpec], seed: int = 0, size: int = _DYNAMIC_SIZE) -> dict[str, Array]:
    """Plausible inputs: normal floats, small non-negative integers, true booleans.

    Every dynamic dimension gets `size`. Equal symbols get equal sizes, hence one size for all.
    For a model that onnx-ir reads, `plausible_feed` knows more of what its integers mean.
    """
    rng = np.random.default_rng(seed)
    return {spec.name: _seeded(spec, rng, size) for spec in specs}


def _seeded(spec: TensorSpec, rng: np.random.Generator, size: int) -> Array:
    shape = tuple(d if isinstance(d, int) else size for d in spec.shape)
    if spec.dtype == np.bool_:
        return np.ones(shape, np.bool_)
    if spec.dtype == np.object_ or spec.dtype.kind in "US":
        return np.full(shape, "a", dtype=np.object_)
    if spec.dtype.kind in "iu":
        return rng.integers(0, _INTEGER_LIMIT, shape).astype(spec.dtype)
    return rng.standard_normal(shape).astype(spec.dtype)
