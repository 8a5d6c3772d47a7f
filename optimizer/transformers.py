"""onnxruntime's own fusions for transformers, by its own tool, as a step that is checked like any other."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import yaml

from edgewise.optimizer import files
from edgewise.passes.base import Outcome, Pass
from edgewise.passes.channel_links import op_types
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Evaluator, Feed
from edgewise.runtime.session import import_onnxruntime

_TOOL = "onnxruntime.transformers.optimizer"
KINDS = op_types(
    "bart bert bert_keras bert_tf clip conformer gpt2 gpt2_tf gpt_neox mmdit phi qwen3 sam2 swin t5 tnlr "
    "unet vae vit"
)
"""What the tool calls the types of models."""
_PLUMBING = op_types("Cast Concat Constant Gather Identity Reshape Shape Slice Squeeze Transpose Unsqueeze")
"""What the fusions put around the operators they make."""


@dataclass(frozen=True)
class FuseForOnnxruntime(Pass):
    """Fuse what onnxruntime alone has operators for: attention, skip connections into norms, embeddings.

    `kind` is what its tool calls the type of the model: bert, gpt2, t5, vit, ... `heads` and `hidden`, the
    number of heads and the width of the model, are found in the graph where they are 0, if the kind
    allows. The result runs on onnxruntime only. The pass runs a process and writes files, so it is none
    of `passes`.
    """

    name = "fuse-for-onnxruntime"
    kind: str = "bert"
    heads: int = 0
    hidden: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: there is no {self.kind!r}, only {' '.join(KINDS)}")

    def apply(self, model: ir.Model) -> Outcome:
        fused = fused_by_onnxruntime(model, self.kind, heads=self.heads, hidden=self.hidden)
        edits = fused_operators(model, fused).total()
        if edits:
            model.graph, model.ir_version = fused.graph, fused.ir_version
            model.functions.clear()
            model.functions.update(fused.functions)
        return Outcome(edits)


def fusion_of(text: str) -> FuseForOnnxruntime:
    """The step that `text` names: bert, or with what is not found in the graph bert{heads: 12, hidden: 768}.

    Raises `ValueError` on a kind or an option that there is none of.
    """
    kind, brace, options = text.strip().partition("{")
    given = yaml.safe_load(brace + options) if brace else {}
    if not isinstance(given, dict):
        raise ValueError(f"{text!r}: options are written as {{heads: 12, hidden: 768}}")
    step = FuseForOnnxruntime.from_options({"kind": kind.strip(), **given})
    assert isinstance(step, FuseForOnnxruntime)
    return step


def fused_by_onnxruntime(model: ir.Model, kind: str, *, heads: int = 0, hidden: int = 0) -> ir.Model:
    """What onnxruntime's tool makes of `model`, which is left as it was; not compared with it.

    The tool runs in a process of its own: importing it extends `sys.path` by a folder of modules with
    names like `metrics` and `float16`. It is kept from optimizing with a session first, for which it
    would need torch. Raises `EdgewiseError` where the tool fails.
    """
    import_onnxruntime()
    with tempfile.TemporaryDirectory(prefix="edgewise-") as scratch:
        source, made = Path(scratch) / "source.onnx", Path(scratch) / "fused.onnx"
        files.save(model, source)
        options = ["--num_heads", str(heads), "--hidden_size", str(hidden), "--opt_level", "0"]
        if kind == "bert":  # which by default takes masks for lengths: right only where they hide the end
            options.append("--use_raw_attention_mask")
        if Path(f"{source}.data").exists():
            options.append("--use_external_data_format")
        _run(["--input", str(source), "--output", str(made), "--model_type", kind, *options], kind)
        fused = files.load(made)
        ir.external_data.load_to_model(fused)
    return fused


def _run(arguments: Sequence[str], kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", _TOOL, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise EdgewiseError(f"onnxruntime's transformer tool fails on this model as {kind}: {said[-1]}")


def fused_operators(before: ir.Model, after: ir.Model) -> Counter[str]:
    """The operators that `after` has more of, by type, but for those that only move data."""
    found = Counter[str]()
    for (_, op_type), more in (_operators(after) - _operators(before)).items():
        found[op_type] += 0 if op_type in _PLUMBING else more
    return +found


def _operators(model: ir.Model) -> Counter[tuple[str, str]]:
    return Counter((node.domain, node.op_type) for node in model.graph.all_nodes())


def with_hidden_keys(model: ir.Model, feeds: Sequence[Feed]) -> tuple[Feed, ...]:
    """The feeds, and each once more with every third place of masks that hide nothing set to zero.

    A fusion that drops a mask, or takes it for a length, is right on masks of ones only.
    """
    hidden = [varied for feed in feeds if (varied := _with_hidden_keys(feed)) is not None]
    evaluator = Evaluator(model) if hidden else None
    return (*feeds, *(feed for feed in hidden if evaluator is not None and _runs(evaluator, feed)))


def _with_hidden_keys(feed: Feed) -> Feed | None:
    masks = {
        name: array.copy()
        for name, array in feed.items()
        if "mask" in name.lower() and array.ndim == 2 and array.shape[1] > 1 and bool((array == 1).all())
    }
    for mask in masks.values():
        mask[:, 1::3] = 0
    return {**feed, **masks} if masks else None


def _runs(evaluator: Evaluator, feed: Feed) -> bool:
    try:
        evaluator.run(feed)
    except InputError:
        return False
    return True
