"""Open an onnxruntime session that runs where it was asked to, or say why it cannot."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from edgewise.runtime.errors import EdgewiseError, InputError

if TYPE_CHECKING:  # a worker process starts without onnx-ir, in a quarter of the time and half the memory
    import onnx_ir as ir
    import onnxruntime

ModelSource: TypeAlias = "ir.Model | bytes | str | os.PathLike[str]"

PROVIDERS = MappingProxyType(
    {
        "cpu": ("CPUExecutionProvider", "onnxruntime"),
        "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
        "tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu"),
        "openvino": ("OpenVINOExecutionProvider", "onnxruntime-openvino"),
        "coreml": ("CoreMLExecutionProvider", "onnxruntime"),
        "qnn": ("QNNExecutionProvider", "onnxruntime-qnn"),
        "xnnpack": ("XnnpackExecutionProvider", "onnxruntime"),
        "dml": ("DmlExecutionProvider", "onnxruntime-directml"),
    }
)
"""Short name -> (onnxruntime's name, the distribution that brings it)."""

_RUNTIMES = tuple(dict.fromkeys(package for _, package in PROVIDERS.values()))
_PROTOBUF_LIMIT = 2**31 - 1


class ProviderError(InputError):
    """The installed onnxruntime does not have, or cannot start, the execution provider asked for."""


def import_onnxruntime() -> Any:
    """The onnxruntime module, whichever distribution installed it."""
    try:
        import onnxruntime
    except ImportError:
        raise InputError(
            "no onnxruntime is installed: pip install onnxruntime (or onnxruntime-gpu, onnxruntime-openvino)"
        ) from None
    return onnxruntime


def installed_runtimes() -> tuple[str, ...]:
    """The distributions of onnxruntime found here. More than one overwrite each other's files."""
    found = {d.metadata["Name"].lower() for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return tuple(name for name in _RUNTIMES if name in found)


def check_provider(provider: str) -> str:
    """onnxruntime's name for `provider`; `ProviderError` if this installation lacks it."""
    if provider not in PROVIDERS:
        raise ProviderError(f"unknown execution provider {provider!r}: choose from {', '.join(PROVIDERS)}")
    name, package = PROVIDERS[provider]
    if name not in import_onnxruntime().get_available_providers():
        here = ", ".join(installed_runtimes()) or "onnxruntime"
        raise ProviderError(
            f"the installed {here} has no {name}: pip uninstall {here.replace(',', '')} "
            f"&& pip install {package}"
        )
    return name


def open_session(
    model: ModelSource,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    optimize: bool = True,
    spinning: bool = True,
    config: dict[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """A session of `model` on `provider`, with the CPU behind it for nodes the provider does not take.

    `threads` is the number of intra-op threads (default: onnxruntime's, one a core), `config` holds
    further session configuration entries. Raises `ProviderError` where the provider is not granted,
    `InputError` where onnxruntime cannot load the model.
    """
    ort = import_onnxruntime()
    name = check_provider(provider)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    wanted = [name] if provider == "cpu" else [name, "CPUExecutionProvider"]
    with _as_argument(model) as argument:
        try:
            session = ort.InferenceSession(argument, options, providers=wanted, enable_fallback=0)
        except runtime_errors() as error:
            raise InputError(
                f"onnxruntime {ort.__version__} cannot load the model; export it again with ONNX operators: "
                f"{first_line(error)}"
            ) from error
    if name not in session.get_providers():
        raise ProviderError(
            f"{name} was asked for and onnxruntime fell back to {session.get_providers()[0]}: "
            f"check the driver and the libraries that {PROVIDERS[provider][1]} needs"
        )
    return session


def runtime_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: a class for each of its status codes, without a common base."""
    state = import_onnxruntime().capi.onnxruntime_pybind11_state
    kinds = [v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception)]
    return (RuntimeError, ValueError, *kinds)


def first_line(error: BaseException) -> str:
    """The one line of an onnxruntime status that says what happened."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def serialize(model: ir.Model) -> bytes:
    """The model as one protobuf message with its weights inside; at most 2 GiB."""
    import onnx_ir as ir

    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, those of subgraphs included."""
    return sum(
        v.const_value.nbytes
        for g in model.graphs()
        for v in g.initializers.values()
        if v.const_value is not None
    )


@contextmanager
def _as_argument(model: ModelSource) -> Iterator[bytes | str]:
    """What `InferenceSession` accepts: a path, or the bytes; above 2 GiB a temporary file."""
    if isinstance(model, bytes | str | os.PathLike):
        yield model if isinstance(model, bytes) else os.fspath(model)
        return
    if weight_bytes(model) < _PROTOBUF_LIMIT * 0.9:
        yield serialize(model)
        return
    with tempfile.TemporaryDirectory(prefix="edgewise-") as folder:
        path = Path(folder) / "model.onnx"
        import onnx_ir as ir

        try:
            ir.save(model.clone(), path, external_data="model.data")
        except OSError as error:
            raise EdgewiseError(f"no room for a temporary copy of the model in {folder}: {error}") from error
        yield str(path)
