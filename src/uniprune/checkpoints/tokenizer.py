"""What makes text, or images and text, ready for a model: its tokenizer, or its processor."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

from uniprune.checkpoints.origin import Origin
from uniprune.errors import InputError, first_line

logger = logging.getLogger(__name__)

TOKENIZERS = ("tokenizer*", "*.model", "vocab.json", "vocab.txt", "merges.txt")  # files that are, or are of, one
FEW = 128  # tokens: without files, transformers makes of some configurations a tokenizer that knows special ones alone
BLANK = ("", "\u2581")  # and of some what stands for a space


def load_tokenizer(origin: Origin) -> Any:
    """The model's tokenizer, or None if it has none. Raises InputError for one that is there, but cannot be read."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(origin.folder, **origin.options())
        if len(found) < FEW and not found.get_vocab().keys() - {*found.all_special_tokens, *BLANK}:
            raise ValueError("it knows no token but special ones")
        return found
    except Exception as error:  # transformers and tokenizers raise all kinds for a file that they cannot read
        reason = first_line(error)
        if origin.gguf is None and any(file for kind in TOKENIZERS for file in origin.folder.glob(kind)):
            raise InputError(f"model {origin}: {_what_helps(origin, reason)}") from error
        note = logging.WARNING if origin.gguf else logging.INFO  # which always has one
        logger.log(note, "model %s has no usable tokenizer (%s)", origin, reason)
        return None


def _what_helps(origin: Origin, reason: str) -> str:
    """Why a tokenizer cannot be read, and what to do."""
    models = sorted(file.name for file in origin.folder.glob("*.model"))
    if models and not (origin.folder / "tokenizer.json").exists() and not (find_spec("sentencepiece") and find_spec("google")):
        return f"its tokenizer, {models[0]}, needs packages that are not installed; pip install sentencepiece protobuf"
    return f"its tokenizer cannot be read ({reason}); fetch it again, or move its files away and give a token file"


def load_processor(origin: Origin | None, given: Any = None) -> Any:
    """What makes images and text ready for a model: its own processor. given: as the caller's tokenizer.

    Raises InputError if there is none.
    """
    from transformers import AutoProcessor

    if getattr(given, "image_processor", None) is not None:
        return given
    reason = "a model in memory is given it as its tokenizer: Loaded(model, processor)"
    if origin is not None:
        try:
            found = AutoProcessor.from_pretrained(origin.folder, **origin.options())
            if getattr(found, "image_processor", None) is not None:
                return found
            reason = "it has a tokenizer alone"
        except Exception as error:  # as of a tokenizer
            reason = first_line(error)
    raise InputError(
        f"the text has images, but model {origin or 'in memory'} has no processor that can be read ({reason}); take the text "
        "alone: --field text"
    )
