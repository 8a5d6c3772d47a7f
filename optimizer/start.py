"""What a job starts from: a model that was read and made what was asked for, and what it is run on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgewise.calibration.data import Samples
from edgewise.optimizer import files
from edgewise.optimizer.inputs import RANDOM
from edgewise.optimizer.interface import Adapted, adapt
from edgewise.optimizer.probe import probe_feeds
from edgewise.optimizer.recipe import Recipe
from edgewise.optimizer.transformers import with_hidden_keys
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Feed

_AS_ASKED = "what is measured and compared as the input is the model with the changes that were asked for"


@dataclass(frozen=True)
class Start:
    """A model that was read from `path` and made what was asked for, and what it is run on."""

    path: Path
    adapted: Adapted
    samples: Samples | None
    feeds: tuple[Feed, ...]
    validation: Samples | None = None

    @property
    def judges(self) -> Samples | None:
        """What judges where none of the samples are held back for it."""
        return self.samples if self.validation is None else self.validation

    @property
    def notes(self) -> tuple[str, ...]:
        """What people should know of it."""
        random = any(s is not None and s.random for s in (self.samples, self.validation))
        return (*((RANDOM,) if random else ()), *((_AS_ASKED,) if self.adapted.changes else ()))

    def file(self, scratch: Path) -> Path:
        """The file of the model as it was asked for, in `scratch` where that is not as it came."""
        if not self.adapted.changes:
            return self.path
        path = scratch / f"{self.path.stem}.as-asked.onnx"
        return path if path.exists() else files.save(self.adapted.model, path)


def begin(
    path: Path, data: str | Samples | None, recipe: Recipe, validation: str | Samples | None = None
) -> Start:
    """Read a model, make it what the recipe asks for and see that it still answers as it did."""
    if isinstance(validation, str) and validation == data:
        raise InputError(f"--validation is {data} like --data: nobody judges what was learned by heart")
    adapted = adapt(files.load(path), recipe)
    samples, judges = (adapted.samples(d, recipe.preprocess, recipe.seed) for d in (data, validation))
    feeds = probe_feeds(adapted.model, samples, seed=recipe.seed)
    adapted.verify(feeds, threads=recipe.threads)
    if recipe.fuse_for_onnxruntime is not None:
        feeds = with_hidden_keys(adapted.model, feeds)
    return Start(path, adapted, samples, feeds, judges)
