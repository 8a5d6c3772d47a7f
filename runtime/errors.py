"""The failures edgewise expects. Anything else that is raised is a bug and keeps its traceback."""

from __future__ import annotations


class EdgewiseError(Exception):
    """The job could not be done. The text says in one line what is wrong and what to do."""

    exit_code = 1


class InputError(EdgewiseError):
    """What the user handed in cannot be used: a file, a sample, an option."""

    exit_code = 2
