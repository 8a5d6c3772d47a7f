"""What the channels of a model cost, as something that can be asked of every model a search meets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from edgewise.optimizer.width_probe import Bench, UnknownLayersError, measure_widths
from edgewise.passes.channels import ChannelGraph
from edgewise.passes.graph import opset
from edgewise.passes.infer_shapes import shapes_on
from edgewise.runtime.evaluate import Feed
from edgewise.training.costs import Cost, FileBytes, Macs, Parameters, Shares
from edgewise.training.selection import Bill

Pricing = Callable[[ir.Model], Cost]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ByMacs:
    """Multiply-accumulates of one run on inputs of these shapes."""

    shapes: Shapes

    def __call__(self, model: ir.Model) -> Cost:
        return Macs(shapes_on(model, self.shapes))


@dataclass(frozen=True)
class ByBytes:
    """Bytes of the file; its weights with so many bytes a number, where they will be quantized."""

    weight: float | None = None

    def __call__(self, _: ir.Model) -> Cost:
        return FileBytes(self.weight)


@dataclass(frozen=True)
class ByParameters:
    """Numbers that the weights hold."""

    def __call__(self, _: ir.Model) -> Cost:
        return Parameters()


@dataclass(frozen=True, eq=False)
class Alike:
    """Several costs, each in shares of what the whole model has of it."""

    pricings: tuple[Pricing, ...]

    def __call__(self, model: ir.Model) -> Cost:
        return Shares(tuple(pricing(model) for pricing in self.pricings))


@dataclass(frozen=True, eq=False)
class Priced:
    """A cost that is known, for the one model that it is the cost of."""

    cost: Cost

    def __call__(self, _: ir.Model) -> Cost:
        return self.cost


@dataclass(frozen=True, eq=False)
class ByTime:
    """Milliseconds on the target, by the times of every layer at many widths; measured when asked.

    Where layers of an int8 form are not those of the model, those of the model in float stand for them.
    """

    feed: Feed
    bench: Bench

    def __call__(self, model: ir.Model) -> Cost:
        try:
            return measure_widths(model, self.feed, self.bench)
        except UnknownLayersError:
            bench = self.bench
            in_float = Bench(bench.provider, bench.threads, bench.multiple, timeout=bench.timeout)
            return measure_widths(model, self.feed, in_float)


def shapes_of(feed: Feed) -> Shapes:
    """What a feed says of the inputs."""
    return {name: tuple(array.shape) for name, array in feed.items()}


def price(model: ir.Model, pricing: Pricing) -> float:
    """What the whole model costs."""
    return Bill.of(ChannelGraph.of(model.graph, opset(model)), pricing(model)).whole
