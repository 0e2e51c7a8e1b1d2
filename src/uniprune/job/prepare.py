"""What a run needs before it starts: checked input, the matrices and what they are to lose, the windows, the loaded model.

The cheap checks come first and the weights last. How the model is executed is chosen in ``execution``.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uniprune.artefacts import archive_size, writer
from uniprune.artefacts.binding import Binding
from uniprune.artefacts.reports import ModelFacts
from uniprune.checkpoints.origin import Origin, resolve, stored_dtype
from uniprune.common import distributed, formatting, pictures
from uniprune.common.progress import Progress, silent
from uniprune.data.sources import files_of
from uniprune.data.windows import Windows, save_windows
from uniprune.errors import InputError
from uniprune.job import memory
from uniprune.job.execution import check_execution, choose, choose_for_loaded, warn_of_traffic
from uniprune.job.images import image_windows
from uniprune.job.options import IN_MEMORY, Execution, RunOptions
from uniprune.job.recipe import Recipe
from uniprune.job.samples import calibration_windows, generated
from uniprune.models import blocks
from uniprune.models.loading import (
    Loaded,
    Source,
    check_one_device,
    dtype_name,
    fast_dtype,
    load_tokenizer,
    load_weights,
    native_dtype,
    parse_device,
    parse_dtype,
    skeleton,
    warn_of_emulation,
)
from uniprune.models.matrices import Matrices, check_decoder, check_finite, check_loaded, choose_matrices, find_matrices
from uniprune.models.residency.sharding import open_sharded
from uniprune.models.residency.streaming import Streamer, attached, open_streamed
from uniprune.saliency.calibration import OUTPUTS, SWEEP, Calibration
from uniprune.sparsity.hardware import check_prunes, fitted
from uniprune.sparsity.patterns import Pattern, Saliency
from uniprune.storage import files, runs
from uniprune.storage.dtypes import PLAIN
from uniprune.storage.files import check_output_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Aim:
    """What a recipe asks for, resolved for a model's matrices.

    unsupported: matrices that cannot have the pattern, and why. budget: if a size was asked for; sparsity: that meets it.
    """

    pattern: Pattern | None
    unsupported: dict[str, str]
    budget: archive_size.Budget | None
    sparsity: float | None

    def with_scores(self, saliency: Saliency) -> Aim:
        """For a size budget: the same at the sparsity that meets it with these scores; without scores it is an estimate."""
        if self.budget is None:
            return self
        sparsity = self.budget.sparsity(saliency)
        return replace(self, sparsity=sparsity, pattern=self.budget.at(sparsity))


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
        return Calibration(
            self.loaded.model,
            self.matrices,
            self.windows.tokens,
            self.loaded.residency,
            run,
            progress,
            recompute=self.execution in ("recomputed", "offloaded"),
            offload=self.execution == "offloaded",
        )

    def identity(self, recipe: Recipe, **more: Any) -> dict[str, Any]:
        """What a run must have in common with the interrupted one that it resumes."""
        tokens = hashlib.sha256(self.windows.tokens.contiguous().numpy().data).hexdigest()
        dtype = dtype_name(next(self.loaded.model.parameters()).dtype)
        settings = {
            "recipe": recipe.record(),
            "model": self.binding.base,
            "tokens": tokens,
            "execution": "resident" if self.execution in IN_MEMORY else self.execution,  # those have the same states
            "dtype": dtype,
        }
        return settings | {"processes": distributed.count()} | more


def prepare(
    source: Source,
    recipe: Recipe,
    output: Path | None,
    options: RunOptions,
    scores: Path | None = None,
    progress: Progress = silent,
) -> Job:
    """Checks the cheap things first and loads the weights last; samples that the model itself writes come after them.

    output: an output folder, or None; scores: a scores file instead, whose name its writer checks.
    Raises InputError for anything that cannot be done as it is asked for.
    """
    device, target = device_of(options), output or scores
    check_execution(recipe, "resident")
    if isinstance(source, Loaded):
        _check_loaded(source, recipe, options)
    given = source if isinstance(source, Loaded) else resolve(source)
    origin = given.origin if isinstance(given, Loaded) else given
    _check_outputs(recipe, origin, options, output, scores)
    model = given.model if isinstance(given, Loaded) else skeleton(given)
    check_predicts(recipe, model)
    warn_of_idle(recipe)
    matrices = choose_matrices(model, recipe.include, recipe.exclude)
    aim = aim_of(recipe, matrices, given)
    if aim.pattern:
        check_prunes(aim.pattern, aim.unsupported, {name: matrix.shape for name, matrix in matrices.items()})
    disk = _output_bytes(recipe, origin, model, matrices, to_folder=output is not None)
    if target is not None:
        files.check_disk_space(target, disk)
    with ExitStack() as meanwhile:  # files are hashed by other threads; after an error they are told to stop
        checkpoint = given.checkpoint if isinstance(given, Loaded) else given.files
        digests = meanwhile.enter_context(checkpoint.digesting(matrices)) if checkpoint else None
        tokenizer = given.tokenizer if isinstance(given, Loaded) else load_tokenizer(given)
        windows = _windows(recipe, model, origin, tokenizer)
        _save_tokens(windows, options)
        if isinstance(given, Loaded):
            loaded = given
            warn_of_emulation(loaded.model)
            execution = choose_for_loaded(loaded, recipe, matrices, windows.tokens.shape[1], options)
        else:
            work = _work(given, recipe, model, matrices, windows, device)
            needs = memory.needs(work)
            execution = choose(given, needs, options, device, target)
            check_execution(recipe, execution)
            warn_of_traffic(work, execution, needs[execution])
            _check_images(windows, execution)
            if target is not None:  # each process has files of its own beside the output
                files.check_disk_space(target, disk + distributed.count() * needs[execution].disk)
            loaded = _load(given, tokenizer, work.dtype, device, execution)
            matrices = _found_in(loaded, recipe)
        if windows.prompts is not None:
            windows = generated(windows, loaded, recipe.seed, progress)
            _save_tokens(windows, options)
        pictures.show(loaded.model, windows.pictures)
        if loaded.residency is blocks.resident:
            check_finite(matrices)  # of the weights in the type computed in; those in the files are checked as they are hashed
            check_loaded(loaded.model, matrices)
        if recipe.size is not None and aim.budget is None:
            aim = aim_of(recipe, matrices, loaded)
        found = digests() if digests else loaded.checkpoint.digests(matrices)
        return Job(loaded, matrices, windows, Binding.of(matrices, found, str(loaded)), aim, execution)


def _check_loaded(loaded: Loaded, recipe: Recipe, options: RunOptions) -> None:
    """Raises InputError for a model in memory that cannot be run as the recipe and the options ask for it."""
    if loaded.residency is not blocks.resident:
        return
    check_one_device(loaded.model)
    loaded.check(recipe.dtype, options.device)
    if recipe.parsed_controller() is not None and next(loaded.model.parameters()).is_inference():
        raise InputError(
            "the model was made in torch.inference_mode and cannot be differentiated; make it outside, or give its folder"
        )


def _check_outputs(
    recipe: Recipe, origin: Origin | None, options: RunOptions, output: Path | None, scores: Path | None
) -> None:
    """Raises InputError if a file or folder that the run writes may not be written, or is one that it reads."""
    texts, save_tokens = files_of(recipe.text), options.save_tokens
    model = origin.path if origin else None
    if save_tokens is not None and scores is not None and save_tokens.resolve() == scores.resolve():
        raise InputError(f"output {scores} cannot hold both scores and tokens; give --save-tokens another name")
    for file in (save_tokens, scores):
        if file is not None:
            # A token file of an interrupted run is compared later on; a scores file was checked by its writer.
            replaceable = options.overwrite or options.resume or file is scores
            check_output_file(file, replaceable, *texts, *([model] if model else []))
    if output is not None:
        files.check_output_folder(output, options.overwrite, model, texts)


def _output_bytes(recipe: Recipe, origin: Origin | None, model: nn.Module, matrices: Matrices, to_folder: bool) -> int:
    """The disk space that the output takes: a checkpoint's, or a scores file's."""
    if not to_folder:
        return 4 * sum(matrix.size for matrix in matrices.values())
    weights = sum(p.numel() for p in model.parameters()) * (parse_dtype(recipe.dtype) or torch.float32).itemsize
    return writer.checkpoint_bytes(origin, weights) if origin else weights


def _windows(recipe: Recipe, model: nn.Module, origin: Origin | None, tokenizer: Any) -> Windows:
    """The calibration samples. Raises InputError if they are too few for the processes and a held-out one."""
    windows = image_windows(recipe, model, origin, tokenizer) or calibration_windows(recipe, tokenizer, model)
    holds_out = bool(getattr(recipe.parsed_controller(), "held_out", 0))
    distributed.check_windows(len(windows.tokens), held_out=int(holds_out))
    return windows


def _work(
    origin: Origin, recipe: Recipe, model: nn.Module, matrices: Matrices, windows: Windows, device: torch.device
) -> memory.Work:
    """What the forecasts of memory depend on, for a model that is yet to be loaded."""
    stored = stored_dtype(origin, matrices)
    dtype = parse_dtype(recipe.dtype) or fast_dtype(stored or native_dtype(origin), device)
    return memory.Work(model, matrices, recipe, dtype, stored, windows.tokens.shape[1], device)


def _check_images(windows: Windows, execution: Execution) -> None:
    if windows.pictures and execution not in IN_MEMORY:
        raise InputError("images go through the whole model in memory; raise --max-memory, or take the text: --field text")


def _load(origin: Origin, tokenizer: Any, dtype: torch.dtype, device: torch.device, execution: Execution) -> Loaded:
    if execution in IN_MEMORY:
        return Loaded(load_weights(origin, dtype, device), tokenizer, origin)
    return (open_sharded if execution == "sharded" else open_streamed)(origin, tokenizer, dtype, device)


def _found_in(loaded: Loaded, recipe: Recipe) -> Matrices:
    """The matrices to prune of a model that was loaded, where its blocks are not in memory read from the checkpoint."""
    matrices = find_matrices(loaded.model, recipe.include, recipe.exclude)
    return attached(matrices, loaded.residency) if isinstance(loaded.residency, Streamer) else matrices


def _save_tokens(windows: Windows, options: RunOptions) -> None:
    """Writes the token file, if one is asked for and the model has no sample left to write."""
    if options.save_tokens is not None and windows.prompts is None and distributed.rank() == 0:
        save_windows(windows, options.save_tokens, again=options.resume and not options.overwrite)


def aim_of(recipe: Recipe, matrices: Matrices, source: Loaded | Origin | None) -> Aim:
    """The pattern that a recipe asks for; and its size budget, if it has one and ``source`` has weights that can be read."""
    origin = source.origin if isinstance(source, Loaded) else source

    def at(sparsity: float | None) -> Pattern:
        pattern, _ = _pattern_of(recipe, matrices, origin, sparsity)
        assert pattern is not None
        return pattern

    budget = None
    if recipe.size is not None and source is not None and (isinstance(source, Loaded) or source.files):
        budget = archive_size.budget(formatting.parse_size(recipe.size), source, matrices, at, at(None))
    sparsity = budget.sparsity() if budget else None
    return Aim(*_pattern_of(recipe, matrices, origin, sparsity), budget, sparsity)


def _pattern_of(
    recipe: Recipe, matrices: Matrices, origin: Origin | None, sparsity: float | None
) -> tuple[Pattern | None, dict[str, str]]:
    """The pattern of a recipe, if it has one, with rules for the matrices that cannot have it; and those, with the reasons.

    sparsity: what a size became; the lowest while that is not known.
    """
    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    if recipe.size is not None:
        recipe = recipe.at(archive_size.lowest(recipe.at(recipe.lowest).pattern(), shapes) if sparsity is None else sparsity)
    if recipe.sparsity is None:
        return None, {}
    dtype = partial(_written_dtype, recipe, matrices, origin)
    return fitted(recipe.pattern(), shapes, dtype, recipe.hardware, recipe.unsupported)


def warn_of_idle(recipe: Recipe) -> None:
    """Warns if there are settings for the steps of a controller, but no controller runs."""
    if not recipe.corrected and (recipe.steps or recipe.budget_tokens):
        logger.warning("--steps and --budget-tokens change nothing: they are of a controller, and none runs")


def check_predicts(recipe: Recipe, model: nn.Module) -> None:
    """Raises InputError if a controller is to run on an encoder, which does not predict the next token."""
    if recipe.corrected:
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


def device_of(options: RunOptions) -> torch.device:
    """The device; under ``torchrun`` each process has its own."""
    device = parse_device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", distributed.local_rank() if device.index is None else device.index)
        torch.cuda.set_device(device)  # Triton's and cuSPARSELt's kernels use the current one
    return device


def _written_dtype(recipe: Recipe, matrices: Matrices, origin: Origin | None, name: str) -> str:
    """The type that a matrix is written in, such as ``bfloat16``; of quantised tensors the name that safetensors has."""
    if origin is not None and origin.files:
        found = origin.files.stored(name).dtype
        return dtype_name(PLAIN.get(found, found))
    whole = matrices[name].whole
    return dtype_name((parse_dtype(recipe.dtype) or torch.float32) if whole.is_meta else whole.dtype)  # meta: of a GGUF file
