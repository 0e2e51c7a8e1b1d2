"""Few-shot examples: which solved rows stand before a question; the choice is lm-evaluation-harness's, to the row."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from uniprune.errors import InputError
from uniprune.tasks.question import Format, Row

SEED = 1234


class Examples:
    """Draws ``count`` rows of a pool for one question after the other.

    without_itself: whether the question's own row is left out, and one more is drawn to that end.
    """

    def __init__(self, pool: Sequence[Row], format: Format, count: int, without_itself: bool) -> None:
        self._pool, self._format, self._count = pool, format, count
        self._without, self._random = without_itself, Random(SEED)

    def of(self, row: Row) -> list[Row]:
        """The examples for one row. Raises InputError if there are too few."""
        if not self._count:
            return []
        if self._format.first:
            return self._first(row)
        found = [self._pool[index] for index in self._drawn(len(self._pool), self._count + self._without)]
        if not self._without:
            return found
        found = [other for other in found if other != row][: self._count]
        if len(found) < self._count:  # the row is there more than once
            others = [other for other in self._pool if other != row]
            found = [others[index] for index in self._drawn(len(others), self._count)]
        return found

    def _first(self, row: Row) -> list[Row]:
        """The first ones, of the row's own subject."""
        subject = self._format.subject or (lambda row: "")
        alike = [other for other in self._pool if subject(other) == subject(row) and not (self._without and other == row)]
        if len(alike) < self._count:
            raise self._too_few(len(alike), f" of the subject {subject(row)!r}" if subject(row) else "")
        return alike[: self._count]

    def _drawn(self, rows: int, count: int) -> list[int]:
        if rows < count:
            raise self._too_few(rows)
        return self._random.sample(range(rows), count)

    def _too_few(self, rows: int, which: str = "") -> InputError:
        excepting = " beside the question itself" if self._without else ""
        return InputError(f"--num-fewshot {self._count} needs as many solved rows{excepting}; there are {rows}{which}")
