"""What can go wrong, as one small tree.

UniPruneError           anything this package raises on purpose; the CLI exits with 1
└── InputError          the caller can mend it: the message says what, where and how; the CLI exits with 2
    └── MismatchError   an artefact belongs to another model or another calibration
"""

from __future__ import annotations

LONGEST = 2000  # characters of a message


class UniPruneError(Exception):
    """Base class of every error that this package raises on purpose.

    Messages show values that files and callers gave; the middle of one that would be longer than LONGEST is left out.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST - 500]} ... {text[-400:]}")


class InputError(UniPruneError):
    """An argument, a file or a model cannot be used as it is; the message names it and the remedy."""


class MismatchError(InputError):
    """What was made before, scores, masks or an interrupted run, is of another model or other settings than those given."""


def first_line(error: Exception) -> str:
    """What another library's error says, in one line of at most 300 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
