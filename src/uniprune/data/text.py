"""Text sources -> windows of tokens.

A source is a name (``builtin``, ``wikitext2``, ``c4``), a local file (.txt, .raw, .jsonl, .parquet, or .safetensors as
written by :func:`save_windows`) or a folder of such files. Its documents are joined by two newlines, so that short ones
are never dropped, tokenised as one text, and cut into non-overlapping windows of one length.
"""

from __future__ import annotations

import hashlib
import logging
import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from uniprune.data import text
from uniprune.data.rows import read_hub, read_jsonl
from uniprune.errors import InputError, first_line
from uniprune.storage.record import Count, Facts
from uniprune.storage.tensor_file import Metadata, open_tensors, write_tensors

logger = logging.getLogger(__name__)

Use = Literal["calibration", "evaluation"]
JOIN = "\n\n"


class TextFacts(Facts):
    """Which tokens were read. ``text``: the source; ``available_windows``: how many it has; ``sha256``: of the token ids.

    join: what stands between two documents. bos: whether the tokenizer put a token at the start.
    """

    text: str
    windows: Count | None = None
    length: Count | None = None
    available_windows: Count | None = None
    join: str | None = None
    bos: bool | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Windows:
    """Token windows ``tokens`` (int64, ``[windows, length]``) and where they come from."""

    tokens: Tensor
    source: str
    available: int
    bos: bool

    @property
    def sha256(self) -> str:
        """Hash of the token ids and their shape: equal hashes mean equal windows, whatever the source was called."""
        data = self.tokens.to(torch.int64).contiguous()
        return hashlib.sha256(repr(tuple(data.shape)).encode() + data.numpy().tobytes()).hexdigest()

    def describe(self) -> TextFacts:
        """The provenance that goes into reports and artefacts."""
        count, length = self.tokens.shape
        return TextFacts(
            text=self.source,
            windows=count,
            length=length,
            available_windows=self.available,
            join=JOIN,
            bos=self.bos,
            sha256=self.sha256,
        )


class TokenFacts(Metadata):
    """The metadata of a saved token file."""

    kind: Literal["tokens"] = "tokens"
    source: str
    available: Count
    bos: bool


def load_windows(
    source: str | Path,
    tokenizer: Any,
    *,
    use: Use,
    length: int,
    count: int | None = None,
    seed: int = 0,
) -> Windows:
    """Windows of ``length`` tokens from a text source.

    use: named sources have a part for each use, disjoint from the other. For ``calibration``, ``count`` windows are
    drawn without replacement by ``seed``; for ``evaluation`` they are spread evenly over the text, or all of them taken
    if ``count`` is None.
    Raises InputError if the source is missing, empty, or holds fewer windows than asked for.
    """
    if length < 2:
        raise InputError(f"window length {length} is too short: predicting a token needs at least 2")
    if count is not None and count < 1:
        raise InputError(f"number of windows {count} is not positive")
    if str(source).endswith(".safetensors"):
        return _load_tokens(Path(source), length, count)
    # Calibration needs a fraction of a large corpus; evaluation is defined on the whole text.
    limit = max(1_000_000, 8 * count * length) * 6 if use == "calibration" and count else None
    text = read(source, use, limit)
    tokens, bos = _tokenise(text, tokenizer, source)
    available = len(tokens) // length
    if available == 0:
        raise InputError(f"text {source} has {len(tokens)} tokens, less than one window of {length}; lower --length")
    wanted = available if count is None else count
    if wanted > available:
        raise InputError(
            f"text {source} has {available} windows of {length} tokens, {count} were asked for; "
            f"lower --windows or --length, or give more text"
        )
    grid = tokens[: available * length].view(available, length)
    if use == "calibration":
        index = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted]
    else:  # evenly, from the first window to the last
        index = torch.arange(wanted) * (available - 1) // max(wanted - 1, 1)
    return Windows(grid[index].clone(), str(source), available, bos)


def save_windows(windows: Windows, path: Path) -> None:
    """Writes the token ids as safetensors (``tokens``: int32 ``[windows, length]``), for runs on the very same tokens."""
    facts = TokenFacts(source=windows.source, available=windows.available, bos=windows.bos)
    write_tensors(path, {"tokens": windows.tokens.to(torch.int32)}, facts)


def read(source: str | Path, use: Use, limit: int | None = None) -> str:
    """The text of a source, documents joined by two newlines; reading stops after about ``limit`` characters."""
    documents, size = [], 0
    for document in _documents(str(source), use):
        documents.append(document)
        size += len(document) + len(JOIN)
        if limit is not None and size > limit:
            logger.info("text %s: windows are drawn from its first %d characters", source, size)
            break
    text = JOIN.join(documents)
    if not text.strip():
        raise InputError(f"text {source} is empty")
    return text


def _tokenise(text: str, tokenizer: Any, source: str | Path) -> tuple[Tensor, bool]:
    """All tokens of the text, with the tokenizer's own special tokens (BOS once, at the start, or none)."""
    if tokenizer is None:
        raise InputError(f"the model has no tokenizer, so text {source} cannot be read; give a saved token file")
    ids = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id
    return torch.tensor(ids, dtype=torch.int64), bool(bos)


