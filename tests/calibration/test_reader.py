"""Side by side with onnxruntime's quantizer: its readers feed ours, our tables feed it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from edgewise.calibration.collect import collect
from edgewise.calibration.ranges import METHODS, grid_of
from edgewise.calibration.reader import SampleReader, from_reader, tensor_overrides
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Feed, input_specs

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float[N, 3, 8, 8] x) => (float[N, 4, 1, 1] y)
<float[4, 3, 3, 3] w = {WEIGHT}>
{
    c = Conv <pads = [1, 1, 1, 1]> (x, w)
    s = Sigmoid (c)
    m = Mul (c, s)
    y = GlobalAveragePool (m)
}""".replace("WEIGHT", ", ".join(str(n % 7 - 3) for n in range(108)))
VALUES = ("x", "c", "s", "m", "y")


def model() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TEXT))


def feeds(count: int, rows: int = 1) -> list[Feed]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((rows, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


class Once(CalibrationDataReader):
    """A reader as its own documentation writes it."""

    def __init__(self, given: list[Feed]) -> None:
        self._given: Iterator[Feed] = iter(given)

    def get_next(self) -> Feed | None:
        return next(self._given, None)


class Again(Once):
    def __init__(self, given: list[Feed]) -> None:
        super().__init__(given)
        self._all = given
        self.rewound = 0

    def rewind(self) -> None:
        self.rewound += 1
        self._given = iter(self._all)


@pytest.mark.parametrize("kind", [Once, Again])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_reader_gives_samples(kind: type[Once], rows: int) -> None:
    given = feeds(4, rows)
    samples = from_reader(kind(given), input_specs(model()))
    assert len(samples) == 4 * rows
    assert samples.source == kind.__name__
    for _ in range(2):  # they can be read again
        got = np.concatenate([feed["x"] for feed in samples])
        np.testing.assert_array_equal(got, np.concatenate([feed["x"] for feed in given]))
    rest = samples.take(range(rows, 4 * rows))
    assert collect(model(), rest, VALUES) == collect(model(), list(rest), VALUES)


def test_a_reader_that_can_rewind_is_not_kept() -> None:
    reader = Again(feeds(3))
    list(from_reader(reader, input_specs(model())))
    assert reader.rewound >= 2


def test_readers_that_do_not_fit_are_refused() -> None:
    specs = input_specs(model())
    with pytest.raises(InputError, match="Once holds no samples"):
        from_reader(Once([]), specs)
    with pytest.raises(InputError, match="makes samples of shape"):
        from_reader(Once([{"x": np.ones((1, 2, 8, 8), np.float32)}]), specs)


def scales_in(path: Path) -> dict[str, tuple[float, int, np.dtype]]:
    """Scale and zero point of every QuantizeLinear, by the value that it reads."""
    graph = onnx.load(path).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    return {
        n.input[0]: (float(constants[n.input[1]]), int(constants[n.input[2]]), constants[n.input[2]].dtype)
        for n in graph.node
        if n.op_type == "QuantizeLinear"
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_quantize_static_writes_the_scales_of_the_table(method: str, dtype: str, tmp_path: Path) -> None:
    """Whatever its reader gives: here one sample, ten times as large as those of the table."""
    table = collect(model(), feeds(8), VALUES)
    onnx.save(onnx.parser.parse_model(TEXT), tmp_path / "net.onnx")
    kind = QuantType.QUInt8 if dtype == "uint8" else QuantType.QInt8
    quantize_static(
        str(tmp_path / "net.onnx"),
        str(tmp_path / "int8.onnx"),
        Once([{"x": 10 * feeds(1)[0]["x"]}]),
        quant_format=QuantFormat.QDQ,
        activation_type=kind,
        weight_type=QuantType.QInt8,
        extra_options={"TensorQuantOverrides": tensor_overrides(table, method, dtype=dtype)},
    )
    found = scales_in(tmp_path / "int8.onnx")
    assert set(found) >= {"x", "c", "s", "m"}
    for name, (low, high) in table.ranges(method, symmetric=dtype == "int8").items():
        if name in found:
            assert found[name] == (*grid_of(low, high, dtype), np.dtype(dtype))


def test_samples_are_a_reader() -> None:
    samples = from_reader(Once(feeds(3)), input_specs(model()))
    reader = SampleReader(samples)
    assert len(reader) == 3
    for _ in range(2):
        assert sum(1 for _ in iter(reader.get_next, None)) == 3
        reader.rewind()
