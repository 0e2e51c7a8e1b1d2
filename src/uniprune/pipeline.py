"""The verbs, end to end: model + text -> statistics -> saliency -> masks -> pruned checkpoint -> report.

Every verb checks all of its input before the heavy work starts, and writes its output at once or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from uniprune import artefacts, calibration, checkpoint, evaluation, forecast, metrics, mirror_descent, paper, patterns, text
from uniprune import masks as masking
from uniprune.errors import InputError, MismatchError
from uniprune.matrices import Matrices, check_finite, check_fit, find_matrices
from uniprune.models import Loaded, Origin, load_tokenizer, load_weights, parse_device, parse_dtype, resolve, skeleton
from uniprune.patterns import Saliency, Scope
from uniprune.progress import Progress, silent
from uniprune.recipe import LENGTH, WINDOWS, Recipe
from uniprune.text import Windows

Source = str | Path | Loaded


def prune(
    source: Source,
    recipe: Recipe,
    output: Path | None = None,
    *,
    overwrite: bool = False,
    device: str | None = None,
    save_tokens: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Prunes a model and writes the checkpoint, its masks and pruning.json to ``output``; returns that report.

    source: a folder, hub name or GGUF file, or a model in memory. A model in memory needs no ``output``: it is pruned in
    place. Kept weights are bitwise the source's.
    Raises InputError before the heavy work starts if anything asked for cannot be done.
    """
    pattern = recipe.pattern()
    watch = Stopwatch()
    with watch("prepare"):
        job = _prepare(source, recipe, output, overwrite, device, pattern, save_tokens)
    descent: dict[str, Any] = {}
    with watch("calibrate"):
        if recipe.sequential:
            metric, tokens = recipe.parsed_metric(), job.windows.tokens
            model, refine = job.loaded.model, recipe.refine
            cut: Any = calibration.sequential(model, job.matrices, tokens, metric, pattern, progress, refine).items()
        else:
            saliency, descent = _saliency(job, recipe, [pattern], progress)
            cut = pattern(_on_one_scale(saliency, pattern, recipe.comparable))
    if output is None:
        with watch("mask"):
            cut = dict(cut)
            masking.apply(job.matrices, cut.items())
        removed = {name: 1 - int(mask.sum()) / mask.numel() for name, mask in cut.items()}
        return _report(recipe, job, removed, watch) | descent
    with checkpoint.new_folder(output) as folder:
        file = folder / checkpoint.MASKS
        with watch("mask"):
            removed = artefacts.write_masks(file, cut, job.shapes, job.facts() | {"pattern": str(pattern)})
        with watch("write"):
            checkpoint.write_checkpoint(job.loaded, artefacts.MasksFile(file), job.transposed, folder)
        report = _report(recipe, job, removed, watch) | descent | {"masks_sha256": _sha256(file)}
        checkpoint.write_report(folder, report)
    return report


