"""An ONNX graph as a torch module, so that it has gradients."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from edgewise.passes.base import bodies_of, graphs_of
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Feed
from edgewise.training.operators import OPERATORS
from edgewise.training.operators.call import as_tensor, described
from edgewise.training.program import Execution, Hook, Program, Step, is_constant, key_of

_NUMBERS = MappingProxyType(
    {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
)
_TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STATISTICS = MappingProxyType({"BatchNormalization": (3, 4)})
_SETTINGS = MappingProxyType(  # float inputs that say what a node does, and are no weights of it
    {
        "Clip": (1, 2),
        "Dropout": (1,),
        "OneHot": (2,),
        "Pad": (2,),
        "Pow": (1,),
        "Resize": (1, 2),
        "Upsample": (1,),
    }
)
_RANDOM = ("Bernoulli", "Dropout", "Multinomial", "RandomNormalLike", "RandomUniformLike")


def unsupported(model: ir.Model) -> tuple[str, ...]:
    """The operators of `model` that cannot be run here, sorted; empty if `GraphModule(model)` can be made."""
    nodes = (node for graph in graphs_of(model) for node in graph if not is_constant(node))
    return tuple(sorted({key_of(node) for node in nodes} - OPERATORS.keys()))


class GraphModule(nn.Module):
    """Executes a model with torch: a feed of tensors by input name gives the outputs by name.

    Its parameters are the model's float initializers and Constant nodes, each in its own type:
    `weights` has them under the names they have in the file. The running statistics of
    BatchNormalization are buffers, which training moves: `statistics`. Other numbers never change:
    integers, and floats that only set a node up (the bounds of a Clip). What follows from them alone is
    computed once. In training BatchNormalization takes the statistics of the batch and Dropout drops.

    Wherever the module goes, settings and integers of 64 bits stay on the processor: they describe shapes.
    Raises `InputError` where an operator is missing, naming it and the node.
    """

    def __init__(self, model: ir.Model) -> None:
        super().__init__()
        self._model = model.clone()
        self._program = Program.of(self._model)
        self._constants: list[Any] = [None] * self._program.size  # by slot, those that stay on the processor
        self._slots_of_buffers: dict[str, int] = {}
        self._slots_of_parameters: dict[str, int] = {}
        self._hooks: dict[int, OrderedDict[int, Hook]] = {}
        self._learned: dict[ir.Value, str] = {}  # what `write_back` writes, and its name in this module
        for value in _constants_of(self._model):
            if value.uses() or value.is_graph_output():
                self._take(value)
        self._program = dataclasses.replace(
            self._program, steps={**self._program.steps, self._model.graph: tuple(self._fold())}
        )

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        """The parameters under the names they have in the model."""
        found = {value.name or "": self._parameters.get(kept) for value, kept in self._learned.items()}
        return {name: weight for name, weight in found.items() if weight is not None}

    @property
    def statistics(self) -> Mapping[str, Tensor]:
        """The running means and variances under the names they have in the model."""
        found = {value.name or "": self._buffers.get(kept) for value, kept in self._learned.items()}
        return {name: numbers for name, numbers in found.items() if numbers is not None}

    def forward(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for one batch, by name. Inputs may have any batch size that the graph's nodes take."""
        values, slots, graph = self._values(), self._program.slots, self._model.graph
        for value in graph.inputs:
            given = feed.get(value.name or "")
            if given is not None:
                values[slots[value]] = given
            elif values[slots[value]] is None:
                raise InputError(f"input {value.name!r} is missing from the feed")
        Execution(self._program, values, self._hooks, training=self.training).run(graph)
        return {value.name or "": values[slots[value]] for value in graph.outputs}

    def register_value_hook(self, name: str, hook: Hook) -> RemovableHandle:
        """Call `hook` on a value, weights and inputs included, whenever a forward computes it.

        What it returns takes the value's place; None leaves it. `remove()` of the handle takes it away.
        `InputError` if the model has no value of that name.
        """
        slot = next((slot for value, slot in self._program.slots.items() if value.name == name), None)
        if slot is None:
            raise InputError(f"the model has no value {name!r}")
        hooks = self._hooks.setdefault(slot, OrderedDict())
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        return handle

    @contextmanager
    def watch(self, names: Iterable[str]) -> Iterator[Mapping[str, Tensor]]:
        """Within the context, the inner values of these names as the last forward computed them."""
        seen: dict[str, Tensor] = {}
        handles = [self.register_value_hook(name, partial(seen.__setitem__, name)) for name in names]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def write_back(self) -> ir.Model:
        """A copy of the model with the parameters and running statistics as they are now."""
        model = self._model.clone()
        for old, new in zip(_constants_of(self._model), _constants_of(model), strict=True):
            kept = self._learned.get(old)
            if kept is not None:
                _store(new, self._parameters.get(kept, self._buffers.get(kept)))
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModule:
        """A module of its own with the same numbers, where they are; without the hooks."""
        copy = GraphModule(self._model)
        for name, weight in self._parameters.items():
            if weight is not None:
                copy.register_parameter(name, nn.Parameter(weight.detach().clone(), weight.requires_grad))
        for name, numbers in self._buffers.items():
            copy._buffers[name] = None if numbers is None else numbers.detach().clone()
        return copy.train(self.training)

    def _values(self) -> list[Any]:
        """What is known before a run, by slot."""
        values = self._constants.copy()
        for name, slot in self._slots_of_parameters.items():
            values[slot] = self._parameters[name]
        for name, slot in self._slots_of_buffers.items():
            values[slot] = self._buffers[name]
        return values

    def _take(self, value: ir.Value) -> None:
        """Hold a constant as what it is: a parameter, a statistic, or a number that never changes."""
        tensor, slot = as_tensor(_tensor_of(value)), self._program.slots[value]
        name = f"{slot}:{value.name}".replace(".", "/")  # torch reserves the dot
        if _serves_only(value, _SETTINGS):
            self._constants[slot] = tensor  # read as plain numbers, which must not wait for a device
        elif tensor.dtype not in _TRAINABLE:
            self._keep(slot, tensor)
        elif _serves_only(value, _STATISTICS):
            self.register_buffer(name, tensor)
            self._slots_of_buffers[name] = slot
            self._learned[value] = name
        else:
            self.register_parameter(name, nn.Parameter(tensor))
            self._slots_of_parameters[name] = slot
            self._learned[value] = name

    def _keep(self, slot: int, value: Any) -> None:
        """Hold what never changes; on the processor, if it is an integer that may describe a shape."""
        if not isinstance(value, Tensor) or value.dtype == torch.int64:
            self._constants[slot] = value
            return
        name = f"constant_{slot}"
        self.register_buffer(name, value, persistent=False)
        self._slots_of_buffers[name] = slot

    def _fold(self) -> Iterator[Step]:
        """Compute once what follows from unchanging numbers alone; the steps that are left."""
        values = self._values()
        learned = {self._program.slots[value] for value in self._learned}
        known = {slot for slot, value in enumerate(values) if value is not None} - learned
        execution = Execution(self._program, values, {}, training=False)
        for step in self._program.steps[self._model.graph]:
            reads = {slot for slot in step.reads if slot}
            if not reads or not reads <= known or step.node.op_type in _RANDOM or any(bodies_of(step.node)):
                yield step
                continue
            with torch.no_grad():
                execution.run_step(dataclasses.replace(step, frees=()))
            for slot in step.writes:
                if values[slot] is not None:
                    known.add(slot)
                    self._keep(slot, values[slot])


