"""Which outputs depend on numbers that are drawn."""

from __future__ import annotations

import numpy as np
import pytest
from rewrites import build

from edgewise.passes.purity import drawn_outputs

HEAD = "g (float[2] x, bool t) => (float[2] y, float[2] z)"
WEIGHTS = {"half": np.float32(0.5), "yes": np.array(True), "no": np.array(False)}


@pytest.mark.parametrize(
    ("body", "drawn"),
    [
        ("y = Relu(x) z = Exp(y)", set()),
        ("y = Relu(x) r = RandomNormalLike(x) z = Add(r, x)", {"z"}),
        ("y = Dropout(x, half, yes) z = Exp(y)", {"y", "z"}),
        ("y = Dropout(x, half, t) z = Exp(x)", {"y"}),
        ("y = Dropout(x, half, no) z = Exp(y)", set()),
        (
            """r = Bernoulli(x) y = Exp(x)
            z = If(t) <then_branch = a () => (float[2] u) { u = Relu(r) },
                       else_branch = b () => (float[2] v) { v = Relu(x) }>""",
            {"z"},
        ),
        (
            """y = Exp(x)
            z = If(t) <then_branch = a () => (float[2] u) { u = RandomUniformLike(x) },
                       else_branch = b () => (float[2] v) { v = Relu(x) }>""",
            {"z"},
        ),
    ],
)
def test_drawn_outputs(body: str, drawn: set[str]) -> None:
    used = {name: np.asarray(array) for name, array in WEIGHTS.items() if name in body}
    assert drawn_outputs(build(f"{HEAD} {{ {body} }}", **used)) == drawn
