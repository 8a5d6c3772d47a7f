"""Code that is not ours: finding what a user names, and putting what it raises into one line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.session import first_line


@contextmanager
def foreign_code(what: str, failure: type[EdgewiseError] = InputError) -> Iterator[None]:
    """Turn whatever code that is not ours raises into one line of `what` and why.

    This is the one place that catches everything: a user's module may raise anything at all.
    """
    try:
        yield
    except EdgewiseError:
        raise
    except (Exception, SystemExit) as error:
        raise failure(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """One line of the error at the root, where its author said what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else first_line(error)
    kind = type(error).__name__
    return text if text == kind else f"{text} ({kind})"


def import_callable(target: str, otherwise: str) -> Callable[..., Any]:
    """The callable at `package.module:name`, the working folder included in the search.

    `otherwise` opens the error where the text has no such form.
    """
    module_name, colon, attribute = target.partition(":")
    if not colon or not module_name or not attribute:
        raise InputError(f"{otherwise}; a function of yours is named module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    with foreign_code(f"{target} cannot be imported"):
        module = importlib.import_module(module_name)
    found = getattr(module, attribute, None)
    if not callable(found):
        raise InputError(f"{target}: module {module_name} has no function {attribute!r}")
    return found  # type: ignore[no-any-return]
