"""A user's code is found from the working folder, and what it raises becomes one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.foreign import foreign_code, import_callable, reason


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(3), RuntimeError("one\ntwo"), ValueError()])
def test_whatever_is_raised_becomes_one_line(error: BaseException) -> None:
    with pytest.raises(InputError, match="theirs failed") as caught, foreign_code("theirs failed"):
        raise error
    assert "\n" not in str(caught.value)


def test_our_own_errors_pass() -> None:
    with pytest.raises(EdgewiseError, match=r"^ours$"), foreign_code("theirs failed", InputError):
        raise EdgewiseError("ours")


def test_an_interrupt_is_no_failure() -> None:
    with pytest.raises(KeyboardInterrupt), foreign_code("theirs failed"):
        raise KeyboardInterrupt


def test_the_root_of_a_chain_is_told() -> None:
    error = RuntimeError("around it")
    error.__cause__ = ValueError("the cause")
    assert reason(error) == "the cause (ValueError)"


def test_functions_are_found_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_module_f.py").write_text("def seven():\n    return 7\n")
    monkeypatch.chdir(tmp_path)
    assert import_callable("users_module_f:seven", "")() == 7


def test_a_text_of_another_form_keeps_its_own_words() -> None:
    with pytest.raises(InputError, match=r"^no metric best; .*module:function"):
        import_callable("best", "no metric best")
