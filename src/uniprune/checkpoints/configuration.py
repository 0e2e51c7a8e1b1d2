"""What a model's configuration says; transformers' classes do not give everything out to who asks."""

from __future__ import annotations

from typing import Any

from uniprune.errors import InputError

UNBOUNDED = 1 << 30  # tokens: the context of models that have no limit


def text_config(config: Any) -> Any:
    """The part of a configuration that is of the text model; all of it where several are (MusicGen)."""
    try:
        return config.get_text_config()
    except ValueError:
        return config


def setting(config: Any, name: str) -> Any:
    """What a configuration says of its text model; None if it has no such setting, or does not give it out (XLNet's length)."""
    try:
        return getattr(text_config(config), name, None)
    except Exception:  # of the configuration's own, in dozens of kinds
        return None


def reads_images(config: Any) -> bool:
    """Whether a configuration is of a model of images and text."""
    return getattr(config, "vision_config", None) is not None


def context(config: Any) -> int:
    """The most tokens that a model can read at once."""
    limit = setting(config, "max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 else UNBOUNDED


def check_context(config: Any, length: int) -> None:
    """Raises InputError if windows of ``length`` tokens are more than a model can read at once."""
    if length > context(config):
        raise InputError(f"samples of {length} tokens do not fit the model's context of {context(config)}; take shorter ones")


def check_vocabulary(config: Any, highest: int, where: object) -> None:
    """Raises InputError for a token that a model has no embedding of: its tokenizer, or the token file, is another's."""
    size = setting(config, "vocab_size")
    if isinstance(size, int) and highest >= size:
        raise InputError(f"{where}: token {highest} is beyond the model's vocabulary of {size}; give the tokenizer that it has")
