"""Fourier transforms and the windows that go with them. Complex numbers are pairs along the last axis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from edgewise.training.operators.call import Call, Operator
from edgewise.training.operators.tensors import beside, dtype_of


def dft(call: Call) -> Tensor:
    """x [.., length, .., 1 or 2] -> [.., bins, .., 2]; the inverse of a one-sided spectrum is real."""
    x = call.input(0)
    (axis,) = call.ints("axis", 2) or ((1 if call.opset < 20 else -2),)
    (length,) = call.ints("dft_length", 1) or (None,)
    numbers, axis = _numbers(x), axis % x.dim()
    one_sided = bool(call.attr("onesided", 0))
    if not call.attr("inverse", 0):
        return torch.view_as_real((torch.fft.rfft if one_sided else torch.fft.fft)(numbers, length, axis))
    if one_sided:
        real: Tensor = torch.fft.irfft(numbers, length, axis)
        return real.unsqueeze(-1)
    return torch.view_as_real(torch.fft.ifft(numbers, length, axis))


def stft(call: Call) -> Tensor:
    """Spectra of windowed frames: [batch, length, 1 or 2] -> [batch, frames, bins, 2]."""
    signal, window = _numbers(call.input(0)), call.optional(2)
    (step,) = call.ints("frame_step", 1) or (1,)
    given = call.ints("frame_length", 3)
    frames = signal.unfold(1, given[0] if given else 0 if window is None else window.shape[0], step)
    if window is not None:
        frames = frames * beside(frames, window)[0]
    one_sided = bool(call.attr("onesided", 1)) and not frames.is_complex()
    return torch.view_as_real((torch.fft.rfft if one_sided else torch.fft.fft)(frames))


def _numbers(x: Tensor) -> Tensor:
    return x[..., 0] if x.shape[-1] == 1 else torch.view_as_complex(x.contiguous())


def _window(*coefficients: float) -> Operator:
    """A sum of cosines with alternating signs over `size` points, `periodic` or symmetric."""

    def operator(call: Call) -> Tensor:
        size = int(call.input(0).item())
        period = size if call.attr("periodic", 1) else size - 1
        angle = torch.arange(size, dtype=torch.float64) * (2 * math.pi / max(1, period))
        terms = [(-1) ** k * a * torch.cos(k * angle) for k, a in enumerate(coefficients)]
        return torch.stack(terms).sum(0).to(dtype_of(call, call.attr("output_datatype", 1)))

    return operator


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "BlackmanWindow": _window(0.42, 0.5, 0.08),
        "DFT": dft,
        "HammingWindow": _window(25 / 46, 21 / 46),
        "HannWindow": _window(0.5, 0.5),
        "STFT": stft,
    }
)
