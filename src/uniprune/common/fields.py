"""Frozen dataclasses whose fields are settings: made from text, YAML or JSON by the types of their fields, and recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, FiniteFloat, TypeAdapter, ValidationError

from uniprune.errors import InputError

T = TypeVar("T")
ALONE = "it is in no table of uniprune, so JSON alone cannot replay it: give the object itself"


def types_of(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, whether its file has ``from __future__ import annotations`` or not.

    Raises InputError if an annotation names something that its file does not define.
    """
    try:
        hints = get_type_hints(kind)
    except NameError as error:
        raise InputError(f"{kind.__name__}: an annotation is not defined when the program runs: {error}") from None
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def build(kind: type[T], values: Mapping[str, Any], what: str) -> T:
    """An object of a dataclass from values by name: of the fields' types, or text that spells them (``0.006``, ``false``).

    what: the beginning of errors. Raises InputError for a name that is no field, and for a value of another type.
    """
    return kind(**_converted(kind, values, what))


def _converted(kind: type, values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The values for :func:`build`."""
    types, found = types_of(kind), {}
    for name, value in values.items():
        if name not in types:
            raise InputError(f"{what}: {name!r} is not a setting of {kind.__name__}; it has: {', '.join(types) or 'none'}")
        wanted = FiniteFloat if types[name] is float else types[name]
        try:
            found[name] = TypeAdapter(wanted, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            raise InputError(f"{what}: {name} = {value}: {error.errors()[0]['msg']}") from None
    return found


def parse_pairs(texts: Iterable[str], example: str) -> dict[str, str]:
    """``NAME=VALUE`` texts as values by name; the last of a name counts. Raises InputError, with the example, for others."""
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{text!r} is not NAME=VALUE, e.g. {example}")
        values[name.strip()] = value.strip()
    return values


def values_of(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass object that can be given when it is made, by name."""
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if field.init}


def record(settings: Any) -> dict[str, Any]:
    """What JSON can say of an object that has no spelling: its class, its fields, and that this does not replay it."""
    fields = {name: value if _is_plain(value) else repr(value) for name, value in values_of(settings).items()}
    name = f"{type(settings).__module__}.{type(settings).__qualname__}"
    return {"class": name, "settings": fields, "replays": False, "note": ALONE}


def replays(recorded: Any) -> bool:
    """Whether a setting as it was recorded says all: whether it is none of :func:`record`'s.

    Files that older versions wrote have its note alone.
    """
    if not (isinstance(recorded, dict) and "class" in recorded):
        return True
    return bool(recorded.get("replays", "note" not in recorded))


def check_object(given: Any, what: str, members: tuple[str, ...]) -> None:
    """Raises InputError unless an object can stand for a spelling: a dataclass object, so that it can be recorded.

    what: the setting that it is to be, e.g. "metric". members: what it must have.
    """
    if not replays(given):
        raise InputError(f"{what} {given.get('class')}: {ALONE}")
    if isinstance(given, type):
        raise InputError(f"{what} {given.__name__} is a class; give an object of it, {given.__name__}()")
    missing = [name for name in members if not hasattr(given, name)]
    if missing:
        raise InputError(f"{what} {given!r:.200} is neither a spelling nor a {what}: it has no {', '.join(missing)}")
    if not dataclasses.is_dataclass(given):
        name = type(given).__name__
        raise InputError(f"{what} {name} is no dataclass, so its settings could not be recorded; use @dataclass(frozen=True)")
    if type(given).__module__.startswith("uniprune."):  # another's may be of any types
        kind, values = type(given), values_of(given)
        numbers = {name: values[name] for name, type in types_of(kind).items() if type in (int, float, bool)}
        _converted(kind, numbers, f"{what} {kind.__name__}")


def _is_plain(value: Any) -> bool:
    """Whether JSON says all of a value."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
