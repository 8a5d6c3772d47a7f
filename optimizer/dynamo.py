"""A torch module as an ONNX graph, by torch's own exporter, without its chatter and its traces.

The exporter is `torch.onnx.export(..., dynamo=True)`; the module is expected in eval mode.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from edgewise.optimizer.torch_target import Axes
from edgewise.passes.graph import opset as opset_of
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Feed
from edgewise.runtime.foreign import foreign_code

Array = npt.NDArray[Any]


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every submodule is in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@dataclass(frozen=True)
class Call:
    """How the named inputs go into `module.forward`: by keyword if it knows all names, else in order."""

    module: torch.nn.Module
    bound: inspect.BoundArguments

    @classmethod
    def of(cls, module: torch.nn.Module, names: Sequence[str]) -> Call:
        """Bind names to parameters; `InputError` where they do not fit."""
        signature = inspect.signature(module.forward)
        by_name = set(names) <= set(signature.parameters)
        try:
            bound = signature.bind(**{n: n for n in names}) if by_name else signature.bind(*names)
        except TypeError as error:
            raise InputError(
                f"the module takes {signature}, the inputs given are {', '.join(names)}: {error}"
            ) from error
        for parameter, name in bound.arguments.items():
            if name in signature.parameters and name != parameter:
                raise InputError(
                    f"input {name!r} would go to parameter {parameter!r}: name all as {signature}"
                )
        return cls(module, bound)

    @property
    def names(self) -> list[str]:
        """The inputs in the order in which the exporter meets them."""
        return [*self.bound.args, *self.bound.kwargs.values()]

    def run(self, feed: Feed) -> dict[str, Array]:
        """The module's outputs under the names they have in the exported graph."""
        args, kwargs = self.arguments(feed)
        with foreign_code(f"the module does not run with {_shapes(feed)}"):
            tensors = _named_tensors(self.module(*args, **kwargs), set(feed))
            return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}

    def arguments(self, feed: Feed) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        """The feed as tensors on the module's device, in the places where `forward` wants them."""
        state = itertools.chain(self.module.parameters(), self.module.buffers())
        device = next((tensor.device for tensor in state), torch.device("cpu"))
        tensors = {name: torch.from_numpy(np.array(array)).to(device) for name, array in feed.items()}
        args = tuple(tensors[name] for name in self.bound.args)
        return args, {parameter: tensors[name] for parameter, name in self.bound.kwargs.items()}

    def dynamic_shapes(self, axes: Axes) -> dict[str, Any]:
        """The free axes by parameter, as torch.export wants them."""
        free = {name: dict(axes.get(name, {})) for name in self.names}
        return {
            parameter: tuple(free[n] for n in name) if isinstance(name, tuple) else free[name]
            for parameter, name in self.bound.arguments.items()
        }


def _shapes(feed: Feed) -> str:
    return ", ".join(
        f"{name}={'x'.join(map(str, a.shape)) or 'scalar'}:{a.dtype}" for name, a in feed.items()
    )


def _named_tensors(result: Any, taken: set[str]) -> dict[str, torch.Tensor]:
    """The tensors in what a module returned: by key, by field, or numbered; not named like an input."""
    tensors = {f"{n}_output" if n in taken else n: t for n, t in _walk(result, "")}
    if not tensors:
        raise InputError("the module returns no tensor")
    return tensors


def _walk(result: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(result, torch.Tensor):
        yield prefix or "output", result
        return
    if isinstance(result, Mapping):
        parts = [(f"{prefix}_{key}" if prefix else str(key), part) for key, part in result.items()]
    elif fields := getattr(result, "_fields", ()):  # a named tuple
        names = [f"{prefix}_{key}" if prefix else key for key in fields]
        parts = list(zip(names, result, strict=True))
    elif isinstance(result, tuple | list):
        parts = [(f"{prefix or 'output'}_{i}", part) for i, part in enumerate(result)]
    else:
        raise InputError(f"the module returns {type(result).__name__}: only tensors can leave an ONNX graph")
    for name, part in parts:
        if part is not None:
            yield from _walk(part, name)


def write_onnx(call: Call, feed: Feed, axes: Axes, outputs: Sequence[str], opset: int | None) -> ir.Model:
    """Trace the module on `feed`, whose free axes are at least 2 long, as torch.export asks.

    `opset` is the operator set's version, by default the one that the exporter recommends. Raises
    `EdgewiseError` where the exporter fails.
    """
    args, kwargs = call.arguments(feed)
    with _silence(), foreign_code("torch cannot export the module", EdgewiseError):
        program = torch.onnx.export(
            call.module,
            args,
            kwargs=kwargs,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=call.names,
            output_names=list(outputs),
            dynamic_shapes=call.dynamic_shapes(axes) if axes else None,
        )
    if program is None:
        raise EdgewiseError("torch exported nothing")
    model: ir.Model = program.model
    if opset is not None and opset_of(model) != opset:
        raise EdgewiseError(f"torch cannot write opset {opset}: leave it out, and torch chooses")
    _check_names(model, call.names, outputs)
    _detach(model)
    _strip(model)
    return model


def _check_names(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    found = [v.name for v in (*model.graph.inputs, *model.graph.outputs)]
    if found != [*inputs, *outputs]:
        raise EdgewiseError(f"torch exported {found}, the module has {[*inputs, *outputs]}")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing printed, warned or logged: the exporter does all three, on success too."""
    level = logging.root.manager.disable
    sink = io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _detach(model: ir.Model) -> None:
    """Copy the weights: those that the exporter hands out change when the module is trained on."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and type(tensor) is not ir.Tensor:
                value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)


def _strip(model: ir.Model) -> None:
    """Remove what the exporter notes beside the graph: source lines, file paths, its own bookkeeping."""
    bodies = [*model.graphs(), *(g for f in model.functions.values() for g in (f.graph, *f.subgraphs()))]
    model.metadata_props.clear()
    for graph in bodies:
        _forget(graph)
        values = (*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs))
        for item in (*values, *graph):
            _forget(item)
    model.doc_string = None


def _forget(item: Any) -> None:
    item.metadata_props.clear()
    item.doc_string = None
