"""Placements under a bound on noise."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from edgewise.calibration.placement import Costs
from edgewise.optimizer.placing import Placer

LENGTH = 12
NAMES = [f"v{i}" for i in range(LENGTH)]


def chain() -> ir.Model:
    """One operator after the other, all alike."""
    lines = [f"{name} = Relu({'x' if i == 0 else NAMES[i - 1]})" for i, name in enumerate(NAMES)]
    head = f'<ir_version: 10, opset_import: ["" : 18]> g (float[1, 4] x) => (float[1, 4] {NAMES[-1]})'
    return ir.from_onnx_text("\n".join((head, "{", *lines, "}")))


def placer(in_float: dict[str, float], border: float) -> Placer:
    return Placer(chain(), frozenset(NAMES), Costs(in_float, {}, border=border), {})


def in_int8(found: Placer, noise: dict[str, float], most: float) -> list[str]:
    placement = found.within(noise, most)
    assert placement.noise <= most
    assert set(placement.floats) | {n for n in NAMES if n not in placement.floats} == set(NAMES)
    return [name for name in NAMES if name not in placement.floats]


def test_where_all_nodes_are_alike_a_part_stays_in_int8() -> None:
    """At any price of noise all of them would be int8, or none."""
    found = placer(dict.fromkeys(NAMES, 1.0), border=0.5)
    assert len(in_int8(found, dict.fromkeys(NAMES, 0.01), 0.0501)) == 5


def test_the_part_is_of_one_piece_where_borders_cost() -> None:
    found = placer(dict.fromkeys(NAMES, 1.0), border=0.9)
    kept = in_int8(found, dict.fromkeys(NAMES, 0.01), 0.0501)
    places = [NAMES.index(name) for name in kept]
    assert places == list(range(places[0], places[0] + 5))


def test_the_noisy_one_is_left_out() -> None:
    noise = dict.fromkeys(NAMES, 0.001) | {"v4": 0.5}
    found = placer(dict.fromkeys(NAMES, 1.0), border=0.0)
    assert in_int8(found, noise, 0.02) == [name for name in NAMES if name != "v4"]
    assert found.within(noise, 0.02).floats["v4"] == "adds noise of -3 dB to the outputs"


def test_what_gains_most_for_its_noise_is_kept() -> None:
    gains = {name: (4.0 if i % 2 else 1.0) for i, name in enumerate(NAMES)}
    found = placer(gains, border=0.0)
    assert in_int8(found, dict.fromkeys(NAMES, 0.01), 0.0601) == NAMES[1::2]


@pytest.mark.parametrize("most", [0.0, 1e-9])
def test_no_noise_leaves_nothing(most: float) -> None:
    assert in_int8(placer(dict.fromkeys(NAMES, 1.0), border=0.1), dict.fromkeys(NAMES, 0.01), most) == []
