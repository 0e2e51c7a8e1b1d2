"""The factory of commands: a function whose parameters are groups of settings becomes a command with an option for each.

    def mask(source: Scores, recipe: Annotated[RecipeOptions, Only(SPARSITY)], target: Target) -> None: ...

A group is a model (``common.options``) whose fields say what the options are called and what they mean. The function gets the
models, validated; their ``given()`` are the options that were not left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click
from click.shell_completion import CompletionItem
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from uniprune.common import fields
from uniprune.common.options import Commas, Flag, Options, Positional, marker, spellings
from uniprune.errors import InputError

ARGUMENTS = "Arguments"  # heading of those that are no options
METAVARS = {int: "N", float: "X", Path: "PATH"}


class Only:
    """Marks a group of which a command takes some settings: their names, in any number of texts."""

    def __init__(self, *names: str) -> None:
        self.names = " ".join(names).split()


class Argument(click.Argument):
    """A positional argument with a help text, which click's own has not."""

    def __init__(self, name: str, metavar: str, help: str, many: bool, required: bool) -> None:
        super().__init__([name], metavar=metavar, nargs=-1 if many else 1, required=required, shell_complete=_completed)
        self._record = metavar, help

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return self._record


class Command(click.Command):
    """A command made of a function; ``sections`` has its parameters by the heading they stand under in the help."""

    def __init__(self, name: str, help: str, function: Callable[..., None]) -> None:
        self._function, self._groups = function, dict(_groups(function))
        made: dict[str, click.Parameter] = {}
        sections: dict[str, list[click.Parameter]] = {}
        for model, names in self._groups.values():
            for field in names:
                if field not in made:
                    made[field] = _parameter(field, model.model_fields[field])
                    sections.setdefault(_heading(model, field), []).append(made[field])
        last = sections.pop(Options.heading, [])
        self.sections = {ARGUMENTS: sections.pop(ARGUMENTS, []), **sections, Options.heading: last}
        super().__init__(name, callback=self._call, params=[*made.values()], help=help)

    def _call(self, **values: Any) -> None:
        given = {name: value for name, value in values.items() if value is not None and value != () and value != {}}
        groups = self._groups.items()
        self._function(**{key: model.of(**{n: given[n] for n in names if n in given}) for key, (model, names) in groups})

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, parameters in self.sections.items():
            shown = [*parameters, self.get_help_option(ctx)] if heading == Options.heading else parameters
            records = [record for each in shown if each and (record := each.get_help_record(ctx))]
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def _groups(function: Callable[..., None]) -> Iterator[tuple[str, tuple[type[Options], list[str]]]]:
    """The groups that a function takes, by parameter: the model, and the settings of it."""
    for parameter, hint in get_type_hints(function, include_extras=True).items():
        if parameter != "return":
            model, *marks = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
            wanted = {name for mark in marks if isinstance(mark, Only) for name in mark.names}
            assert wanted <= model.model_fields.keys(), wanted
            yield parameter, (model, [name for name in model.model_fields if not wanted or name in wanted])


def _heading(model: type[Options], name: str) -> str:
    """That of the class that has the field, which may be a base of the model."""
    if marker(model.model_fields[name], Positional):
        return ARGUMENTS
    bases = (base for base in reversed(model.__mro__) if issubclass(base, Options))
    return next(base.heading for base in bases if name in base.model_fields)


def _parameter(name: str, field: FieldInfo) -> click.Parameter:
    """The argument or option of a field."""
    kind = _kind(field)
    many = _many(field)
    positional, flag, spelled = marker(field, Positional), marker(field, Flag) or Flag(), spellings(name, field)
    if positional:
        metavar = positional.metavar or name.upper() + ("..." if many else "")
        return Argument(name, metavar, str(field.description), many, field.is_required())
    if kind is bool:
        names = f"{spelled[0]}/--no-{spelled[0].removeprefix('--')}" if field.default else spelled[0]
        return click.Option([names, *spelled[1:], name], is_flag=True, default=None, help=field.description)
    read_by_model = any(isinstance(one, BeforeValidator) for one in field.metadata)
    return click.Option(
        [*spelled, name],
        type=click.STRING if read_by_model else {int: click.INT, float: click.FLOAT}.get(kind, click.STRING),
        metavar=flag.metavar or ("|".join(get_args(kind)) if get_origin(kind) is Literal else METAVARS.get(kind, "TEXT")),
        multiple=many or flag.once,
        required=field.is_required(),
        callback=_pairs if get_origin(kind) is dict else _joined if Commas in field.metadata else _only if flag.once else None,
        help=described(field),
        shell_complete=partial(_completed, choices=get_args(kind) if get_origin(kind) is Literal else None),
    )


def _completed(
    ctx: click.Context, parameter: click.Parameter, typed: str, choices: tuple[str, ...] | None = None
) -> list[CompletionItem]:
    """What a shell offers for a value that is being typed: the choices, or files, which most values may name."""
    if choices is None:
        return [CompletionItem(typed, type="file")]
    return [CompletionItem(choice) for choice in choices if choice.startswith(typed)]


def _kind(field: FieldInfo) -> Any:
    """The type of a field, without the None that stands for a value left out."""
    if get_origin(field.annotation) not in (Union, UnionType):
        return field.annotation
    return next(one for one in get_args(field.annotation) if one is not NoneType)


def described(field: FieldInfo) -> str:
    """What a field means, and what it is if it is left out."""
    repeated = " May be repeated." if _many(field) else ""
    default = default_of(field)
    return f"{field.description}{repeated}" + (f" [default: {default}]" if default else "")


def default_of(field: FieldInfo) -> str:
    """What a field is if it is left out, in words; nothing for what is off, or must be given."""
    flag, default = marker(field, Flag) or Flag(), field.get_default()
    if flag.default or default is None or isinstance(default, (bool, dict)) or field.is_required():
        return flag.default
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _many(field: FieldInfo) -> bool:
    return get_origin(_kind(field)) in (tuple, dict)


def _joined(ctx: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> str | None:
    """``-s 0.5 -s 2:4`` as ``-s 0.5,2:4``: of an option given twice nothing is lost."""
    return ",".join(texts) if texts else None


def _only(ctx: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> str | None:
    if len(texts) > 1:
        raise click.BadParameter(f"given {len(texts)} times, and takes one value", ctx, option)
    return texts[0] if texts else None


def _pairs(ctx: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    """``NAME=VALUE`` by name; the last of a name counts."""
    try:
        return fields.parse_pairs(texts, "step_size=0.006")
    except InputError as error:
        raise click.BadParameter(str(error), ctx, option) from None