def _load_tokens(path: Path, length: int, count: int | None) -> Windows:
    tokens, facts = _read_tokens(path)
    if tokens.shape[1] != length:
        raise InputError(f"token file {path} has windows of {tokens.shape[1]} tokens, not {length}; give --length")
    if count is not None and count > len(tokens):
        raise InputError(f"token file {path} has {len(tokens)} windows, {count} were asked for; lower --windows")
    return Windows(tokens[:count], facts.source, facts.available, facts.bos)


def _read_tokens(path: Path) -> tuple[Tensor, TokenFacts]:
    """The windows of a token file, and where they come from; InputError unless they could be windows."""
    with open_tensors(path, TokenFacts) as (file, facts):
        try:
            if list(file.keys()) != ["tokens"]:
                raise ValueError("it must hold one tensor, named tokens")
            tokens = file.get_tensor("tokens")
            if tokens.dtype != torch.int32 or tokens.ndim != 2 or not tokens.numel():
                raise ValueError(f"its tokens are {tokens.dtype} {list(tokens.shape)}, not int32 [windows, length]")
            if int(tokens.min()) < 0:
                raise ValueError(f"{int(tokens.min())} is no token")
        except ValueError as error:
            raise TokenFacts.damaged(path, error) from None
    return tokens.to(torch.int64), facts


def token_file_shape(path: Path) -> tuple[int, int]:
    """(windows, length) of a saved token file."""
    count, length = _read_tokens(path)[0].shape
    return count, length


# ---------------------------------------------------------------------------------------------------------- sources


def _documents(source: str, use: Use) -> Iterator[str]:
    if source in NAMED:
        return NAMED[source](use)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    raise InputError(f"text {source!r} is neither one of {', '.join(NAMED)} nor an existing file or folder")


def _file(path: Path) -> Iterator[str]:
    if path.suffix not in READERS:
        raise InputError(f"text {path}: {path.suffix or 'no suffix'} is not one of {', '.join(READERS)}")
    try:
        yield from READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise InputError(f"text {path} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _folder(path: Path) -> Iterator[str]:
    files = sorted(file for file in path.rglob("*") if file.suffix in READERS and file.is_file())
    if not files:
        raise InputError(f"text folder {path} holds no file ending in {', '.join(READERS)}")
    for file in files:
        yield from _file(file)


def _plain(path: Path) -> Iterator[str]:
    yield path.read_text(encoding="utf-8")


def _wikitext_raw(path: Path) -> Iterator[str]:
    """WikiText's own .raw files, as the rows that ``datasets`` makes of them: the papers' text joins those rows."""
    with path.open(encoding="utf-8", newline="\n") as lines:
        yield from (line if line.strip() else "" for line in lines)


def _jsonl(path: Path) -> Iterator[str]:
    for number, row in read_jsonl(path, "text"):
        if not isinstance(row.get("text"), str):
            raise InputError(f'text {path}, line {number}: no string field "text"')
        yield row["text"]


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"text {path}: reading .parquet needs pyarrow; pip install 'uniprune[data]'") from None
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are these
        raise InputError(f"text {path} is not a Parquet file, or damaged ({first_line(error)})") from None
    if "text" not in file.schema_arrow.names:
        raise InputError(f'text {path} has no column "text", only {", ".join(file.schema_arrow.names)}')
    for batch in file.iter_batches(columns=["text"]):
        yield from (row for row in batch.column("text").to_pylist() if row is not None)


def _builtin(use: Use) -> Iterator[str]:
    """English prose that every Python carries: its language reference. Every fourth topic is kept for evaluation."""
    topics = pydoc_data.topics.topics
    for index, key in enumerate(sorted(topics)):
        if (index % 4 == 3) == (use == "evaluation"):
            yield topics[key]


def _hub(path: str, **options: Any) -> Iterator[str]:
    return (row["text"] for row in read_hub(path, "text", instead=", or use builtin", **options))


def _wikitext2(use: Use) -> Iterator[str]:
    split = "test" if use == "evaluation" else "train"
    return _hub("Salesforce/wikitext", name="wikitext-2-raw-v1", split=split)


def _c4(use: Use) -> Iterator[str]:
    """The shards that Wanda and SparseGPT use."""
    part = "validation" if use == "evaluation" else "train"
    shard = f"en/c4-{part}.00000-of-{'00008' if part == 'validation' else '01024'}.json.gz"
    return _hub("allenai/c4", data_files={part: shard}, split=part, streaming=True)


NAMED: dict[str, Callable[[Use], Iterator[str]]] = {"builtin": _builtin, "wikitext2": _wikitext2, "c4": _c4}
READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _plain,
    ".raw": _wikitext_raw,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}


def window_length(source: str | Path, length: int | None, default: int) -> int:
    """A token file knows its own length."""
    if length is None and str(source).endswith(".safetensors"):
        return text.token_file_shape(Path(source))[1]
    return length or default
