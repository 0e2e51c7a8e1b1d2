"""Text sources: where a corpus is, and how it is read, as a whole or by passages from all over it.

A source is a name (``builtin``, ``wikitext2``, ``c4``), a file or a folder of files of any common kind, or a
Hub dataset (``owner/name``, ``owner/name:config``). It has one or several parts, its files or shards; the documents of a part
are joined by two newlines, so that short ones are never dropped.
"""

from __future__ import annotations

import os
import pydoc_data.topics
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from uniprune.data.bos import Bos
from uniprune.data.documents import JOIN, Reader
from uniprune.data.formats import COMPRESSED, READABLE, SUFFIXES, recognise, suffix_of
from uniprune.data.parts import File, HubShard, Listed, Part
from uniprune.data.rows import commit_of, load_hub, reachable, read_hub
from uniprune.errors import InputError
from uniprune.storage.files import check_again_readable, path_of
from uniprune.storage.record import Count, Facts

Use = Literal["calibration", "evaluation"]
SHARED = re.compile(r"(?P<text>.+):(?P<share>\d+\.?\d*|\.\d+)")  # one of several texts, with its share of the tokens
HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w.@+ -]+))?")
SPLITS: dict[str, tuple[str, ...]] = {"calibration": ("train",), "evaluation": ("test", "validation", "dev")}
SHARDS = 16  # of a Hub dataset, at most
C4_DOCUMENTS = 1100  # of its validation split, those that papers evaluate on
# What accompanies data and is none itself: of models and datasets, of programs, and of systems.
IGNORED = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|dataset_infos?|dataset_dict|state"
    r"|preprocessor_config|package|package-lock|tsconfig|pruning)\.json|.*\.index\.json|merges\.txt|requirements\.txt"
    r"|cache-\w+\.arrow|_.*|\..*|__MACOSX",  # datasets keeps what map and filter made of a saved set in cache-....arrow
    re.IGNORECASE,
)
ABOUT = re.compile(r"(readme|licen[cs]e|changelog|citation|notice|contributing|datacard|dataset_card)(\..*)?", re.IGNORECASE)


class Sample(Facts):
    """What was read of a text. whole: all of it; else ``passages`` from all over it, ``characters`` in all.

    documents: how many were seen, as far as they were counted; text_sha256: of all of the text; commit: of a Hub dataset.
    """

    whole: bool = True
    files: Count | None = None
    files_read: Count | None = None
    documents: Count | None = None
    passages: Count | None = None
    characters: Count | None = None
    text_sha256: str | None = None
    commit: str | None = None


class TextShare(Facts):
    """One of several texts. share: of the tokens of all, None where texts stand side by side; windows: how many it gave."""

    text: str
    share: float | None = None
    windows: Count | None = None
    available_windows: Count | None = None
    sample: Sample | None = None


class TextFacts(Facts):
    """Which tokens were read. ``text``: the source; ``available_windows``: how many it has; ``sha256``: of the token ids.

    join: what stands between two documents. bos: which windows were to begin with BOS; windows_with_bos: how many really do.
    rolling: whether documents were read one by one, in ``pieces``; in_context: whether those are as long as the model's
    context; second_bos: whether a document begins with two, as in lm-evaluation-harness. text_sha256: of those documents.
    images: windows that have one. sources: if they are of several texts, each by its name.
    """

    text: str
    windows: Count | None = None
    length: Count | None = None
    available_windows: Count | None = None
    join: str | None = None
    bos: Bos | bool | None = None
    windows_with_bos: Count | None = None
    sample: Sample | None = None
    rolling: bool = False
    documents: Count | None = None
    pieces: Count | None = None
    in_context: bool = False
    second_bos: bool = False
    text_sha256: str | None = None
    images: Count | None = None
    sources: dict[str, TextShare] | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Text:
    """What to read. field: which field of a row is the text; split: of a Hub dataset; both have defaults."""

    source: str
    field: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        return self.source

    @property
    def is_token_file(self) -> bool:
        return self.source.endswith(".safetensors")


def read(source: str | Path | Text, use: Use, tokenizer: Any = None) -> str:
    """All of a text: its parts, and their documents, joined by two newlines. Raises InputError if it is empty."""
    parts = open_text(source if isinstance(source, Text) else Text(str(source)), use, tokenizer)
    text = "".join(texts(parts))
    if not text.strip():
        raise InputError(f"text {source} is empty")
    return text


def texts(parts: Sequence[Part]) -> Iterator[str]:
    """The text of several parts, in consecutive pieces."""
    return chain.from_iterable(chain([JOIN] if number else [], part.texts()) for number, part in enumerate(parts))


def open_text(text: Text, use: Use, tokenizer: Any = None) -> list[Part]:
    """The parts of a text, in a fixed order. tokenizer: whose chat template conversations are written in.

    Raises InputError if the source is missing, or of a kind that cannot be read.
    """
    path = path_of(text.source)
    if text.source in NAMED:
        return [_named(text, use)]
    if path.is_file():
        if text.split is not None:
            raise InputError(f"text {text} is a file, which has no splits; leave --split out, or give the folder it is in")
        file = File(path, Reader(text.field, tokenizer))
        if text.field is not None and file.format.plain:
            raise InputError(f"text {text} is plain text, which has no fields; leave --field out")
        return [file]
    if path.is_dir():
        if text.split is not None:
            return _shards(text, use, tokenizer, str(path), {})
        return [File(file, Reader(text.field, tokenizer)) for file in _files(path)]
    found = _hub_name(text.source)
    commit = commit_of(found["name"], "text", found["revision"])
    options = {"name": found["config"], "revision": commit or found["revision"]}
    return _shards(text, use, tokenizer, found["name"], {key: value for key, value in options.items() if value}, commit)


