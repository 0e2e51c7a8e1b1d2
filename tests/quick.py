"""What tests take a long time for and learn nothing from."""

import os
from collections.abc import Iterator

from uniprune.data import text

CHARACTERS = 50_000


def builtin(use: text.Use) -> Iterator[str]:
    """The first documents of the text of this name: to tokenise the whole of it takes longer than most tests."""
    size = 0
    for document in text._builtin(use):
        if size > CHARACTERS:
            return
        yield document
        size += len(document)


def without_waiting() -> None:
    """For the rest of this process the text ``builtin`` is short, and nobody waits for the disk: what a process has written is
    there for others even if it is killed.
    """
    text.NAMED["builtin"] = builtin
    os.fsync = lambda handle: None
