"""The conformance cases of the onnx package, run through the trainable graph.

python tests/support/conformance.py > docs/graph_module.md       writes the table of coverage
"""

from __future__ import annotations

import fnmatch
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_cases
import onnx_ir as ir
import torch
from onnx_cases import base_of, modules

from edgewise.passes.base import graphs_of
from edgewise.training.graph_module import GraphModule
from edgewise.training.operators import OPERATORS
from edgewise.training.operators.call import as_tensor
from edgewise.training.program import key_of

OPSETS = range(9, 24)
CLAIMED = tuple(sorted({*(name for name in OPERATORS if "." not in name), "Constant"}))
"""The operators of the default domain."""

SKIPPED: Mapping[str, str] = {
    "test_*cast*FLOAT4E2M1*": "torch has no floats of four bits",
    "test_*cast*_to_*INT[24]*": "torch has no integers below eight bits",
    "test_*cast*E8M0*": "a type of powers of two, for scales alone",
    "test_*cast*no_saturate*FLOAT8E4M3FN": "torch's own cast saturates",
    "test_*cast*no_saturate*FLOAT8E4M3FN_expanded": "torch's own cast saturates",
    "test_*quantizelinear_float4e2m1": "torch has no floats of four bits",
    "test_bernoulli*": "random numbers",
    "test_training_dropout*": "random numbers",
    "test_col2im_5d": "torch folds images of two axes",
    "test_equal_string*": "text has no counterpart in torch",
    "test_resize_downsample_scales_*_align_corners": "onnxruntime takes the rounded size, and so does this",
    "test_scan_sum": "the form of opset 8, with a batch axis",
}
"""Cases of operators that are claimed, by pattern, and why they are not run."""


_CANCELLING = ("Attention", "DFT")


@dataclass(frozen=True)
class Case:
    """A case and the operator it is about. One that is `composed` has the operator written out in others."""

    operator: str
    composed: bool
    test: Any
    lacks: tuple[str, ...]

    @property
    def name(self) -> str:
        name: str = self.test.name
        return name

    @property
    def reason(self) -> str | None:
        """Why the case is not run; None if it is."""
        return next(
            (why for pattern, why in SKIPPED.items() if fnmatch.fnmatchcase(self.name, pattern)), None
        )


@cache
def cases() -> tuple[Case, ...]:
    """All cases. Making them takes some seconds: every expected output is computed."""
    return tuple(case for operator in modules() for case in cases_of(operator))


def cases_of(operator: str) -> tuple[Case, ...]:
    """The cases of one operator; those written out in others count for what they stand for."""
    tests = onnx_cases.cases_of(operator)
    names = {key_of(test.model.graph.node[0]) for test in tests if test.name == base_of(test)}
    return tuple(_case(test, name) for name in names for test in tests)


def _case(test: Any, operator: str) -> Case:
    used = {key_of(node) for graph in graphs_of(ir.from_proto(test.model)) for node in graph}
    return Case(operator, test.name != base_of(test), test, tuple(sorted(used.difference(CLAIMED))))


def run(case: Case) -> None:
    """`AssertionError` where an output is not what the case expects."""
    module = GraphModule(ir.from_proto(case.test.model)).eval()
    names = [value.name for value in case.test.model.graph.input]
    for inputs, expected in case.test.data_sets:
        feed = {name: _tensor(x) for name, x in zip(names, inputs, strict=True)}
        with torch.no_grad():
            outputs = module(feed)
        for got, wanted in zip(outputs.values(), expected, strict=True):
            _compare(case, got, _tensor(wanted))


def _tensor(given: Any) -> Any:
    if isinstance(given, list):
        return [_tensor(item) for item in given]
    if isinstance(given, onnx.TensorProto):
        return as_tensor(ir.from_proto(given))
    return as_tensor(ir.Tensor(np.asarray(given)))


def _compare(case: Case, got: Any, wanted: Any) -> None:
    """Within the tolerance of the case; of sums that cancel, within two roundings of the largest number."""
    if isinstance(wanted, list):
        assert len(got) == len(wanted), f"{case.name}: {len(got)} tensors, not {len(wanted)}"
        for one, other in zip(got, wanted, strict=True):
            _compare(case, one, other)
        return
    assert got.shape == wanted.shape, f"{case.name}: shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
    assert got.dtype == wanted.dtype, f"{case.name}: {got.dtype}, not {wanted.dtype}"
    steps = 2 * torch.finfo(got.dtype).eps if case.operator in _CANCELLING else 0.0
    got, wanted = _plain(got), _plain(wanted)
    steps *= np.abs(wanted[np.isfinite(wanted)]).max(initial=0)
    np.testing.assert_allclose(
        got, wanted, rtol=case.test.rtol, atol=max(case.test.atol, steps), err_msg=case.name
    )


def _plain(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A numpy array; the floats that numpy lacks as the wider ones."""
    lacking = tensor.dtype == torch.bfloat16 or (tensor.is_floating_point() and tensor.dtype.itemsize == 1)
    array: np.ndarray[Any, Any] = (tensor.float() if lacking else tensor).detach().numpy()
    return array


def table() -> str:
    """The page of coverage."""
    return "".join(f"{line}\n" for line in _lines())


_HEAD = """\
# The graph as a torch module: coverage

`edgewise.training.graph_module.GraphModule` runs these operators of the ONNX default domain, opsets 9 to 23,
with torch, so that a model has gradients. An operator or a variant that is missing is named in one line
(`InputError`), and never computed wrong. "Cases" are the conformance cases of onnx {version} that pass,
of all there are for the operator; `tests/training/test_conformance.py` runs them.
This page is written by `python tests/support/conformance.py > docs/graph_module.md`.

| operator | definitions of opset | cases |
|---|---|---|"""


def _lines() -> Iterator[str]:
    yield from _HEAD.format(version=onnx.__version__).splitlines()
    plain = defaultdict(list)
    for case in cases():
        if not case.composed:
            plain[case.operator].append(case)
    for operator in CLAIMED:
        yield f"| {operator} | {_definitions(operator)} | {_share(plain[operator])} |"
    composed = [case for case in cases() if case.composed and case.operator in CLAIMED and not case.lacks]
    yield ""
    yield f"The same operators written out in others: {_share(composed)} cases pass."
    yield ""
    yield from _skips()


def _share(group: Sequence[Case]) -> str:
    passed = sum(not case.lacks and case.reason is None for case in group)
    return f"{passed} / {len(group)}" if group else "none there"


def _definitions(operator: str) -> str:
    """The opsets in which a definition came that a model of the opsets covered may use."""
    found = []
    for opset in OPSETS:
        try:
            found.append(onnx.defs.get_schema(operator, opset, "").since_version)
        except onnx.defs.SchemaError:
            continue
    return ", ".join(map(str, sorted(set(found))))


def _skips() -> Iterator[str]:
    """What is not run, and why."""
    counts: Counter[str] = Counter()
    for case in cases():
        if case.operator in CLAIMED and not case.lacks and case.reason is not None:
            counts[case.reason] += 1
    yield "| cases not run | why |"
    yield "|---|---|"
    for reason, count in sorted(counts.items()):
        yield f"| {count} | {reason} |"


if __name__ == "__main__":
    sys.stdout.write(table())
