"""Inputs that nobody gave run, and make sense: ids lie in their tables, masks hide nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator, input_specs, seeded_feed
from edgewise.runtime.plausible import plausible_feed

BERT = """
    g (int64[N, L] input_ids, int64[N, L] attention_mask, int64[N, L] token_type_ids) => (float[N, L, 4] y)
    <float[90, 4] words, float[3, 4] types, float one = {1}, float low = {-10000}, int64[1] axis = {2}>
    {
        flat = Cast <to = 6> (input_ids)
        w = Gather (words, flat)
        t = Gather (types, token_type_ids)
        e = Add (w, t)
        m = Cast <to = 1> (attention_mask)
        c = Unsqueeze (m, axis)
        i = Sub (one, c)
        p = Mul (i, low)
        y = Add (e, p)
    }"""

GPT = """
    g (int64[batch, seq] input_ids, int64[batch, all] attention_mask,
       float[batch, 2, past_len, 4] past) => (float[batch, 2, total, 4] present)
    <float[50, 8] words, int64[4] heads = {0, 0, 2, 4}, int64[2] between = {1, 3}>
    {
        w = Gather (words, input_ids)
        h = Reshape (w, heads)
        k = Transpose <perm = [0, 2, 1, 3]> (h)
        c = Concat <axis = 2> (past, k)
        f = Cast <to = 1> (attention_mask)
        m = Unsqueeze (f, between)
        present = Mul (c, m)
    }"""

LSTM = """
    g (float[T, N, 3] x, int32[N] lens) => (float[T, 1, N, 2] y) <float[1, 8, 3] w, float[1, 8, 2] r>
    {
        y = LSTM <hidden_size = 2> (x, w, r, , lens)
    }"""


def parse(text: str) -> ir.Model:
    """The model; the values that it only declares become weights with a seed."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> {text}')
    rng = np.random.default_rng(0)
    for value in proto.graph.value_info:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    del proto.graph.value_info[:]
    return ir.from_proto(proto)


def generator() -> ir.Model:
    """GPT, with the sum that onnx's parser does not read."""
    model = parse(GPT)
    model.graph.inputs[1].shape = ir.Shape(["batch", "past_len + seq"])
    return model


class TestIndices:
    def test_spread_over_their_tables(self) -> None:
        model = parse(BERT)
        feed = plausible_feed(model, size=600)
        for name, entries in (("input_ids", 90), ("token_type_ids", 3)):
            assert set(feed[name].ravel().tolist()) == set(range(entries))
        assert np.isfinite(Evaluator(model).run(feed)["y"]).all()

    def test_along_the_axis_of_the_gather(self) -> None:
        model = parse("g (float[2, 7] x, int64[500] i) => (float[2, 500] y) { y = Gather <axis = 1> (x, i) }")
        assert set(plausible_feed(model)["i"].tolist()) == set(range(7))

    def test_into_an_axis_of_open_size(self) -> None:
        model = parse(
            "g (float[N, L, 4] x, int64[N] i) => (float[N, N, 4] y) { y = Gather <axis = 1> (x, i) }"
        )
        feed = plausible_feed(model, size=5, batch=400)
        assert set(feed["i"].tolist()) == set(range(5))

    def test_into_what_a_node_yields(self) -> None:
        """The size of the axis follows from that of the input: 3 x 4 rows of 2."""
        model = parse(
            """g (float[3, L, 2] x, int64[600] i) => (float[600, 2] y) <int64[2] s = {-1, 2}>
            { r = Reshape (x, s) y = Gather (r, i) }"""
        )
        assert set(plausible_feed(model, size=4)["i"].tolist()) == set(range(12))

    @pytest.mark.parametrize(
        "moves",
        [
            "j = Identity (i)",
            "a = Unsqueeze (i, axes) j = Squeeze (a, axes)",
            "a = Reshape (i, line) j = Expand (a, line)",
            "a = Cast <to = 1> (i) j = Cast <to = 6> (a)",
            "j = Concat <axis = 0> (zero, i)",
        ],
    )
    def test_that_are_moved_before(self, moves: str) -> None:
        model = parse(
            f"""g (int64[300] i) => (float[M, 2] y)
            <float[40, 2] t, int64[1] axes = {{0}}, int64[1] line = {{300}}, int64[1] zero = {{0}}>
            {{ {moves} y = Gather (t, j) }}"""
        )
        ids = plausible_feed(model)["i"]
        assert (ids.min(), ids.max()) == (0, 39)

    def test_that_are_fed_as_floats(self) -> None:
        model = parse(
            """g (float[300] i) => (float[300, 2] y) <float[40, 2] t>
            { j = Cast <to = 7> (i) y = Gather (t, j) }"""
        )
        ids = plausible_feed(model)["i"]
        assert ids.dtype == np.float32
        assert set(ids.tolist()) == set(range(40))

    def test_of_two_tables_suit_both(self) -> None:
        model = parse(
            """g (int64[300] i) => (float[300, 2] y) <float[40, 2] t, float[9, 2] s>
            { a = Gather (t, i) b = Gather (s, i) y = Add (a, b) }"""
        )
        assert plausible_feed(model)["i"].max() == 8

    def test_inside_a_body(self) -> None:
        model = parse(
            """g (bool c, int64[300] i) => (float[300, 2] y) <float[40, 2] t> {
                y = If (c) <
                    then_branch = a () => (float[300, 2] p) { p = Gather (t, i) },
                    else_branch = b () => (float[300, 2] q) { o = Gather (t, i) q = Neg (o) }
                >
            }"""
        )
        assert plausible_feed(model)["i"].max() == 39

    def test_of_several_axes(self) -> None:
        model = parse("g (float[9, 4, 2] x, int64[300, 2] i) => (float[300, 2] y) { y = GatherND (x, i) }")
        feed = plausible_feed(model)
        assert set(feed["i"].ravel().tolist()) == set(range(4))
        Evaluator(model).run(feed)

    def test_that_become_one_hot(self) -> None:
        model = parse(
            """g (int64[300] i) => (float[300, 30] y) <int64 d = {30}, float[2] v = {0, 1}>
            { y = OneHot (i, d, v) }"""
        )
        assert set(plausible_feed(model)["i"].tolist()) == set(range(30))

    def test_into_a_table_of_unknown_size_are_zero(self) -> None:
        model = parse(
            """g (float[9] x, int64[3] i) => (float[3, 1] y)
            { n = NonZero (x) t = Transpose (n) f = Cast <to = 1> (t) y = Gather (f, i) }"""
        )
        assert plausible_feed(model)["i"].tolist() == [0, 0, 0]