def check_there(source: str) -> None:
    """Raises InputError for a text that cannot be there; nothing is fetched."""
    path = path_of(source)
    if source not in NAMED and not path.is_file() and not path.is_dir():
        _hub_name(source)


def _hub_name(source: str) -> re.Match[str]:
    """The parts of a Hub dataset's name, of what is no file."""
    check_again_readable("text", source)
    found, path = HUB.fullmatch(source), Path(source)
    if (shared := SHARED.fullmatch(source)) and os.path.exists(path_of(shared["text"])):  # pathlib raises for long names
        raise InputError(
            f"text {source!r}: a share is for several texts, and {shared['text']} is one alone; leave :{shared['share']} out"
        )
    if found is None or suffix_of(path) in SUFFIXES or path.suffix in COMPRESSED:
        raise InputError(
            f"text {source!r} is neither one of {', '.join(NAMED)} nor an existing file or folder, "
            "nor the name of a Hub dataset, owner/name or owner/name:config"
        )
    return found


# -------------------------------------------------------------------------------------------------------------- folders


def _files(folder: Path) -> list[Path]:
    """The files of a corpus in a folder and those below, by name: no hidden ones, and nothing that only accompanies data."""
    every = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _ignored(path.relative_to(folder))]
    files = [path for path in every if suffix_of(path) in SUFFIXES or (not suffix_of(path) and _is_text(path))]
    files = [path for path in files if not ABOUT.fullmatch(path.name)] or files
    if not files:
        others = sorted({path.suffix for path in every if path.suffix})[:8]
        there = f"; there are {', '.join(others)}: give such a file by name to read it as plain text" if others else ""
        raise InputError(f"text folder {folder} holds no file of a kind that is read, {READABLE}{there}")
    return files


def _is_text(path: Path) -> bool:
    """Whether a file whose name does not say what it is can be read."""
    try:
        recognise(path, "text")
    except InputError:
        return False
    return True


def _ignored(path: Path) -> bool:
    return any(IGNORED.fullmatch(name) for name in path.parts)


# ------------------------------------------------------------------------------------------------------------------ hub


def _shards(text: Text, use: Use, tokenizer: Any, name: str, options: dict[str, Any], commit: str | None = None) -> list[Part]:
    """The shards of a dataset, streamed; a slice of a split (``train[:1%]``) is loaded as a whole."""
    reader = partial(Reader, text.field, tokenizer)
    if text.split is not None and not text.split.isidentifier():
        return [HubShard(str(text), load_hub(name, "text", split=text.split, **options), reader(), False, commit)]
    splits = load_hub(name, "text", streaming=True, **options)
    split = text.split or next((split for split in SPLITS[use] if split in splits), None)
    if split not in splits:
        lacking = text.split or " or ".join(SPLITS[use])
        raise InputError(f"text {text} has no split {lacking}, only {', '.join(splits)}; choose with --split")
    with reachable(name, "text"):
        data = splits[split]
        count = min(SHARDS, data.num_shards)
        shards = [data.shard(count, index) if count > 1 else data for index in range(count)]
    return [HubShard(f"{text} ({split})", shard, reader(), True, commit) for shard in shards]


# ---------------------------------------------------------------------------------------------------------------- named


def _named(text: Text, use: Use) -> Part:
    if text.field is not None or text.split is not None:
        raise InputError(f"text {text} has its own field and splits; leave --field and --split out, or give owner/name")
    read = NAMED[text.source]
    found = read(use)
    if isinstance(found, Listed | File):
        return found
    return Listed(lambda: read(use))  # type: ignore[arg-type, return-value]


def _builtin(use: Use) -> Iterator[str]:
    """Python's language reference, which every Python has. Every fourth topic is kept for evaluation."""
    topics = pydoc_data.topics.topics
    for index, key in enumerate(sorted(topics)):
        if (index % 4 == 3) == (use == "evaluation"):
            yield topics[key]


def _wikitext2(use: Use) -> Part:
    options = {"name": "wikitext-2-raw-v1", "split": "test" if use == "evaluation" else "train"}

    def documents() -> Iterator[str]:
        return (row["text"] for row in read_hub("Salesforce/wikitext", "text", ", or use builtin", **options))

    return Listed(documents, articles=True)


def _c4(use: Use) -> Part:
    """The shards that Wanda and SparseGPT use: the first of the training split, the beginning of the first for validation."""
    from huggingface_hub import hf_hub_download

    shard = "en/c4-validation.00000-of-00008.json.gz" if use == "evaluation" else "en/c4-train.00000-of-01024.json.gz"
    with reachable("allenai/c4", "text", ", or use builtin"):
        file = File(Path(hf_hub_download("allenai/c4", shard, repo_type="dataset")), Reader())
    if use == "calibration":
        return file
    return Listed(lambda: islice((document for document, _ in file.pages()), C4_DOCUMENTS), join=" ")


NAMED: dict[str, Callable[[Use], Part | Iterator[str]]] = {"builtin": _builtin, "wikitext2": _wikitext2, "c4": _c4}
"""Texts by name: for each use a part, or simply documents."""
