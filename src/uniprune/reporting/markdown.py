"""A report as Markdown: the verdict and the tables of the page, for a pull request or a lab book."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from uniprune.common.formatting import NOTE
from uniprune.reporting.headline import verdict
from uniprune.reporting.summary import Summary
from uniprune.reporting.tables import as_markdown, plain

if TYPE_CHECKING:
    from uniprune.reporting.sections import Dialogue, Panel, Section

LONGEST = 100  # rows


def markdown(sections: Sequence[Section], summary: Summary) -> str:
    """The page without its plots and long tables, which the page or its JSON has."""
    parts = [f"# {plain(summary.title)}", plain(verdict(summary) or ""), f"> {NOTE}"]
    for section in sections:
        parts += _section(section)
    return "\n\n".join(filter(None, parts)) + "\n"


def _section(section: Section) -> Iterator[str]:
    yield f"## {section.title}"
    for part in section.parts:
        yield from _part(part)


def _part(part: Panel) -> Iterator[str]:
    if part.title:
        yield f"### {plain(part.title)}"
    yield from map(plain, part.paragraphs)
    yield from map(_dialogue, part.dialogues)
    for grid in (*part.grids, *part.folded):
        shown = as_markdown(grid) if len(grid.rows) <= LONGEST else f"{len(grid.rows)} rows, which the page and the JSON have."
        yield f"{plain(grid.caption)}:\n\n{shown}"


def _dialogue(facts: Dialogue) -> str:
    lines = {"prompt": facts.prompt, facts.other: facts.same + facts.against, "pruned": facts.same + facts.model}
    return "\n".join(f"- {name}: {plain(text)}" for name, text in lines.items())