def calibrate(
    source: Source,
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    device: str | None = None,
    save_tokens: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Scores every prunable weight and writes the scores: from them, masks of any sparsity are cut in seconds.

    Returns the facts that stand in the file's metadata.
    """
    if recipe.sequential:
        flag = "--refine" if recipe.refine else "--sequential"
        raise InputError(f"{flag} needs the masks while it calibrates; use it with prune")
    artefacts.check_output_file(output, overwrite)
    target = recipe.pattern() if recipe.sparsity is not None else None
    job = _prepare(source, recipe, None, overwrite, device, target, save_tokens)
    checkpoint.check_disk_space(output, 4 * sum(matrix.size for matrix in job.matrices.values()))
    targets = [target] if target else _fitting(mirror_descent.any_sparsity(), job.shapes)
    saliency, descent = _saliency(job, recipe, targets, progress)
    facts = job.facts() | {
        "recipe": recipe.record(),
        "calibration": job.windows.describe(),
        "comparable": recipe.comparable,
        "versions": versions(),
        **descent,
    }
    artefacts.write_scores(output, saliency, job.shapes, facts)
    return facts


def mask(
    scores: Path, sparsity: str | float, output: Path, *, scope: Scope | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Cuts masks of one sparsity from a scores file and writes them; returns the realised sparsity."""
    artefacts.check_output_file(output, overwrite)
    saliency = artefacts.ScoresFile(scores)
    pattern = patterns.parse(sparsity, scope, default="model" if saliency.facts["comparable"] else "row")
    check_fit(saliency.shapes.items(), pattern)
    facts = {key: saliency.facts[key] for key in ("base", "base_name", "transposed")}
    cut = pattern(_on_one_scale(saliency, pattern, saliency.facts["comparable"]))
    removed = artefacts.write_masks(output, cut, saliency.shapes, facts | {"pattern": str(pattern)})
    return {"pattern": str(pattern)} | _realised(removed, saliency.shapes)


def apply(
    source: str | Path, masks: Path, output: Path, *, overwrite: bool = False, dtype: str | None = None
) -> dict[str, Any]:
    """Writes the pruned checkpoint of a model from a masks file; returns the report.

    dtype: only for sources that are not safetensors already (GGUF).
    Raises MismatchError if the masks were made for another model.
    """
    watch = Stopwatch()
    origin = resolve(source)
    checkpoint.check_output_folder(output, overwrite, origin.folder)
    file = artefacts.MasksFile(masks)
    with watch("prepare"):
        loaded: Loaded | Origin = origin
        matrices: Matrices | None = None
        if not origin.shards:
            weights = load_weights(origin, parse_dtype(dtype), torch.device("cpu"))
            loaded = Loaded(weights, load_tokenizer(origin), origin)
            matrices = find_matrices(weights)
        _check_names(origin, file, matrices, masks)
        base = checkpoint.fingerprint(loaded, file, matrices)
        artefacts.check_base(file.facts, base, masks, origin)
        size = sum(matrix.parameter.nbytes for matrix in matrices.values()) if matrices else 0
        checkpoint.check_disk_space(output, checkpoint.checkpoint_bytes(origin, size))
    with checkpoint.new_folder(output) as folder:
        with watch("write"):
            (folder / checkpoint.MASKS).parent.mkdir()
            shutil.copyfile(masks, folder / checkpoint.MASKS)
            checkpoint.write_checkpoint(loaded, file, file.transposed, folder)
        removed = {name: 1 - int(kept.sum()) / kept.numel() for name, kept in file.items()}
        report = {
            "model": {"name": str(origin), "fingerprint": base},
            "pattern": file.facts["pattern"],
            **_realised(removed, file.shapes),
            "masks_sha256": _sha256(masks),
            "versions": versions(),
            "seconds": watch.seconds,
        }
        checkpoint.write_report(folder, report)
    return report


def plan(source: str | Path, recipe: Recipe, *, device: str | None = None) -> forecast.Plan:
    """What pruning this model would touch, cost and yield; reads no weight and writes nothing."""
    origin = resolve(source)
    model = skeleton(origin)
    matrices = find_matrices(model, recipe.include, recipe.exclude)
    dtype = parse_dtype(recipe.dtype) or (torch.float32 if origin.gguf else _stored_dtype(origin, matrices))
    pattern = recipe.pattern() if recipe.sparsity is not None else None
    tokens = (recipe.windows or WINDOWS) * (recipe.length or LENGTH)
    place = parse_device(device)
    return forecast.make_plan(origin, model, matrices, pattern, dtype, tokens, place, recipe.resolved_controller)


def evaluate(
    source: Source,
    *,
    text_source: str | Path = "builtin",
    windows: int | None = None,
    length: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Token perplexity of a model or an output folder, with the protocol beside it, and the zeros it really has.

    text_source: as in uniprune.text; a name stands for its evaluation part. windows: so many, spread evenly over the text;
    None takes all. length: tokens per window, by default 2048, or the model's context if that is shorter.
    """
    loaded = source if isinstance(source, Loaded) else None
    origin = None if loaded else resolve(source)  # type: ignore[arg-type]
    config = loaded.model.config if loaded else skeleton(origin).config  # type: ignore[arg-type]
    tokenizer = loaded.tokenizer if loaded else load_tokenizer(origin)  # type: ignore[arg-type]
    length = _window_length(text_source, length, min(2048, _context(config)))
    _check_context(config, length)
    chosen = text.load_windows(text_source, tokenizer, use="evaluation", length=length, count=windows)
    if loaded is None:
        assert origin is not None
        loaded = Loaded(load_weights(origin, parse_dtype(dtype), parse_device(device)), tokenizer, origin)
    result = asdict(evaluation.perplexity(loaded.model, chosen, progress))
    return {"model": str(loaded), **result, "sparsity": _zeros(loaded.model), "versions": versions()}


# ------------------------------------------------------------------------------------------------------------- parts


@dataclass
class Job:
    """Everything a run needs, checked and loaded."""

    loaded: Loaded
    matrices: Matrices
    windows: Windows
    base: str

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {name: matrix.shape for name, matrix in self.matrices.items()}

    @property
    def transposed(self) -> list[str]:
        return [name for name, matrix in self.matrices.items() if matrix.transposed]

    def facts(self) -> dict[str, Any]:
        """What ties an artefact to its model."""
        return {"base": self.base, "base_name": str(self.loaded), "transposed": self.transposed}


def _prepare(
    source: Source,
    recipe: Recipe,
    output: Path | None,
    overwrite: bool,
    device: str | None,
    pattern: patterns.Pattern | None,
    save_tokens: Path | None,
) -> Job:
    """Checks the cheap things first and loads the weights last."""
    place, dtype = parse_device(device), parse_dtype(recipe.dtype)
    if save_tokens is not None:
        artefacts.check_output_file(save_tokens, overwrite)
    loaded = source if isinstance(source, Loaded) else None
    origin = loaded.origin if loaded else resolve(source)  # type: ignore[arg-type]
    if output is not None:
        checkpoint.check_output_folder(output, overwrite, origin.folder if origin else None)
    model = loaded.model if loaded else skeleton(origin)  # type: ignore[arg-type]
    matrices = find_matrices(model, recipe.include, recipe.exclude)
    if pattern is not None:
        check_fit(((name, matrix.shape) for name, matrix in matrices.items()), pattern)
    if output is not None:
        size = sum(p.numel() for p in model.parameters()) * (dtype or torch.float32).itemsize
        needed = checkpoint.checkpoint_bytes(origin, size) if origin else size
        checkpoint.check_disk_space(output, needed)
    tokenizer = loaded.tokenizer if loaded else load_tokenizer(origin)  # type: ignore[arg-type]
    windows = _calibration_windows(recipe, tokenizer, model)
    if save_tokens is not None:
        text.save_windows(windows, save_tokens)
    if loaded is None:
        assert origin is not None
        loaded = Loaded(load_weights(origin, dtype, place), tokenizer, origin)
        matrices = find_matrices(loaded.model, recipe.include, recipe.exclude)
    check_finite(matrices)
    return Job(loaded, matrices, windows, checkpoint.fingerprint(loaded, matrices, matrices))


def _calibration_windows(recipe: Recipe, tokenizer: Any, model: torch.nn.Module) -> Windows:
    length = _window_length(recipe.text, recipe.length, min(LENGTH, _context(model.config)))
    _check_context(model.config, length)
    count = recipe.windows or (None if recipe.text.endswith(".safetensors") else WINDOWS)
    return text.load_windows(recipe.text, tokenizer, use="calibration", length=length, count=count, seed=recipe.seed)


def _window_length(source: str | Path, length: int | None, default: int) -> int:
    """A token file knows its own length."""
    if length is None and str(source).endswith(".safetensors"):
        return text.token_file_shape(Path(source))[1]
    return length or default


def _context(config: Any) -> int:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 1 << 30


def _check_context(config: Any, length: int) -> None:
    if length > _context(config):
        raise InputError(f"windows of {length} tokens do not fit the model's context of {_context(config)}; lower --length")


def _stored_dtype(origin: Origin, matrices: Matrices) -> torch.dtype:
    """The type that the checkpoint's own matrices have."""
    keys = checkpoint.entries(origin.shards)
    by_name = {name: dtype for dtype, name in checkpoint.NAMES.items()}
    return by_name.get(keys[checkpoint.key_of(next(iter(matrices)), keys)].dtype, torch.float32) if keys else torch.float32


def _saliency(
    job: Job, recipe: Recipe, targets: Sequence[patterns.Pattern], progress: Progress
) -> tuple[Saliency, dict[str, Any]]:
    """The saliency that masks are cut from, and the record of the controller's descent if it ran."""
    model, tokens, metric = job.loaded.model, job.windows.tokens, recipe.parsed_metric()
    settings = recipe.parsed_tuning()
    if not recipe.corrected:
        return calibration.one_shot(model, job.matrices, tokens, metric, progress), {}
    steps = recipe.steps
    if recipe.budget_tokens is not None:
        within = max(1, recipe.budget_tokens // settings.step_tokens(tokens.shape[1]))
        steps = min(steps or within, within)
    arguments = model, job.matrices, tokens, metric, targets, steps
    if isinstance(settings, paper.Paper):
        duals, record = paper.descend(*arguments, settings, recipe.seed, progress)
    else:
        duals, record = mirror_descent.descend(*arguments, settings, recipe.seed, progress)
    return duals, {"controller": {"targets": [str(target) for target in targets], **record}}


def _on_one_scale(saliency: Saliency, pattern: patterns.Pattern, comparable: bool) -> Saliency:
    """One budget over all matrices needs their scores on one scale."""
    return saliency if pattern.local or comparable else metrics.Comparable(saliency)


def _fitting(targets: Sequence[patterns.Pattern], shapes: Mapping[str, tuple[int, int]]) -> list[patterns.Pattern]:
    """The targets that every matrix can have."""
    return [target for target in targets if not any(target.misfit(*shape) for shape in shapes.values())]


def _check_names(origin: Origin, file: artefacts.MasksFile, matrices: Matrices | None, path: Path) -> None:
    """Masks for a model of another architecture name matrices that this one does not have."""
    keys = checkpoint.entries(origin.shards)
    for name in file:
        if name not in matrices if matrices is not None else not checkpoint.find_key(name, keys):
            raise MismatchError(f"{path} was made for another model: {origin} has no matrix {name}")


def _zeros(model: torch.nn.Module) -> float | None:
    """Fraction of exact zeros among the prunable weights; None for a model that can be evaluated, but not pruned."""
    try:
        matrices = find_matrices(model)
    except InputError:
        return None
    zeros = masking.zeros(matrices)
    return sum(zeros[name] * matrix.size for name, matrix in matrices.items()) / sum(m.size for m in matrices.values())


def _report(recipe: Recipe, job: Job, removed: Mapping[str, float], watch: Stopwatch) -> dict[str, Any]:
    return {
        "model": {"name": str(job.loaded), "fingerprint": job.base},
        "recipe": recipe.record(),
        "pattern": str(recipe.pattern()),
        **_realised(removed, job.shapes),
        "calibration": job.windows.describe(),
        "versions": versions(),
        "seconds": watch.seconds,
    }


def _realised(removed: Mapping[str, float], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Realised sparsity, in all and for each matrix."""
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    total = sum(removed[name] * size for name, size in sizes.items()) / sum(sizes.values())
    return {
        "sparsity": total,
        "matrices": {name: {"shape": shapes[name], "sparsity": removed[name]} for name in removed},
    }


def versions() -> dict[str, str]:
    """The software that a result depends on."""
    names = ("uniprune", "torch", "transformers", "tokenizers")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


class Stopwatch:
    """Wall-clock seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(time.perf_counter() - start, 3)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
