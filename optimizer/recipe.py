"""A recipe: everything that decides what comes out, in one value that YAML can hold."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edgewise.calibration.data import Preprocess
from edgewise.calibration.plan import QuantOptions
from edgewise.optimizer.runtimes import limits_of
from edgewise.optimizer.transformers import FuseForOnnxruntime, fusion_of
from edgewise.passes import EXACT_CHAIN, PREPARATION, parse
from edgewise.passes.base import Contract, Pass
from edgewise.passes.lower_opset import LowerOpset
from edgewise.passes.upgrade_opset import UpgradeOpset
from edgewise.runtime.errors import InputError

TargetName = Literal["cpu", "cuda", "tensorrt", "openvino"]

_FAST_SECONDS = 5.0


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _exact(specs: tuple[str, ...]) -> tuple[str, ...]:
    for spec in specs:
        step = parse(spec)
        if step.contract is not Contract.EXACT:
            raise ValueError(f"{spec} is lossy; the recipe's section for it decides, not the chain")
        if not step.keeps_signature:
            raise ValueError(
                f"{spec} changes inputs or outputs: ask for it with fix_dims, outputs or uint8_input"
            )
    return specs


Rung = Literal["equalize", "smooth", "bias", "round", "shift", "train"]


Format = Literal["auto", "qdq", "qoperator", "dynamic", "int4-weights", "int8-weights", "float16", "bfloat16"]


class Quantize(_Frozen):
    """How int8 is made. The `format` auto is QDQ, with dynamic int8 as its rival where that is possible.

    Of the range `methods` the one whose int8 model is nearest to the float model counts; each rung of the
    `ladder` is kept where it brings the outputs nearer; "train", which needs torch, trains weights for their
    integers. `prepare` holds exact passes that run before: what they write may be slower in float, and has
    int8 kernels where what was there has none. With `search` every node is timed in float and in int8 on the
    target and runs in what is faster, as a whole; without, rules for the target decide. `portable` keeps
    processors without VNNI from saturating: "auto" where that costs less than 0.1 dB.
    """

    methods: tuple[Literal["minmax", "average", "percentile", "entropy", "mse"], ...] = Field(
        default=("minmax", "mse", "percentile", "entropy", "average"), min_length=1
    )
    options: QuantOptions = QuantOptions()
    prepare: tuple[str, ...] = PREPARATION
    ladder: tuple[Rung, ...] = ("equalize", "smooth", "bias", "round", "shift")
    search: bool = True
    format: Format = "auto"
    portable: Literal["auto", "on", "off"] = "auto"
    samples: int = Field(default=128, ge=1, description="samples that calibrate; the rest judges")

    @field_validator("prepare")
    @classmethod
    def _are_exact_passes(cls, specs: tuple[str, ...]) -> tuple[str, ...]:
        return _exact(specs)

    @property
    def preparation(self) -> tuple[Pass, ...]:
        """The passes that run before, ready to run."""
        return tuple(parse(spec) for spec in self.prepare)


Importance = Literal[
    "fisher",
    "taylor",
    "gradient",
    "reconstruction",
    "magnitude-l1",
    "magnitude-l2",
    "bn-scale",
    "activation-mean",
    "activation-energy",
    "activation-zeros",
    "random",
]

_BOUNDS = ("min_metric", "max_latency", "max_macs", "max_size", "ratio")
_ALL_BOUNDS = ("max_drop", *_BOUNDS)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class Prune(_Frozen):
    """Which channels leave, and how the rest gets its accuracy back.

    One bound counts: without any other as little as possible is kept such that the metric falls by no more
    than the recipe's `max_drop`; or no lower than `min_metric`. The others say how much is kept whatever the
    metric: `max_latency` ms, a share `max_macs` of the multiply-accumulates, `max_size` MB of file, or all
    layers lose the `ratio` of their channels. Channels leave by their `score` and by what they save of the
    `cost`, which is by default what the bound or else the objective is about. What stays gets new statistics
    and biases, or is refitted in closed form, or that and distilled from the original, for `effort` times as
    long. In `schedule` steps each cuts a little and recovers. With `best_effort` a bound that cannot be
    reached is missed by as little as possible. So many `workers` try amounts at once, or actors of the Ray
    cluster at `ray`. Every amount that was tried is written into the folder `candidates`, where one is named.
    """

    score: Importance = "fisher"
    cost: Literal["latency", "macs", "size", "balanced"] | None = None
    min_metric: float | None = None
    max_latency: float | None = Field(default=None, gt=0)
    max_macs: float | None = Field(default=None, gt=0, le=1)
    max_size: float | None = Field(default=None, gt=0)
    ratio: float | None = Field(default=None, gt=0, lt=1)
    recover: Literal["none", "reestimate", "closed-form", "distill"] = "distill"
    effort: float = Field(default=1.0, gt=0)
    schedule: int = Field(default=1, ge=1)
    trials: int = Field(default=6, ge=1, description="amounts that are tried for a bound on the metric")
    best_effort: bool = False
    candidates: str | None = None
    workers: int | None = Field(default=None, ge=1)
    ray: str | None = None
    memory: int = Field(default=1 << 30, ge=1 << 20, description="bytes of samples and values held at once")

    @model_validator(mode="after")
    def _has_one_bound(self) -> Prune:
        given = [name for name in _BOUNDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"one bound counts, not {' and '.join(given)}")
        return self

    @property
    def bounds_metric(self) -> bool:
        """Whether the metric decides how much leaves."""
        return all(getattr(self, name) is None for name in _BOUNDS[1:])


class Benchmark(_Frozen):
    """How long the measuring may take and how sure it must be."""

    precision: float = Field(default=0.01, gt=0, lt=1)
    max_seconds: float = Field(default=15.0, gt=0)


class Recipe(_Frozen):
    """The whole job. `max_drop` is in units of the metric: 0.01 of top1 is one point. Of what keeps it the
    `objective` chooses: the fastest, the smallest whatever time it takes, or the least product of both.

    What a device needs of the file is done first, and whatever else is done starts from there: open
    dimensions get a size (`fix_dims`: batch=1), `outputs` are kept and all others cut, the image input
    takes raw pixels in the layout `uint8_input` and is normalized inside as `preprocess` says, the file is
    held at what the onnxruntime of version `runtime` reads, and with `strip` debug strings are removed. With
    `short_names` the names inside become short at the very end.
    `emit` names a format that is written beside the .onnx file. `fuse_for_onnxruntime` names a kind of
    transformer, bert or bert{heads: 12, hidden: 768}: onnxruntime's own fusions then come first, and the
    file runs on onnxruntime only.
    """

    version: Literal[1] = 1
    passes: tuple[str, ...] = EXACT_CHAIN
    prune: Prune | None = None
    quantize: Quantize | None = Quantize()
    benchmark: Benchmark | None = Benchmark()
    preprocess: Preprocess | None = None
    fix_dims: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    uint8_input: Literal["nchw", "nhwc"] | None = None
    runtime: str | None = None
    strip: bool = False
    short_names: bool = False
    emit: Literal["ort"] | None = None
    fuse_for_onnxruntime: str | None = None
    metric: str | None = None
    max_drop: float = Field(default=0.01, ge=0)
    objective: Literal["latency", "size", "balanced"] = "latency"
    target: TargetName = "cpu"
    threads: int | None = Field(default=None, ge=1)
    seed: int = 0

    @field_validator("passes")
    @classmethod
    def _are_exact_passes(cls, specs: tuple[str, ...]) -> tuple[str, ...]:
        return _exact(specs)

    @field_validator("runtime")
    @classmethod
    def _is_known(cls, runtime: str | None) -> str | None:
        if runtime is not None:
            limits_of(runtime)
        return runtime

    @field_validator("fuse_for_onnxruntime")
    @classmethod
    def _is_a_kind(cls, kind: str | None) -> str | None:
        if kind is not None:
            fusion_of(kind)
        return kind

    @property
    def chain(self) -> tuple[Pass, ...]:
        """The exact passes, ready to run; what they write is what `runtime` reads."""
        fusions = () if self.fuse_for_onnxruntime is None else (fusion_of(self.fuse_for_onnxruntime),)
        steps = (*fusions, *(parse(spec) for spec in self.passes))
        if self.runtime is None:
            return steps
        limits = limits_of(self.runtime)
        capped = (
            dataclasses.replace(s, to=min(s.to, limits.opset)) if isinstance(s, UpgradeOpset) else s
            for s in steps
        )
        return (*capped, LowerOpset(limits.opset, limits.ir_version))

    def without(self, step: Pass) -> Recipe | None:
        """The recipe without one of its exact passes; None where that is none of its own."""
        if isinstance(step, FuseForOnnxruntime):
            return self.model_copy(update={"fuse_for_onnxruntime": None})
        passes = tuple(spec for spec in self.passes if parse(spec) != step)
        return None if passes == self.passes else self.model_copy(update={"passes": passes})

    def to_yaml(self) -> str:
        """Text that `load_recipe` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def fast(self) -> Recipe:
        """The same job without its searches: rules and one range method instead of measurements."""
        quantize = self.quantize and self.quantize.model_copy(
            update={"search": False, "ladder": (), "methods": self.quantize.methods[:1]}
        )
        benchmark = self.benchmark and self.benchmark.model_copy(
            update={"max_seconds": min(self.benchmark.max_seconds, _FAST_SECONDS)}
        )
        return self.model_copy(update={"quantize": quantize, "benchmark": benchmark})

    def to_prune(self, wanted: Mapping[str, Any], *, by_drop: bool, int8: bool) -> Recipe:
        """The recipe for pruning as `wanted`; for what is exact if no bound is named here or in `prune`.

        Static int8 follows if that is asked for. Raises `InputError` on options that do not go together.
        """
        known = {} if self.prune is None else self.prune.model_dump()
        if by_drop or any(name in wanted for name in _BOUNDS):
            known |= dict.fromkeys(_BOUNDS)
        elif self.prune is None:
            if wanted or int8:
                raise InputError(f"a bound is missing: name one of {', '.join(map(_option, _ALL_BOUNDS))}")
            return self
        if by_drop and (rival := next((name for name in _BOUNDS if name in wanted), None)):
            raise InputError(f"one bound counts, not --max-drop and {_option(rival)}")
        update = {"prune": {**known, **wanted}} | ({} if int8 else {"quantize": None})
        return recipe_from({**self.model_dump(), **update}, "options")

    def with_options(self, **options: Any) -> Recipe:
        """The recipe with every option that is not None in place of its own value."""
        given = {key: value for key, value in options.items() if value is not None}
        return recipe_from({**self.model_dump(), **given}, "options")


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe; `InputError` names the field that does not fit."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"recipe {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise InputError(f"recipe {path} is no mapping of option names to values")
    return recipe_from(data, str(path))


def recipe_from(data: dict[str, Any], source: str) -> Recipe:
    """Validate plain data; `source` names where it came from."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"recipe {source}: {where}: {first['msg']}") from error
