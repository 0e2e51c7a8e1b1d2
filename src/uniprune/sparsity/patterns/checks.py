"""What is checked of scores, and of the shapes of matrices, before masks are created."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from uniprune.errors import InputError


def finite(name: str, scores: Tensor) -> Tensor:
    """The scores themselves. Raises InputError if one is NaN or infinite."""
    check_extremes([name], [scores.aminmax()])
    return scores


def check_extremes(names: Iterable[str], extremes: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Raises InputError if a matrix has scores that are NaN or infinite. extremes: its lowest and its highest score.

    Both are NaN if any score is. All are read from the GPU at once, because each read waits for it.
    """
    ends = [end for pair in extremes for end in pair]
    values = torch.stack(ends).tolist() if ends else []
    for name, low, high in zip(names, values[::2], values[1::2], strict=True):
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(
                f"{name}: the scores contain NaN or infinity; recalibrate (in float16 with --dtype bfloat16), and check the "
                "model's weights"
            )


def check_fit(shapes: Iterable[tuple[str, tuple[int, int]]], pattern: Any) -> None:
    """Raises InputError naming the matrices whose shape cannot have the pattern."""
    unsupported = [(name, reason) for name, shape in shapes if (reason := pattern.unsupported(*shape))]
    if unsupported:
        name, reason = unsupported[0]
        raise InputError(
            f"{len(unsupported)} matrices cannot be {pattern}, e.g. {name}: {reason}; calibrate without them (--exclude)"
        )
