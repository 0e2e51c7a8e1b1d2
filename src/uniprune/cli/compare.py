"""The command ``compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from uniprune.cli.groups import Printed, Revision, Target, at
from uniprune.cli.options import Only
from uniprune.cli.terminal import Bars, quiet, show
from uniprune.comparison.request import ComparisonRequest
from uniprune.errors import InputError
from uniprune.job.options import TableRunOptions


class ComparisonOptions(ComparisonRequest):
    """The settings of a table, over those of a recipe file."""

    revision: str | None = Revision
    config: Path | None = Field(
        default=None,
        description="Recipe file (YAML) with any settings of a comparison, as compare writes it; options override it.",
    )

    def request(self) -> ComparisonRequest:
        """Without the file, which has been read. Raises InputError if no model is named."""
        given = self.given()
        file, revision = given.pop("config", None), given.pop("revision", None)
        request = ComparisonRequest.load(file, **given) if file else ComparisonRequest.of(**given)
        if request.model is None:
            raise InputError("the argument MODEL is missing; it can be left out only if --config names it")
        return request.model_copy(update={"model": at(request.model, revision)})


def compare(
    table: ComparisonOptions, target: Target, run: Annotated[TableRunOptions, Only("device resume overwrite")], printed: Printed
) -> None:
    quiet()
    request = table.request()
    from uniprune.cli.tables import comparison_table
    from uniprune.entrypoints.compare import compare

    asked = request.given()
    with Bars() as progress:
        found = compare(asked.pop("model"), target.output, **run.given(), progress=progress, **asked)
    show(found, printed.as_json, *comparison_table(found), f"{target.output} written")
