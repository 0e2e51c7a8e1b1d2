"""Model cards: the README.md of a pruned checkpoint, with the metadata that model hubs read; and the upload to one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from uniprune.artefacts import mask_tools
from uniprune.artefacts.reports import ExpertRemoval, Permutation, Pruning, read_report
from uniprune.artefacts.writer import MASKS
from uniprune.checkpoints.origin import CARD, Origin
from uniprune.checkpoints.weight_files import PATTERNS
from uniprune.common.fields import replays
from uniprune.common.formatting import NOTE, percent, short
from uniprune.data.sources import SELF
from uniprune.data.text import TextFacts
from uniprune.errors import InputError, UniPruneError, first_line
from uniprune.evaluation import reproduce
from uniprune.evaluation.results import Evaluation, samples
from uniprune.reporting.summary import agree, same_model
from uniprune.storage import strict_json
from uniprune.storage.files import REPORT, path_of, replacing

MARK = "<!-- Written by uniprune: `uniprune card` replaces this file. -->"
METRICS = {"acc": "accuracy", "acc_norm": "accuracy, per character", "perplexity": "perplexity of the answers"}

Report = Pruning | Permutation | ExpertRemoval


def card(
    report: Report, results: Sequence[Evaluation] = (), inherited: Mapping[str, Any] | None = None, images: bool = False
) -> str:
    """The card of a checkpoint: markdown after a YAML head.

    report: what pruning.json says. results: what ``evaluate`` said of this checkpoint. inherited: what stands in
    the head of the base model's card as well, as :func:`_inherited` gives it. images: whether it is of images and text.
    """
    repository, pattern = report.model.repository, getattr(report, "structure", None)
    data = ModelCardData(
        base_model=repository,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if images else "text-generation",
        tags=["pruned", "sparse", "uniprune", *(["n-m-sparsity"] if pattern and pattern.nm else [])],
        model_name=f"{report.model.title}, {_title(report)}",
        eval_results=list(_eval_results(results)) or None,
        **(inherited or {}),
    )
    page = f"https://huggingface.co/{repository}" + (f"/tree/{report.model.commit}" if report.model.commit else "")
    name = f"[{repository}]({page})" if repository else report.model.title
    body = "\n\n".join(_body(report, results, name, images))
    return f"---\n{data.to_yaml()}\n---\n\n{MARK}\n\n{body}\n"


def complete(folder: Path, report: Report, source: Origin | None = None) -> None:
    """Completes the folder of a new checkpoint: writes its card, and its report.

    source: the base model, for its licence.
    """
    inherited = _inherited(source.card if source else None)
    (folder / CARD).write_text(card(report, (), inherited, sees_images(folder)), encoding="utf-8")
    report.write(folder / REPORT)


def rewrite(folder: Path, results: Sequence[Path], *, overwrite: bool = False) -> str:
    """Rewrites the card of an existing output folder with results of ``evaluate``; returns it.

    overwrite: also if somebody has edited the card so that its mark is gone.
    Raises InputError if the folder is no output folder, or a result is none of this very checkpoint's; MismatchError if its
    weights are no longer those that were pruned, as after training without ``KeepZeros``.
    """
    if not (folder / REPORT).is_file():
        raise InputError(f"folder {folder} has no {REPORT} of uniprune; give an output folder of prune or apply")
    report = read_report(folder / REPORT)
    path = folder / CARD
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace") and not overwrite:
        raise InputError(f"{path} was written by somebody else; give --overwrite to replace it")
    read = [reproduce.read(result)[0] for result in results]
    for result, file in zip(read, results, strict=True):
        if "\0" in result.model or result.masks or path_of(result.model).resolve() != folder.resolve():
            raise InputError(f"result {file} is of {result.name}, not of {folder}")
        if isinstance(report, Pruning) and not agree(result, report):
            raise InputError(f"result {file} was measured before {folder} was pruned by other masks; evaluate the folder again")
    if (folder / MASKS).is_file():  # last: it reads all weights
        mask_tools.verify(folder / MASKS, pruned=folder)
    try:
        text = card(report, read, _inherited(path) or _inherited(path_of(report.model.name) / CARD), sees_images(folder))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / REPORT}, or a result, cannot be shown ({first_line(error)}); make it again") from None
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")
    return text


def check_push(repository: str) -> None:
    """Raises InputError if an upload to a hub repository cannot succeed, before any work is done."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {repository!r}: {first_line(error)}") from None
    if repository.count("/") != 1:
        raise InputError(f"--push-to-hub {repository!r} is no repository; give owner/name")
    if constants.HF_HUB_OFFLINE:
        raise InputError("--push-to-hub cannot work while HF_HUB_OFFLINE is set; unset it")
    if not get_token():
        raise InputError("--push-to-hub needs a login; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repository: str, *, overwrite: bool = False) -> str:
    """Uploads an output folder to a hub repository, which is made if it is not there; returns its address.

    overwrite: also into a repository that has files already; other weights that it has are deleted, since one of those may be
    what is loaded.
    Raises UniPruneError if the hub refuses; the folder stays, and :func:`push` may be called again.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, exist_ok=True)
        there = set(api.list_repo_files(repository)) - {".gitattributes"}
        if there and not overwrite:
            raise InputError(f"--push-to-hub {repository} has {len(there)} files; give another name, or --overwrite")
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Pruned by uniprune",
            ignore_patterns=[".*"],
            delete_patterns=[*PATTERNS, "*.index.json"],
        )
    except (OSError, ValueError) as error:  # the hub client's errors are among them
        raise UniPruneError(f"{folder} is complete, but was not uploaded to {repository}: {first_line(error)}") from error
    return str(url)


# ---------------------------------------------------------------------------------------------------------------- parts


def _body(report: Report, results: Sequence[Evaluation], source: str, images: bool) -> Iterator[str]:
    yield f"# {report.model.title}, {_title(report)}"
    if isinstance(report, Permutation):
        yield (
            f"The same dense model as {source}: the inputs of {len(report.permuted)} matrices stand in an order that suits "
            f"{report.pattern}, and what they come from in the same. No weight was changed."
        )
    elif isinstance(report, ExpertRemoval):
        yield from _of_experts(report, source)
    else:
        yield (
            f"{source}, pruned after training by uniprune: **{report.sparsity:.1%} of the weights in "
            f"{len(report.matrices)} matrices were set to zero** ({report.pattern}). No weight was updated: what is kept has "
            "the bits of the original."
        )
        if report.differs:
            yield (
                f"The masks were made for another model, such as the one that this was trained from: {len(report.differs)} of "
                "the matrices have other weights than they had there."
            )
        if report.model.quantised:
            yield (
                f"The weights are quantised ({report.model.quantised}) and were pruned as they are stored: what is removed has "
                "the code of 0, all other codes and all scales are the original's, and so is `quantization_config`."
            )
        if images:
            seen = "images and text" if report.calibration and report.calibration.images else "text alone"
            yield (
                f"Only the text decoder was pruned, and calibrated on {seen}; what sees images (or hears sound), and what "
                "brings that into the decoder, has the bytes of the original."
            )
        yield f"> **{NOTE}** `uniprune pack` makes it smaller to store, `uniprune bench` measures speed."
    kind, processor = ("AutoModelForImageTextToText", "AutoProcessor") if images else ("AutoModelForCausalLM", "AutoTokenizer")
    yield (
        f"```python\nfrom transformers import {kind}, {processor}\n\n"
        f'model = {kind}.from_pretrained("path/of/this/folder", dtype="auto")\n'
        f'{processor.removeprefix("Auto").lower()} = {processor}.from_pretrained("path/of/this/folder")\n```'
    )
    if rows := list(_rows(results, report.model.name)):
        yield "## Results"
        head = "| measured | on | this model | compared with |\n| --- | --- | ---: | ---: |"
        yield "\n".join([head, *("| " + " | ".join(row) + " |" for row in rows)])
    if report.recipe:
        yield "## How it was made"
        recipe = {key: value for key, value in report.recipe.items() if value not in (None, [], {}, ())}
        how = "With this recipe (`uniprune prune MODEL --config recipe.yaml -o OUT`)"
        if not all(map(replays, recipe.values())):
            how = "With these settings, of which those with a class are of code that is not uniprune's"
        yield f"{how}:\n\n```yaml\n{_yaml(recipe)}```"
    about = [f"{name} {version}" for name, version in report.versions.items()]
    if text := report.calibration:
        what = f"{text.windows} samples of {text.length} tokens of {_texts(text)}"
        about.insert(0, f"Calibrated on {what} (sha256 {(text.sha256 or 'unknown')[:12]})")
    fingerprint, commit = (report.model.fingerprint or "unknown")[:12], report.model.commit
    revision = f" of {report.model.name} at commit {commit}" if commit else ""
    yield f"{'; '.join(about)}. Model fingerprint {fingerprint}{revision}; all facts are in `{REPORT}`."


def _texts(calibration: TextFacts) -> str:
    """What a model was calibrated on: a text without its folders, or several with their shares."""
    if not calibration.sources:
        return Path(calibration.text).name
    total = sum(one.windows or 0 for one in calibration.sources.values()) or 1
    shares = ((name, one.text, (one.windows or 0) / total) for name, one in calibration.sources.items())
    own = {SELF: f"{SELF}, what the dense model writes"}
    return ", ".join(f"{own.get(text, name)} ({share:.0%})" for name, text, share in shares)


def _of_experts(report: ExpertRemoval, source: str) -> Iterator[str]:
    kept = report.experts
    yield (
        f"{source} without some of its experts, removed by uniprune: **each of {kept.layers} layers has {kept.kept} of "
        f"{kept.of} experts**, and its router as many rows. No weight was updated: what is kept has the bits of the original."
    )
    if report.unreached:
        count, text = sum(map(len, report.unreached.values())), report.calibration
        name = f" of {Path(text.text).name}" if text else ""
        yield f"No calibration token{name} was routed to {count} of the original's experts; `{REPORT}` names them."


def _rows(results: Sequence[Evaluation], base: str) -> Iterator[tuple[str, str, str, str]]:
    """What was measured, on what, of this model, and of the one that it was compared with: the dense one, or which."""
    for result in results:
        rival = "" if not result.against else " (dense)" if same_model(result.against, base) else f" ({short(result.against)})"
        reference = result.closeness.reference_perplexity if result.closeness else None
        if result.perplexity is not None:
            where = f"{_name(result)}, {samples(result)}"
            other = "" if reference is None else f"{reference:.2f}{rival}"
            yield "token perplexity", where, f"{result.perplexity:.2f}", other
        near = (result.closeness.by_text if result.closeness else None) or {}
        for name, text in (result.by_text or {}).items():
            dense = near[name].reference_perplexity if name in near else None
            where = f"{name}, {text.windows} samples of {result.length} tokens"
            yield "token perplexity", where, f"{text.perplexity:.2f}", "" if dense is None else f"{dense:.2f}{rival}"
        for name, facts in result.tasks.items():
            for metric, label in METRICS.items():
                value, error = getattr(facts, metric), getattr(facts, f"{metric}_stderr", None)
                if value is not None:
                    spread = "" if error is None else f" ± {error:.3f}"
                    against = facts.against.get(metric)
                    compared = f"{against.reference:.3f}{rival}" if against else ""
                    yield label, f"{Path(name).stem}, {facts.questions} questions", f"{value:.3f}{spread}", compared


def _eval_results(results: Sequence[Evaluation]) -> Iterator[EvalResult]:
    """As the hub's model index has them."""
    for result in results:
        read: Mapping[str, Any] = result.by_text or {_name(result): result}  # there is no data set of several texts together
        found = [(name, "perplexity", facts.perplexity) for name, facts in read.items()]
        found += [(task, metric, getattr(facts, metric)) for task, facts in result.tasks.items() for metric in METRICS]
        for name, metric, value in found:
            if value is not None:
                yield EvalResult("text-generation", Path(name).stem, Path(name).stem, metric, round(value, 4))


def _name(result: Evaluation) -> str:
    """The text's, without folders."""
    return Path(result.text.text).name if result.text else "text"


def _title(report: Report) -> str:
    if isinstance(report, Permutation):
        return f"channels ordered for {report.pattern}"
    if isinstance(report, ExpertRemoval):
        return f"{report.experts.kept} of {report.experts.of} experts"
    return f"{percent(report.zeros)} sparse".replace(".0%", "%")


def sees_images(folder: Path) -> bool:
    """Whether the configuration in a folder names a model of images and text, and says something about images."""
    try:
        content = (folder / "config.json").read_bytes()
        if not re.search(rb'"\w*(vision|image)\w*"\s*:', content):
            return False  # transformers, which takes a second to import, counts some models of text and of proteins among them
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

        config = strict_json.parse(content)
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config["model_type"]) in config["architectures"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _inherited(path: Path | None) -> dict[str, Any]:
    """What a card says of the model's licence, which may have a name and an address, and of its languages."""
    if path is None or not os.path.isfile(path):  # pathlib raises for a name that is too long
        return {}
    try:
        head = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}
    found = {name: head[name] for name in ("license", "license_name", "license_link") if isinstance(head.get(name), str)}
    languages = head.get("language")
    listed = isinstance(languages, list) and all(isinstance(language, str) for language in languages)
    return found | ({"language": languages} if isinstance(languages, str) or (listed and languages) else {})


def _yaml(content: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False)
    return text
