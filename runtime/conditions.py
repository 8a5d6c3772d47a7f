"""Under which conditions models are run: what a latency depends on beside the model and the machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgewise.runtime.errors import InputError
from edgewise.runtime.machine import cores_for, usable_cores


@dataclass(frozen=True)
class Conditions:
    """How a model is run. The defaults are onnxruntime's own; `InputError` on what makes no sense.

    `threads` are those within an operator (None: one a physical core), `inter_op_threads` run operators
    side by side. `cores` are those the process is pinned to; none leaves it free. `concurrency` runs at
    once share one session when throughput is measured. `io_binding` keeps inputs and outputs on the
    device, so that no run copies them; None does so on devices only. With `strict`, a model of which the
    provider does not take every node counts as failed.
    """

    provider: str = "cpu"
    threads: int | None = None
    inter_op_threads: int | None = None
    spinning: bool = True
    cores: tuple[int, ...] = ()
    batch: int = 1
    concurrency: int = 1
    io_binding: bool | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("threads", "inter_op_threads", "batch", "concurrency"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 or more, not {value}")

    def pinned(self) -> Conditions:
        """With cores for the threads asked for, one thread a core, where none were named.

        Raises `InputError` where one was named that this process may not use.
        """
        if missing := set(self.cores) - set(usable_cores()):
            usable = ", ".join(map(str, usable_cores()))
            raise InputError(f"core {min(missing)} is not to be had: this process may use {usable}")
        if self.cores or self.threads is None:
            return self
        return dataclasses.replace(self, cores=cores_for(self.threads * self.concurrency))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {**dataclasses.asdict(self), "cores": list(self.cores)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Conditions:
        """What `to_dict` wrote."""
        return cls(**{**data, "cores": tuple(data["cores"])})

    def __str__(self) -> str:
        parts = [
            self.provider,
            "all cores" if self.threads is None else _count(self.threads, "thread"),
            *([f"batch {self.batch}"] if self.batch > 1 else []),
            *([f"{self.concurrency} runs at once"] if self.concurrency > 1 else []),
        ]
        return ", ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number > 1)}"
