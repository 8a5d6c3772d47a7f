"""The loop that trains a graph, whatever it learns: rate, clipping, best weights, restarts, resuming."""

from __future__ import annotations

import json
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgewise.passes.fingerprint import fingerprint
from edgewise.passes.graph import Array, constant_of
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.training.batches import Batch, Stack, varied
from edgewise.training.graph_module import GraphModule, lay_out
from edgewise.training.options import DivergedError, Epoch, History, Interrupted, Trained, TrainOptions
from edgewise.training.torch_threads import torch_threads

_RESTARTS = 2
_ROWS_FOR_STATISTICS = 4  # of fewer rows a batch norm takes what is stored: theirs tell too little
_LEARNED: Mapping[str, tuple[int, ...]] = {
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "PRelu": (1,),
    "Gather": (0,),
    "Einsum": (0, 1, 2),
    "LSTM": (1, 2, 3, 7),
    "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
}
"""The inputs that hold weights, whatever their size."""
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div"})
"""Operators whose constants are weights where they are more than one number."""
_MOVING = frozenset(
    {"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Identity", "QuantizeLinear", "DequantizeLinear"}
)
"""Operators through which weights may reach their reader."""


@dataclass(frozen=True)
class Answer:
    """The loss of a batch, a mean over its rows, and how well it does in a measure that people read."""

    loss: Tensor
    score: float


class Objective(Protocol):
    """What is to become small: runs the module on a batch."""

    def __call__(self, batch: Batch, /) -> Answer: ...


class Regularizer(Protocol):
    """A penalty on the weights themselves, whose proximal step is made behind every step of the optimizer."""

    def __call__(self, rate: float, /) -> None:
        """Make the step for this learning rate."""

    @property
    def value(self) -> float:
        """What it adds to the loss on held-back samples, by which the best weights are chosen."""


Progress = Callable[[Epoch], None]


