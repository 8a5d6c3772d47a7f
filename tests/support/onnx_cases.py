"""The conformance cases inside the onnx package, operator by operator.

onnx makes the cases of an operator as the module about it is imported. Making those of all operators takes
a while, most of it for those of pooling.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

from onnx.backend.test.case import node
from onnx.backend.test.case.node import ai_onnx_ml

_RENAMED = {"rangeop": "range"}


@cache
def modules() -> Mapping[str, str]:
    """The module of each operator, whose name is in lower case."""
    found = {}
    for package in (node, ai_onnx_ml):
        for module in pkgutil.iter_modules(package.__path__):
            if not (module.ispkg or module.name.startswith("_")):
                name = module.name.replace("_", "")
                found[_RENAMED.get(name, name)] = f"{package.__name__}.{module.name}"
    return found


def cases_of(operator: str) -> tuple[Any, ...]:
    """The cases of an operator, named in any case; none where onnx has no module about it."""
    if (module := modules().get(operator.lower())) is None:
        return ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some cases divide by zero on purpose
        importlib.import_module(module)
    made = node._NodeTestCases
    mine = {
        case.name
        for case in made
        if case.name == base_of(case) and case.model.graph.node[0].op_type.lower() == operator.lower()
    }
    return tuple(case for case in made if base_of(case) in mine)


def base_of(case: Any) -> str:
    """The name of the case that this one may write out in other operators; else its own."""
    name: str = case.name.split("_expanded")[0]
    return name
