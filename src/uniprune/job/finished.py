"""Runs that are complete: one that is resumed again has nothing to do."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uniprune.artefacts.binding import fingerprint
from uniprune.checkpoints.origin import called, spelled
from uniprune.data.sources import files_of
from uniprune.errors import InputError
from uniprune.job.options import RunOptions
from uniprune.job.recipe import Recipe
from uniprune.models.loading import Loaded, Source
from uniprune.models.matrices import choose_matrices
from uniprune.storage import files, runs

logger = logging.getLogger(__name__)


def same_run(settings: Mapping[str, Any], model: tuple[str, str | None], recipe: Recipe, source: Source) -> bool:
    """Whether an output is of these settings and this model: its name and its fingerprint.

    A model that is in memory alone is told by its weights.
    """
    name, base = model
    if settings != json.loads(json.dumps(recipe.record())) or name != called(spelled(source)):
        return False
    if isinstance(source, Loaded) and not (source.origin and source.origin.files):
        matrices = choose_matrices(source.model, recipe.include, recipe.exclude)
        return fingerprint(source.checkpoint.digests(matrices)) == base
    return True


def leave(output: Path, recipe: Recipe, source: Source) -> None:
    """Deletes what a run that is complete has left beside its output.

    To read the model and the text again would take as long as many runs do, so of files that were written since, a warning
    tells: they may be copies of what was there.
    """
    runs.discard(output)
    inputs = [path for path in (files.path_of(spelled(source)), *files_of(recipe.text)) if path.exists()]
    if newer := [str(path) for path in inputs if files.changed(path) > files.changed(output)]:
        logger.warning(
            "%s is complete, so there is nothing to do; but this has been written since: %s; if it is no copy of what it was, "
            "make the output again (--overwrite without --resume)",
            output,
            ", ".join(newer),
        )


def check_tokens_kept(options: RunOptions, output: Path) -> None:
    """Raises InputError if a run that is complete is resumed for tokens that it did not save."""
    if options.save_tokens is not None and not options.save_tokens.exists():
        raise InputError(
            f"{output} is complete, and its calibration samples were not saved as {options.save_tokens}; leave --save-tokens "
            "out, or make it again: --overwrite without --resume"
        )
