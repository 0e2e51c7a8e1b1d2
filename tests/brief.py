"""A shorter text by the name ``builtin``: to tokenise the whole of it takes longer than most tests."""

from collections.abc import Iterator

from uniprune.data import text

CHARACTERS = 50_000


def builtin(use: text.Use) -> Iterator[str]:
    """The first documents of the text of this name."""
    size = 0
    for document in text._builtin(use):
        if size > CHARACTERS:
            return
        yield document
        size += len(document)


def shorten() -> None:
    text.NAMED["builtin"] = builtin
