"""What a run needs before it starts: checked input, a choice of how to execute it, the model, the windows.

The cheap checks come first and the weights last. How the model is executed follows from the memory that the forecast asks for
and the machine has: whole; whole, but with activations that are computed again; block by block from the memory of all
processes; or block by block from disk.
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

from uniprune.artefacts import archive_size, writer
from uniprune.artefacts.binding import Binding
from uniprune.artefacts.reports import ModelFacts
from uniprune.checkpoints.origin import Origin, resolve, stored_dtype
from uniprune.common import distributed, formatting, pictures
from uniprune.common.progress import Progress, silent
from uniprune.controller import controllers
from uniprune.data.sources import files_of
from uniprune.data.windows import Windows, save_windows
from uniprune.errors import InputError
from uniprune.job import memory
from uniprune.job.images import image_windows
from uniprune.job.options import Execution, RunOptions
from uniprune.job.recipe import Recipe
from uniprune.job.samples import calibration_windows, check_written, writes, written
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
from uniprune.models.sharding import Sharder, open_sharded
from uniprune.models.streaming import attached, open_streamed
from uniprune.saliency.calibration import OUTPUTS, SWEEP, Calibration
from uniprune.sparsity.hardware import fitted
from uniprune.sparsity.patterns import Pattern, Saliency
from uniprune.storage import files, runs
from uniprune.storage.dtypes import PLAIN
from uniprune.storage.files import check_output_file

IN_MEMORY: tuple[Execution, ...] = ("resident", "recomputed", "offloaded")
UNSUITABLE = {
    "recomputed": "only --controller feedback has activations to compute again",
    "offloaded": "it is for a controller on a GPU",
    "sharded": "it takes several processes (torchrun)",
}


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Aim:
    """What a recipe's budget comes to for a model's matrices.

    unsupported: matrices that cannot have the pattern, and why. budget: if a size was asked for; sparsity: what it became.
    """

    pattern: Pattern | None
    unsupported: dict[str, str]
    budget: archive_size.Budget | None
    sparsity: float | None

    def with_scores(self, saliency: Saliency) -> Aim:
        """The same, now that there are scores: at the sparsity at which what they keep has the size that was asked for."""
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
    """
    with ExitStack() as beside:
        return _prepare(source, recipe, output, options, scores, progress, beside)


