"""What is chosen before a training and what is known after it: plain values, without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from typing import Any, Literal

import onnx_ir as ir

from edgewise.runtime.errors import EdgewiseError, InputError

_DEFAULT_EPOCHS = 30
PENALTIES = ("l1", "l2", "group-lasso", "bn-scale")


@dataclass(frozen=True)
class TrainOptions:
    """How a model is trained. Lengths: the first limit that is reached of those that are set counts.

    The rate rises over the first `warmup` of the way and falls as a cosine to zero. `weight_decay` spares
    vectors. `clip` bounds the norm of all gradients together. Training stops after `patience` epochs without
    a smaller loss on the samples held back. `temperature` softens scores. `inner` weighs inner values
    against outputs, `labels` those (where there are any) against the teacher, and `blockwise` is the share of
    the way on which every block learns by itself. `frozen` is the share at the end on which the statistics
    of batch norms stay. `augment` is "auto" for images, or "none". `freeze` holds patterns for names of
    initializers that stay. `memory` bounds, in bytes, samples and what is computed of them: samples beyond a
    part of it lie in a temporary file, and a batch goes through the model in as many parts as make it fit.
    Batch norms see the parts, and those of less than 4 rows with stored statistics. The weights and what
    belongs to them come on top.

    The same options and seed give the same model, with `max_seconds` only on a machine of the same speed.
    """

    epochs: int | None = None
    steps: int | None = None
    max_seconds: float | None = None
    batch: int = 64
    learning_rate: float = 2e-3
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9
    warmup: float = 0.05
    weight_decay: float = 1e-4
    clip: float = 5.0
    patience: int | None = None
    temperature: float = 4.0
    inner: float = 0.5
    labels: float = 0.5
    blockwise: float = 0.0
    frozen: float = 0.1
    augment: Literal["auto", "none"] = "auto"
    freeze: tuple[str, ...] = ()
    seed: int = 0
    memory: int = 2**30

    def __post_init__(self) -> None:
        """Raise `InputError` on the first value that means nothing."""
        for name in (
            "epochs",
            "steps",
            "max_seconds",
            "patience",
            "batch",
            "learning_rate",
            "clip",
            "temperature",
        ):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"training: {name} has to be above zero, not {value}")
        if not 0 <= self.frozen <= 1:
            raise InputError(f"training: frozen is a share from 0 to 1, not {self.frozen}")
        for name in ("warmup", "blockwise", "momentum", "labels"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"training: {name} is a share, at least 0 and below 1, not {getattr(self, name)}"
                )
        for name in ("weight_decay", "inner", "memory", "seed"):
            if not getattr(self, name) >= 0:
                raise InputError(f"training: {name} cannot be negative, as {getattr(self, name)} is")
        for name, known in (("optimizer", ("adamw", "sgd")), ("augment", ("auto", "none"))):
            if getattr(self, name) not in known:
                raise InputError(f"training: {name} is one of {', '.join(known)}, not {getattr(self, name)}")

    def total(self, per_epoch: int) -> float:
        """How many steps are made at most, in epochs of so many."""
        if self.epochs is None and self.steps is None:
            return math.inf if self.max_seconds is not None else _DEFAULT_EPOCHS * per_epoch
        limits = (self.steps, None if self.epochs is None else self.epochs * per_epoch)
        return min(limit for limit in limits if limit is not None)

    def rate(self, way: float) -> float:
        """The learning rate at a share of the way."""
        if way < self.warmup:
            return self.learning_rate * max(way / self.warmup, 0.01)
        return (
            self.learning_rate
            * 0.5
            * (1 + math.cos(math.pi * min((way - self.warmup) / (1 - self.warmup), 1)))
        )

    def shortened(self, share: float) -> TrainOptions:
        """The same for a share of the way."""
        epochs, steps, seconds = self.epochs, self.steps, self.max_seconds
        if epochs is None and steps is None and seconds is None:
            epochs = _DEFAULT_EPOCHS
        return replace(
            self,
            epochs=None if epochs is None else max(round(epochs * share), 1),
            steps=None if steps is None else max(round(steps * share), 1),
            max_seconds=None if seconds is None else seconds * share,
        )


@dataclass(frozen=True)
class Penalty:
    """`strength` times one of

    l1           the sum of |w|, which makes single weights zero
    l2           half the sum of w**2, which makes weights small
    group-lasso  the sum over channels of the norm of all that leaves with a channel, times the square root
                 of their number (Yuan & Lin, 2006), which makes whole channels zero
    bn-scale     the sum of |scale| of batch norms (Liu et al., ICCV 2017), which makes channels constant
    """

    kind: str
    strength: float

    def __post_init__(self) -> None:
        if self.kind not in PENALTIES:
            raise InputError(f"penalty {self.kind!r} is none of {', '.join(PENALTIES)}")
        if not 0 <= self.strength < math.inf:
            raise InputError(f"a penalty's strength is a number from zero on, not {self.strength}")

    @classmethod
    def parse(cls, text: str) -> Penalty:
        """The penalty of kind=strength, as group-lasso=1e-4. Raises `InputError` on anything else."""
        kind, _, strength = text.partition("=")
        try:
            return cls(kind, float(strength))
        except ValueError:
            raise InputError(f"{text!r} is no penalty such as group-lasso=1e-4") from None


@dataclass(frozen=True)
class Epoch:
    """One pass over the samples; number 0 is the model before training, which has no `loss`.

    `held_back` is the loss on the samples held back. `score` is the share of their rows with the right
    answer, or 1 - noise over signal where the outputs are no scores; more is better.
    """

    number: int
    loss: float | None
    held_back: float
    score: float
    learning_rate: float
    seconds: float
    phase: str = "end to end"


@dataclass(frozen=True)
class History:
    """The epochs of a training in order, and why it came to its end."""

    epochs: tuple[Epoch, ...] = ()
    ended: str = "all steps are made"

    @property
    def best(self) -> Epoch:
        """The epoch whose weights were kept: that of the smallest held-back loss in the last phase."""
        last = [epoch for epoch in self.epochs if epoch.phase == self.epochs[-1].phase]
        return min(last, key=lambda epoch: epoch.held_back if math.isfinite(epoch.held_back) else math.inf)

    @property
    def start(self) -> Epoch:
        """The model before training, measured as `best` is."""
        return next(epoch for epoch in self.epochs if epoch.phase == self.epochs[-1].phase)

    @property
    def seconds(self) -> float:
        """The time of all epochs."""
        return sum(epoch.seconds for epoch in self.epochs)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts and lists, for YAML or JSON."""
        return {"ended": self.ended, "epochs": [asdict(epoch) for epoch in self.epochs]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> History:
        """What `to_dict` gave."""
        known = {field.name for field in fields(Epoch)}
        epochs = (Epoch(**{k: v for k, v in row.items() if k in known}) for row in data["epochs"])
        return cls(tuple(epochs), str(data["ended"]))


@dataclass(frozen=True, eq=False)
class Trained:
    """A model with the best weights that a training found, never worse on held-back samples than before."""

    model: ir.Model
    history: History


class DivergedError(EdgewiseError):
    """Losses or gradients are no numbers any more. `trained` is the best that was found until then."""

    def __init__(self, text: str, trained: Trained) -> None:
        super().__init__(text)
        self.trained = trained


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a training. `trained` is the best that was found until then."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.trained = trained


@contextmanager
def ending_in(change: Callable[[Trained], Trained]) -> Iterator[None]:
    """Where a training within the context is broken off, what it hands out is `change` of what it had."""
    try:
        yield
    except Interrupted as stop:
        raise Interrupted(change(stop.trained)) from None
    except DivergedError as error:
        raise DivergedError(str(error), change(error.trained)) from None


def require_torch(what: str, instead: str = "") -> None:
    """Raise `InputError` where torch is not installed, before any work that ends in `what` is begun."""
    if find_spec("torch") is None:
        raise InputError(f"{what} needs torch: pip install 'edgewise[torch]'{instead and f', or {instead}'}")
