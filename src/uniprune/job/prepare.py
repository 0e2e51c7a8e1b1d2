"""What a run needs before it starts: checked input, the matrices and what they are to lose, the windows, the loaded model.

The cheap checks come first and the weights last. What is known before any text or weight is read is an :class:`Prospect`: that
is all of what ``plan`` tells. How the model is executed is chosen in ``execution``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uniprune.artefacts import writer
from uniprune.artefacts.binding import Binding
from uniprune.artefacts.reports import ModelFacts
from uniprune.checkpoints.origin import Origin, called, stored_dtype
from uniprune.checkpoints.tokenizer import load_tokenizer
from uniprune.common import distributed, pictures
from uniprune.common.progress import Progress, silent, with_notes
from uniprune.data.sources import files_of
from uniprune.data.windows import Windows, check_savable, save_windows
from uniprune.errors import InputError
from uniprune.job.aim import Aim, aim_of
from uniprune.job.execution import check_execution, choose, choose_for_loaded, warn_of_traffic
from uniprune.job.forecast import memory
from uniprune.job.options import EXECUTIONS, Execution, RunOptions, saved_as
from uniprune.job.recipe import Recipe
from uniprune.job.samples import generated, windows_of
from uniprune.models import blocks
from uniprune.models.checks import check_finite, check_loaded, check_uncompiled, check_writable
from uniprune.models.loading import (
    Loaded,
    Source,
    check_one_device,
    dtype_name,
    fast_dtype,
    load_weights,
    model_of,
    native_dtype,
    parse_device,
    parse_dtype,
    resolved,
    warn_of_emulation,
)
from uniprune.models.matrices import Matrices, check_decoder, choose_matrices, find_matrices
from uniprune.models.residency.sharding import open_sharded
from uniprune.models.residency.streaming import Streamer, attached, open_streamed
from uniprune.saliency.calibration import OUTPUTS, SWEEP, Calibration
from uniprune.sparsity.hardware import check_prunes
from uniprune.storage import files, runs
from uniprune.storage.files import check_output_file

logger = logging.getLogger(__name__)


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


def prepare(
    source: Source,
    recipe: Recipe,
    output: Path | None,
    options: RunOptions,
    scores: Path | None = None,
    progress: Progress = silent,
    table: Path | None = None,
) -> Job:
    """Checks the cheap things first and loads the weights last; samples that the model itself writes come after them.

    output: an output folder, or None; scores: a scores file instead, whose name its writer checks. table: a
    folder that another writes, for which masks are measured one after the other, and where the run keeps its progress.
    Raises InputError for anything that cannot be done as it is asked for.
    """
    prospect, aim, disk = _checked(source, recipe, output, options, scores)
    given, target = prospect.given, output or scores
    with ExitStack() as meanwhile:  # files are hashed by other threads; after an error they are told to stop
        digests = meanwhile.enter_context(given.checkpoint.digesting(prospect.matrices)) if given.checkpoint else None
        tokenizer = given.tokenizer if isinstance(given, Loaded) else load_tokenizer(given)
        windows = windows_of(recipe, prospect.model, given.origin, tokenizer)
        distributed.check_alike(recipe.record() | {"text": windows.sha256})  # which may lie in another folder on each machine
        if options.save_tokens is not None and windows.prompts is None:
            check_savable(windows, options.save_tokens, _kept_tokens(options))
        work = replace(prospect.work(*windows.tokens.shape), compared=table is not None)
        if isinstance(given, Loaded):
            warn_of_emulation(given.model)
            loaded, matrices, execution = given, prospect.matrices, choose_for_loaded(given, work, options)
        else:
            needs = memory.needs(work)
            execution = execution_of(given, work, needs, options, target)
            _check_images(windows, execution)
            if place := target or table:  # each process has files of its own beside the output
                needed = (disk if target else 0) + distributed.count() * needs[execution].disk
                files.check_disk_space(place, needed, runs.held(place))
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


def _checked(
    source: Source, recipe: Recipe, output: Path | None, options: RunOptions, scores: Path | None
) -> tuple[Prospect, Aim, int]:
    """All that can be told before any text or weight is read: the model without weights, the aim, and the output's bytes."""
    target = output or scores
    check_execution(recipe, "resident")
    given = resolved(source)
    if isinstance(given, Loaded):
        _check_loaded(given, recipe, options)
        if target is not None:
            check_uncompiled(given.model)
        if output is not None and (given.origin is None or not given.origin.files):
            check_writable(given.model)
    _check_outputs(recipe, given.origin, options, output, scores)
    prospect = prospect_of(given, recipe, options)
    warn_of_idle(recipe)
    aim = aim_of(recipe, prospect.matrices, given)
    if aim.pattern:
        check_prunes(aim.pattern, aim.unsupported, {name: matrix.shape for name, matrix in prospect.matrices.items()})
    disk = _output_bytes(prospect, to_folder=output is not None)
    if target is not None:
        files.check_disk_space(target, disk, runs.held(target))
    return prospect, aim, disk


