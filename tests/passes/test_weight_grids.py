"""Integer grids of weights: the error that their steps allow, and nothing lost in packing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.passes.weight_grids import around_128, in_blocks, packed, symmetric


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1.0, 1e6]))
def test_symmetric_is_off_by_half_a_step(seed: int, size: float) -> None:
    array = np.random.default_rng(seed).standard_normal((5, 7)).astype(np.float32) * np.float32(size)
    integers, scale = symmetric(array, (0,))
    assert scale.shape == (1, 7)
    assert np.all(
        np.abs(integers * scale - array) <= 0.501 * scale
    )  # 0.001: float32's rounding of a quotient


def test_zeros_stay_zero() -> None:
    integers, scale = around_128(np.zeros((4, 3), np.float32), (0,))
    assert np.all(integers == 128)
    assert np.all(scale == 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [32, 40])
def test_blocks(bits: int, k: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((k, 6)).astype(np.float32) + 1
    integers, scale, zero_point = in_blocks(matrix, 16, bits)
    blocks = -(-k // 16)
    assert integers.shape == (6, blocks, 16)
    assert scale.shape == zero_point.shape == (6, blocks)
    back = ((integers.astype(int) - zero_point[..., None]) * scale[..., None]).reshape(6, -1)
    assert np.all(back[:, k:] == 0), "the filling is zero"
    # a range of 1 + 4 deviations in 2^bits steps, of which a fifth may be cut off its ends
    assert np.abs(back[:, :k].T - matrix).max() < {4: 0.6, 8: 0.04}[bits]


def test_packed() -> None:
    assert packed(np.array([[1, 2, 15]], np.uint8)).tolist() == [[0x21, 0x0F]]
