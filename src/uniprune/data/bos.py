"""The token that a text begins with (BOS): which windows have it, and text -> tokens accordingly.

Tokenised once and cut, as the papers do it, a text has BOS in its first window at most, whatever the tokenizer does.
Some models were never trained without it and are far off then: they need it in each window.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from uniprune.checkpoints.configuration import setting
from uniprune.errors import InputError

Bos = Literal["each", "first", "none"]
NEEDED = "gemma"  # in the type of models that need BOS in each window: Gemma 1 to 4, and what has one of them inside

WHOLE = 6_000_000  # characters that are tokenised at once; that takes 150 times their size
PIECE = 1_000_000  # characters at once of a longer text
SCRIPTS = "A token of 12,345 words: naïve, Größe, слово, 语言, 言葉, שפה, كلمة, शब्द, 🙂\n\tdef f(x):  return x != 0  # <b>"

logger = logging.getLogger(__name__)


def bos_of(asked: Bos | None, config: Any, tokenizer: Any) -> Bos | None:
    """What is asked for, by default what the family of a model needs; None leaves it to the tokenizer.

    Gemma was never trained without BOS: the perplexity of Gemma 3 270M is several times as high in windows without it.
    """
    model_type = setting(config, "model_type") or ""
    if NEEDED not in model_type:
        return asked
    if asked is not None and asked != "each":
        logger.warning("--bos %s: models of type %s are far off in windows that do not begin with BOS", asked, model_type)
    if asked is None and getattr(tokenizer, "bos_token_id", None) is None:
        logger.warning("models of type %s need BOS in each window, but the tokenizer has none", model_type)
        return None
    return asked or "each"


def tokenizer_of(given: Any) -> Any:
    """The tokenizer of a model, which may have been given its processor, or None."""
    return given.tokenizer if getattr(given, "image_processor", None) is not None else given


class Encoder:
    """Tokenises the text of windows.

    ``bos``: of which windows it is the first token; ``added``: whether the tokenizer begins a text with it by itself.
    Raises InputError if there is no tokenizer, or BOS is asked for and it has none.
    """

    def __init__(self, tokenizer: Any, bos: Bos | None, source: object) -> None:
        if tokenizer is None:
            raise InputError(
                f"the model has no tokenizer, so text {source} cannot be read; put its tokenizer's files into its folder, "
                "or give a saved token file"
            )
        if bos not in (None, "each", "first", "none"):
            raise InputError(f"--bos {bos} is none of each, first and none")
        self._tokenizer, self._asked = tokenizer, bos
        self.token: int | None = tokenizer.bos_token_id
        if bos in ("each", "first") and self.token is None:
            raise InputError(f"--bos {bos}: the tokenizer has no BOS token; use --bos none")
        self.added = self.token is not None and self._natural("a")[:1] == [self.token]
        self.bos: Bos = bos or ("first" if self.added else "none")

    def room(self, length: int) -> int:
        """How many tokens of text a window of ``length`` tokens has."""
        return length - (self.bos == "each")

    def plain(self, text: str) -> list[int]:
        """The text's tokens and no others."""
        if len(text) > WHOLE:
            return list(chain.from_iterable(self.pieces([text])))
        return self._ids(text, add_special_tokens=False)

    def fingerprint(self) -> str | None:
        """A hash of the tokens of one text in many scripts: tokenizers that write others write another. None if it has no
        tokens for that text."""
        try:
            ids = self._ids(SCRIPTS, add_special_tokens=False)
        except Exception:  # tokenizers raise all kinds for what they have no token for
            return None
        return hashlib.sha256(repr(ids).encode()).hexdigest()

    def pieces(self, text: Iterable[str]) -> Iterator[list[int]]:
        """The tokens of a long text that comes in blocks, tokenised in pieces that end where lines do."""
        left = ""
        for block in text:
            left += block
            while len(left) > PIECE:
                end = left.rfind("\n", 0, PIECE) + 1 or PIECE
                yield self._ids(left[:end], add_special_tokens=False)
                left = left[end:]
        yield self._ids(left, add_special_tokens=False)

    def whole(self, text: str) -> Tensor:
        """The tokens of all of a text, int64; BOS before it if only the first window is to have it."""
        if len(text) <= WHOLE and (self._asked is None or (self._asked == "first" and self.added)):
            return torch.tensor(self._natural(text), dtype=torch.int64)
        return self.begun(torch.tensor(self.plain(text), dtype=torch.int64))

    def begun(self, ids: Tensor) -> Tensor:
        """The tokens of a text, int64, after BOS if only the first window is to have it."""
        return functional.pad(ids, (1, 0), value=self.token or 0) if self.bos == "first" else ids

    def finished(self, windows: Tensor) -> Tensor:
        """Windows of text ``[n, room]`` as windows ``[n, length]`` with BOS where it belongs."""
        return functional.pad(windows, (1, 0), value=self.token or 0) if self.bos == "each" else windows

    def _natural(self, text: str) -> list[int]:
        """With the tokenizer's own special tokens."""
        return self._ids(text)

    def _ids(self, text: str, **options: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, return_attention_mask=False, verbose=False, **options)["input_ids"]
        return ids
