"""The safetensors files of a checkpoint, as config.json or an index names them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from uniprune.errors import InputError
from uniprune.storage import strict_json

ENDINGS = (".safetensors", ".safetensors.index.json")


def named_in(config: Path) -> str | None:
    """The file of weights, or their index, that a config.json names: few do. It must lie beside it."""
    try:
        name = strict_json.parse(config.read_bytes()).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return None  # whoever needs the configuration says what is wrong with it
    if name is not None and (type(name) is not str or {"/", "\\"} & {*name} or not name.endswith(ENDINGS)):
        raise InputError(f"{config}: transformers_weights is no safetensors file beside it")
    return name


def shards_of(index: Path) -> dict[str, str]:
    """Tensor -> file, which must lie beside the index. Raises InputError for an index that says anything else."""
    try:
        content = strict_json.parse(index.read_bytes())
        strict_json.check(content, {"weight_map": dict})
        for name in (names := content["weight_map"]).values():
            if type(name) is not str or "/" in name or "\\" in name or not name.endswith(".safetensors"):
                raise ValueError(f"{str(name)[:80]!r} is no .safetensors file beside it")
    except ValueError as error:
        raise InputError(f"{index} is damaged: {error}; fetch the checkpoint again") from None
    except OSError as error:
        raise InputError(f"{index} cannot be read: {error.strerror}; fetch the checkpoint again") from None
    return dict(names)


def lacking(model: str, config: Any, missing: Collection[str]) -> InputError:
    """The error for a checkpoint without some of the tensors that its model needs."""
    classes = " and ".join(getattr(config, "architectures", None) or ())
    what = f"model {model}: its files lack {len(missing)} tensors, e.g. {min(missing)}"
    if classes and not any(end in classes for end in ("LM", "ConditionalGeneration", "Generator")):
        return InputError(
            f"{what}; config.json says {classes}: no model that predicts tokens, which is what can be pruned; give "
            "the language model that it was made from"
        )
    return InputError(f"{what}; fetch it again")
