"""onnxruntime's own file format, and the list of operators that a runtime built for it alone needs."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from edgewise.optimizer import files
from edgewise.optimizer.comparison import relative
from edgewise.optimizer.pipeline import Reference
from edgewise.optimizer.probe import probe_feeds
from edgewise.passes.graph import opset
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Evaluator, Feed
from edgewise.runtime.session import first_line, import_onnxruntime, runtime_errors, weight_bytes

_LIMIT = int(1.9 * 2**30)  # flatbuffers, which hold weights and all, end at 2 GiB
_OF_ONE_MACHINE = ("NchwcTransformer",)  # blocks channels to the width of this machine's registers


@dataclass(frozen=True)
class OrtFiles:
    """What was written: the model, and beside it the list of its operators.

    `operators` is what onnxruntime's build takes as `--include_ops_by_config`, `required` the same by domain
    and operator set. `error` is the largest difference from the source's outputs relative to their
    largest value, `bytes` the size of the model.
    """

    model: Path
    operators: Path
    required: Mapping[tuple[str, int], tuple[str, ...]]
    bytes: int
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        required = {f"{domain};{version}": list(ops) for (domain, version), ops in self.required.items()}
        paths = {"model": str(self.model), "operators": str(self.operators)}
        return {**paths, "required": required, "bytes": self.bytes, "error": self.error}


def files_beside(output: Path) -> tuple[Path, Path]:
    """The .ort file that goes with `output`, and the list of its operators."""
    return output.with_suffix(".ort"), output.with_suffix(".required_operators.config")


def emit_ort(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    feeds: Sequence[Feed] = (),
    *,
    threads: int | None = None,
    force: bool = False,
) -> OrtFiles:
    """Write the .onnx file `path` as an .ort file, and `<name>.required_operators.config` beside it.

    The graph is written as onnxruntime optimizes it for any CPU. The file is loaded again and compared
    with its source on `feeds`, by default on made-up ones; where it answers differently nothing is
    written and `EdgewiseError` is raised. Raises `InputError` on a file that cannot be read or
    converted and on an output that cannot be written.
    """
    path, output = Path(path), Path(output)
    _, listing = files_beside(output)
    if output.suffix != ".ort":
        raise InputError(f"{output} is no name for an .ort file: onnxruntime tells the format by its end")
    files.check_writable(listing, force=force)
    files.check_writable(output, force=force, source=path)
    model = files.load(path)
    if weight_bytes(model) > _LIMIT:
        raise InputError(f"{path} holds more than an .ort file can, 2 GiB: keep it in .onnx")
    reference = Reference(model, feeds or probe_feeds(model, None), threads=threads)
    with files.write_folder(output, force=force) as folder:
        made, plain = folder / output.name, folder / "optimized.onnx"
        _save(path, made, "ORT")
        error = _compare(path, made, reference, threads)
        _save(path, plain, "ONNX")
        required = _required(ir.load(plain))
        plain.unlink()
        (folder / listing.name).write_text(_config(output.name, required), encoding="utf-8")
    return OrtFiles(output, listing, required, output.stat().st_size, error)


def _save(source: Path, target: Path, kind: str) -> None:
    """Let onnxruntime write `source` as it would run it; `kind` is ORT or ONNX."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = os.fspath(target)
    options.add_session_config_entry("session.save_model_format", kind)
    try:
        ort.InferenceSession(
            os.fspath(source),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=_OF_ONE_MACHINE,
            enable_fallback=0,
        )
    except runtime_errors() as error:
        raise InputError(
            f"onnxruntime {ort.__version__} cannot convert {source}: {first_line(error)}"
        ) from error


def _compare(source: Path, made: Path, reference: Reference, threads: int | None) -> float:
    """The error of the file made; `EdgewiseError` if it is more than rounding explains."""
    before, after = (Evaluator(path, threads=threads) for path in (source, made))
    error = 0.0
    for feed in reference.feeds:
        expected, actual = before.run(feed), after.run(feed)
        names = expected.keys() - reference.random
        error = max([error, *(relative(expected[name], actual.get(name)) for name in names)])
    if error > reference.tolerance:
        raise EdgewiseError(
            f"the .ort file answers otherwise than {source}, by {error:.1e} of the largest value: "
            "keep the .onnx file, and try another version of onnxruntime"
        )
    return error


def _required(model: ir.Model) -> dict[tuple[str, int], tuple[str, ...]]:
    """The operators of a model by their domain and the operator set in which they became what they are."""
    found: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
    for node in model.graph.all_nodes():
        found[node.domain or "ai.onnx", _since(node, model)].add(node.op_type)
    return {key: tuple(sorted(found[key])) for key in sorted(found)}


def _since(node: ir.Node, model: ir.Model) -> int:
    """The operator set that a node's operator is of; in domains that onnx does not know, the one imported."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = opset(model) if domain == "" else model.opset_imports.get(domain, 1)
    if not onnx.defs.has(node.op_type, version, domain):
        return version
    return onnx.defs.get_schema(node.op_type, version, domain).since_version


def _config(name: str, required: Mapping[tuple[str, int], tuple[str, ...]]) -> str:
    lines = [f"{domain};{version};{','.join(ops)}" for (domain, version), ops in required.items()]
    return "\n".join([f"# Operators of {name}", *lines, ""])
