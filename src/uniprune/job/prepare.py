"""What a run needs before it starts: checked input, the matrices and what they are to lose, the windows, the loaded model.

The cheap checks come first and the weights last. What is known before any text or weight is read is a ``Prospect``, what is
written a ``Destination``. How the model is executed is chosen in ``execution``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uniprune.artefacts.binding import Binding
from uniprune.artefacts.reports import ModelFacts
from uniprune.checkpoints.origin import Origin, called
from uniprune.checkpoints.tokenizer import load_tokenizer
from uniprune.common import distributed, pictures
from uniprune.common.progress import Progress, silent, with_notes
from uniprune.data.windows import Windows, check_savable, save_windows
from uniprune.errors import InputError
from uniprune.job.aim import Aim, aim_of
from uniprune.job.destination import Destination
from uniprune.job.execution import check_execution, choose, choose_for_loaded, warn_of_traffic
from uniprune.job.forecast import memory
from uniprune.job.forecast.prospect import Prospect, prospect_of
from uniprune.job.options import EXECUTIONS, Execution, RunOptions, saved_as
from uniprune.job.recipe import Recipe
from uniprune.job.samples import generated, windows_of
from uniprune.models import blocks
from uniprune.models.checks import check_finite, check_loaded
from uniprune.models.loading import (
    Loaded,
    Source,
    check_one_device,
    dtype_name,
    load_weights,
    resolved,
    warn_of_emulation,
)
from uniprune.models.matrices import Matrices, find_matrices
from uniprune.models.residency.sharding import open_sharded
from uniprune.models.residency.streaming import Streamer, attached, open_streamed
from uniprune.saliency.calibration import OUTPUTS, SWEEP, Calibration
from uniprune.sparsity.hardware import check_prunes
from uniprune.storage import runs

logger = logging.getLogger(__name__)


def execution_of(
    origin: Origin, work: memory.Work, needs: memory.Needs, options: RunOptions, output: Path | None = None
) -> Execution:
    """How a model that is yet to be loaded will be run: as :func:`choose` says, checked. Warns if it will wait for the disk."""
    execution = choose(origin, needs, options, work.device, output)
    check_execution(work.recipe, execution)
    warn_of_traffic(work, execution, needs[execution])
    return execution


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked and loaded. binding: to the model, by the bits of its matrices."""

    loaded: Loaded
    matrices: Matrices
    windows: Windows
    binding: Binding
    aim: Aim
    execution: Execution

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {name: matrix.shape for name, matrix in self.matrices.items()}

    @property
    def model(self) -> ModelFacts:
        return ModelFacts.of(self.loaded, self.binding.base)

    def calibration(self, progress: Progress, run: runs.Run | None = None) -> Calibration:
        """What the job calibrates on. run: where its progress is kept."""
        traits = EXECUTIONS[self.execution]
        return Calibration(
            self.loaded.model,
            self.matrices,
            self.windows.tokens,
            self.loaded.residency,
            run,
            with_notes(progress),
            recompute=traits.in_memory and traits.recompute,
            offload=traits.states == "host",
        )

    def identity(self, recipe: Recipe, **more: Any) -> dict[str, Any]:
        """What a run must have in common with the interrupted one that it resumes."""
        settings = {
            "recipe": recipe.record(),
            "model": self.binding.base,
            "tokens": self.windows.sha256,
            "execution": saved_as(self.execution),
            "dtype": dtype_name(blocks.dtype_of(self.loaded.model)),
        }
        return settings | {"processes": distributed.count()} | more


def prepare(source: Source, recipe: Recipe, destination: Destination, options: RunOptions, progress: Progress = silent) -> Job:
    """Checks the cheap things first and loads the weights last; samples that the model itself writes come after them.

    Raises InputError for anything that cannot be done as it is asked for.
    """
    prospect, aim, disk = _checked(source, recipe, destination, options)
    given = prospect.given
    with ExitStack() as meanwhile:  # files are hashed by other threads; after an error they are told to stop
        digests = meanwhile.enter_context(given.checkpoint.digesting(prospect.matrices)) if given.checkpoint else None
        tokenizer = given.tokenizer if isinstance(given, Loaded) else load_tokenizer(given)
        windows = windows_of(recipe, prospect.model, given.origin, tokenizer)
        distributed.check_alike(recipe.record() | {"text": windows.sha256})  # which may lie in another folder on each machine
        if options.save_tokens is not None and windows.prompts is None:
            check_savable(windows, options.save_tokens, _kept_tokens(options))
        work = replace(prospect.work(*windows.tokens.shape), compared=destination.compared)
        if isinstance(given, Loaded):
            warn_of_emulation(given.model)
            loaded, matrices, execution = given, prospect.matrices, choose_for_loaded(given, work, options)
        else:
            needs = memory.needs(work)
            execution = execution_of(given, work, needs, options, destination.path)
            _check_images(windows, execution)
            destination.check_space(disk + distributed.count() * needs[execution].disk)  # each process has files of its own
            loaded = _load(given, tokenizer, work, execution)
            matrices = _found_in(loaded, recipe)
        if windows.prompts is not None:
            windows = generated(windows, loaded, recipe.seed, progress)
        pictures.show(loaded.model, windows.pictures)
        every = find_matrices(loaded.model)
        if loaded.residency is blocks.resident:
            check_finite(matrices)  # of the weights in the type computed in; those in the files are checked as they are hashed
            check_loaded(loaded.model, every)
        if recipe.size is not None and aim.budget is None:
            aim = aim_of(recipe, matrices, loaded)
        prunable = sum(matrix.size for matrix in every.values())
        found = digests() if digests else loaded.checkpoint.digests(matrices)
        binding = Binding.of(matrices, found, called(str(loaded)), prunable)
        distributed.check_alike({"model": binding.base, "--dtype": dtype_name(blocks.dtype_of(loaded.model))})
        _save_tokens(windows, options)  # once nothing is left to refuse
        return Job(loaded, matrices, windows, binding, aim, execution)


