"""Writes docs/cli.md, and the table of settings in the README, from the descriptions of the settings: `make reference`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from uniprune.cli.main import Commands, app

ROOT = Path(__file__).parents[1]
CLI, README = ROOT / "docs" / "cli.md", ROOT / "README.md"
ABOUT = (
    "Every command takes `--help`; `uniprune --version` shows the versions that results depend on. In bash,\n"
    '`eval "$(_UNIPRUNE_COMPLETE=bash_source uniprune)"` completes commands and options (`zsh_source`, `fish_source`).'
)
BEGIN, END = "<!-- settings: written by make reference -->\n", "<!-- /settings -->\n"


def reference() -> str:
    """The page of all commands: arguments and options of each, under the headings of its help."""
    head = ["# Command line", str(app.help), _usage(app, "uniprune"), ABOUT]
    return "\n\n".join([*head, *_commands(app, "uniprune")]) + "\n"


def settings() -> str:
    """The table of what `prune` takes."""
    prune = app.get_command(click.Context(app), "prune")
    rows = ["| option | meaning |", "| --- | --- |"]
    for heading, parameters in prune.sections.items():  # type: ignore[union-attr]
        if heading not in ("Arguments", "Options"):
            rows += [f"| {_names(each)} | {_cell(str(each.help))} |" for each in parameters]  # type: ignore[attr-defined]
    return "\n".join(rows) + "\n"


def with_settings(page: str) -> str:
    """The README with that table in its place."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{settings()}\n{END}{rest.partition(END)[2]}"


def _commands(group: Commands, path: str) -> Iterator[str]:
    for name in group.list_commands(click.Context(group)):
        command, full = group.get_command(click.Context(group), name), f"{path} {name}"
        assert command is not None
        yield f"## {full}\n\n{command.help}"
        if isinstance(command, Commands):
            yield from _commands(command, full)
            continue
        yield _usage(command, full)
        for heading, parameters in command.sections.items():  # type: ignore[attr-defined]
            if parameters:
                yield f"{heading}:\n\n" + "\n".join(_item(each) for each in parameters)


def _usage(command: click.Command, path: str) -> str:
    pieces = command.collect_usage_pieces(click.Context(command))
    return f"```\n{' '.join([path, *pieces])}\n```"


def _item(parameter: click.Parameter) -> str:
    record = parameter.get_help_record(click.Context(click.Command("")))
    assert record is not None
    return f"- `{record[0]}`: {_text(record[1])}"


def _names(option: click.Parameter) -> str:
    return ", ".join(f"`{name}`" for name in option.opts)


def _text(help: str) -> str:
    return help.replace("\\", "\\\\").replace("*", r"\*").replace("  [", " [")


def _cell(help: str) -> str:
    return _text(help).replace("|", r"\|")


if __name__ == "__main__":
    CLI.write_text(reference(), encoding="utf-8")
    README.write_text(with_settings(README.read_text(encoding="utf-8")), encoding="utf-8")
