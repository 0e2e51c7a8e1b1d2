"""What the settings of controllers may be, field by field."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from uniprune.errors import InputError


class Bound(NamedTuple):
    """A condition on a number, and its words in errors."""

    holds: Callable[[float], bool]
    words: str


COUNT = Bound(lambda value: 1 <= value < math.inf, "at least 1")
POSITIVE = Bound(lambda value: 0 < value < math.inf, "a finite number > 0")
NOT_NEGATIVE = Bound(lambda value: 0 <= value < math.inf, "a finite number >= 0")
FRACTION = Bound(lambda value: 0 <= value <= 1, "in [0, 1]")
DECAY = Bound(lambda value: 0 <= value < 1, "in [0, 1)")


def check_bounds(controller: str, settings: Any, bounds: Mapping[str, Bound]) -> None:
    """Raises InputError for the first setting that is out of its bound. controller: its name, with which errors begin."""
    for name, bound in bounds.items():
        value = getattr(settings, name)
        if not bound.holds(value):
            raise InputError(f"{controller}: {name} = {value} is not {bound.words}")