def as_tensors(feed: Feed, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """The arrays of a feed as tensors of their own."""
    return {name: as_tensor(ir.Tensor(array)).to(device) for name, array in feed.items()}


def lay_out(module: GraphModule) -> None:
    """Filters with their channels last: what they give is laid out so too, and takes a fifth less time."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _constants_of(model: ir.Model) -> Iterator[ir.Value]:
    """The initializers and the outputs of Constant nodes, graph by graph: a clone gives the same order."""
    for graph in graphs_of(model):
        yield from graph.initializers.values()
        yield from (node.outputs[0] for node in graph if is_constant(node))


def _tensor_of(value: ir.Value) -> ir.TensorProtocol:
    node = value.producer()
    if node is None:
        if value.const_value is None:
            raise InputError(f"initializer {value.name!r} has no data")
        return value.const_value
    (attr,) = node.attributes.values()
    if attr.name == "value" and not attr.is_ref():
        tensor: ir.TensorProtocol = attr.value
        return tensor
    if attr.name not in _NUMBERS or attr.is_ref():
        raise InputError(f"{described(node)} holds no numbers ({attr.name})")
    return ir.Tensor(np.array(attr.value, _NUMBERS[attr.name]))


def _serves_only(value: ir.Value, places: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether every use of `value` is one of these inputs of these operators."""
    uses = value.uses()
    return bool(uses) and all(use.idx in places.get(use.node.op_type, ()) for use in uses)


def _store(value: ir.Value, numbers: Tensor | None) -> None:
    """Let a constant hold `numbers`. Tensors are shared between clones: it gets one of its own."""
    if numbers is None:
        return
    array = ir.tensor_adapters.TorchTensor(numbers.detach().cpu()).numpy()
    tensor, node = ir.Tensor(array.copy(), name=value.name), value.producer()
    if node is None:
        value.const_value = tensor
    else:
        node.attributes.clear()
        node.attributes["value"] = ir.AttrTensor("value", tensor)
