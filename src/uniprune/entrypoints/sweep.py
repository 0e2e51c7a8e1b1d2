"""The command ``sweep``: what every sparsity and pattern of one calibration costs in perplexity, and saves in bytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniprune.artefacts import archive_size
from uniprune.artefacts.scores import ScoresFile
from uniprune.common.pictures import showing
from uniprune.common.progress import Progress, silent
from uniprune.common.provenance import sha256, sparsity
from uniprune.data.sources import files_of
from uniprune.data.windows import Windows
from uniprune.errors import InputError
from uniprune.evaluation import reproduce
from uniprune.evaluation.divergence import Recording, closeness
from uniprune.evaluation.model import EvaluatedModel
from uniprune.evaluation.perplexity import Perplexity, perplexity
from uniprune.evaluation.request import SweepRequest
from uniprune.evaluation.results import Costs, Row, ScoresName, Sweep, SweepProtocol, TextCosts, marked
from uniprune.job.inference import inferring
from uniprune.models import masking
from uniprune.models.loading import Loaded, Source
from uniprune.models.matrices import Matrices, find_matrices
from uniprune.sparsity import bits
from uniprune.sparsity.choices import Scope
from uniprune.sparsity.patterns import spelling
from uniprune.sparsity.patterns.checks import check_fit
from uniprune.sparsity.patterns.protocol import Pattern, Saliency
from uniprune.sparsity.patterns.tiled import Tiled
from uniprune.sparsity.structure import structure
from uniprune.sparsity.views import comparable_for
from uniprune.storage.files import ROWS, check_output_file, path_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from uniprune.evaluation.request import SweepKeywords

DENSE = spelling.parse("0")


@inferring
def sweep(
    source: Source,
    scores: str | Path,
    output: str | Path,
    sparsities: Sequence[str | float | Pattern] | str,
    *,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    **asked: Unpack[SweepKeywords],
) -> Sweep:
    """Perplexity and packed size of a model at many sparsities, all from one scores file; written to ``output``, as JSON.

    sparsities: fractions and N:M, in a list or by comma. asked: ``scope`` of fractions, as in a recipe; what is
    read of a text and ``dtype``, as in ``evaluate``. The file is rewritten after each row; resume: keep the rows that
    it has, if they were measured in the same way, and add those that are missing. A row's ``bytes`` are what ``pack`` would
    make, estimated from samples; None without the zstandard package, and of a quantised model. ``pareto``: no other row is both
    smaller and better. ``by_text``: of several texts, perplexity on each, and the divergence from the dense model there.
    Raises InputError or MismatchError before the first row if anything asked for cannot be done.
    """
    scores, output = path_of(scores), path_of(output)
    request, saliency = SweepRequest.of(**asked), ScoresFile(scores)
    chosen = _parsed(sparsities, request.scope, saliency)
    check_output_file(output, overwrite or resume, scores, *files_of(request.text_source), suffix=".json", instead=ROWS)
    if not isinstance(source, Loaded):
        Sweep.check_keeps_inputs(output, [path_of(str(source))])
    subject = EvaluatedModel(source)
    windows = subject.windows("builtin" if request.text_source is None else request.text_source, request)
    loaded = subject.load(request.dtype, device)
    every = find_matrices(loaded.model)
    shapes = {name: matrix.shape for name, matrix in every.items()}
    matrices = {name: matrix for name, matrix in every.items() if name in saliency}
    saliency.facts.check_matrices(saliency.shapes, every, scores, loaded)
    saliency.facts.check_digests(loaded.checkpoint.digests(matrices), scores, loaded)
    saliency.warn_unless_for(chosen.values())
    protocol = SweepProtocol(scope=request.scope, **reproduce.conditions(loaded.model, windows))
    name = ScoresName(name=scores.name, sha256=sha256(scores))
    result = Sweep(model=str(loaded), scores=name, protocol=protocol, dense=None, rows=[])
    if resume and output.exists():
        result = _earlier(output, result)
    done = {row.pattern for row in result.rows}
    missing = [*([("0", DENSE)] if result.dense is None else []), *(pair for pair in chosen.items() if pair[0] not in done)]
    bytes_of, reading = _Estimate(loaded, matrices), _Reading(loaded, windows)
    for spec, pattern in progress(missing, "sweeping", len(missing)):
        scaled = comparable_for(saliency, pattern)
        masks = dict(pattern(scaled))
        with masking.applied(matrices, masks):
            costs = Costs(**reading(), bytes=bytes_of(pattern, scaled))
        if pattern is DENSE:
            result = result.model_copy(update={"dense": costs})
        else:
            removed = dict.fromkeys(shapes, 0.0) | {name: bits.sparsity_of(mask) for name, mask in masks.items()}
            row = _row(spec, pattern, sparsity(removed, shapes), costs)
            result = result.model_copy(update={"rows": marked([*result.rows, row])})
        result.write(output)
    return result


def _parsed(sparsities: Sequence[str | float | Pattern] | str, scope: Scope | None, saliency: ScoresFile) -> dict[str, Pattern]:
    """The patterns by their spelling; scope: of the sparsities among them. Raises InputError if a matrix cannot have one."""
    default = scope or spelling.default_scope(saliency.comparable)
    several = sparsities.split(",") if isinstance(sparsities, str) else sparsities
    if not isinstance(several, Iterable):
        several = [] if several is None else [several]
    asked = {}
    for one in several:
        if not isinstance(one, (str, Real)):
            asked[str(one)] = spelling.parse(one, default=default)
        elif spec := str(one).strip():
            asked[spelling.canonical(spec)] = spelling.parse(spec, default=default)
    if not asked:
        raise InputError("no sparsity was asked for; give fractions and N:M by comma, such as 0.5,2:4")
    for pattern in asked.values():
        check_fit(saliency.shapes.items(), pattern)
    return asked


def _row(spec: str, pattern: Pattern, removed: float, costs: Costs) -> Row:
    facts = structure(pattern)
    return Row(pattern=spec, structure=facts, scope=facts.scope, sparsity=removed, **costs.model_dump(exclude_unset=True))


class _Reading:
    """What a model, as it is now, makes of the windows; of several texts also what it makes of each, beside the dense model."""

    def __init__(self, loaded: Loaded, windows: Windows) -> None:
        self._model, self._windows = loaded.model, windows
        self._dense: Recording | None = None
        if windows.by_source:
            self._dense, _ = self._read()

    def __call__(self) -> dict[str, Any]:
        """The perplexity, and by text, of :class:`Costs`."""
        if self._dense is None:
            with showing(self._model, self._windows.pictures):
                return {"perplexity": perplexity(self._model, self._windows).perplexity}
        here, found = self._read()
        near = closeness(here, self._dense, self._windows).by_text or {}
        each = (found.by_text or {}).items()
        by_text = {name: TextCosts(perplexity=one.perplexity, kl=near[name].kl) for name, one in each}
        return {"perplexity": found.perplexity, "by_text": by_text}

    def _read(self) -> tuple[Recording, Perplexity]:
        with showing(self._model, self._windows.pictures), Recording(self._model, self._windows) as here:
            return here, perplexity(self._model, self._windows)


class _Estimate:
    """Bytes of the archive that a pattern leaves; None where archives cannot be made."""

    def __init__(self, loaded: Loaded, matrices: Matrices) -> None:
        self._loaded, self._matrices = loaded, matrices
        self._possible = importlib.util.find_spec("zstandard") is not None and archive_size.estimable(loaded)
        self._made: dict[str, archive_size.Estimate] = {}

    def __call__(self, pattern: Pattern, saliency: Saliency) -> int | None:
        if not self._possible:
            return None
        # What is sampled depends on the pattern's tiles alone, and most have none.
        kind = str(pattern) if isinstance(pattern, Tiled) else ""
        if kind not in self._made:
            self._made[kind] = archive_size.Estimate(self._loaded, self._matrices, pattern)
        estimate = self._made[kind]
        return estimate(pattern, estimate.rows(saliency))


def _earlier(output: Path, result: Sweep) -> Sweep:
    """A sweep with the rows that its file has from an earlier run in the same way. Raises InputError if it was in another."""
    try:
        there = Sweep.read(output)
    except InputError as error:
        raise InputError(
            f"output {output} cannot be resumed as a sweep ({error}); give another name, or --overwrite without --resume"
        ) from None
    before, now = (one.model_dump(include={"scores", "protocol"}) for one in (there, result))
    if said := reproduce.in_words(reproduce.differences(before, now)):
        raise InputError(
            f"output {output} is a sweep that was made with other settings: {said}; give another name, or --overwrite without "
            "--resume"
        )
    return result.model_copy(update={"dense": there.dense, "rows": there.rows})
