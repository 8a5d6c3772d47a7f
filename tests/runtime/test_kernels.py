"""What onnxruntime's registry says of kernels."""

from __future__ import annotations

import pytest

from edgewise.runtime.kernels import types_of_kernel
from edgewise.runtime.session import ProviderError


def test_types() -> None:
    assert "tensor(float)" in types_of_kernel("cpu", "Conv", 17)["T"]
    assert "tensor(bfloat16)" not in types_of_kernel("cpu", "Conv", 17)["T"]
    assert "tensor(float16)" in types_of_kernel("cpu", "Clip", 17)["T"]
    assert "tensor(float16)" not in types_of_kernel("cpu", "Clip", 11)["T"]  # a version of its own


def test_unknown() -> None:
    assert types_of_kernel("cpu", "NoSuchOperator", 17) == {}
    with pytest.raises(ProviderError):
        types_of_kernel("abacus", "Conv", 17)
