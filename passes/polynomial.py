"""Sums and products of values, whatever the order and the grouping in which a graph computes them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import mul
from types import MappingProxyType

import onnx_ir as ir

from edgewise.passes.graph import constant_of, only_user
from edgewise.passes.pattern import is_float, number_of, rounding_of

Monomial = frozenset[tuple[ir.Value, int]]
"""A product of powers: x * x * t is {(x, 2), (t, 1)}, and the empty one is 1."""

_DEPTH = 6  # the cubic of a GELU written out is five operators deep
_TERMS = 8  # and no form that is looked for has more in a product


@dataclass(frozen=True)
class Coefficient:
    """A number computed from constants, and how far the one that was meant may be from it.

    A constant is what its type could hold of a number, so it is off by up to `rounding_of` of itself,
    and sums and products of constants by what follows from that.
    """

    value: float
    error: float = 0.0

    def __add__(self, other: Coefficient) -> Coefficient:
        return Coefficient(self.value + other.value, self.error + other.error)

    def __mul__(self, other: Coefficient) -> Coefficient:
        errors = abs(self.value) * other.error + abs(other.value) * self.error + self.error * other.error
        return Coefficient(self.value * other.value, errors)

    def inverse(self) -> Coefficient:
        """One divided by this number, which is not zero."""
        return Coefficient(1 / self.value, self.error / abs(self.value) / (abs(self.value) - self.error))

    def stands_for(self, exact: float) -> bool:
        """Whether the constants may be what their types hold of the exact number."""
        return abs(self.value - exact) <= self.error < math.inf


_ONE, _MINUS_ONE = Coefficient(1.0), Coefficient(-1.0)


@dataclass(frozen=True, eq=False)
class Polynomial:
    """A sum of monomials with their coefficients.

    `atoms` are the values it is made of, in the order in which they were met; `number_rank` is the
    largest rank of its numbers.
    """

    terms: Mapping[Monomial, Coefficient]
    atoms: tuple[ir.Value, ...] = ()
    number_rank: int = 0

    @classmethod
    def of(cls, value: ir.Value) -> Polynomial:
        """The value itself: a number if it is a constant of one element."""
        number, array = number_of(value), constant_of(value)
        if number is None or array is None or not math.isfinite(number):
            return cls({frozenset({(value, 1)}): _ONE}, (value,))
        error = rounding_of(array.dtype) * abs(number) if is_float(array.dtype) else 0.0
        return cls({frozenset(): Coefficient(number, error)}, (), array.ndim)

    def __add__(self, other: Polynomial) -> Polynomial:
        terms = dict(self.terms)
        for monomial, coefficient in other.terms.items():
            terms[monomial] = terms.get(monomial, Coefficient(0.0)) + coefficient
        return self._joined(other, terms)

    def __mul__(self, other: Polynomial) -> Polynomial:
        terms: dict[Monomial, Coefficient] = {}
        for left, a in self.terms.items():
            for right, b in other.terms.items():
                product = frozenset((Counter(dict(left)) + Counter(dict(right))).items())
                terms[product] = terms.get(product, Coefficient(0.0)) + a * b
        return self._joined(other, terms)

    def _joined(self, other: Polynomial, terms: dict[Monomial, Coefficient]) -> Polynomial:
        atoms = tuple(dict.fromkeys(self.atoms + other.atoms))
        return Polynomial(terms, atoms, max(self.number_rank, other.number_rank))

    def scaled(self, factor: Coefficient) -> Polynomial:
        """All coefficients times `factor`."""
        return Polynomial({m: c * factor for m, c in self.terms.items()}, self.atoms, self.number_rank)

    @property
    def number(self) -> Coefficient | None:
        """The coefficient of a polynomial that is a number; None of any other."""
        return self.terms.get(frozenset()) if not self.atoms else None

    def coefficient(self, *factors: ir.Value) -> Coefficient:
        """The coefficient of the product of `factors`."""
        return self.terms.get(_monomial(factors), Coefficient(0.0))

    def equals(self, expected: Mapping[tuple[ir.Value, ...], float]) -> bool:
        """Whether this is the sum of the products of `expected`, each times its number, and no more."""
        exact = {_monomial(factors): number for factors, number in expected.items()}
        present = {m for m, c in self.terms.items() if c.value}
        return present == exact.keys() and all(self.terms[m].stands_for(n) for m, n in exact.items())


def _monomial(factors: tuple[ir.Value, ...]) -> Monomial:
    return frozenset(Counter(factors).items())


@dataclass(frozen=True)
class Affine:
    """scale * source + shift, with numbers of rank up to `number_rank`."""

    source: ir.Value
    scale: Coefficient
    shift: Coefficient
    number_rank: int

    def equals(self, scale: float, shift: float) -> bool:
        """Whether this is the line with exactly these two numbers."""
        return self.scale.stands_for(scale) and self.shift.stands_for(shift)


def expand(value: ir.Value, reader: ir.Node | None = None) -> Polynomial:
    """What `value` is as a polynomial of values that are shared, or no sum or product of others.

    Values between are read by one node each, in the same graph, so all of them can go. `reader`, where
    it is given, has to be the only one who reads `value` itself; otherwise `value` stays as it is.
    """
    return _expand(value, reader, _DEPTH, only_numbers=False)


def affine_of(value: ir.Value, reader: ir.Node | None = None) -> Affine | None:
    """`value` as a number times a value plus a number, as `expand` gives it; None of a constant."""
    line = _expand(value, reader, _DEPTH, only_numbers=True)
    if len(line.atoms) != 1:
        return None
    source = line.atoms[0]
    return Affine(source, line.coefficient(source), line.coefficient(), line.number_rank)


def _expand(value: ir.Value, reader: ir.Node | None, depth: int, *, only_numbers: bool) -> Polynomial:
    whole, node = Polynomial.of(value), value.producer()
    combine = None if node is None or node.domain != "" else _OPERATORS.get(node.op_type)
    if node is None or combine is None or node.attributes or depth == 0 or whole.number is not None:
        return whole  # an attribute says how to broadcast, before opset 7
    if reader is not None and (node.graph is not reader.graph or only_user(value) is not reader):
        return whole
    operands = [v for v in node.inputs if v is not None]
    if only_numbers and sum(Polynomial.of(v).number is None for v in operands) != 1:
        return whole
    parts = [_expand(v, node, depth - 1, only_numbers=only_numbers) for v in operands]
    if math.prod(len(part.terms) for part in parts) > _TERMS:
        return whole
    return combine(*parts) or whole


def _quotient(dividend: Polynomial, divisor: Polynomial) -> Polynomial | None:
    number = divisor.number
    if number is None or abs(number.value) <= number.error:
        return None
    quotient = dividend.scaled(number.inverse())
    return Polynomial(quotient.terms, quotient.atoms, max(dividend.number_rank, divisor.number_rank))


def _power(base: Polynomial, exponent: Polynomial) -> Polynomial | None:
    number = exponent.number
    if number is None or number.value not in (2.0, 3.0):
        return None
    power = reduce(mul, [base] * int(number.value))
    return Polynomial(power.terms, power.atoms, max(base.number_rank, exponent.number_rank))


_OPERATORS: Mapping[str, Callable[..., Polynomial | None]] = MappingProxyType(
    {
        "Add": lambda a, b: a + b,
        "Sub": lambda a, b: a + b.scaled(_MINUS_ONE),
        "Mul": lambda a, b: a * b,
        "Neg": lambda a: a.scaled(_MINUS_ONE),
        "Div": _quotient,
        "Pow": _power,
    }
)
