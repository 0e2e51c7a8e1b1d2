"""JSON objects in files that may hold anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class NoObject(ValueError):
    """JSON, but no object."""


def parse(text: str | bytes) -> dict[str, Any]:
    """The object that a text is. Raises ValueError, with the reason in one line, for anything else.

    Also for what Python's parser lets through or falls over: a name that stands in an object twice, nesting without end.
    """
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(found, dict):
        raise NoObject("not a JSON object, which is in braces")
    return found


def check(found: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Raises ValueError unless an object has all these names, each with a value of just this type."""
    if missing := sorted(kinds.keys() - found.keys()):
        raise ValueError(f"it lacks {', '.join(missing)}")
    for name, kind in kinds.items():
        if type(found[name]) is not kind:
            raise ValueError(f"{name!r} is of the wrong type")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in found if names.count(name) > 1)[:80]!r} stands there twice")
    return found
