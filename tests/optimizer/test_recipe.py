"""A recipe reads back as it was written, and every mistake in one is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from edgewise.calibration.data import Preprocess
from edgewise.optimizer.recipe import Benchmark, Quantize, Recipe, load_recipe
from edgewise.passes import EXACT_CHAIN
from edgewise.runtime.errors import InputError

FULL = Recipe(
    passes=("drop-identity", "fuse-batch-norm"),
    quantize=Quantize(methods=("minmax",), samples=7),
    benchmark=Benchmark(precision=0.05, max_seconds=1.0),
    preprocess=Preprocess(resize=256, crop=(224, 192), mean=(0.5, 0.5, 0.5), std=(0.25,)),
    fix_dims=("batch=1", "x.2=8"),
    outputs=("scores", "mask"),
    uint8_input="nhwc",
    runtime="1.16",
    strip=True,
    emit="ort",
    metric="top1",
    max_drop=0.02,
    target="openvino",
    threads=2,
    seed=9,
)


@pytest.mark.parametrize("recipe", [Recipe(), FULL, Recipe(quantize=None, benchmark=None)])
def test_yaml_round_trip(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe


def test_the_default_recipe_is_the_whole_exact_chain() -> None:
    assert [step.spec for step in Recipe().chain] == list(EXACT_CHAIN)
    assert Recipe().quantize is not None


def test_a_runtime_holds_the_chain() -> None:
    *before, last = Recipe(runtime="1.9").chain
    assert last.spec == "lower-opset{ir_version: 8, to: 15}"
    expected = ["upgrade-opset{to: 15}" if spec == "upgrade-opset" else spec for spec in EXACT_CHAIN]
    assert [step.spec for step in before] == expected
    assert [step.spec for step in Recipe(runtime="1.16").chain][:-1] == list(EXACT_CHAIN)


def test_a_file_says_only_what_is_different(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("max_drop: 0.5\npreprocess:\n  resize: 32\n  mean: [1, 2, 3]\nbenchmark: null\n")
    recipe = load_recipe(path)
    assert (recipe.max_drop, recipe.benchmark) == (0.5, None)
    assert recipe.preprocess == Preprocess(resize=32, mean=(1, 2, 3))
    assert recipe.passes == EXACT_CHAIN


MISTAKES = {
    "no such file": (None, "cannot be read"),
    "no yaml": ("a: [1", "no YAML"),
    "a list": ("- a", "no mapping"),
    "empty": ("", "no mapping"),
    "binary": (b"\xff\xfe\x00", "no YAML"),
    "unknown field": ("max_dorp: 1", "max_dorp"),
    "unknown field below": ("quantize: {sample: 3}", "quantize.sample"),
    "unknown preprocessing": ("preprocess: {resise: 3}", "resise"),
    "unknown quantization option": ("quantize: {options: {per_chanel: true}}", "per_chanel"),
    "wrong preprocessing": ("preprocess: {layout: chw}", "layout"),
    "wrong type": ("threads: many", "threads"),
    "out of bounds": ("threads: 0", "threads"),
    "negative": ("max_drop: -1", "max_drop"),
    "unknown pass": ("passes: [fuse-nothing]", "fuse-nothing"),
    "pass option": ("passes: ['drop-identity{deep: true}']", "deep"),
    "lossy pass": ("passes: [insert-qdq]", "insert-qdq"),
    "pass of another signature": ("passes: ['keep-outputs{names: y}']", "changes inputs or outputs"),
    "lossy preparation": ("quantize: {prepare: [insert-qdq]}", "insert-qdq"),
    "unknown method": ("quantize: {methods: [best]}", "methods"),
    "no method": ("quantize: {methods: []}", "methods"),
    "unknown target": ("target: toaster", "target"),
    "a runtime that is a number": ("runtime: 1.20", "runtime"),
    "unknown runtime": ("runtime: newest", "no version of onnxruntime"),
    "unknown layout of pixels": ("uint8_input: chw", "uint8_input"),
    "unknown format": ("emit: tflite", "emit"),
    "another version": ("version: 2", "version"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_named(kind: str, tmp_path: Path) -> None:
    text, message = MISTAKES[kind]
    path = tmp_path / "recipe.yaml"
    if isinstance(text, bytes):
        path.write_bytes(text)
    elif text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_options_win_over_the_recipe() -> None:
    recipe = FULL.with_options(max_drop=0.5, threads=None, preprocess=Preprocess(crop=8))
    assert (recipe.max_drop, recipe.threads, recipe.preprocess) == (0.5, 2, Preprocess(crop=8))
    assert recipe.metric == "top1"


def test_zero_is_an_option() -> None:
    assert FULL.with_options(max_drop=0.0, seed=0).max_drop == 0.0


def test_wrong_options_are_named() -> None:
    with pytest.raises(InputError, match="threads"):
        Recipe().with_options(threads=0)
    with pytest.raises(InputError, match="target"):
        Recipe().with_options(target="toaster")


def test_what_is_written_is_plain_yaml() -> None:
    assert yaml.safe_load(FULL.to_yaml())["preprocess"]["resize"] == 256


def test_recipes_are_values() -> None:
    assert hash(Recipe()) == hash(Recipe())
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 3  # type: ignore[misc]