def trainable(model: ir.Model, freeze: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The names of the float initializers that are weights and match none of the patterns `freeze`.

    Constants that are part of an operator's meaning, as scales of a Resize, the statistics of a batch norm,
    or a lone number in a formula, are no weights.
    """
    found = []
    for name, value in model.graph.initializers.items():
        array = constant_of(value)
        if array is not None and array.dtype.kind == "f" and _is_weight(value, array.size):
            found.append(name)
    return tuple(name for name in found if not any(fnmatchcase(name, pattern) for pattern in freeze))


def _is_weight(value: ir.Value, size: int) -> bool:
    for node, index in value.uses():
        if node.op_type in _LEARNED and index in _LEARNED[node.op_type]:
            return True
        if node.op_type in _ARITHMETIC and size > 1:
            return True
        if node.op_type in _MOVING and index == 0 and _is_weight(node.outputs[0], size):
            return True
    return False


def train(
    model: ir.Model,
    module: GraphModule,
    objective: Objective,
    samples: Stack,
    held_back: Stack,
    options: TrainOptions,
    *,
    varies: bool = False,
    flips: bool = False,
    weights: tuple[str, ...] | None = None,
    regularizer: Regularizer | None = None,
    phase: str = "end to end",
    checkpoint: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Make `objective` of `module`, which runs `model`, small on `samples`.

    The weights that are returned are those with which it is smallest on `held_back`.
    With `varies` images are moved and mixed, with `flips` mirrored. `weights` names what is trained, by
    default all that is `trainable`. A `regularizer` counts in the loss on held-back samples.
    A run goes on from `checkpoint`, which is written behind every epoch, as if it had never ended.

    Raises `DivergedError` where the loss is no number even at a quarter of the rate, and `Interrupted` on
    Ctrl-C; both hold the best weights until then.
    """
    run = _Run(model, module, objective, samples, held_back, options, weights, phase)
    run.varies, run.flips, run.regularizer = varies, flips, regularizer
    with _settings(threads, options.seed):
        run.begin(checkpoint)
        try:
            while run.way < 1 and not run.is_stuck:
                run.epoch()
                run.report(progress)
                run.save(checkpoint)
        except KeyboardInterrupt:
            raise Interrupted(run.trained("interrupted")) from None
        return run.trained("patience is over" if run.is_stuck else "all steps are made")


class _ExplodedError(Exception):
    """A loss or a gradient is no finite number."""


class _Run:
    """One training, between its epochs a state that can be saved."""

    def __init__(
        self,
        model: ir.Model,
        module: GraphModule,
        objective: Objective,
        samples: Stack,
        held_back: Stack,
        options: TrainOptions,
        weights: tuple[str, ...] | None,
        phase: str,
    ) -> None:
        self._module, self._objective, self._options, self._phase = module, objective, options, phase
        self._samples, self._held_back = samples, held_back
        self._fingerprint = fingerprint(model)
        lay_out(module)
        names = trainable(model, options.freeze) if weights is None else weights
        self._names = tuple(name for name in names if name in module.weights)
        if not self._names:
            raise InputError(_why_nothing_learns(model))
        self._weights = [module.weights[name] for name in self._names]
        self._total = options.total(max(len(samples) // options.batch, 1))
        self.varies = self.flips = False
        self.regularizer: Regularizer | None = None
        self._epochs: list[Epoch] = []
        self._moves = True
        self._step = self._restarts = 0
        self._spent = 0.0
        self._since = time.perf_counter()
        self._best: dict[str, Tensor] = {}
        self._optimizer = self._new_optimizer()

    @property
    def way(self) -> float:
        """The share of the way that is behind: of the steps, or of the time."""
        seconds = self._options.max_seconds
        spent = self._spent + time.perf_counter() - self._since
        return max(self._step / self._total, 0.0 if seconds is None else spent / seconds)

    @property
    def is_stuck(self) -> bool:
        """Whether the loss did not fall for as many epochs as patience has."""
        best = History(tuple(self._epochs)).best.number
        return self._options.patience is not None and self._epochs[-1].number - best >= self._options.patience

    def begin(self, checkpoint: Path | None) -> None:
        """Measure the model as it is, or go on where `checkpoint` ends."""
        if checkpoint is not None and checkpoint.exists():
            self._load(checkpoint)
            return
        loss, score = self._judged()
        if not math.isfinite(loss):
            raise EdgewiseError(
                "the loss is no number before training: check the model's outputs on the samples held back"
            )
        self._epochs.append(Epoch(0, None, loss, score, 0.0, 0.0, self._phase))
        self._best = self._snapshot()

    def epoch(self) -> None:
        """One pass over the samples, again from the best weights at half the rate where numbers explode."""
        since, number = time.perf_counter(), self._epochs[-1].number + 1
        while True:
            try:
                loss, rate = self._pass(np.random.default_rng([self._options.seed, number, self._restarts]))
                held_back, score = self._judged()
                if not math.isfinite(held_back):
                    raise _ExplodedError
                break
            except _ExplodedError:
                self._restart()
        if held_back < History(tuple(self._epochs)).best.held_back:
            self._best = self._snapshot()
        now = time.perf_counter()
        self._epochs.append(Epoch(number, loss, held_back, score, rate, now - since, self._phase))
        self._spent, self._since = self._spent + now - self._since, now

    def _pass(self, rng: np.random.Generator) -> tuple[float | None, float]:
        """Mean loss and last rate; no loss where the time was over before the first step."""
        losses, rate = [], 0.0
        for batches in self._samples.steps(self._options.batch, rng):
            way = self.way
            if way >= 1:
                break
            self._moves = way < 1 - self._options.frozen
            rate = self._options.rate(way) * 0.5**self._restarts
            losses.append(self._update(batches, rate, rng))
            self._step += 1
        return float(np.mean(losses)) if losses else None, rate

    def _update(self, batches: tuple[Batch, ...], rate: float, rng: np.random.Generator) -> float:
        """One step of the optimizer on the mean loss of all samples of `batches`."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        count, total = sum(len(batch.numbers) for batch in batches), 0.0
        for batch in batches:
            self._module.train(self._moves and len(next(iter(batch.feed.values()))) >= _ROWS_FOR_STATISTICS)
            answer = self._objective(varied(batch, rng, flips=self.flips) if self.varies else batch)
            loss = answer.loss * (len(batch.numbers) / count)
            if not loss.requires_grad:
                raise EdgewiseError("no output depends smoothly on the weights: there is nothing to train by")
            loss.backward(inputs=self._weights)  # type: ignore[no-untyped-call]
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self._weights, self._options.clip)
        if not math.isfinite(total + norm.item()):
            raise _ExplodedError
        self._optimizer.step()
        if self.regularizer is not None:
            self.regularizer(rate)
        return total

    def _judged(self) -> tuple[float, float]:
        """Loss and score on the samples held back."""
        loss, score = judged_on(self._module, self._objective, self._held_back, self._options.batch)
        return loss + (0.0 if self.regularizer is None else self.regularizer.value), score

    def _restart(self) -> None:
        if self._restarts == _RESTARTS:
            raise DivergedError(
                f"training diverged, at last with a rate of {self._options.learning_rate / 4:.2g}: "
                "choose a lower learning rate",
                self.trained("diverged"),
            )
        self._restarts += 1
        self._module.load_state_dict(self._best)
        self._optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """Vectors, which are biases and scales of norms, do not decay."""
        options, parameters = self._options, self._weights
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if options.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=options.learning_rate)
        return torch.optim.SGD(
            groups, lr=options.learning_rate, momentum=options.momentum, nesterov=options.momentum > 0
        )

    def report(self, progress: Progress | None) -> None:
        if progress is not None:
            progress(self._epochs[-1])

    def trained(self, ended: str) -> Trained:
        """The best weights, which from now on the module has as well."""
        self._module.load_state_dict(self._best)
        self._module.eval()
        return Trained(self._module.write_back(), History(tuple(self._epochs), ended))

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._module.state_dict().items()}

    def save(self, checkpoint: Path | None) -> None:
        """Everything that the next epoch depends on; the file is whole at any moment."""
        if checkpoint is None:
            return
        arrays = {f"now/{name}": _numpy(tensor) for name, tensor in self._module.state_dict().items()}
        arrays |= {f"best/{name}": _numpy(tensor) for name, tensor in self._best.items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            arrays |= {f"optimizer/{index}/{key}": _numpy(torch.as_tensor(t)) for key, t in state.items()}
        plain = {
            "of": self._identity,
            "epochs": [asdict(epoch) for epoch in self._epochs],
            "step": self._step,
            "restarts": self._restarts,
            "spent": self._spent,
        }
        unfinished = checkpoint.with_name(checkpoint.name + ".part")
        with unfinished.open("wb") as file:
            np.savez(file, plain=np.array(json.dumps(plain)), **arrays)  # type: ignore[arg-type]
        os.replace(unfinished, checkpoint)

    @property
    def _identity(self) -> str:
        """What a checkpoint must be of: the same model, way and samples."""
        samples = (len(self._samples), len(self._held_back), self.varies, self.flips)
        return f"{self._fingerprint} {self._options} {self._phase} {samples} {self._names}"

    def _load(self, checkpoint: Path) -> None:
        try:
            with np.load(checkpoint) as file:
                arrays = dict(file)
            plain = json.loads(str(arrays.pop("plain")))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{checkpoint} is no checkpoint of a training: remove it") from error
        if plain["of"] != self._identity:
            raise InputError(f"{checkpoint} is of another training: remove it, or name another file")
        self._best = {n[5:]: torch.from_numpy(a) for n, a in arrays.items() if n.startswith("best/")}
        self._module.load_state_dict(
            {n[4:]: torch.from_numpy(a) for n, a in arrays.items() if n.startswith("now/")}
        )
        self._epochs = [Epoch(**epoch) for epoch in plain["epochs"]]
        self._step, self._restarts, self._spent = plain["step"], plain["restarts"], plain["spent"]
        state: dict[int, dict[str, Tensor]] = {}
        for name, array in arrays.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                state.setdefault(int(index), {})[key] = torch.from_numpy(array)
        whole = self._optimizer.state_dict()
        self._optimizer.load_state_dict({**whole, "state": state})


def _why_nothing_learns(model: ir.Model) -> str:
    stored = (node.inputs[0] for node in model.graph if node.op_type == "DequantizeLinear")
    if any(value is not None and constant_of(value) is not None for value in stored):
        return "the model's weights are integers, which do not learn: train the float model it was made of"
    return "the model has no weights to train, or all of them are frozen: free some"


def judged_on(module: GraphModule, objective: Objective, held_back: Stack, size: int) -> tuple[float, float]:
    """Mean loss and score of the module in inference."""
    module.eval()
    sums = np.zeros(2)
    with torch.no_grad():
        for batch in held_back.in_order(size):
            answer = objective(batch)
            sums += len(batch.numbers) * np.array([answer.loss.item(), answer.score])
    loss, score = (sums / len(held_back)).tolist()
    return loss, score


def _numpy(tensor: Tensor) -> Array:
    """The numbers, in float32 those of a type that numpy lacks: loading them turns them back."""
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()
    return array


@contextmanager
def _settings(threads: int | None, seed: int) -> Iterator[None]:
    """So many threads and this seed for torch, and afterwards as it was."""
    with torch_threads(threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
