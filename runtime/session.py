"""Open an onnxruntime session that runs where it was asked to, or say why it cannot."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
        "xnnpack": ("XnnpackExecutionProvider", "an onnxruntime built with --use_xnnpack"),
        "dml": ("DmlExecutionProvider", "onnxruntime-directml"),
    }
)
"""Short name -> (onnxruntime's name, the distribution that brings it)."""

_PACKAGED_FOR = MappingProxyType(
    {
        "cuda": ("Linux", "Windows"),
        "tensorrt": ("Linux", "Windows"),
        "openvino": ("Linux", "Windows"),
        "coreml": ("Darwin",),
        "qnn": ("Windows",),
        "dml": ("Windows",),
    }
)
"""The systems that a provider's package exists for, where it is not made for all of them."""

_SYSTEMS = MappingProxyType({"Darwin": "macOS"})
_WITHIN = MappingProxyType(
    {"onnxruntime-qnn": "'onnxruntime-qnn<2'"}
)  # from 2 on no runtime, but a plugin for one
_THREADS_OF = MappingProxyType({"openvino": "num_of_threads", "xnnpack": "intra_op_num_threads"})
"""The option of providers that run on a thread pool of their own."""

_RUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-directml",
)
_CPU = "CPUExecutionProvider"
_PROTOBUF_LIMIT = 2**31 - 1


class ProviderError(InputError):
    """The installed onnxruntime does not have, or cannot start, the execution provider asked for."""


@dataclass(frozen=True)
class Grant:
    """What onnxruntime made of the wish for a `provider`, by its own record.

    `assigned` counts the nodes each execution provider took, `elsewhere` the types of those that went to
    another than the one asked for. Both are empty where onnxruntime keeps no record (before 1.24), and
    then nobody knows that all of it was granted, unless the CPU was asked for, which takes everything.
    """

    provider: str
    assigned: Mapping[str, int]
    elsewhere: Mapping[str, int]

    @property
    def complete(self) -> bool:
        """Whether all nodes are known to run where it was asked for."""
        return not self.elsewhere and (bool(self.assigned) or self.provider == "cpu")

    def __str__(self) -> str:
        if not self.assigned:
            return f"{self.provider}: onnxruntime keeps no record of where nodes run"
        total, others = sum(self.assigned.values()), sum(self.elsewhere.values())
        if not others:
            return f"{self.provider} runs all {total} nodes"
        kinds = ", ".join(f"{op} {n}" for op, n in self.elsewhere.items())
        taken = {name for name in self.assigned if name != PROVIDERS[self.provider][0]}
        where = "the CPU" if taken == {_CPU} else "other providers"
        return f"{self.provider} runs {total - others or 'none'} of {total} nodes; on {where}: {kinds}"


def grant_of(session: onnxruntime.InferenceSession, provider: str) -> Grant:
    """The grant of a session that was opened with `record_assignment`."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return Grant(provider, {}, {})
    name, _ = PROVIDERS[provider]
    assigned: Counter[str] = Counter()
    elsewhere: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        ops = [node.op_type for node in part.get_nodes()]
        assigned[part.ep_name] += len(ops)
        if part.ep_name != name:
            elsewhere.update(ops)
    return Grant(provider, dict(assigned), dict(elsewhere.most_common()))


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
    name, _ = PROVIDERS[provider]
    ort = import_onnxruntime()
    if name not in ort.get_available_providers():
        raise ProviderError(f"onnxruntime {ort.__version__} has no {name}: {_remedy(provider)}")
    return name


def _remedy(provider: str) -> str:
    """What to do about a provider that is missing."""
    _, package = PROVIDERS[provider]
    system = platform.system()
    if (known := _PACKAGED_FOR.get(provider)) and system not in known:
        systems = " and ".join(_SYSTEMS.get(s, s) for s in known)
        return f"it exists for {systems} only, and this is {_SYSTEMS.get(system, system)}"
    if package not in _RUNTIMES:
        return f"no package on PyPI brings it, it takes {package}"
    here = installed_runtimes()
    if here == (package,):
        return f"pip install --force-reinstall {_WITHIN.get(package, package)}"
    install = f"pip uninstall {' '.join(here)} && pip install {_WITHIN.get(package, package)}"
    if len(here) > 1:
        return f"{', '.join(here)} are installed over each other and only one can be: {install}"
    return install if here else f"it comes with the package {package}"


def open_session(
    model: ModelSource,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    inter_op_threads: int | None = None,
    optimize: bool = True,
    spinning: bool = True,
    record_assignment: bool = False,
    config: dict[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """A session of `model` on `provider`, with the CPU behind it for nodes the provider does not take.

    `threads` is the number of intra-op threads (default: onnxruntime's, one a core), `config` holds
    further session configuration entries. `record_assignment` lets `grant_of` tell where nodes run.
    Raises `ProviderError` where the provider is not granted, `InputError` where onnxruntime cannot load
    the model.
    """
    ort = import_onnxruntime()
    name = check_provider(provider)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    if inter_op_threads is not None:
        options.inter_op_num_threads = inter_op_threads
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    if record_assignment:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    wanted = _with_fallbacks(provider, threads)
    with _as_argument(model) as argument:
        try:
            session = ort.InferenceSession(argument, options, providers=wanted, enable_fallback=0)
        except runtime_errors() as error:
            raise InputError(_refusal(provider, error)) from error
    if name not in session.get_providers():
        raise ProviderError(
            f"{name} was asked for and onnxruntime fell back to {session.get_providers()[0]}: "
            f"check the driver and the libraries that {PROVIDERS[provider][1]} needs"
        )
    return session


def _with_fallbacks(provider: str, threads: int | None) -> list[tuple[str, dict[str, str]]]:
    """The providers to try for each node in turn, with their options."""
    name, _ = PROVIDERS[provider]
    option = _THREADS_OF.get(provider)
    wanted = [(name, {} if option is None or threads is None else {option: str(threads)})]
    cuda, _ = PROVIDERS["cuda"]
    if provider == "tensorrt" and cuda in import_onnxruntime().get_available_providers():
        wanted.append((cuda, {}))  # what TensorRT does not take stays on the device
    return wanted if provider == "cpu" else [*wanted, (_CPU, {})]


def _refusal(provider: str, error: Exception) -> str:
    """Why there is no session; a compiler behind a provider tells the cause last, after its own sources."""
    version = import_onnxruntime().__version__
    if provider == "cpu":
        return (
            f"onnxruntime {version} cannot load the model; export it again with ONNX operators: "
            f"{first_line(error)}"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"onnxruntime {version} cannot load the model on {PROVIDERS[provider][0]}: {lines[-1]}"


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

    inside = ir.external_data.load_to_model(model.clone())  # bytes have no folder to find other files in
    data: bytes = ir.to_proto(inside).SerializeToString()
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
