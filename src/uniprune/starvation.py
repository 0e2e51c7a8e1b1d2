"""Experts that saw next to no calibration token, and what stands in for what their inputs would have told."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from uniprune.matrices import Matrices
from uniprune.metrics import SquaredNorm

logger = logging.getLogger(__name__)

FEW = 32  # tokens: with fewer, the RMS of a channel is off by more than an eighth


def feed(matrices: Matrices, statistics: Mapping[str, SquaredNorm], gradients: Mapping[str, Tensor] | None = None) -> None:
    """Where an expert's matrix saw under FEW tokens, its inputs become even, and as large as its fellows' are per token.

    So an activation-aware score becomes the magnitude, on the scale of the other experts' scores. gradients: sums over the
    tokens of squared output gradients ``[out]``; they become even, too, and as large as the fellows' are on average. Where all
    experts of a group saw too little, they are all treated so; where none saw any token, nothing is changed.
    """
    for names in _groups(matrices, statistics).values():
        poor = [name for name in names if statistics[name].tokens < FEW]
        rich = [name for name in names if statistics[name].tokens >= FEW] or [n for n in poor if statistics[n].tokens]
        if not poor or not rich:
            continue
        power = sum(statistics[name].power for name in rich) / sum(statistics[name].tokens for name in rich)
        said = sum(float(gradients[name].mean()) for name in rich) / len(rich) if gradients is not None else 0.0
        for name in poor:
            statistics[name].even(power)
            if gradients is not None:
                gradients[name].fill_(said)


def starved(matrices: Matrices, statistics: Mapping[str, SquaredNorm]) -> dict[str, Any]:
    """For the report, which experts' matrices :func:`feed` gave a stand-in, with a warning; empty if there are none."""
    groups = _groups(matrices, statistics)
    names = [name for group in groups.values() for name in group if statistics[name].tokens < FEW]
    if not names:
        return {}
    count = sum(map(len, groups.values()))
    logger.warning(
        "%d of %d experts' matrices saw under %d calibration tokens, e.g. %s; they are scored by magnitude: use more text",
        *(len(names), count, FEW, names[0]),
    )
    return {"starved": {"matrices": names, "of": count, "tokens_under": FEW}}


def _groups(matrices: Matrices, statistics: Mapping[str, SquaredNorm]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in statistics:
        if group := matrices[name].group:
            groups[group].append(name)
    return groups
