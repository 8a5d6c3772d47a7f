"""What goes to another process comes back the same, and pieces come back in order."""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
import pytest
from pieces import doubled, dying

from edgewise.optimizer.parallel import pack, unpack, workers_for
from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.session import serialize


def test_models_and_views_of_dicts_can_be_sent(model: ir.Model) -> None:
    sent = MappingProxyType({"model": model, "scores": MappingProxyType({"a": np.arange(3.0)})})
    got = unpack(pack(sent))
    assert serialize(got["model"]) == serialize(model)
    np.testing.assert_array_equal(got["scores"]["a"], np.arange(3.0))


def test_the_answers_come_in_order_from_other_processes() -> None:
    with workers_for(doubled, pack({"name": "n"}), 2, None) as over:
        answers = [unpack(answer) for answer in over([3.0, 1.0, 2.0])]
    assert [(name, value) for name, value, _ in answers] == [("n", 6.0), ("n", 2.0), ("n", 4.0)]
    assert os.getpid() not in {pid for _, _, pid in answers}


def test_a_worker_that_dies_is_told_in_a_line() -> None:
    with (
        pytest.raises(EdgewiseError, match="a worker died"),
        workers_for(dying, b"", 1, None) as over,
    ):
        over([1.0])


@pytest.mark.skipif(find_spec("ray") is not None, reason="ray is installed")
def test_ray_that_is_missing_is_named() -> None:
    with pytest.raises(EdgewiseError, match="Ray is not installed"), workers_for(doubled, b"", 1, "local"):
        pass
