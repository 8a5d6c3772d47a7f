"""What a latency depends on beside the model and the machine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgewise.runtime.conditions import Conditions
from edgewise.runtime.errors import InputError
from edgewise.runtime.machine import cores_for, usable_cores


@pytest.mark.parametrize("name", ["threads", "inter_op_threads", "batch", "concurrency"])
def test_counts_are_counts(name: str) -> None:
    fields: dict[str, Any] = {name: 0}
    with pytest.raises(InputError, match=f"{name} must be 1 or more"):
        Conditions(**fields)


def test_survive_json() -> None:
    conditions = Conditions("cuda", 2, 3, False, (99, 100), 8, 4, True, True)
    assert Conditions.from_dict(json.loads(json.dumps(conditions.to_dict()))) == conditions


def test_threads_are_pinned_to_cores_of_their_own() -> None:
    assert Conditions(threads=1).pinned().cores == cores_for(1)
    everything = len(usable_cores())
    assert Conditions(threads=1, concurrency=everything).pinned().cores == usable_cores()


def test_without_threads_the_process_is_free() -> None:
    assert Conditions().pinned() == Conditions()


def test_cores_that_are_named_are_taken() -> None:
    (first, *_) = usable_cores()
    assert Conditions(threads=2, cores=(first,)).pinned().cores == (first,)
    with pytest.raises(InputError, match="core 12345 is not to be had"):
        Conditions(cores=(first, 12345)).pinned()


@pytest.mark.parametrize(
    ("conditions", "text"),
    [
        (Conditions(), "cpu, all cores"),
        (Conditions(threads=1), "cpu, 1 thread"),
        (Conditions("cuda", 2, batch=8, concurrency=4), "cuda, 2 threads, batch 8, 4 runs at once"),
    ],
)
def test_in_words(conditions: Conditions, text: str) -> None:
    assert str(conditions) == text