def _prepare(
    source: Source,
    recipe: Recipe,
    output: Path | None,
    options: RunOptions,
    scores: Path | None,
    progress: Progress,
    beside: ExitStack,
) -> Job:
    """beside: what other threads do meanwhile, which ends with it."""
    device, asked, save_tokens = device_of(options), parse_dtype(recipe.dtype), options.save_tokens
    check_execution(recipe, "resident")
    loaded = source if isinstance(source, Loaded) else None
    if loaded and loaded.residency is blocks.resident:
        check_one_device(loaded.model)
        loaded.check(recipe.dtype, options.device)
        if recipe.parsed_controller() is not None and next(loaded.model.parameters()).is_inference():
            raise InputError(
                "the model was made in torch.inference_mode and cannot be differentiated; make it outside, or give its folder"
            )
    origin = loaded.origin if loaded else resolve(source)  # type: ignore[arg-type]
    texts = files_of(recipe.text)
    if save_tokens is not None and scores is not None and save_tokens.resolve() == scores.resolve():
        raise InputError(f"output {scores} cannot hold both scores and tokens; give --save-tokens another name")
    for file in (save_tokens, scores):
        if file is not None:
            may = options.overwrite or options.resume or file is scores  # the tokens of an earlier try are compared
            check_output_file(file, may, *texts, *([origin.path] if origin else []))
    if output is not None:
        files.check_output_folder(output, options.overwrite, origin.path if origin else None, texts)
    model = loaded.model if loaded else skeleton(origin)  # type: ignore[arg-type]
    check_predicts(recipe, model)
    warn_of_idle(recipe)
    matrices = choose_matrices(model, recipe.include, recipe.exclude)
    aim = aim_of(recipe, matrices, loaded or origin)
    disk = 4 * sum(matrix.size for matrix in matrices.values())  # of scores
    if output is not None:
        weights = sum(p.numel() for p in model.parameters()) * (asked or torch.float32).itemsize
        disk = writer.checkpoint_bytes(origin, weights) if origin else weights
    target = output or scores
    if target is not None:
        files.check_disk_space(target, disk)
    digests = None
    if checkpoint := loaded.checkpoint if loaded else origin.files:  # type: ignore[union-attr]
        digests = beside.enter_context(checkpoint.digesting(matrices))
    tokenizer = loaded.tokenizer if loaded else load_tokenizer(origin)  # type: ignore[arg-type]
    windows = image_windows(recipe, model, origin, tokenizer) or calibration_windows(recipe, tokenizer, model)
    holds_out = bool(getattr(recipe.parsed_controller(), "held_out", 0))
    distributed.check_windows(len(windows.tokens), held_out=int(holds_out))
    _keep(windows, options)
    if loaded:
        warn_of_emulation(loaded.model)
        execution = _of_loaded(loaded, recipe, matrices, windows, options)
    else:
        assert origin is not None
        stored = stored_dtype(origin, matrices)
        computed = asked or fast_dtype(stored or native_dtype(origin), device)
        work = memory.Work(model, matrices, recipe, computed, stored, windows.tokens.shape[1], device)
        needs = memory.needs(work)
        execution = choose(origin, needs, options, device, target)
        check_execution(recipe, execution)
        memory.warn_of_traffic(work, execution, needs[execution])
        if windows.pictures and execution not in IN_MEMORY:
            raise InputError("images go through the whole model in memory; raise --max-memory, or take the text: --field text")
        if target is not None:
            files.check_disk_space(target, disk + distributed.count() * needs[execution].disk)  # each process has its own
        if execution in IN_MEMORY:
            loaded = Loaded(load_weights(origin, computed, device), tokenizer, origin)
            matrices = find_matrices(loaded.model, recipe.include, recipe.exclude)
        else:
            open_blocks = open_sharded if execution == "sharded" else open_streamed
            loaded = open_blocks(origin, tokenizer, computed, device)
            matrices = attached(find_matrices(loaded.model, recipe.include, recipe.exclude), loaded.residency)  # type: ignore[arg-type]
    if windows.prompts is not None:
        windows = written(windows, loaded, recipe.seed, progress)
        _keep(windows, options)
    pictures.show(loaded.model, windows.pictures)
    if loaded.residency is blocks.resident:
        check_finite(matrices)  # as they are computed; as they are stored, digests looks
        check_loaded(loaded.model, matrices)
    if recipe.size is not None and aim.budget is None:
        aim = aim_of(recipe, matrices, loaded)
    return Job(loaded, matrices, windows, _bind(loaded, matrices, digests() if digests else None), aim, execution)


def _of_loaded(loaded: Loaded, recipe: Recipe, matrices: Matrices, windows: Windows, options: RunOptions) -> Execution:
    """How a model that was loaded before is executed."""
    if loaded.residency is not blocks.resident:
        return "sharded" if isinstance(loaded.residency, Sharder) else "streamed"
    dtype, device = next(loaded.model.parameters()).dtype, blocks.device_of(loaded.model)
    work = memory.Work(loaded.model, matrices, recipe, dtype, dtype, windows.tokens.shape[1], device)
    limit = options.max_memory or memory.free_memory(device) + memory.PROCESS + work.parameters * dtype.itemsize
    found = {execution: needed for execution, needed in memory.needs(work).items() if execution in IN_MEMORY}
    if options.execution is not None and options.execution not in found:
        raise InputError(f"--execution {options.execution} is not for a model that is in memory; one of {', '.join(found)} is")
    return options.execution or _fitting(found, limit) or "resident"


def _keep(windows: Windows, options: RunOptions) -> None:
    """Writes the token file, if one is asked for and no sample is still to be written by the model."""
    if options.save_tokens is not None and windows.prompts is None and distributed.rank() == 0:
        save_windows(windows, options.save_tokens, again=options.resume and not options.overwrite)


def _bind(loaded: Loaded, matrices: Matrices, digests: dict[str, str] | None) -> Binding:
    digests = digests or loaded.checkpoint.digests(matrices)
    transposed = [name for name, matrix in matrices.items() if matrix.stored_transposed]
    return Binding(base=writer.fingerprint(digests), base_name=str(loaded), digests=digests, transposed=transposed)