def _checked(source: Source, recipe: Recipe, destination: Destination, options: RunOptions) -> tuple[Prospect, Aim, int]:
    """All that can be told before any text or weight is read: the model without weights, the aim, and the output's bytes."""
    check_execution(recipe, "resident")
    given = resolved(source)
    if isinstance(given, Loaded):
        _check_loaded(given, recipe, options)
        destination.check_loaded(given)
    destination.check(recipe, given.origin, options)
    prospect = prospect_of(given, recipe, options)
    warn_of_idle(recipe)
    aim = aim_of(recipe, prospect.matrices, given)
    if aim.pattern:
        check_prunes(aim.pattern, aim.unsupported, {name: matrix.shape for name, matrix in prospect.matrices.items()})
    if disk := destination.size_of(prospect):
        destination.check_space(disk)
    return prospect, aim, disk


def _check_loaded(loaded: Loaded, recipe: Recipe, options: RunOptions) -> None:
    """Raises InputError for a model in memory that cannot be run as the recipe and the options ask for it."""
    check_one_device(loaded.model)
    loaded.check(recipe.dtype, options.device)
    if recipe.uses_controller and next(loaded.model.parameters()).is_inference():
        raise InputError(
            "the model was made in torch.inference_mode and cannot be differentiated; make it outside, or give its folder"
        )


def _check_images(windows: Windows, execution: Execution) -> None:
    if windows.pictures and not EXECUTIONS[execution].in_memory:
        raise InputError("images go through the whole model in memory; raise --max-memory, or take the text: --field text")


def _load(origin: Origin, tokenizer: Any, work: memory.Work, execution: Execution) -> Loaded:
    """The model for an execution: in memory as a whole, or block by block."""
    if EXECUTIONS[execution].in_memory:
        return Loaded(load_weights(origin, work.dtype, work.device), tokenizer, origin)
    return (open_sharded if execution == "sharded" else open_streamed)(origin, tokenizer, work.dtype, work.device)


def _found_in(loaded: Loaded, recipe: Recipe) -> Matrices:
    """The matrices to prune of a model that was loaded, where its blocks are not in memory read from the checkpoint."""
    matrices = find_matrices(loaded.model, recipe.include, recipe.exclude)
    return attached(matrices, loaded.residency) if isinstance(loaded.residency, Streamer) else matrices


def _save_tokens(windows: Windows, options: RunOptions) -> None:
    """Writes the token file, if one is asked for."""
    if options.save_tokens is not None and distributed.rank() == 0:
        save_windows(windows, options.save_tokens, _kept_tokens(options))


def _kept_tokens(options: RunOptions) -> bool:
    """Whether a token file that is there may be of this run, which was interrupted, and is not to be replaced."""
    return options.resume and not options.overwrite


def warn_of_idle(recipe: Recipe) -> None:
    """Warns if there are settings for the steps of a controller, but no controller runs."""
    if not recipe.uses_controller and (recipe.steps or recipe.budget_tokens):
        logger.warning("--steps and --budget-tokens change nothing: they are of a controller, and none runs")


@contextmanager
def progress_of(output: Path, options: RunOptions, identity: dict[str, Any]) -> Iterator[runs.Run]:
    """The run of this process, new or resumed. All processes share the first one's folder; the others have folders inside it.

    A block-by-block pass of several processes is not resumed but starts again: the hidden states of each process's windows lie
    in its own folder, which does not outlive it.
    """
    if distributed.rank() == 0:
        with runs.open_run(output, identity, resume=options.resume, overwrite=options.overwrite) as run:
            for stage in (SWEEP, OUTPUTS) if distributed.count() > 1 else ():
                run.drop(stage)
            distributed.barrier()
            yield run
            distributed.barrier()
    else:
        distributed.barrier()
        with runs.process_run(runs.folder_of(output), f"rank-{distributed.rank()}") as run:
            yield run
        distributed.barrier()
