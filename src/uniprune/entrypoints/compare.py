"""The command ``compare``: a table of methods, all made and measured in one way, in one go that can be interrupted."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniprune.artefacts.masks import digest
from uniprune.checkpoints.origin import Origin
from uniprune.common.progress import Progress, silent
from uniprune.common.provenance import Stopwatch, sparsity
from uniprune.comparison import harness
from uniprune.comparison.calibrations import CalibrationCache
from uniprune.comparison.candidates import asked, fitted, naming
from uniprune.comparison.methods import Candidate
from uniprune.comparison.request import ComparisonRequest
from uniprune.comparison.results import COMPARISON, DENSE, UNIFORM, Comparison, ComparisonProtocol, ComparisonRow
from uniprune.data.sources import files_of
from uniprune.data.windows import Windows
from uniprune.errors import InputError, UniPruneError
from uniprune.evaluation import reproduce
from uniprune.evaluation.model import AskedQuestions, EvaluatedModel, Questions
from uniprune.evaluation.protocols import followed_protocols
from uniprune.evaluation.request import NEW_TOKENS
from uniprune.job.destination import ToTable
from uniprune.job.inference import inferring
from uniprune.job.options import EXECUTIONS, RunOptions
from uniprune.job.prepare import Job, prepare
from uniprune.models.loading import Loaded, Source, model_of, resolved
from uniprune.models.matrices import choose_matrices
from uniprune.reporting.comparison import latex, markdown
from uniprune.sparsity import bits
from uniprune.sparsity.patterns.spelling import canonical
from uniprune.storage import files, runs
from uniprune.tasks.loading import load_task

READS = r"--(?=(text|windows|num-samples|length|stride|bos|field|split)\b)"  # options that are --eval-... here

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from uniprune.comparison.request import ComparisonKeywords

HARNESS = "lm_eval"  # the folder of the results files
UNCOMPARED = {"versions", "machine"}  # of the protocol: a table may go on with others

logger = logging.getLogger(__name__)


@inferring
def compare(
    source: Source,
    output: str | Path,
    *,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    **request: Unpack[ComparisonKeywords],
) -> Comparison:
    """A row for the dense model and for each method at each sparsity: perplexity, accuracies, seconds of calibration.

    request: ``methods``, ``sparsities``, what they are calibrated on and measured on, see
    :class:`uniprune.comparison.request.ComparisonRequest`. All rows have the same samples of the same texts; no pruned model is
    written. The folder ``output`` is rewritten after each row: ``comparison.json`` (what is returned), the table as Markdown
    and LaTeX, ``recipe.yaml``, which asks for the same, and a results file of lm-evaluation-harness for each row. resume: keep
    the rows that are there, if they were made in the same way, and add those that are missing.
    The model must fit into memory as a whole, and once more its prunable weights, which each row changes and gives back.
    Raises InputError or MismatchError before the first row if anything asked for cannot be done, and UniPruneError after the
    last one if there are rows that could not be made.
    """
    output = files.path_of(output)
    wanted = ComparisonRequest.of(**request)
    candidates = asked(wanted)
    inputs = [*files_of(wanted.text), *files_of(wanted.eval_text)]
    fresh = not (resume and (output / COMPARISON).is_file())
    there: dict[str, Any] = {"mark": COMPARISON, "replaced": fresh, "instead": files.ROWS}
    files.check_output_folder(output, overwrite or resume, inputs=inputs, **there)
    earlier = _earlier(output, resume)
    _check_same(output, earlier, {"settings": wanted.protocol})
    subject = EvaluatedModel(source)
    given = resolved(source)
    files.check_output_folder(output, overwrite or resume, given.origin.path if given.origin else None, **there)
    questions = _questions(wanted, subject)
    _warn_of_idle(wanted, candidates)
    candidates = _fitted(candidates, wanted, given)
    job = _job(source, candidates, output, device, progress)
    protocol = _protocol(wanted, job, questions.questions)
    _check_same(output, earlier, protocol.model_dump(mode="json"))
    comparison = _merged(wanted, Comparison(model=str(job.loaded), protocol=protocol, rows=[]), earlier)
    identity = {"command": "compare", **protocol.model_dump(mode="json", exclude=UNCOMPARED)}
    with runs.open_run(output, identity, resume=resume, overwrite=overwrite) as run:
        table = _Table(output, run, comparison, _named(source, wanted))
        cache = CalibrationCache(job, run, progress)
        missing = table.missing(candidates)
        if missing and comparison.rows:  # so that a calibration that is interrupted goes on, in the first row of this run, too
            table.commit()
        failed = list[str]()
        for candidate in progress(missing, "comparing", len(missing)):
            if candidate is None:
                table.add(_row(subject, questions, cache, {"method": DENSE, "sparsity": 0.0}, {}))
                continue
            try:
                table.add(_pruned(candidate, subject, questions, cache))
            except UniPruneError as error:  # one method's trouble with this model is not the others'
                logger.warning("no row: %s", error)
                failed.append(str(error))
            candidate.method.forget(cache, candidate)
        table.write()
    if failed:
        raise UniPruneError(f"{len(failed)} of {len(missing)} rows could not be made; the others are in {output}: {failed[0]}")
    return table.comparison


# ------------------------------------------------------------------------------------------------------------- parts


def _questions(request: ComparisonRequest, subject: EvaluatedModel) -> AskedQuestions:
    """What every row is measured on, now that it is known to be possible."""
    reading = request.reading
    reading.check(compared=False)
    if request.new_tokens is not None and not request.prompts:
        raise InputError("--new-tokens is the length of what goes on with a prompt; give --prompt, or leave it out")
    try:
        windows = subject.windows(request.eval_text, reading)
    except InputError as error:  # which names the options as evaluate has them
        raise InputError(re.sub(READS, "--eval-", str(error))) from None
    tasks = [load_task(name, request.limit, fewshot) for name, fewshot in reading.asked.items()]
    length = NEW_TOKENS if request.new_tokens is None else request.new_tokens
    return subject.ask(Questions(windows, tasks, request.prompts if length else (), length))


def _warn_of_idle(request: ComparisonRequest, candidates: Sequence[Candidate]) -> None:
    """Warns of settings that no method uses."""
    given, methods = request.model_fields_set, [candidate.method for candidate in candidates]
    if "metric" in given and not any(method.starts_from_metric for method in methods):
        logger.warning("--metric changes nothing: controllers, sequential and refine start from it, and none is compared")
    if given & {"sparsities", "scope"} and all(method.has_masks for method in methods):
        logger.warning("--sparsity and --scope change nothing: masks files have their own, and nothing else is compared")


def _fitted(candidates: list[Candidate], request: ComparisonRequest, source: Loaded | Origin) -> list[Candidate]:
    """The candidates, now that it is known which matrices they are for."""
    return fitted(candidates, choose_matrices(model_of(source), request.include, request.exclude), source)


def _protocol(request: ComparisonRequest, job: Job, questions: Questions) -> ComparisonProtocol:
    assert isinstance(questions.windows, Windows)
    return ComparisonProtocol(
        settings=request.protocol,
        calibration=job.windows.describe(),
        tasks={task.name: task.sha256 for task in questions.tasks},
        prompts=list(questions.prompts),
        **reproduce.conditions(job.loaded.model, questions.windows),
    )


def _job(source: Source, candidates: Sequence[Candidate], output: Path, device: str | None, progress: Progress) -> Job:
    """The model and the calibration samples, for the candidate that takes most memory."""
    hungriest = max(candidates, key=lambda candidate: (candidate.recipe.cost.state_bytes, candidate.recipe.refine))
    job = prepare(source, hungriest.recipe, ToTable(output), RunOptions(device=device), progress)
    if not EXECUTIONS[job.execution].in_memory:
        raise InputError(f"compare needs the whole model in memory, and {job.loaded} does not fit; take a smaller model")
    for candidate in candidates:
        if job.windows.pictures is not None:
            candidate.method.check_images(candidate.recipe)
        candidate.method.check_weights(job)
    return job


def _earlier(output: Path, resume: bool) -> Comparison | None:
    """The table that a run goes on with, if it does. Raises InputError for a damaged one."""
    path = output / COMPARISON
    return Comparison.read(path) if resume and path.is_file() else None


def _check_same(output: Path, earlier: Comparison | None, protocol: Mapping[str, Any]) -> None:
    """Raises InputError, with what differs, unless the rows of an earlier run were made in the same way, as far as is known."""
    if earlier is None:
        return
    there = earlier.protocol.model_dump(mode="json", include=set(protocol))
    if said := reproduce.in_words(reproduce.differences({"protocol": there}, {"protocol": protocol})):
        raise InputError(
            f"output {output} is a table that was made with other settings: {said}; give another name, or --overwrite without "
            "--resume"
        )


def _merged(request: ComparisonRequest, empty: Comparison, earlier: Comparison | None) -> Comparison:
    """The table before the first row of this run: empty, or with the rows of an earlier one."""
    begun = earlier or empty
    rows = earlier.rows if earlier else []
    return Comparison(
        model=empty.model,
        methods=list(dict.fromkeys([*begun.methods, *request.methods])),
        sparsities=list(dict.fromkeys([*begun.sparsities, *map(canonical, request.sparsities)])),
        protocol=empty.protocol,
        comparable=followed_protocols(empty.model, empty.reading),
        rows=rows,
    )


def _named(source: Source, request: ComparisonRequest) -> ComparisonRequest:
    """The request with the model as a recipe file can name it; one that is in memory only it cannot."""
    model = source.origin if isinstance(source, Loaded) else source
    return request.model_copy(update={"model": None if model is None else str(model)})


def _pruned(candidate: Candidate, subject: EvaluatedModel, questions: AskedQuestions, cache: CalibrationCache) -> ComparisonRow:
    method = candidate.method
    shapes = cache.job.shapes
    form = candidate.structure
    with naming(method.name, candidate.sparsity), method.pruned(cache, candidate) as created:
        removed = dict.fromkeys(shapes, 0.0) | {name: bits.sparsity_of(mask) for name, mask in created.masks.items()}
        facts = {
            "method": method.name,
            "pattern": candidate.sparsity,
            "structure": form,
            "scope": form.scope if form else None,
            "sparsity": sparsity(removed, shapes),
            "matrices": removed if max(removed.values()) - min(removed.values()) > UNIFORM else {},
            "updates_weights": method.updates_weights,
            "resumed": method.calibration(candidate) in cache.resumed,
            "masks_digest": digest(created.masks),
            **method.recorded(candidate.recipe),
            **created.record.facts,
        }
        return _row(subject, questions, cache, facts, created.seconds)


def _row(
    subject: EvaluatedModel,
    questions: AskedQuestions,
    cache: CalibrationCache,
    facts: dict[str, Any],
    seconds: Mapping[str, float],
) -> ComparisonRow:
    """A row of the model as it is now."""
    watch = Stopwatch()
    with watch("evaluate"):
        measured = subject.measure(cache.job.loaded, questions, cache.progress, record=False)
    assert measured.perplexity is not None
    names = ("perplexity", "nats_stderr", "word_perplexity", "byte_perplexity", "by_position")
    return ComparisonRow(
        **facts,
        **{name: getattr(measured.perplexity, name) for name in names},
        tasks={answers.task.name: answers.result() for answers in measured.answers},
        right={
            answers.task.name: {metric: _bits(right) for metric, right in answers.right.items()} for answers in measured.answers
        },
        written=[cache.job.loaded.tokenizer.decode(tokens) for tokens in measured.written],
        seconds={**seconds, **watch.seconds},
        measured=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _bits(right: Sequence[bool]) -> str:
    """As ``ComparisonRow.right`` has them."""
    return f"{int(''.join('01'[answer] for answer in right), 2):x}"


class _Table:
    """The output folder, rewritten after each row; ``comparison``: what stands in it."""

    def __init__(self, output: Path, run: runs.Run, comparison: Comparison, request: ComparisonRequest) -> None:
        self._output = output
        self._run = run
        self._request = request
        self.comparison = comparison
        self._new = not comparison.rows

    def missing(self, candidates: Sequence[Candidate]) -> list[Candidate | None]:
        """The candidates that have no row yet; None is the dense model's.

        Raises InputError if a file of scores or masks is not the one that a row was made of.
        """
        rows = {row.key: row for row in self.comparison.rows}
        for candidate in candidates:
            if (row := rows.get(candidate.key)) and row.file_sha256 != candidate.method.recorded(candidate.recipe).get(
                "file_sha256"
            ):
                raise InputError(
                    f"{candidate.method.name} is not the file that its row was made of; give another output, or --overwrite "
                    "without --resume"
                )
        dense: list[Candidate | None] = [] if (DENSE, None) in rows else [None]
        return [*dense, *(candidate for candidate in candidates if candidate.key not in rows)]

    def add(self, row: ComparisonRow) -> None:
        """A row is in the table when ``comparison.json`` is replaced; the other files follow it."""
        self.comparison = self.comparison.model_copy(update={"rows": [*self.comparison.rows, row]})
        self.write()
        self.commit()

    def commit(self) -> None:
        """From here on an interrupted run goes on instead of starting over."""
        self._run.commit("rows", {"rows": len(self.comparison.rows)})

    def write(self) -> None:
        """All files; the first time, the folder appears as a whole."""
        if not self._new:
            self._fill(self._output)
            return
        with files.new_folder(self._output, self._run.folder, COMPARISON) as folder:
            self._fill(folder)
        self._new = False

    def _fill(self, folder: Path) -> None:
        contents = dict(self._contents())
        for path in folder.glob(f"{HARNESS}/*/results_*.json"):  # of rows that have another label now
            if str(path.relative_to(folder)) not in contents and harness.is_ours(path):
                path.unlink()
                with suppress(OSError):  # there is something else in it
                    path.parent.rmdir()
        for name, content in contents.items():
            path = folder / name
            if path.parent == folder or not path.exists():  # a row's own file stays as it is
                with files.replacing(path, self._run.folder / "partial") as temporary:
                    temporary.write_text(content, encoding="utf-8", errors="replace")  # half a surrogate pair is no text

    def _contents(self) -> Iterator[tuple[str, str]]:
        comparison = self.comparison
        yield COMPARISON, _json(comparison.record())
        yield "comparison.md", markdown(comparison)
        yield "comparison.tex", latex(comparison)
        yield "recipe.yaml", _recipe(self._request, comparison)
        for name, content in harness.files(comparison):
            yield f"{HARNESS}/{name}", _json(content)


def _recipe(request: ComparisonRequest, comparison: Comparison) -> str:
    """The recipe file that asks for all methods of the table at all of its sparsities, the table if it was made at once."""
    made = [f"{name} {version}" for name, version in comparison.protocol.versions.items()]
    head = ["uniprune compare --config recipe.yaml -o again", ", ".join(made), f"weights {comparison.protocol.weights_sha256}"]
    everything = request.model_copy(update={"methods": tuple(comparison.methods), "sparsities": tuple(comparison.sparsities)})
    return "".join(f"# {line}\n" for line in head) + everything.spelled


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"