class TestMasksAndLengths:
    def test_a_mask_by_its_name(self) -> None:
        feed = plausible_feed(parse(BERT), size=5, batch=2)
        assert feed["attention_mask"].tolist() == [[1] * 5] * 2

    def test_a_mask_by_what_it_feeds(self) -> None:
        model = parse(BERT.replace("attention_mask", "input_3"))
        assert plausible_feed(model, size=5)["input_3"].tolist() == [[1] * 5]

    def test_a_mask_of_floats(self) -> None:
        model = parse("g (float[4] x, float[4] src_mask) => (float[4] y) { y = Mul (x, src_mask) }")
        assert plausible_feed(model)["src_mask"].tolist() == [1, 1, 1, 1]

    def test_what_is_masked_is_no_mask(self) -> None:
        model = parse("g (float[400] masked_image) => (float[400] y) { y = Relu (masked_image) }")
        assert plausible_feed(model)["masked_image"].std() > 0.5

    def test_masked_positions_are_indices(self) -> None:
        model = parse(
            "g (float[30, 2] x, int64[400] mask_at) => (float[400, 2] y) { y = Gather (x, mask_at) }"
        )
        assert plausible_feed(model)["mask_at"].max() == 29

    @pytest.mark.parametrize("size", [1, 6])
    def test_lengths_are_those_of_the_sequences(self, size: int) -> None:
        model = parse(LSTM)
        model.graph.inputs[1].name = "input_2"
        feed = plausible_feed(model, size=4, batch=size)
        assert feed["input_2"].tolist() == [feed["x"].shape[0]] * feed["x"].shape[1]
        Evaluator(model).run(feed)

    def test_lengths_by_name(self) -> None:
        model = parse(
            """g (float[N, L] x, int64[N] lengths) => (float[N, L] y, int64[N] z)
            { y = Neg (x) z = Neg (lengths) }"""
        )
        assert plausible_feed(model, size=7, batch=2)["lengths"].tolist() == [7, 7]

    def test_a_count_is_no_less_than_one(self) -> None:
        model = parse("g (float[9] x, int64[1] k) => (float[M] y, int64[M] i) { y, i = TopK (x, k) }")
        assert [plausible_feed(model, seed=seed)["k"].tolist() for seed in range(5)] == [[1]] * 5


