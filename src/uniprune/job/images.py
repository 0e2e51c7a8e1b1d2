"""Calibration on images with text: when a recipe asks for it, and what it does not go with."""

from __future__ import annotations

from typing import Any

import torch

from uniprune.checkpoints.configuration import check_context, context
from uniprune.checkpoints.origin import Origin
from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.data import sources
from uniprune.data.images import windows as images
from uniprune.data.images.rows import has_images
from uniprune.data.text import Text
from uniprune.data.windows import Windows
from uniprune.errors import InputError
from uniprune.job.recipe import WINDOWS, Recipe
from uniprune.models.loading import load_processor, reads_images


def image_windows(recipe: Recipe, model: torch.nn.Module, origin: Origin | None, tokenizer: Any) -> Windows | None:
    """The windows of a data set of images and text, for a model of both; None if the recipe has text alone.

    tokenizer: the processor, of a model in memory. Raises InputError for a recipe that cannot show images.
    """
    asked = sources.parse(recipe.text)
    if len(asked) > 1 or asked[0].text == sources.SELF or not reads_images(model.config):
        return None
    source = Text(asked[0].text, recipe.field, recipe.split)
    if not has_images(source, "calibration"):
        return None
    controller, instead = recipe.parsed_controller(), "or take the text alone: --field text"
    if recipe.sequential or not (controller is None or isinstance(controller, MirrorDescent)):
        raise InputError(f"--sequential, --refine and --controller unipruning read text alone; leave them out, {instead}")
    if recipe.bos is not None:
        raise InputError(f"--bos is for text alone; leave it out, {instead}")
    if recipe.length is not None:
        check_context(model.config, recipe.length)
    eyes, count = images.Eyes(load_processor(origin, tokenizer), model.config), recipe.windows or WINDOWS
    return images.load(source, eyes, "calibration", recipe.length, count, recipe.seed, context(model.config))
