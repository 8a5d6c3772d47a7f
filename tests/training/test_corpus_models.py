"""The trainable graph of every real model gives what onnxruntime gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")

import torch
from zoo import corpus_models

from edgewise.optimizer.probe import probe_feeds
from edgewise.runtime.evaluate import Array, Evaluator
from edgewise.runtime.plausible import plausible_feed
from edgewise.training.graph_module import GraphModule, as_tensors

CLOSE = 1e-4  # of the largest output: two libraries add in another order
HALF = 1e-2  # the same where the model itself counts in sixteen bits
SMALLEST = 1e-2  # of outputs that are all next to nothing: onnxruntime's sigmoid is zero before torch's is
STEPS, MOVED = 4, 0.02  # of an int8 net: a rounding that falls on the other side moves what follows by a step
SIZES = {"ppocr_v2_cls": 64, "ppocr_v4_det": 64}  # for what is open, where the first that runs is degenerate


@pytest.mark.parametrize("path", corpus_models(), ids=lambda path: path.stem)
def test_outputs_are_those_of_onnxruntime(path: Path) -> None:
    model = ir.load(path)
    evaluator = Evaluator(model, threads=1, optimize=False)  # the file as it stands: no int8 kernels
    module = GraphModule(model).eval()
    size = SIZES.get(path.stem)
    feeds = probe_feeds(model, None) if size is None else (plausible_feed(model, size=size, batch=2),)
    for feed in feeds:
        expected = evaluator.run(feed)
        with torch.no_grad():
            outputs = module(as_tensors(feed))
        for name, wanted in expected.items():
            _agree(outputs[name].numpy(), np.asarray(wanted))


def _agree(got: Array, wanted: Array) -> None:
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    if wanted.dtype.kind != "f":
        steps = np.abs(got.astype(np.int64) - wanted)
        assert steps.max(initial=0) <= STEPS
        assert np.count_nonzero(steps) <= MOVED * steps.size
        return
    largest = max(float(np.abs(wanted).max(initial=0)), SMALLEST)
    share = HALF if wanted.dtype == np.float16 else CLOSE
    assert float(np.abs(got.astype(np.float64) - wanted).max(initial=0)) <= share * largest