def _check_loaded(loaded: Loaded, recipe: Recipe, options: RunOptions) -> None:
    """Raises InputError for a model in memory that cannot be run as the recipe and the options ask for it."""
    check_one_device(loaded.model)
    loaded.check(recipe.dtype, options.device)
    if recipe.uses_controller and next(loaded.model.parameters()).is_inference():
        raise InputError(
            "the model was made in torch.inference_mode and cannot be differentiated; make it outside, or give its folder"
        )


def _check_outputs(
    recipe: Recipe, origin: Origin | None, options: RunOptions, output: Path | None, scores: Path | None
) -> None:
    """Raises InputError if a file or folder that the run writes may not be written, or is one that it reads."""
    texts = files_of(recipe.text)
    save_tokens = options.save_tokens
    model = origin.path if origin else None
    if save_tokens is not None and scores is not None and save_tokens.resolve() == scores.resolve():
        raise InputError(f"output {scores} cannot hold both scores and tokens; give --save-tokens another name")
    if save_tokens is not None and output is not None and save_tokens.resolve().is_relative_to(output.resolve()):
        raise InputError(f"--save-tokens {save_tokens} lies in the output folder, which is made anew; give it another place")
    for file in (save_tokens, scores):
        if file is not None:
            # A token file of an interrupted run is compared later on; a scores file was checked by its writer.
            replaceable = options.overwrite or options.resume or file is scores
            check_output_file(file, replaceable, *texts, *([model] if model else []))
    if output is not None:
        files.check_output_folder(output, options.overwrite, model, texts)


def _output_bytes(prospect: Prospect, to_folder: bool) -> int:
    """The disk space that the output takes: a checkpoint's and its masks', or a scores file's."""
    if not to_folder:
        return 4 * sum(matrix.size for matrix in prospect.matrices.values())
    parameters = list(prospect.model.parameters())
    masks = 0 if prospect.recipe.experts is not None else sum(matrix.size for matrix in prospect.matrices.values()) // 8
    if isinstance(prospect.given, Loaded):
        weights = sum(parameter.nbytes for parameter in parameters)
    else:
        weights = (
            sum(parameter.numel() for parameter in parameters) * (parse_dtype(prospect.recipe.dtype) or torch.float32).itemsize
        )
    origin = prospect.given.origin
    return masks + (writer.checkpoint_bytes(origin, weights) if origin else weights)


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


def check_predicts(recipe: Recipe, model: nn.Module) -> None:
    """Raises InputError if a controller is to run on an encoder, which does not predict the next token."""
    if recipe.uses_controller:
        check_decoder(model, "prune it by the local metric: --controller none")


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


def use_device(options: RunOptions, source: Source | Origin) -> torch.device:
    """The device to compute on, from now on PyTorch's current one: of a model in memory its own, under ``torchrun`` the
    process's."""
    device = blocks.device_of(source.model) if isinstance(source, Loaded) else parse_device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", distributed.local_rank() if device.index is None else device.index)
        torch.cuda.set_device(device)  # Triton's and cuSPARSELt's kernels use the current one
    return device
