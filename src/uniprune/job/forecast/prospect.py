"""What is known of a run before any text or weight is read: all of what ``plan`` tells."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from uniprune.checkpoints.origin import Origin, stored_dtype
from uniprune.common import distributed
from uniprune.job.forecast import memory
from uniprune.job.options import RunOptions
from uniprune.job.recipe import Recipe
from uniprune.models import blocks
from uniprune.models.loading import Loaded, Source, fast_dtype, model_of, native_dtype, parse_device, parse_dtype
from uniprune.models.matrices import Matrices, check_decoder, choose_matrices


@dataclass(frozen=True)
class Prospect:
    """What is known of a run before a weight or a text is read.

    given: the model that the caller has loaded, or the files of one that is yet to be. model: that model, or a skeleton of it.
    matrices: those to prune. device: where it computes.
    """

    given: Loaded | Origin
    recipe: Recipe
    model: nn.Module
    matrices: Matrices
    device: torch.device

    def work(self, windows: int, length: int) -> memory.Work:
        """What memory and time depend on, with so many windows of ``length`` tokens."""
        if isinstance(self.given, Loaded):
            dtype, device = blocks.dtype_of(self.model), blocks.device_of(self.model)
            return memory.Work(self.model, self.matrices, self.recipe, dtype, dtype, length, device, windows)
        stored = stored_dtype(self.given, self.matrices)
        dtype = parse_dtype(self.recipe.dtype) or fast_dtype(stored or native_dtype(self.given), self.device)
        return memory.Work(self.model, self.matrices, self.recipe, dtype, stored, length, self.device, windows)


def prospect_of(given: Loaded | Origin, recipe: Recipe, options: RunOptions) -> Prospect:
    """Raises InputError for a device that is not there, and for a model that has nothing to prune, or not in this way."""
    device = use_device(options, given)
    model = model_of(given)
    check_predicts(recipe, model)
    return Prospect(given, recipe, model, choose_matrices(model, recipe.include, recipe.exclude), device)


def check_predicts(recipe: Recipe, model: nn.Module) -> None:
    """Raises InputError if a controller is to run on an encoder, which does not predict the next token."""
    if recipe.uses_controller:
        check_decoder(model, "prune it by the local metric: --controller none")


def use_device(options: RunOptions, source: Source | Origin) -> torch.device:
    """The device to compute on, from now on PyTorch's current one: of a model in memory its own, under ``torchrun`` the
    process's."""
    device = blocks.device_of(source.model) if isinstance(source, Loaded) else parse_device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", distributed.local_rank() if device.index is None else device.index)
        torch.cuda.set_device(device)  # Triton's and cuSPARSELt's kernels use the current one
    return device
