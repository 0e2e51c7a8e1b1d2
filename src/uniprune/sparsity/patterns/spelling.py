"""Patterns by their spelling: what a recipe and the command line call them. A new one is a line in PATTERNS."""

from __future__ import annotations

from typing import Protocol

from uniprune.errors import InputError
from uniprune.sparsity.choices import Scope
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.protocol import Pattern
from uniprune.sparsity.patterns.tiled import Tiled
from uniprune.sparsity.patterns.unstructured import Unstructured


class Spelled(Pattern, Protocol):
    """A pattern that a recipe and the command line can ask for in words."""

    @classmethod
    def read(cls, text: str, scope: Scope | None, default: Scope) -> Pattern | None:
        """The pattern of a spelling, None if it is none of this kind; InputError if it is, but impossible."""
        ...

    @property
    def spelling(self) -> tuple[str, Scope | None]:
        """The text, and the scope if it has one, that :meth:`read` turns into the pattern."""
        ...


PATTERNS: tuple[type[Spelled], ...] = (NM, Tiled, Unstructured)


def canonical(spec: str) -> str:
    """A pattern as records spell it: 0.50 and .5 are 0.5. What is none is left to whoever needs the pattern."""
    try:
        pattern = parse(spec)
    except InputError:
        return spec
    return pattern.spelling[0].removesuffix(".0") if isinstance(pattern, PATTERNS) else spec  # type: ignore[arg-type]


def default_scope(comparable: bool) -> Scope:
    """The budget group of a fraction that none is said for: the whole model if scores of different matrices may be compared."""
    return "model" if comparable else "row"


def parse(spec: str | float | Pattern, scope: Scope | None = None, default: Scope = "row") -> Pattern:
    """A pattern from its spelling: a sparsity (``0.6``), N of M kept (``2:4``) or a sparsity of tiles (``0.8@16x16``).

    scope: the budget group of a sparsity, ``default`` unless given; an N:M pattern has its own and refuses one.
    Raises InputError for anything else.
    """
    if not isinstance(spec, (str, float, int)):
        return spec
    text = str(spec).strip()
    for kind in PATTERNS:
        if (pattern := kind.read(text, scope, default)) is not None:
            return pattern
    raise InputError(f"sparsity {text!r} is neither a fraction such as 0.6 nor a pattern such as 2:4 or 0.8@16x16")
