"""What a model is fed, and what it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator, TensorSpec, input_specs, seeded_feed

HEADER = '<ir_version: 8, opset_import: ["": 17]>'
DTYPES = (np.float16, np.float32, np.float64, np.int8, np.uint8, np.int32, np.int64, np.bool_)


def parse(graph: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(HEADER + graph))


class TestInputSpecs:
    def test_of_every_kind_of_dimension(self) -> None:
        model = parse("g (float[batch, 3, ?] x, int64 n) => (float[] y) { y = Identity(x) }")
        assert input_specs(model) == (
            TensorSpec("x", np.dtype(np.float32), ("batch", 3, None)),
            TensorSpec("n", np.dtype(np.int64), ()),
        )

    def test_negative_dimensions_are_unknown(self) -> None:
        model = parse("g (float[1, 3] x) => (float[1, 3] y) { y = Relu(x) }")
        model.graph.inputs[0].shape = ir.Shape([-1, 3])
        assert input_specs(model)[0].shape == (None, 3)

    def test_inputs_with_a_default_are_left_out(self) -> None:
        model = parse("g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
        assert [spec.name for spec in input_specs(model)] == ["x"]

    @pytest.mark.parametrize("kind", ["seq(float[2])", "optional(float[2])"])
    def test_what_is_no_tensor(self, kind: str) -> None:
        model = parse(f"g ({kind} s) => ({kind} t) {{ t = Identity(s) }}")
        with pytest.raises(InputError, match="input 's' is no tensor of known rank: pass --data"):
            input_specs(model)

    def test_a_tensor_of_unknown_rank(self) -> None:
        model = parse("g (float[2] x) => (float[2] y) { y = Relu(x) }")
        model.graph.inputs[0].shape = None
        with pytest.raises(InputError, match="known rank"):
            input_specs(model)


class TestSeededFeed:
    @given(
        st.sampled_from(DTYPES),
        st.lists(st.one_of(st.integers(0, 4), st.sampled_from(["n", "m"]), st.none()), max_size=4),
        st.integers(1, 3),
        st.integers(0, 2**31),
    )
    @settings(deadline=None, max_examples=60)
    def test_fits_the_spec(self, dtype: Any, shape: list[int | str | None], size: int, seed: int) -> None:
        spec = TensorSpec("x", np.dtype(dtype), tuple(shape))
        array = seeded_feed([spec], seed, size)["x"]
        assert array.dtype == dtype
        assert array.shape == tuple(d if isinstance(d, int) else size for d in shape)
        assert np.isfinite(array).all()
        np.testing.assert_array_equal(array, seeded_feed([spec], seed, size)["x"])

    def test_integers_lie_in_every_embedding(self) -> None:
        ids = seeded_feed([TensorSpec("ids", np.dtype(np.int64), (1000,))])["ids"]
        assert set(ids.tolist()) == {0, 1}

    def test_booleans_mask_nothing(self) -> None:
        assert seeded_feed([TensorSpec("mask", np.dtype(np.bool_), (5,))])["mask"].all()

    def test_strings(self) -> None:
        model = parse("g (string[2] s) => (string[2] t) { t = Identity(s) }")
        feed = seeded_feed(input_specs(model))
        assert Evaluator(model).run(feed)["t"].tolist() == ["a", "a"]

    def test_another_seed_gives_other_values(self) -> None:
        spec = TensorSpec("x", np.dtype(np.float32), (8,))
        assert (seeded_feed([spec], 0)["x"] != seeded_feed([spec], 1)["x"]).any()


class TestEvaluator:
    TWO = "g (float[2] x) => (float[2] y, float[2] z) { y = Relu(x) z = Neg(x) }"
    X = np.array([-1.0, 2.0], np.float32)

    def test_gives_all_outputs_by_name(self) -> None:
        answer = Evaluator(parse(self.TWO)).run({"x": self.X})
        assert {k: v.tolist() for k, v in answer.items()} == {"y": [0.0, 2.0], "z": [1.0, -2.0]}

    def test_gives_those_that_are_wanted(self) -> None:
        evaluator = Evaluator(parse(self.TWO), outputs=["z"])
        assert evaluator.outputs == ("z",)
        assert list(evaluator.run({"x": self.X})) == ["z"]

    def test_gives_a_sequence_as_it_is(self) -> None:
        model = parse("g (float[2] x) => (seq(float[2]) s) { s = SequenceConstruct(x, x) }")
        assert [a.tolist() for a in Evaluator(model).run({"x": self.X})["s"]] == [[-1.0, 2.0]] * 2

    @pytest.mark.parametrize(
        "feed",
        [{}, {"z": X}, {"x": np.zeros(3, np.float32)}, {"x": np.zeros(2, np.float64)}],
        ids=["missing", "misnamed", "shape", "dtype"],
    )
    def test_inputs_that_do_not_fit(self, feed: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="does not run on these inputs") as error:
            Evaluator(parse(self.TWO)).run(feed)
        assert "\n" not in str(error.value)

    def test_optimized_or_not_the_answer_is_the_same(self) -> None:
        model = parse("g (float[2] x) => (float[2] y) { a = Exp(x) b = Neg(a) c = Neg(b) y = Identity(c) }")
        answers = [Evaluator(model, optimize=o).run({"x": self.X})["y"] for o in (True, False)]
        np.testing.assert_array_equal(*answers)


def test_weights_beside_the_file_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was read goes to onnxruntime as bytes, which have no folder."""
    weight = ir.tensor(np.full(4, 2, np.float32), name="w")
    model = parse("g (float[4] x, float[4] w) => (float[4] y) { y = Mul(x, w) }")
    value = model.graph.inputs.pop()
    value.const_value = weight
    model.graph.register_initializer(value)
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    assert (tmp_path / "m.data").exists()
    monkeypatch.chdir(tmp_path.parent)
    loaded = ir.load(tmp_path / "m.onnx")
    (result,) = Evaluator(loaded).run({"x": np.arange(4, dtype=np.float32)}).values()
    np.testing.assert_array_equal(result, [0, 2, 4, 6])
    tensor = loaded.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)  # the model itself is left as it was, its weights mapped
