"""Settings that describe themselves: the command line, recipe files, records and the reference are made from such models.

A setting is one field: its name, type, default and ``Field(description=...)``. ``Annotated`` may add how it is spelled on the
command line (:class:`Flag`). The models import no PyTorch, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from uniprune.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

Kind = TypeVar("Kind")


class Flag(NamedTuple):
    """How a field is spelled on the command line where ``--its-name`` is not all.

    also: more spellings: ``-s``, ``--dataset``; a model is made with the long ones, too: ``Recipe(dataset=...)``. name: in
    place of the field's own. metavar: of the value. default: what a value that is left out stands for, in words. once: a
    second value is an error, as another command's option of that name takes several; else the last one counts.
    """

    also: tuple[str, ...] = ()
    name: str | None = None
    metavar: str | None = None
    default: str = ""
    once: bool = False


class Positional(NamedTuple):
    """A field that is an argument of the command line, not an option."""

    metavar: str | None = None


Several = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
"""For a field with several values: one alone needs no brackets. On the command line the option may be repeated."""
Alone = BeforeValidator(lambda value: value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value)
"""For a field with one value or several: several of which there is one are that one. On the command line it may be repeated."""
Commas = BeforeValidator(
    lambda value: tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value
)
"""For a field with several values: they may be one text with commas, ``0.5,2:4``. The option may be repeated, too."""


def spelled(*kinds: type) -> BeforeValidator:
    """For a field of text, or of several: values of these kinds stand for their spelling."""

    def spell(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(map(spell, value))
        return str(value) if isinstance(value, kinds) and not isinstance(value, bool) else value

    return BeforeValidator(spell)


Name, Number = spelled(Path), spelled(int, float)


class Options(BaseModel):
    """Base of all settings. Wrong ones raise pydantic's ValidationError, so that it can be part of a record; in :meth:`of`,
    InputError."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    heading: ClassVar[str] = "Options"  # of the section that has them in --help

    @classmethod
    def of(cls, /, **given: Any) -> Self:
        """The settings of keywords, which are converted: a list to a tuple, ``8GB`` to bytes.

        Raises InputError that names the setting at fault.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            raise InputError(fault(error, cls)) from None

    def given(self) -> dict[str, Any]:
        """The settings that were not left out."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}

    @classmethod
    def named(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every setting under the name of its field. Raises InputError for one that is given under two names."""
        fields = cls.model_fields
        names = {_identifier(flag): name for name, field in fields.items() for flag in spellings(name, field)}
        found: dict[str, Any] = {}
        first: dict[str, str] = {}
        for spelled, value in given.items():
            name = spelled if spelled in fields else names.get(_identifier(spelled), spelled)
            if name in found:
                raise InputError(f"{first[name]!r} and {spelled!r} both set {name!r}; leave one of them out")
            found[name], first[name] = value, spelled
        return found

    @field_validator("*")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        """Paths with the home folder for ``~``, as models and texts have it: of ``--output=~/x`` no shell makes that."""
        if type(value) is tuple:
            return tuple(map(cls._at_home, value))
        return Path(os.path.expanduser(value)) if isinstance(value, Path) else value

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, given: Any) -> Any:
        return cls.named(given) if isinstance(given, dict) else given


def fault(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first setting at fault and what is wrong with it, in one line."""
    first, fields = error.errors(include_url=False)[0], kind.model_fields
    name, *keys = map(str, first["loc"] or [kind.__name__.lower()])
    where = spellings(name, fields[name])[0] if name in fields else name
    key = f" {keys[0]}" if keys and not keys[0].isdigit() else ""
    said = first["msg"]
    if first["type"] == "extra_forbidden":
        meant = get_close_matches(name, fields, 1)
        said = f"no such setting{f' (did you mean {meant[0]}?)' if meant else ''}; known settings: {', '.join(fields)}"
    return f"{where}{key} = {first['input']!r:.200}: {said}"


def marker(field: FieldInfo, kind: type[Kind]) -> Kind | None:
    """What the annotation of a field says beside its type, if anything of that kind."""
    return next((one for one in field.metadata if isinstance(one, kind)), None)


def spellings(name: str, field: FieldInfo) -> list[str]:
    """How a field is spelled on the command line, its own name first; a positional one by its name alone."""
    if marker(field, Positional):
        return [name]
    flag = marker(field, Flag) or Flag()
    return [flag.name or f"--{name.replace('_', '-')}", *flag.also]


def _identifier(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
