"""Which types the kernels of an execution provider take, by onnxruntime's own registry."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from edgewise.runtime.session import check_provider, import_onnxruntime


def types_of_kernel(provider: str, op_type: str, opset: int) -> Mapping[str, frozenset[str]]:
    """The types, such as "tensor(float16)", that the kernels of `op_type` take for each type parameter.

    Empty where there is no kernel; a parameter that is left out takes all types of the schema. Raises
    `ProviderError` on a provider that is not installed.
    """
    found: dict[str, frozenset[str]] = {}
    for (first, last), kinds in _kernels(check_provider(provider)).get(op_type, ()):
        if first <= opset <= last:
            for name, types in kinds.items():
                found[name] = found.get(name, frozenset()) | frozenset(types)
    return MappingProxyType(found)


@cache
def _kernels(provider: str) -> Mapping[str, list[tuple[tuple[int, int], Mapping[str, list[str]]]]]:
    """Versions and types of every kernel of the default domain, by operator."""
    state = import_onnxruntime().capi.onnxruntime_pybind11_state
    found: dict[str, list[tuple[tuple[int, int], Mapping[str, list[str]]]]] = {}
    for kernel in state.get_all_opkernel_def():
        if kernel.provider == provider and kernel.domain == "":
            found.setdefault(kernel.op_name, []).append((kernel.version_range, kernel.type_constraints))
    return MappingProxyType(found)
