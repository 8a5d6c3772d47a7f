"""LSTM, GRU and RNN, step by step: every direction, initial states, peepholes, sequence lengths, layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from edgewise.training.operators.call import Call, Operator
from edgewise.training.operators.tensors import beside, unsupported

_Activation = Callable[[Tensor], Tensor]
_Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]
"""From the input's share of the gates [batch, gates * hidden] and the states to the new states."""

_MAKERS: Mapping[str, Callable[[float, float], _Activation]] = MappingProxyType(
    {
        "affine": lambda a, b: lambda x: a * x + b,
        "elu": lambda a, b: lambda x: functional.elu(x, a),
        "hardsigmoid": lambda a, b: lambda x: (a * x + b).clamp(0, 1),
        "leakyrelu": lambda a, b: lambda x: functional.leaky_relu(x, a),
        "relu": lambda a, b: torch.relu,
        "scaledtanh": lambda a, b: lambda x: a * torch.tanh(b * x),
        "sigmoid": lambda a, b: torch.sigmoid,
        "softplus": lambda a, b: functional.softplus,
        "softsign": lambda a, b: functional.softsign,
        "tanh": lambda a, b: torch.tanh,
        "thresholdedrelu": lambda a, b: lambda x: torch.where(x > a, x, 0.0),
    }
)
_DEFAULTS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "elu": (1.0, 0.0),
        "hardsigmoid": (0.2, 0.5),
        "leakyrelu": (0.01, 0.0),
        "thresholdedrelu": (1.0, 0.0),
    }
)


@dataclass(frozen=True)
class _Weights:
    """One direction: w [gates * hidden, input], r [gates * hidden, hidden], the bias in halves."""

    w: Tensor
    r: Tensor
    input_bias: Tensor
    hidden_bias: Tensor
    peepholes: Tensor | None
    activations: tuple[_Activation, ...]


