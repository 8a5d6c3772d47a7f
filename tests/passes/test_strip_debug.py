"""strip-debug: what exporters noted for their own sake goes, what an application may read stays."""

from __future__ import annotations

import onnx_ir as ir
from rewrites import build, rewritten

from edgewise.passes.strip_debug import StripDebug
from edgewise.runtime.session import serialize

TEXT = """g (float[2] x, bool c) => (float[2] y) {
    y = If(c) <then_branch = t () => (float[2] p) { p = Mul(x, w) },
               else_branch = e () => (float[2] r) { r = Neg(x) }>
}"""


def model() -> ir.Model:
    import numpy as np

    return build(TEXT, w=np.float32([1, 2]))


def test_documentation_goes() -> None:
    noisy = model()
    (branch,) = noisy.graph
    inner = branch.attributes["then_branch"].as_graph().node(0)
    parts = (noisy, noisy.graph, branch, inner, inner.outputs[0], noisy.graph.inputs[0])
    for part in (*parts, noisy.graph.initializers["w"]):
        part.doc_string = "File /home/me/train.py, line 3"
    after, outcome = rewritten(noisy, StripDebug())
    assert outcome.edits == 7
    assert b"train.py" not in serialize(after)


def test_notes_of_exporters_go_and_other_metadata_stays() -> None:
    noisy = model()
    (branch,) = noisy.graph
    for part in (branch, branch.attributes["else_branch"].as_graph().node(0), branch.outputs[0]):
        part.metadata_props.update({"pkg.torch.onnx.stack_trace": "...", "namespace": "a/b", "layer": "3"})
    noisy.graph.metadata_props["pkg.torch.export.graph_signature"] = "..."
    noisy.metadata_props.update({"names": "{0: 'cat'}", "pkg.torch.version": "2"})
    after, outcome = rewritten(noisy, StripDebug())
    assert outcome.edits == 8
    assert after.metadata_props == {"names": "{0: 'cat'}"}
    assert after.graph.node(0).metadata_props == {"layer": "3"}
    assert b"pkg." not in serialize(after)


def test_names_stay() -> None:
    noisy = model()
    noisy.graph.node(0).name, noisy.graph.node(0).doc_string = "choice", "why"
    after, _ = rewritten(noisy, StripDebug())
    assert after.graph.node(0).name == "choice"


def test_nothing_to_strip() -> None:
    _, outcome = rewritten(model(), StripDebug())
    assert outcome.edits == 0