class TestOtherValues:
    def test_a_number_that_is_compared(self) -> None:
        """A sample rate that the model knows, not one that it never saw."""
        model = parse(
            """g (float[2] x, int64 sr) => (float[2] y) <int64 known = {16000}> {
                c = Equal (sr, known)
                y = If (c) <
                    then_branch = a () => (float[2] p) { p = Neg (x) },
                    else_branch = b () => (float[2] q) { q = Relu (x) }
                >
            }"""
        )
        feed = plausible_feed(model)
        assert feed["sr"] == 16000
        assert feed["sr"].shape == ()

    def test_many_that_are_compared_with_one_are_not_it(self) -> None:
        model = parse("g (int64[99] i) => (bool[99] y) <int64 pad = {5}> { y = Equal (i, pad) }")
        assert set(plausible_feed(model)["i"].tolist()) == {0, 1}

    def test_a_one_hot_written_out(self) -> None:
        model = parse(
            """g (int32[500, 1] i) => (bool[500, 4] y) <int32[4] levels = {0, 1, 2, 3}>
            { y = Equal (i, levels) }"""
        )
        assert set(plausible_feed(model)["i"].ravel().tolist()) == {0, 1, 2, 3}

    @pytest.mark.parametrize(("kind", "low", "high"), [("uint8", 0, 255), ("int8", -128, 127)])
    def test_bytes_take_any_value(self, kind: str, low: int, high: int) -> None:
        model = parse(f"g ({kind}[1, 90, 90, 3] x) => (float[1, 90, 90, 3] y) {{ y = Cast <to = 1> (x) }}")
        pixels = plausible_feed(model)["x"]
        assert (pixels.min(), pixels.max()) == (low, high)

    def test_where_nothing_is_known(self) -> None:
        model = parse("g (int64[99] i) => (int64[99] y) { y = Add (i, i) }")
        assert set(plausible_feed(model)["i"].tolist()) == {0, 1}

    def test_booleans_strings_and_floats(self) -> None:
        model = parse(
            """g (bool[3] b, string[2] s, float[900] x) => (bool[3] c, string[2] t, float[900] y)
            { c = Not (b) t = Identity (s) y = Relu (x) }"""
        )
        feed = plausible_feed(model)
        assert feed["b"].all()
        assert feed["s"].tolist() == ["a", "a"]
        assert abs(feed["x"].mean()) < 0.2 < 0.8 < feed["x"].std() < 1.2

    @pytest.mark.parametrize("kind", ["float16", "double", "bfloat16"])
    def test_floats_of_other_widths(self, kind: str) -> None:
        model = parse(f"g ({kind}[3] x) => ({kind}[3] y) {{ y = Neg (x) }}")
        (spec,) = input_specs(model)
        assert plausible_feed(model)["x"].dtype == spec.dtype

    def test_of_a_plain_model_are_those_of_a_seeded_feed(self) -> None:
        model = parse("g (float[N, 3] x, float[N, 2] z) => (float[N, 3] y) { y = Relu (x) }")
        for name, array in seeded_feed(input_specs(model), seed=5, size=1).items():
            np.testing.assert_array_equal(plausible_feed(model, seed=5)[name], array)

    def test_repeat_with_the_seed_alone(self) -> None:
        first, again, other = (plausible_feed(parse(BERT), seed=s, size=9)["input_ids"] for s in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


class TestSizes:
    @staticmethod
    def shapes(*shapes: list[int | str | None], prefix: str = "x", **options: Any) -> list[tuple[int, ...]]:
        model = parse("g () => (float[1] y) <float[1] c = {1}> { y = Relu (c) }")
        model.graph.inputs.extend(
            ir.Value(name=f"{prefix}{i}", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
            for i, shape in enumerate(shapes)
        )
        return [array.shape for array in plausible_feed(model, **options).values()]

    def test_equal_symbols_are_equal(self) -> None:
        found = self.shapes(["N", "L"], ["L", "M"], [2, "N", "L"], size=5, batch=3)
        assert found == [(3, 5), (5, 5), (2, 3, 5)]

    def test_the_batch_by_its_name(self) -> None:
        assert self.shapes(["seq", "batch"], ["batch", "seq"], size=5, batch=3) == [(5, 3), (3, 5)]

    def test_sums_and_products_of_symbols(self) -> None:
        found = self.shapes(["batch", "L"], ["batch", "L + 2"], ["2*L", "K-1"], size=5, batch=3)
        assert found == [(3, 5), (3, 7), (10, 5)]

    @pytest.mark.parametrize("text", ["a.b.0", "dim with blanks", "f(x)", "1x"])
    def test_any_text_is_a_symbol(self, text: str) -> None:
        assert self.shapes([3, text], size=5) == [(3, 5)]

    @pytest.mark.parametrize("text", ["past_len + seq", "total_len"])
    def test_the_past_counts_where_it_is_added_up(self, text: str) -> None:
        found = self.shapes(["batch", "seq"], ["batch", text], ["batch", "past_len", 8], size=2)
        assert found == [(1, 2), (1, 4), (1, 2, 8)]

    def test_or_else_nothing_is_past(self) -> None:
        found = self.shapes(["batch", "seq"], ["batch", "seq"], ["batch", "past_len", 8], size=2)
        assert found == [(1, 2), (1, 2), (1, 0, 8)]
        assert self.shapes(["batch", None, 8], prefix="past", size=2) == [(1, 0, 8)]

    def test_without_names(self) -> None:
        """Question marks are not one symbol; the middle of a recurrent state is the batch."""
        found = self.shapes(["?", "?"], [2, "?", 128], size=5, batch=3)
        assert found == [(3, 5), (2, 3, 128)]
        assert self.shapes([1, None, 128], size=5) == [(1, 5, 128)]


class TestWholeModels:
    @pytest.mark.parametrize("model", [parse(BERT), generator(), parse(LSTM)], ids=["bert", "gpt", "lstm"])
    @pytest.mark.parametrize("size", [1, 2, 9])
    def test_run(self, model: ir.Model, size: int) -> None:
        answer = Evaluator(model).run(plausible_feed(model, size=size))
        assert all(np.isfinite(a).all() for a in answer.values())

    def test_are_left_as_they_were(self) -> None:
        model = parse(BERT)
        before = ir.to_proto(model).SerializeToString()
        plausible_feed(model, size=3)
        assert ir.to_proto(model).SerializeToString() == before

    def test_whose_nodes_are_in_no_order(self) -> None:
        model = parse(BERT)
        nodes = list(model.graph)
        model.graph.remove(nodes)
        model.graph.extend(reversed(nodes))
        assert plausible_feed(model, size=600)["input_ids"].max() == 89

    def test_that_contradict_themselves(self) -> None:
        """What onnx cannot infer is unknown, and what is declared still counts."""
        model = parse(
            """g (float[2] x, float[3] z, int64[300] i) => (float[300, 2] y) <float[40, 2] t>
            { bad = Add (x, z) y = Gather (t, i) }"""
        )
        assert plausible_feed(model)["i"].max() == 39

    def test_with_operators_of_a_domain_that_is_not_imported(self) -> None:
        model = parse("g (float[2] x, int64[300] i) => (float[M] y) { a = test.Odd (x) y = Gather (x, i) }")
        assert set(plausible_feed(model)["i"].tolist()) == {0, 1}

    def test_with_inputs_that_are_no_tensors(self) -> None:
        with pytest.raises(InputError, match="'s' is no tensor of known rank: pass --data"):
            plausible_feed(parse("g (seq(float[2]) s) => (seq(float[2]) t) { t = Identity(s) }"))

    def test_weights_are_not_read(self, tmp_path: Path) -> None:
        """They may be larger than memory; here their file is gone."""
        model = parse(
            """g (int64[300] i) => (float[300, 64] y) <float[512, 64] t, int64[1] s = {300}>
            { j = Reshape (i, s) y = Gather (t, j) }"""
        )
        ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
        (tmp_path / "m.data").unlink()
        assert plausible_feed(ir.load(tmp_path / "m.onnx"))["i"].max() > 400

    @pytest.mark.parametrize(
        ("name", "ranges"),
        [
            ("models/magika_v3_3", {"bytes": (0, 256)}),
            ("models/silero_vad", {"sr": (16000, 16000)}),
            ("graphs/onnxruntime/bert_toy_optimized", {"input_ids": (0, 98), "input_mask": (1, 1)}),
        ],
    )
    def test_of_the_corpus(self, corpus: Path, name: str, ranges: dict[str, tuple[int, int]]) -> None:
        feed = plausible_feed(ir.load(corpus / f"{name}.onnx"), size=600)
        assert {key: (feed[key].min(), feed[key].max()) for key in ranges} == ranges