def rnn(call: Call) -> tuple[Tensor | None, ...]:
    def step_of(weights: _Weights) -> _Step:
        (f,) = weights.activations

        def step(x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            gates = x + weights.input_bias + functional.linear(states[0], weights.r, weights.hidden_bias)
            return (f(_clipped(call, gates)),)

        return step

    return _recurrence(call, ("Tanh",), 1, step_of)


def gru(call: Call) -> tuple[Tensor | None, ...]:
    reset_after = bool(call.attr("linear_before_reset", 0))

    def step_of(weights: _Weights) -> _Step:
        f, g = weights.activations
        hidden = weights.r.shape[1]
        r_zr, r_h = torch.split(weights.r, [2 * hidden, hidden])
        b_zr, b_h = torch.split(weights.hidden_bias, [2 * hidden, hidden])

        def step(x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (h,) = states
            x_zr, x_h = torch.split(x + weights.input_bias, [2 * hidden, hidden], -1)
            z, r = f(_clipped(call, x_zr + functional.linear(h, r_zr, b_zr))).chunk(2, -1)
            past = r * functional.linear(h, r_h, b_h) if reset_after else functional.linear(r * h, r_h, b_h)
            return ((1 - z) * g(_clipped(call, x_h + past)) + z * h,)

        return step

    return _recurrence(call, ("Sigmoid", "Tanh"), 1, step_of)


def lstm(call: Call) -> tuple[Tensor | None, ...]:
    if call.attr("input_forget", 0):
        raise unsupported(call, "input_forget")

    def step_of(weights: _Weights) -> _Step:
        f, g, h_of = weights.activations
        zero = torch.zeros((), dtype=weights.r.dtype, device=weights.r.device)
        p_i, p_o, p_f = (zero,) * 3 if weights.peepholes is None else weights.peepholes.chunk(3)

        def step(x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            h, c = states
            gates = x + weights.input_bias + functional.linear(h, weights.r, weights.hidden_bias)
            i, o, forget, update = gates.chunk(4, -1)
            kept = f(_clipped(call, forget + p_f * c)) * c
            c = kept + f(_clipped(call, i + p_i * c)) * g(_clipped(call, update))
            return f(_clipped(call, o + p_o * c)) * h_of(c), c

        return step

    return _recurrence(call, ("Sigmoid", "Tanh", "Tanh"), 2, step_of)


def _clipped(call: Call, gates: Tensor) -> Tensor:
    limit = call.attr("clip")
    return gates if limit is None else gates.clamp(-limit, limit)


def _recurrence(
    call: Call, defaults: tuple[str, ...], states: int, step_of: Callable[[_Weights], _Step]
) -> tuple[Tensor | None, ...]:
    """Run every direction over x [time, batch, input]; layout 1 has the batch in front."""
    batch_first = bool(call.attr("layout", 0))
    x = call.input(0).transpose(0, 1) if batch_first else call.input(0)
    directions = _directions(call)
    runs = []
    for d, backwards in enumerate(directions):
        weights = _weights(call, d, len(directions), defaults)
        first = tuple(_initial(call, 5 + s, d, x, weights) for s in range(states))
        runs.append(_run(x, call.optional(4), first, weights, step_of(weights), backwards))
    y = torch.stack([steps for steps, _ in runs], 1)
    last = [torch.stack([final[s] for _, final in runs]) for s in range(states)]
    if batch_first:
        y, last = y.permute(2, 0, 1, 3), [v.transpose(0, 1) for v in last]
    return (y, *last)


def _directions(call: Call) -> tuple[bool, ...]:
    """Of each direction, whether it runs backwards."""
    return {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[
        call.attr("direction", "forward")
    ]


def _weights(call: Call, d: int, directions: int, defaults: tuple[str, ...]) -> _Weights:
    w, r, bias = call.input(1)[d], call.input(2)[d], call.optional(3)
    halves = (w.new_zeros(w.shape[0]),) * 2 if bias is None else bias[d].chunk(2)
    peepholes = call.optional(7)
    return _Weights(
        w,
        r,
        halves[0],
        halves[1],
        None if peepholes is None else peepholes[d],
        _activations(call, d, directions, defaults),
    )


def _activations(call: Call, d: int, directions: int, defaults: tuple[str, ...]) -> tuple[_Activation, ...]:
    """The functions of direction `d`; alphas and betas are handed to those that take any, in order."""
    names = call.attr("activations") or defaults * directions
    alphas, betas = iter(call.attr("activation_alpha", ())), iter(call.attr("activation_beta", ()))
    made = []
    for name in map(str.lower, names):
        if name not in _MAKERS:
            raise unsupported(call, f"activation {name}")
        alpha, beta = _DEFAULTS.get(name, (1.0, 0.0))
        alpha = next(alphas, alpha) if name in _TAKES_ALPHA else alpha
        beta = next(betas, beta) if name in _TAKES_BETA else beta
        made.append(_MAKERS[name](alpha, beta))
    return tuple(made[d * len(defaults) : (d + 1) * len(defaults)])


_TAKES_ALPHA = frozenset({"affine", "elu", "hardsigmoid", "leakyrelu", "scaledtanh", "thresholdedrelu"})
_TAKES_BETA = frozenset({"affine", "hardsigmoid", "scaledtanh"})


def _initial(call: Call, index: int, d: int, x: Tensor, weights: _Weights) -> Tensor:
    given = call.optional(index)
    if given is None:
        return x.new_zeros(x.shape[1], weights.r.shape[1])
    return given[:, d] if call.attr("layout", 0) else given[d]


def _run(
    x: Tensor,
    lengths: Tensor | None,
    states: tuple[Tensor, ...],
    weights: _Weights,
    step: _Step,
    backwards: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All steps of one direction: outputs [time, batch, hidden], and the states after each last step.

    Beyond a sequence's length the states stay as they are and the outputs are zero.
    """
    shares = functional.linear(x, weights.w)
    outputs: list[Tensor] = []
    order: Sequence[int] = range(x.shape[0])
    for t in reversed(order) if backwards else order:
        new = step(shares[t], states)
        output = new[0]
        if lengths is not None:
            (running,) = beside(x, (t < lengths).unsqueeze(-1))
            new = tuple(torch.where(running, n, s) for n, s in zip(new, states, strict=True))
            output = torch.where(running, output, torch.zeros_like(output))
        states = new
        outputs.append(output)
    return torch.stack(outputs[::-1] if backwards else outputs), states


OPERATORS: Mapping[str, Operator] = MappingProxyType({"GRU": gru, "LSTM": lstm, "RNN": rnn})
