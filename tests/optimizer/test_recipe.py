"""A recipe reads back as it was written, and every mistake in one is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from edgewise.calibration.data import Preprocess
from edgewise.optimizer.recipe import Benchmark, Prune, Quantize, Recipe, load_recipe
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
    short_names=True,
    emit="ort",
    metric="top1",
    max_drop=0.02,
    target="openvino",
    threads=2,
    seed=9,
)


PRUNING = Prune(
    score="taylor",
    max_macs=0.4,
    recover="closed-form",
    effort=0.5,
    schedule=3,
    best_effort=True,
    workers=2,
    memory=1 << 28,
)


@pytest.mark.parametrize(
    "recipe",
    [Recipe(), FULL, Recipe(quantize=None, benchmark=None), Recipe(prune=Prune()), Recipe(prune=PRUNING)],
)
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
    "two bounds of pruning": ("prune: {ratio: 0.5, max_size: 1}", "one bound counts, not max_size and ratio"),
    "more than all": ("prune: {max_macs: 1.5}", "prune.max_macs"),
    "a bound that is no number": ("prune: {min_metric: .nan}", "prune.min_metric"),
    "endless effort": ("prune: {effort: .inf}", "prune.effort"),
    "unknown score": ("prune: {score: best}", "prune.score"),
    "unknown option of pruning": ("prune: {max_mac: 0.5}", "prune.max_mac"),
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


BOUNDS = [("min_metric", 0.9), ("max_latency", 2.0), ("max_macs", 0.5), ("max_size", 1.0), ("ratio", 0.5)]


@pytest.mark.parametrize(("name", "number"), BOUNDS)
def test_only_a_bound_on_the_metric_is_searched_for(name: str, number: float) -> None:
    assert Prune().bounds_metric
    assert Prune.model_validate({name: number}).bounds_metric is (name == "min_metric")


def wanted(recipe: Recipe, *, by_drop: bool = False, int8: bool = False, **options: Any) -> Recipe:
    return recipe.to_prune(options, by_drop=by_drop, int8=int8)


def test_without_a_word_of_pruning_a_recipe_stays_as_it_is() -> None:
    assert wanted(FULL) is FULL


@pytest.mark.parametrize("options", [{"score": "taylor"}, {"effort": 2.0}, {"best_effort": True}])
def test_options_of_pruning_want_a_bound(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="a bound is missing: name one of --max-drop, --min-metric"):
        wanted(FULL, **options)


def test_int8_after_pruning_wants_a_bound() -> None:
    with pytest.raises(InputError, match="a bound is missing"):
        wanted(FULL, int8=True)


def test_a_bound_prunes_in_float_unless_int8_is_asked_for() -> None:
    found = wanted(FULL, max_macs=0.5, score="fisher")
    assert found == FULL.model_copy(update={"prune": Prune(max_macs=0.5, score="fisher"), "quantize": None})
    assert wanted(FULL, max_macs=0.5, int8=True).quantize == FULL.quantize


def test_a_drop_is_a_bound_by_itself() -> None:
    found = wanted(FULL, by_drop=True, trials=2)
    assert found.prune == Prune(trials=2)
    assert found.prune is not None
    assert found.prune.bounds_metric


@pytest.mark.parametrize(("name", "number"), BOUNDS)
def test_a_drop_and_another_bound_do_not_go_together(name: str, number: float) -> None:
    with pytest.raises(InputError, match=f"not --max-drop and --{name.replace('_', '-')}"):
        wanted(FULL, by_drop=True, **{name: number})


def test_two_bounds_are_one_too_many() -> None:
    with pytest.raises(InputError, match="one bound counts, not max_macs and ratio"):
        wanted(FULL, max_macs=0.5, ratio=0.5)


def test_a_bound_takes_the_place_of_the_recipes() -> None:
    recipe = Recipe(prune=PRUNING)
    found = wanted(recipe, max_size=2.0).prune
    assert found == Prune.model_validate({**PRUNING.model_dump(), "max_macs": None, "max_size": 2.0})
    assert wanted(recipe, by_drop=True).prune == PRUNING.model_copy(update={"max_macs": None})


def test_options_without_a_bound_change_the_recipes_section() -> None:
    recipe = Recipe(prune=PRUNING)
    assert wanted(recipe, recover="none").prune == PRUNING.model_copy(update={"recover": "none"})
    assert wanted(recipe).prune == PRUNING
