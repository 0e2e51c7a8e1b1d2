"""Numbers and names as people read them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from uniprune.errors import InputError

NOTE = (
    "A pruned checkpoint is dense with zeros: it has the size and the speed of the original "
    "unless a runtime with sparse kernels loads it."
)
MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"


def spell_fraction(sparsity: float) -> str:
    """A fraction in up to six digits; all six of one that has more, so that it is known to be rounded."""
    short = f"{sparsity:g}"
    return short if float(short) == float(f"{sparsity:.15g}") else f"{sparsity:#g}"


def short(name: str | None) -> str:
    """A model, text or task without this machine's folders; hub names are as they are."""
    name = name or ""
    if name.startswith(("/", "~")) or name.endswith(".jsonl") or re.match(r"[A-Za-z]:[\\/]", name):
        name = re.split(r"[\\/]", name.rstrip("\\/"))[-1] or name
    return name.removesuffix(".jsonl").removesuffix(".gguf")


def apart(names: Iterable[str]) -> dict[str, str]:
    """Short names; of those that would be the same, the folders that they are in, as many as tell them apart."""
    found = {name: short(name) for name in names}
    for one in {label for label in found.values() if list(found.values()).count(label) > 1}:
        alike = [name for name, label in found.items() if label == one]
        parts = {name: [*re.split(r"[\\/]", name.rstrip("\\/"))[:-1], one] for name in alike}
        ends = (["/".join(parts[name][-depth:]) for name in alike] for depth in range(2, 1 + max(map(len, parts.values()))))
        found |= zip(alike, next((end for end in ends if len(set(end)) == len(end)), alike), strict=True)
    return found


def number(value: float | None) -> str:
    """A perplexity or another positive number, as people read it."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else f"{MINUS}∞"
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def percent(fraction: float | None) -> str:
    return "unknown" if fraction is None else f"{fraction:.1%}" if math.isfinite(fraction) else number(fraction)


def points(value: float, error: float | None = None) -> str:
    """A difference of accuracies in percentage points, signed, with its standard error."""
    text = f"{100 * value:+.1f}".replace("-", MINUS)
    return text if error is None else f"{text} ± {100 * error:.1f}"


def shots_words(shots: Sequence[int]) -> str:
    """How many solved examples came before questions: ``zero-shot``, ``5-shot``, ``0- and 5-shot``."""
    return "zero-shot" if not any(shots) else " and ".join(f"{count}-" for count in shots) + "shot"


def size(value: int | None) -> str:
    return NONE if value is None else f"{value / 1e6:,.1f} MB" if value < 1e9 else f"{value / 1e9:,.2f} GB"


def count(value: int) -> str:
    return f"{value / 1e9:.2f}B" if value >= 1e9 else f"{value / 1e6:.1f}M" if value >= 1e6 else f"{value:,}"


def parse_size(text: str) -> int:
    """Bytes from a size such as ``8GB``, ``1.5 GB``, ``900MB`` (powers of 1000) or ``8GiB`` (of 1024).

    Raises InputError for anything else.
    """
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * units[(match[2] or "").lower()]) if match else 0
    if size < 1:
        raise InputError(f"{text!r} is not a size; give a number and a unit, e.g. 8GB or 512MB")
    return size


def spell_size(size: float, up: bool = False) -> str:
    """A size as :func:`parse_size` reads it, ``31.2MB``, rounded down, or up."""
    power = max((power for power in range(5) if 1000**power <= size), default=0)
    tenths = (math.ceil if up else math.floor)(10 * size / 1000**power)
    return f"{tenths / 10:g}{'kMGT'[power - 1] if power else ''}B"
