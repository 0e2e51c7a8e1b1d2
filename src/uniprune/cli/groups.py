"""Groups of settings that several commands have in common, and that only the command line has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from uniprune.cli.terminal import quiet
from uniprune.common.options import Flag, Options, Positional
from uniprune.job.settings import Settings

if TYPE_CHECKING:
    from uniprune.job.recipe import Recipe

SPARSITY = "sparsity sparsity_type scope allow rules hardware unsupported"
CONTROLLER = "controller budget_tokens steps tuning"
SAMPLES = "text field split bos windows length seed"
LAYERS = "include exclude dtype"


def at(model: str, revision: str | None) -> str:
    """A model's name with a revision. Raises InputError if it has none."""
    from uniprune.checkpoints.hub import at_revision

    return at_revision(model, revision)


Revision: Any = Field(default=None, description="Branch, tag or commit of a Hub model; or as MODEL@REVISION.")


class ModelArgument(Options):
    """The model that a command works on."""

    model: Annotated[str, Positional()] = Field(
        description="Model: a folder, a .gguf file, or a Hub name (owner/name, owner/name/folder, owner/name/file.gguf)."
    )
    revision: str | None = Revision

    @property
    def name(self) -> str:
        """The model, with its revision."""
        return at(self.model, self.revision)


class Target(Options):
    """Where a command writes."""

    output: Annotated[Path, Flag(("-o",))] = Field(description="Where to write.")


class Overwrite(Options):
    """For outputs that need no other run options."""

    overwrite: bool = Field(default=False, description="Replace an existing output.")


class Printed(Options):
    """How a command shows its result."""

    as_json: Annotated[bool, Flag(name="--json")] = Field(
        default=False, description="Print the result as one JSON object on stdout."
    )


class Push(Options):
    """The upload of an output folder."""

    push_to_hub: Annotated[str | None, Flag(metavar="OWNER/NAME")] = Field(
        default=None, description="Then upload the output folder to this repository of the Hub, model card and all."
    )


class RecipeOptions(Settings):
    """The settings of a recipe, over those of a recipe file."""

    heading: ClassVar[str] = "Recipe"

    config: Path | None = Field(
        default=None,
        description="Recipe file (YAML) with any settings of a recipe, or the pruning.json of a run; options override it.",
    )

    def recipe(self) -> Recipe:
        quiet()
        from uniprune.job.recipe import Recipe

        given = self.given()
        file = given.pop("config", None)
        return Recipe.load(file, **given) if file else Recipe(**given)
