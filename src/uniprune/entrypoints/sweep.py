"""The verb ``sweep``: what every level and pattern of one calibration costs in perplexity, and saves in bytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from uniprune.artefacts import archive_size, writer
from uniprune.artefacts.scores import ScoresFile
from uniprune.common.progress import Progress, silent
from uniprune.common.provenance import sha256, sparsity, versions
from uniprune.errors import InputError, MismatchError
from uniprune.evaluation import reproduce
from uniprune.evaluation.model import Subject
from uniprune.evaluation.perplexity import perplexity
from uniprune.models import masking
from uniprune.models.loading import Loaded, Source, dtype_name
from uniprune.models.matrices import Matrices, find_matrices
from uniprune.sparsity import bits, spelling
from uniprune.sparsity.choices import Scope
from uniprune.sparsity.patterns import Pattern, Saliency, Tiled, check_fit
from uniprune.sparsity.views import on_one_scale
from uniprune.storage import strict_json
from uniprune.storage.files import check_output_file, write_json

Row = dict[str, Any]
DENSE = spelling.parse("0")


def sweep(
    source: Source,
    scores: Path,
    output: Path,
    sparsities: Sequence[str],
    *,
    scope: Scope | None = None,
    text_source: str | Path = "builtin",
    windows: int | None = None,
    length: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Perplexity and packed size of a model at many sparsities, masks cut from one scores file; written to ``output``, as JSON.

    sparsities: levels and N:M. scope: as in a recipe. text_source, windows, length: as in ``evaluate``. The file is written
    anew after each row; resume: keep the rows that it has, if they were had in the same way, and add those that are missing.
    A row's ``bytes`` are what ``pack`` would make, estimated from samples; None without the zstandard package. ``pareto``: no
    other row is both smaller and better.
    Raises InputError or MismatchError before the first row if anything asked for cannot be done.
    """
    saliency = ScoresFile(scores)
    asked = _parsed(sparsities, scope, saliency)
    check_output_file(output, overwrite or resume, suffix=".json")
    subject = Subject(source)
    chosen = subject.windows(text_source, windows, length)
    loaded = subject.load(dtype, device)
    matrices = {name: matrix for name, matrix in find_matrices(loaded.model).items() if name in saliency}
    _check_model(loaded, matrices, saliency, scores)
    result: dict[str, Any] = {
        "sweep": 1,
        "model": str(loaded),
        "scores": {"name": scores.name, "sha256": sha256(scores)},
        "protocol": {
            "text": chosen.describe(),
            "windows": len(chosen.tokens),
            "length": chosen.tokens.shape[1],
            "dtype": dtype_name(next(loaded.model.parameters()).dtype),
            "scope": scope,
            "weights_sha256": reproduce.weights_sha256(loaded.model),
            "machine": reproduce.machine(loaded.model),
            "versions": versions(),
        },
        "dense": None,
        "rows": [],
    }
    if resume and output.exists():
        result |= _earlier(output, result)
    done = {row["pattern"] for row in result["rows"]}
    missing = [*(["0"] if result["dense"] is None else []), *(spec for spec in asked if spec not in done)]
    bytes_of = _Estimate(loaded, matrices)
    for spec in progress(missing, "sweeping", len(missing)):
        pattern = asked.get(spec, DENSE)
        scaled = on_one_scale(saliency, pattern)
        cut = dict(pattern(scaled))
        with masking.applied(matrices, cut):
            costs = {"perplexity": perplexity(loaded.model, chosen).perplexity, "bytes": bytes_of(pattern, scaled)}
        if pattern is DENSE:
            result["dense"] = costs
        else:
            removed = {name: bits.removed(mask) for name, mask in cut.items()}
            facts = {"pattern": spec, "scope": getattr(pattern, "scope", None)}
            result["rows"].append(facts | {"sparsity": sparsity(removed, saliency.shapes)} | costs)
        _mark(result["rows"])
        write_json(output, result)
    return result


def _parsed(sparsities: Sequence[str], scope: Scope | None, saliency: ScoresFile) -> dict[str, Pattern]:
    """The patterns by their spelling; scope: of the levels among them. Raises InputError if a matrix cannot have one."""
    default: Scope = "model" if saliency.comparable else "row"
    asked = {spec: spelling.parse(spec, None if ":" in spec else scope, default) for spec in sparsities}
    if not asked:
        raise InputError("no sparsity was asked for; give levels and N:M by comma, such as 0.5,2:4")
    for pattern in asked.values():
        check_fit(saliency.shapes.items(), pattern)
    return asked


class _Estimate:
    """Bytes of the archive that a pattern leaves; None where archives cannot be made."""

    def __init__(self, loaded: Loaded, matrices: Matrices) -> None:
        self._loaded, self._matrices = loaded, matrices
        self._possible = importlib.util.find_spec("zstandard") is not None
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


def _check_model(loaded: Loaded, matrices: Matrices, saliency: ScoresFile, scores: Path) -> None:
    """Raises MismatchError unless the scores are of this model's weights."""
    if missing := [name for name in saliency if name not in matrices]:
        raise MismatchError(f"{scores} was made for another model: {loaded} has no matrix {missing[0]}")
    if writer.fingerprint(writer.digests(loaded, matrices, matrices)) != saliency.facts["base"]:
        made = f"{saliency.facts['base_name']}, {saliency.facts['base'][:12]}"
        raise MismatchError(f"{scores} was made for another model ({made}) than {loaded}; give that one")


def _earlier(output: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The rows that a file has from an earlier run in the same way. Raises InputError if it was in another."""
    try:
        there = strict_json.parse(output.read_bytes())
        rows = {"dense": there["dense"], "rows": [row for row in there["rows"] if {"pattern", "perplexity"} <= row.keys()]}
        how = {key: there[key] for key in ("scores", "protocol")}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"output {output} is no sweep that could be gone on with; give another name, or --overwrite") from None
    differing = [change.what for change in reproduce.differences(how, {key: result[key] for key in how})]
    if differing:
        raise InputError(
            f"output {output} is a sweep made otherwise ({', '.join(differing[:3])}); give another name, or --overwrite"
        )
    return rows


def _mark(rows: Sequence[Row]) -> None:
    for row in rows:
        row["pareto"] = not any(_dominates(other, row) for other in rows)


def _dominates(one: Row, other: Row) -> bool:
    """Whether a row is at least as good as another in both respects, and better in one."""
    mine, theirs = (tuple(_costs(row)) for row in (one, other))
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def _costs(row: Row) -> Iterator[float]:
    yield row["perplexity"]
    yield -row["sparsity"] if row["bytes"] is None else row["bytes"]
