"""What releases of onnxruntime read, and what is too new for them."""

from __future__ import annotations

import itertools

import onnx
import onnx_ir as ir
import pytest

from edgewise.optimizer.runtimes import limits_of
from edgewise.runtime.errors import EdgewiseError, InputError


@pytest.mark.parametrize(
    ("runtime", "opset", "ir_version"),
    [
        ("1.6", 13, 7),
        ("1.8.1", 14, 7),
        ("1.10", 15, 8),
        ("1.14", 18, 8),
        ("1.16", 19, 9),
        ("1.16.3", 19, 9),
        ("1.20", 21, 10),
        ("1.22.0", 21, 10),
        ("1.23", 23, 11),
        ("1.99", 23, 11),
        ("2.0", 23, 11),
    ],
)
def test_limits(runtime: str, opset: int, ir_version: int) -> None:
    found = limits_of(runtime)
    assert (found.opset, found.ir_version) == (opset, ir_version)


def test_newer_ones_read_no_less() -> None:
    found = [limits_of(f"1.{minor}") for minor in range(6, 30)]
    for older, newer in itertools.pairwise(found):
        assert (older.opset, older.ml_opset, older.ir_version) <= (
            newer.opset,
            newer.ml_opset,
            newer.ir_version,
        )


@pytest.mark.parametrize("text", ["new", "1", "1.x", "", "v1.16", "1.16-rc1"])
def test_what_is_no_version(text: str) -> None:
    with pytest.raises(InputError, match="no version of onnxruntime"):
        limits_of(text)


def test_what_is_too_old_to_be_known() -> None:
    with pytest.raises(InputError, match=r"1\.5 is older than 1\.6"):
        limits_of("1.5")


def model(opset: int, ir_version: int = 8, ml: int | None = None) -> ir.Model:
    extra = "" if ml is None else f', "ai.onnx.ml": {ml}'
    text = f'<ir_version: {ir_version}, opset_import: ["" : {opset}{extra}]>'
    return ir.from_proto(onnx.parser.parse_model(f"{text} g (float[2] x) => (float[2] y) {{ y = Relu (x) }}"))


def test_what_is_too_new() -> None:
    limits = limits_of("1.16")
    limits.check(model(19, 9, 3))
    for newer, message in (
        (model(20), "operator set 19 and older, and the model has 20"),
        (model(19, 10), "IR version 9 and older, and the model has 10"),
        (model(19, ml=5), "operator set of ai.onnx.ml 3 and older, and the model has 5"),
    ):
        with pytest.raises(EdgewiseError, match=message) as caught:
            limits.check(newer)
        assert caught.value.exit_code == 1
