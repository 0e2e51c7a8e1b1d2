"""A sparsity pattern as data, so that nobody who reads of one has to parse its spelling."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from uniprune.errors import InputError
from uniprune.sparsity.constraints import Mixed, Ruled, spell, spelled
from uniprune.sparsity.patterns import NM, Pattern, Tiled, Unstructured

SCOPES = {
    "row": "the same share of every row",
    "matrix": "the same share of every matrix",
    "block": "the same share of every decoder block",
    "model": "one budget for the whole model",
}


class _Data(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class RuleData(_Data):
    """What holds for the matrices in whose names ``match`` is found, see ``constraints.Rule``."""

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
    """What a masks file claims to be, as far as its words are a pattern's (see ``constraints.spelled``)."""
    try:
        pattern = spelled(text)
    except InputError:
        return None
    return structure(pattern) if pattern else None
