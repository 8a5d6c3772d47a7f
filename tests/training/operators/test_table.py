"""The table of operators."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from edgewise.training.operators import _merged
from edgewise.training.operators.elementwise import OPERATORS


def test_an_operator_in_two_families_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"two families: \['Add'\]"):
        _merged((OPERATORS, {"Add": OPERATORS["Add"]}))
