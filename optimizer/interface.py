"""What a device needs of a model: fewer outputs, fixed sizes, raw pixels, operators that its runtime reads.

All of it is asked for by name, so it is done or the job fails: nothing is rolled back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir

from edgewise.calibration.data import Preprocess, Samples, open_samples
from edgewise.calibration.images import find_images
from edgewise.optimizer.comparison import relative
from edgewise.optimizer.inputs import as_samples
from edgewise.optimizer.pipeline import Reference
from edgewise.optimizer.recipe import Recipe
from edgewise.optimizer.runtimes import limits_of
from edgewise.passes.base import Pass, PassError
from edgewise.passes.fix_dimensions import FixDimensions
from edgewise.passes.graph import opset
from edgewise.passes.keep_outputs import KeepOutputs
from edgewise.passes.lower_opset import LowerOpset
from edgewise.passes.strip_debug import StripDebug
from edgewise.passes.uint8_input import Uint8Input
from edgewise.passes.verify import Signature, check
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Evaluator, Feed, TensorSpec, input_specs
from edgewise.runtime.plausible import plausible_feed

_OPTIONS: Mapping[str, str] = MappingProxyType(
    {FixDimensions.name: "--fix-dim", KeepOutputs.name: "--outputs", Uint8Input.name: "--uint8-input"}
)
_PIXELS = "with --uint8-input samples are raw pixels: uint8 arrays of that layout, or images"


@dataclass(frozen=True)
class _Image:
    """An input that was made to take pixels: the step, and the model as it was before it."""

    step: Uint8Input
    model: ir.Model
    name: str


@dataclass(frozen=True)
class Adapted:
    """A model as it was asked for: `original` as it came, `model` with the `changes`, told in words."""

    original: ir.Model
    model: ir.Model
    changes: tuple[str, ...] = ()
    _image: _Image | None = None

    def samples(self, data: str | Samples | None, preprocess: Preprocess | None, seed: int) -> Samples | None:
        """The samples named by `data`, for `model`; `InputError` where they are made for `original`.

        Where `model` takes pixels, images are cut and not normalized; arrays are taken as they are, and
        `preprocess` has told what was normalized before.
        """
        specs = input_specs(self.model)
        if isinstance(data, Samples) and self.changes:
            if not set(specs) <= set(data.specs):
                raise InputError(
                    f"{data.source} holds samples for other inputs than the model has once it is changed: "
                    "name the file or function, or open them for the new inputs"
                )
            return data.only(specs)
        if not isinstance(data, str):
            return data
        if self._image is not None:
            preprocess = (
                preprocess.pixels(self._image.step.layout) if preprocess and _holds_images(data) else None
            )
        dropped = _dropped(self.original, specs)
        if not dropped:
            return self._open(data, preprocess, seed)
        try:
            return open_samples(data, [*specs, *dropped], preprocess=preprocess, seed=seed).only(specs)
        except InputError:  # perhaps it holds none for inputs that are gone
            return self._open(data, preprocess, seed)

    def _open(self, data: str, preprocess: Preprocess | None, seed: int) -> Samples | None:
        try:
            return as_samples(data, self.model, preprocess, seed)
        except InputError as error:
            if self._image is None:
                raise
            raise InputError(f"{error} ({_PIXELS})") from error

    def verify(self, feeds: Sequence[Feed], *, threads: int | None = None) -> float:
        """The largest difference of the outputs of `model` on `feeds` from those of the original.

        `EdgewiseError` where it is more than rounding explains. Relative to the largest value of an output.
        """
        if not self.changes:
            return 0.0
        anchor = self.original.clone()
        kept = {v.name for v in self.model.graph.outputs}
        outputs = [v for v in anchor.graph.outputs if v.name in kept]
        anchor.graph.outputs.clear()
        anchor.graph.outputs.extend(outputs)
        before = [self._for_original(feed) for feed in feeds]
        reference = Reference(anchor, before, threads=threads)
        expected, actual = Evaluator(anchor, threads=threads), Evaluator(self.model, threads=threads)
        error = 0.0
        for old, new in zip(before, feeds, strict=True):
            wanted, found = expected.run(old), actual.run(new)
            names = wanted.keys() - reference.random
            error = max([error, *(relative(wanted[name], found.get(name)) for name in names)])
        if error > reference.tolerance:
            raise EdgewiseError(
                f"the model as it was asked for ({'; '.join(self.changes)}) answers otherwise than it came, "
                f"by {error:.1e} of the largest value: nothing was written"
            )
        return error

    def _for_original(self, feed: Feed) -> Feed:
        """What the original takes for `feed`: floats for pixels, and anything for inputs that are gone."""
        full = dict(feed)
        if self._image is not None:
            full[self._image.name] = self._image.step.float_pixels(self._image.model, feed[self._image.name])
        if _dropped(self.original, input_specs(self.model)):
            full = plausible_feed(self.original) | full
        return full


def adapt(model: ir.Model, recipe: Recipe) -> Adapted:
    """`model`, which is left as it was, with all that the recipe asks of its interface.

    Raises `InputError` where what is asked for does not fit the model, `EdgewiseError` with the operator's
    name where one cannot be written for the runtime asked for.
    """
    made, image = model, None
    for step in _steps(recipe):
        before, made = made, made.clone()
        try:
            refused = step.apply(made).refused
            check(made, Signature.of(made))
        except PassError as error:
            option = _OPTIONS.get(step.name, step.name)
            raise InputError(f"{option}: {str(error).removeprefix('dims: ')}") from error
        if isinstance(step, LowerOpset) and refused:
            raise EdgewiseError(f"not for onnxruntime {recipe.runtime}: {', '.join(refused)}")
        if isinstance(step, Uint8Input):
            image = _Image(step, before, step.image_of(before).name or "")
    if recipe.runtime is not None:
        limits_of(recipe.runtime).check(made)
    return Adapted(model, made, tuple(_changes(model, made, recipe)), image)


def _steps(recipe: Recipe) -> Sequence[Pass]:
    """The passes that make what is asked for, in the order in which they can name things."""
    steps: list[Pass] = []
    if recipe.fix_dims:
        steps.append(FixDimensions(",".join(recipe.fix_dims)))
    if recipe.outputs:
        steps.append(KeepOutputs(",".join(recipe.outputs), unused_inputs=True))
    if recipe.uint8_input is not None:
        given = recipe.preprocess or Preprocess()
        mean, std = ("/".join(map(str, numbers)) for numbers in (given.mean, given.std))
        steps.append(Uint8Input(recipe.uint8_input, scale=given.scale, mean=mean, std=std))
    if recipe.runtime is not None:
        limits = limits_of(recipe.runtime)
        steps.append(LowerOpset(limits.opset, limits.ir_version))
    if recipe.strip:
        steps.append(StripDebug())
    return steps


def _changes(before: ir.Model, after: ir.Model, recipe: Recipe) -> list[str]:
    """What is different, a line each."""
    found = []
    for kind, old, new in (
        ("input", before.graph.inputs, after.graph.inputs),
        ("output", before.graph.outputs, after.graph.outputs),
    ):
        texts = {v.name: _text(v) for v in new}
        for value in old:
            text = texts.get(value.name, "cut")
            if text != _text(value):
                found.append(f"{kind} {value.name}: {_text(value)} -> {text}")
    if recipe.uint8_input is not None and recipe.preprocess is not None:
        inside = dataclasses.replace(recipe.preprocess, resize=None, crop=None, layout="nchw")
        found += [f"normalized inside: {inside}"] if str(inside) else []
    numbers = (("opset", opset(before), opset(after)), ("IR version", before.ir_version, after.ir_version))
    found += [f"{name}: {old} -> {new}" for name, old, new in numbers if old != new]
    removed = StripDebug().apply(before.clone()).edits if recipe.strip else 0
    return [*found, f"debug strings: {removed} removed"] if removed else found


def _text(value: ir.Value) -> str:
    if not isinstance(value.type, ir.TensorType) or value.shape is None:
        return str(value.type)
    dims = ", ".join(str(d) if isinstance(d, int) else d.value or "?" for d in value.shape)
    return f"{value.type.dtype.numpy()} [{dims}]"


def _dropped(original: ir.Model, specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The inputs of the original that are not in `specs`."""
    names = {spec.name for spec in specs}
    return [spec for spec in input_specs(original) if spec.name not in names]


def _holds_images(source: str) -> bool:
    return Path(source).is_dir() and bool(find_images(Path(source))[0])
