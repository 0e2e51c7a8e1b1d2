"""How long-running work reports where it is, without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """Wraps an iterable of known length; the CLI passes one that draws a bar with an ETA."""

    def __call__(self, items: Iterable[Item], label: str, total: int) -> Iterator[Item]: ...

    def note(self, text: str, tokens: int = 0) -> None:
        """Says one line about the work now under way, e.g. the current loss. tokens: worked on since the last note."""
        ...


class Silent:
    """The default: iterates and says nothing."""

    def __call__(self, items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
        return iter(items)

    def note(self, text: str, tokens: int = 0) -> None:
        pass


silent = Silent()


def with_notes(progress: Progress) -> Progress:
    """A progress that can be told notes, whatever was given: a plain function that yields the items will do."""
    return progress if hasattr(progress, "note") else _Wrapping(progress)


class _Wrapping(Silent):
    def __init__(self, wrap: Progress) -> None:
        self._wrap = wrap

    def __call__(self, items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
        return self._wrap(items, label, total)
