"""A sparsity pattern as data, so that nobody who reads of one has to parse its spelling."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict

from uniprune.errors import InputError
from uniprune.sparsity.choices import Scope
from uniprune.sparsity.patterns.mixed import Mixed, choice
from uniprune.sparsity.patterns.nm import NM, spell
from uniprune.sparsity.patterns.protocol import Pattern
from uniprune.sparsity.patterns.ruled import Rule, Ruled
from uniprune.sparsity.patterns.spelling import PATTERNS, canonical, parse
from uniprune.sparsity.patterns.tiled import Tiled
from uniprune.sparsity.patterns.unstructured import Unstructured

SCOPES = {
    "row": "the same share of every row",
    "matrix": "the same share of every matrix",
    "block": "the same share of every decoder block",
    "model": "one budget for the whole model",
}


class _Data(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class RuleData(_Data):
    """What holds for the matrices in whose names ``match`` is found, see ``patterns.ruled.Rule``."""

    match: str
    what: str


class Structure(_Data):
    """A pattern. Fields that do not go with its kind are None.

    kind: ``unstructured``, ``N:M``, ``tiles`` or ``mixed``; of a pattern that is not this package's, its class. spelling:
    without its rules. sparsity: the fraction removed. scope: the budget group of a sparsity. n, m: kept of every m inputs.
    height, width: of tiles. allow: the spellings of the N:M patterns of a mixed one. rules: those for some of the matrices.
    """

    kind: str
    spelling: str
    sparsity: float
    scope: str | None = None
    n: int | None = None
    m: int | None = None
    height: int | None = None
    width: int | None = None
    allow: list[str] = []
    rules: list[RuleData] = []

    @property
    def nm(self) -> bool:
        """Whether groups of consecutive inputs keep N of M."""
        return self.kind in ("N:M", "mixed")

    @property
    def words(self) -> str:
        """What it means: ``0.5 by model`` -> one budget for the whole model."""
        base = self.spelling
        if self.kind == "unstructured":
            base = SCOPES.get(self.scope or "", base)
        elif self.kind == "N:M":
            base = f"{base}, that is {self.n} of every {self.m} consecutive weights kept"
        return "; ".join([base, *(f"{rule.match}={rule.what}" for rule in self.rules)])


def structure(pattern: Pattern) -> Structure:
    """What a pattern is."""
    spelling, sparsity = str(pattern), pattern.sparsity
    match pattern:
        case Ruled(base, rules):
            return structure(base).model_copy(update={"rules": [RuleData(match=rule.match, what=rule.what) for rule in rules]})
        case Unstructured(_, scope):
            return Structure(kind="unstructured", spelling=spelling, sparsity=sparsity, scope=scope)
        case NM(n, m):
            return Structure(kind="N:M", spelling=spelling, sparsity=sparsity, n=n, m=m)
        case Tiled(of, height, width):
            scope = of.scope
            return Structure(kind="tiles", spelling=spelling, sparsity=sparsity, scope=scope, height=height, width=width)
        case Mixed(_, allow):
            return Structure(kind="mixed", spelling=spelling, sparsity=sparsity, allow=[spell(nm) for nm in allow])
    return Structure(kind=type(pattern).__name__, spelling=spelling, sparsity=sparsity)


def claimed(text: str) -> Structure | None:
    """What a masks file claims to be, as far as its words are a pattern's (see :func:`spelled`)."""
    try:
        pattern = spelled(text)
    except InputError:
        return None
    return structure(pattern) if pattern else None


def asked_as(text: str) -> str:
    """How ``--sparsity`` asks for what a masks file claims to be: 0.5 for ``0.5 by model``; the claim itself if it cannot."""
    try:
        pattern = spelled(text)
    except InputError:
        return text
    return canonical(pattern.spelling[0]) if isinstance(pattern, PATTERNS) else text


def settings(pattern: Pattern) -> dict[str, Any] | None:
    """The settings of a recipe that ask for a pattern: its sparsity and scope, its choices, its rules; None if none do."""
    if isinstance(pattern, Ruled):
        base = settings(pattern.base)
        return base and base | {"rules": tuple(map(str, pattern.rules))}
    if isinstance(pattern, Mixed):
        found = {"sparsity": str(pattern.sparsity), "allow": tuple(map(spell, pattern.allow))}
        return found if pattern == Mixed(pattern.sparsity, pattern.allow) else None
    if isinstance(pattern, PATTERNS):
        text, scope = pattern.spelling
        return {"sparsity": text, "scope": scope} if parse(text, scope) == pattern else None
    return None


def spelled(text: str) -> Pattern | None:
    """The pattern whose spelling a text is, rules and all; None for other text, and for sparsities that may have been rounded.

    Raises InputError for a pattern that is impossible, or that is to be spelled in another way.
    """
    base, *rules = text.split("; ")
    fraction = r"(?P<fraction>[\d.e+-]+)"
    forms = (
        r"\d+:\d+",
        fraction + r" by (?P<scope>\w+)(?: of (?P<tile>\d+x\d+) tiles)?",
        fraction + r" in (?P<allow>[\w:, ]+)",
    )
    found = next((match.groupdict() for form in forms if (match := re.fullmatch(form, base))), None)
    if (
        found is None
        or found.get("scope") not in (None, *get_args(Scope))
        or len((found.get("fraction") or "").lstrip("0.")) >= 6
    ):
        return None
    if allow := found.get("allow"):
        pattern: Pattern = Mixed(float(found["fraction"]), tuple(map(choice, allow.split(", "))))
    else:
        tile = f"@{found['tile']}" if found.get("tile") else ""
        pattern = parse((found.get("fraction") or base) + tile, found.get("scope"))  # type: ignore[arg-type]
    if rules:
        pattern = Ruled(pattern, tuple(map(Rule.parse, rules)))
    if str(pattern) != text:
        raise InputError(f"the pattern {text!r} is to be spelled {str(pattern)!r}")
    return pattern
