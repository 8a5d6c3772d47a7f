"""Where the time of one model goes, or why another version of it takes more or less."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewise.calibration.data import Preprocess, Samples
from edgewise.optimizer import files
from edgewise.optimizer.benchmarking import names_of
from edgewise.optimizer.inputs import as_samples, check_inputs, feed_of
from edgewise.optimizer.pipeline import Progress, no_progress
from edgewise.runtime.errors import InputError
from edgewise.runtime.machine import Machine, describe
from edgewise.runtime.peaks import Peaks, measure_peaks_isolated
from edgewise.runtime.profile import Profile, profile_isolated
from edgewise.runtime.profile_difference import ProfileDifference, difference
from edgewise.runtime.session import check_provider

ModelPath = str | os.PathLike[str]


@dataclass(frozen=True)
class ProfileReport:
    """One or two profiles and what they were measured on.

    `inputs` are names, types and shapes of what was fed, and where it is from; `names` are short names
    of the models. `peaks` is None where they were not measured, `difference` where there is one model.
    """

    machine: Machine
    inputs: str
    names: tuple[str, ...]
    profiles: tuple[Profile, ...]
    peaks: Peaks | None
    difference: ProfileDifference | None
    top: int = 10
    """How many nodes a view shows."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "machine": self.machine.to_dict(),
            "inputs": self.inputs,
            "names": list(self.names),
            "profiles": [profile.to_dict() for profile in self.profiles],
            "peaks": None if self.peaks is None else self.peaks.to_dict(),
            "difference": None if self.difference is None else self.difference.to_dict(),
        }


def profile(
    models: Sequence[ModelPath],
    *,
    provider: str = "cpu",
    threads: int | None = None,
    batch: int = 1,
    data: str | Samples | None = None,
    preprocess: Preprocess | None = None,
    runs: int | None = None,
    seed: int = 0,
    peaks: bool = True,
    timeout: float = 120.0,
    progress: Progress = no_progress,
) -> ProfileReport:
    """Tell where the time of one .onnx file goes; with a second one, where the difference comes from.

    Both get the same `batch` samples of `data`, seeded ones if there are none. Every model runs in a
    process of its own, `runs` times (without it, for a few seconds), pinned to as many cores as
    `threads`. `peaks` measures beside it how fast the machine is at best. Raises `InputError` on files
    that cannot be used or take different inputs, `ProviderError` where the provider is not there,
    `EdgewiseError` with the cause where a model crashes, or does not answer within `timeout` seconds.
    """
    if not 1 <= len(models) <= 2:
        raise InputError(f"one model is profiled, or two are compared: {len(models)} were given")
    _check(threads, runs, timeout)
    check_provider(provider)
    named = names_of([Path(model) for model in models])
    loaded = [files.load(path) for path in named.values()]
    for path, other in zip(named.values(), loaded, strict=True):
        check_inputs(loaded[0], other, path)
    samples = as_samples(data, loaded[0], preprocess, seed)
    feed = feed_of(loaded[0], samples, batch, seed)
    del loaded
    profiles = []
    for i, path in enumerate(named.values()):
        progress(f"profile {path.name}", i, len(named) + peaks)
        profiles.append(
            profile_isolated(
                path, feed, provider=provider, threads=threads, runs=runs, seed=seed, timeout=timeout
            )
        )
    progress("peaks", len(named), len(named) + peaks)
    names = tuple(named)
    return ProfileReport(
        machine=describe(),
        inputs=", ".join(f"{name} {a.dtype}{list(a.shape)}" for name, a in feed.items())
        + (f" (random, seed {seed})" if samples is None else f" ({samples.source})"),
        names=names,
        profiles=tuple(profiles),
        peaks=measure_peaks_isolated(provider, threads, timeout=timeout) if peaks else None,
        difference=difference(*profiles, names=(names[0], names[1])) if len(names) == 2 else None,
    )


def _check(threads: int | None, runs: int | None, timeout: float) -> None:
    if threads is not None and threads < 1:
        raise InputError(f"threads must be 1 or more, not {threads}")
    if runs is not None and runs < 2:
        raise InputError(f"runs must be 2 or more, not {runs}")
    if not timeout > 0:
        raise InputError(f"timeout must be above 0, not {timeout:g}")
