"""What hardware asks of a pruned matrix, as data: which patterns its kernels take, of which types and shapes.

That a profile is met does not make a model faster.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from uniprune.common.matrix_names import expression_for
from uniprune.errors import InputError
from uniprune.sparsity.choices import Unsupported
from uniprune.sparsity.patterns.mixed import Mixed
from uniprune.sparsity.patterns.nm import DENSE, NM
from uniprune.sparsity.patterns.protocol import Pattern, Shape
from uniprune.sparsity.patterns.ruled import Rule, Ruled
from uniprune.sparsity.patterns.tiled import Tiled


@dataclass(frozen=True)
class Profile:
    """One kind of kernel.

    patterns: N:M patterns and tile sizes (rows, inputs) that it takes; none: whatever there is. types: by type of the weights
    what rows and inputs must be multiples of; none: any type, any shape. capability: of CUDA devices, at least.
    """

    patterns: tuple[NM | Shape, ...] = ()
    types: Mapping[str, Shape] = field(default_factory=dict)
    capability: tuple[int, int] | None = None

    def unsupported(self, pattern: Pattern, shape: Shape, dtype: str) -> str | None:
        """Why a matrix of this shape and type (``bfloat16``) would not be multiplied faster, or None."""
        parts = [nm for nm in pattern.allow if nm != DENSE] if isinstance(pattern, Mixed) else [pattern]
        for part in parts:
            kind = (part.height, part.width) if isinstance(part, Tiled) else part
            if self.patterns and part != DENSE and kind not in self.patterns:
                return f"{part} is not {' or '.join(_spell(one) for one in self.patterns)}"
        if pattern == DENSE or not self.types:
            return None
        if dtype not in self.types:
            return f"weights of type {dtype}; the kernels take {', '.join(self.types)}"
        rows, columns = self.types[dtype]
        fits = shape[0] % rows == 0 and shape[1] % columns == 0
        return None if fits else f"{shape[0]} x {shape[1]} weights are not multiples of {rows} x {columns}"


PROFILES = {
    "any": Profile(),
    # torch.sparse.to_sparse_semi_structured with CUTLASS, the narrower of its two backends; Ampere and later.
    "nvidia-semi-structured": Profile(
        (NM(2, 4),), {"float16": (32, 64), "bfloat16": (32, 64), "int8": (16, 128)}, capability=(8, 0)
    ),
    # Block-sparse rows (BSR), as CPU kernels have them: tiles as wide as a register, as high, or both.
    "block": Profile(((1, 16), (16, 1), (16, 16))),
}


def parse(name: str) -> Profile:
    """Raises InputError for a profile that is not in the table."""
    if name not in PROFILES:
        raise InputError(f"hardware {name!r} is unknown; use one of {', '.join(PROFILES)}")
    return PROFILES[name]


def fitted(
    pattern: Pattern,
    shapes: Mapping[str, Shape],
    dtype: str | Callable[[str], str],
    hardware: str = "any",
    unsupported: Unsupported = "refuse",
) -> tuple[Pattern, dict[str, str]]:
    """The pattern with a rule for every matrix that cannot have it as the hardware wants it, and the reasons by matrix.

    dtype: of the weights of all matrices, or of each by its name, which is asked only for hardware that types matter to.
    unsupported: what such matrices get: ``dense``, or ``unstructured``, the sparsity that their rule or the pattern has, by
    matrix; with ``refuse`` InputError is raised that names them. Raises InputError, too, for rules and choices that leave the
    sparsity out of reach.
    """
    if isinstance(pattern, Ruled):
        pattern.check(shapes)
    profile, reasons = parse(hardware), {}
    for name, shape in shapes.items():
        part = pattern.pattern_of(name)
        kind = dtype if isinstance(dtype, str) else dtype(name) if profile.types else ""
        if reason := part.unsupported(*shape) or profile.unsupported(part, shape, kind):
            reasons[name] = reason
    if not reasons:
        if isinstance(pattern, Mixed):
            Ruled(pattern, ()).check(shapes)
        return pattern, {}
    if unsupported == "refuse":
        name, reason = next(iter(reasons.items()))
        place = "" if hardware == "any" else f" on {hardware} hardware"
        raise InputError(
            f"{len(reasons)} of {len(shapes)} matrices cannot be {pattern}{place}, e.g. {name}: {reason}; "
            "leave them out (--exclude), or say what they are to be (--unsupported, --rule), where the command takes these"
        )
    ruled = pattern if isinstance(pattern, Ruled) else Ruled(pattern, ())
    gets = {name: "dense" if unsupported == "dense" else f"{ruled.pattern_of(name).sparsity:g}" for name in reasons}
    spared = tuple(
        Rule(match, what)
        for what in dict.fromkeys(gets.values())
        for match in _matches([name for name in gets if gets[name] == what], shapes.keys())
    )
    used = {ruled.rule(name) for name in shapes.keys() - reasons.keys()}
    fits = Ruled(ruled.base, spared + tuple(rule for rule in ruled.rules if rule in used))
    fits.check(shapes)
    return fits, reasons


def check_prunes(pattern: Pattern, reasons: Mapping[str, str], shapes: Mapping[str, Shape]) -> None:
    """Raises InputError if all matrices are to stay dense; pattern, reasons: as :func:`fitted` gives them."""
    if reasons and all(pattern.pattern_of(name) == DENSE for name in shapes):
        name, reason = next(iter(reasons.items()))
        raise InputError(
            f"nothing would be pruned: all matrices would stay dense, e.g. {name}: {reason}; change --sparsity or --hardware"
        )


def _matches(some: Collection[str], names: Iterable[str]) -> Iterator[str]:
    """Expressions that match some of the names and no others: one for all of a kind, as experts are of one, else one each."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(expression_for(name), []).append(name)
    for kind, members in kinds.items():
        inside = [name for name in members if name in some]
        yield from [kind] if 1 < len(inside) == len(members) else [f"^{re.escape(name)}$" for name in inside]


def _spell(pattern: NM | Shape) -> str:
    return str(pattern) if isinstance(pattern, NM) else f"{pattern[0]}x{pattern[1]} tiles"
