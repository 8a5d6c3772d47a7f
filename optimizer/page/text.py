"""Numbers as the page writes them: three digits, one unit, never a power of ten."""

from __future__ import annotations

import math

TIMES = "\u00d7"
MINUS = "\u2212"
NOTHING = "\u2013"
"""A dash: there is no number."""


def digits(number: float, count: int = 3) -> str:
    """`count` significant digits, without an exponent: 0.0214, 2.14, 214, 21,400."""
    if number == 0 or not math.isfinite(number):
        return "0" if number == 0 else NOTHING
    rounded = float(f"{number:.{count - 1}e}")
    places = count - 1 - math.floor(math.log10(abs(rounded)))
    text = f"{rounded:,.{max(places, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text and places > count else text


def plain_digits(number: float) -> str:
    """A number of an axis: no digits that say nothing."""
    text = digits(number)
    return text.rstrip("0").rstrip(".") if "." in text else text


def fixed(number: float, whole: float) -> str:
    """A number of a column whose largest is `whole`, with as many decimals as the others."""
    return f"{number:,.{max(0, 3 - math.floor(math.log10(whole)))}f}" if whole > 0 else digits(number)


def milliseconds(number: float) -> str:
    """A time given in milliseconds."""
    return f"{digits(number)} ms" if number < 10_000 else f"{digits(number / 1000)} s"


def times(number: float) -> str:
    """A speed-up."""
    return f"{digits(number)}{TIMES}"


def interval(low: float, high: float) -> str:
    """From one number to another."""
    return f"{digits(low)} {NOTHING} {digits(high)}"


def percent(share: float, places: int = 0) -> str:
    """A share of 1."""
    return f"{100 * share:.{places}f} %"


def count_text(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