def aim_of(recipe: Recipe, matrices: Matrices, source: Loaded | Origin | None) -> Aim:
    """The pattern, and the size that a recipe asks for, if it does and the weights can be read before they are loaded."""
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
    """The pattern that a recipe asks for, if it does, as these matrices can have it; and those that cannot, with reasons.

    sparsity: what a size became; the lowest while that is not known.
    """
    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    if recipe.size is not None:
        recipe = recipe.at(archive_size.lowest(recipe.at(recipe.lowest).pattern(), shapes) if sparsity is None else sparsity)
    if recipe.sparsity is None:
        return None, {}
    dtype = partial(_written_dtype, recipe, matrices, origin)
    return fitted(recipe.pattern(), shapes, dtype, recipe.hardware, recipe.unsupported)


def choose(
    origin: Origin, needs: memory.Needs, options: RunOptions, device: torch.device, output: Path | None = None
) -> Execution:
    """The one that was asked for, or the fastest that fits; an interrupted run goes on as it began.

    All processes choose the same, by the one that has least memory.
    Raises InputError, with the numbers, if nothing fits.
    """
    asked, limit = options.execution, options.max_memory or memory.free_memory(device)
    if asked is not None and asked not in needs:
        raise InputError(f"--execution {asked} is not to be had here: {UNSUITABLE[asked]}; one of {', '.join(needs)} is")
    able = {name: needed for name, needed in needs.items() if asked in (None, name) and (origin.files or name in IN_MEMORY)}
    begun = (runs.identity_of(output) or {}).get("execution") if options.resume and output is not None else None
    if begun in needs:
        same = IN_MEMORY if begun == "resident" else (begun,)
        return _fitting({name: needed for name, needed in able.items() if name in same}, limit) or asked or begun
    if (found := _fitting(able, limit)) is not None:
        return found
    takes = ", ".join(f"{gigabytes(needed.memory)} {name}" for name, needed in needs.items() if asked in (None, name))
    steps = "masks" in needs["streamed"].parts  # of a controller
    remedy = "lower the tokens of a step" if steps else "give shorter samples (--length)"
    if not origin.files:
        remedy = "convert it: only safetensors files are read block by block"
    raise InputError(f"model {origin} needs {takes} of memory; {gigabytes(limit)} are there; raise --max-memory, or {remedy}")


def _fitting(able: memory.Needs, limit: int) -> Execution | None:
    """The fastest execution that fits into the memory of every process."""
    host = memory.free_memory(torch.device("cpu"))
    return next((name for name, needed in able.items() if _everywhere(needed.memory <= limit and needed.host <= host)), None)


def check_execution(recipe: Recipe, execution: Execution) -> None:
    """Raises InputError if the recipe's controller or text does not go with the way that the model would be executed."""
    check_written(writes(recipe), execution in IN_MEMORY)
    controller = recipe.parsed_controller()
    if controller is None:
        return
    name, others = controllers.name_of(controller), "use another controller, or --controller none"
    if controller.one_process and distributed.count() > 1:
        raise InputError(f"--controller {name} runs in one process; start it without torchrun, or {others}")
    if controller.in_memory and execution not in ("resident", "recomputed"):
        raise InputError(f"--controller {name} needs the whole model in memory; raise --max-memory, or {others}")


def warn_of_idle(recipe: Recipe) -> None:
    """Says so if steps were asked for that nothing takes."""
    if not recipe.corrected and (recipe.steps or recipe.budget_tokens):
        logger.warning("--steps and --budget-tokens change nothing: they are of a controller, and none runs")


def check_predicts(recipe: Recipe, model: torch.nn.Module) -> None:
    """Raises InputError if a controller is to correct scores by the next token's prediction, which the model does not make."""
    if recipe.corrected:
        check_decoder(model, "prune it by the local metric: --controller none")


def _everywhere(condition: bool) -> bool:
    """Whether something is so in all processes; all of them must ask."""
    return distributed.total_of(float(condition)) == distributed.count()


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


@contextmanager
def progress_of(output: Path, options: RunOptions, identity: dict[str, Any]) -> Iterator[runs.Run]:
    """The run of this process: all share the first one's folder, which an interrupted run is resumed from.

    A sweep shared by several processes begins again: each has the hidden states of its own windows, and they are not copied.
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
        with runs.beside(runs.folder_of(output), f"rank-{distributed.rank()}") as run:
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
    """The type that a matrix is written in, for people, as masks know it; of codes safetensors' name."""
    if origin is not None and origin.files:
        found = origin.files.stored(name).dtype
        return dtype_name(PLAIN.get(found, found))
    whole = matrices[name].whole
    return dtype_name((parse_dtype(recipe.dtype) or torch.float32) if whole.is_meta else whole.dtype)  # meta: of a GGUF file
