"""GGUF files, of which several may be one model: ``model-00001-of-00003.gguf``, as llama.cpp splits large ones.

Of what a file says, transformers (seen in 5.23) leaves some out without a word, and the model is then another: how positions
are scaled, which of Llama 3.1 and later is a tensor of factors, and biases that the class of the model has only if its
configuration says so. Here the scaling is put back where transformers has the same, and all else is refused.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from uniprune.errors import InputError

SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.gguf)", re.IGNORECASE)
MOST = 1000  # parts
COUNT = 8  # where a file says how many tensors it has
FACTORS = "rope_freqs.weight"  # of Llama 3.1 and later: what the frequency of each pair of channels is divided by
OTHER_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")  # of Phi 3 and later
CONTEXTS = (8192, 4096, 2048, 16384, 32768)  # that Llamas were trained on before their positions were scaled; most on the first
KNOWN = {"type", "factor", "original_context_length", "finetuned"}  # settings of scaling that are put back
NEUTRAL = {"attn_factor": 1, "yarn_attn_factor": 1, "yarn_beta_fast": 32, "yarn_beta_slow": 1}  # others that change nothing so


def siblings(name: str) -> list[str]:
    """The files of the model that a file is of, in their order; the file alone if it is all of it."""
    found = SPLIT.fullmatch(name)
    if found is None or not 0 < int(found["count"]) <= MOST:
        return [name]
    count = int(found["count"])
    return [f"{found['stem']}-{number:05d}-of-{count:05d}{found['ending']}" for number in range(1, count + 1)]


def first_parts(files: Collection[str]) -> list[str]:
    """The GGUF files among some, of those that are one model the first."""
    return sorted(file for file in files if file.lower().endswith(".gguf") and siblings(file)[0] == file)


def parts(file: Path) -> list[Path]:
    """The files of the model that a file is of. Raises InputError unless they lie beside it."""
    every = [file.with_name(name) for name in siblings(file.name)]
    if missing := [part for part in every if not part.is_file()]:
        raise InputError(f"model {file} is one of {len(every)} files, and {missing[0]} is not there; put it beside")
    return every


def merge(files: Sequence[Path], target: Path) -> None:
    """Writes the files of a model as one: transformers reads no more.

    The first has all settings; of the tensors, headers and bytes are copied, and only their offsets change. Raises InputError
    without the package gguf.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError(f"model {files[0]}: reading GGUF needs the gguf package; pip install gguf") from None
    readers = [GGUFReader(file) for file in files]
    first = readers[0]
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    end = max(field.offset + sum(part.nbytes for part in field.parts) for field in first.fields.values())
    head = bytearray(first.data[:end])
    struct.pack_into("<Q", head, COUNT, len(tensors))
    offset = 0
    for tensor in tensors:
        head += b"".join(part.tobytes() for part in tensor.field.parts[:-1]) + struct.pack("<Q", offset)
        offset += _padded(tensor.n_bytes, first.alignment)
    with target.open("wb") as file:
        file.write(head.ljust(_padded(len(head), first.alignment), b"\0"))
        for tensor in tensors:
            file.write(tensor.data.tobytes().ljust(_padded(tensor.n_bytes, first.alignment), b"\0"))


def _padded(size: int, alignment: int) -> int:
    return -(-int(size) // alignment) * alignment


# ---------------------------------------------------------------------------------------------- what transformers leaves out


class Facts(NamedTuple):
    """What a file says of the scaling of positions, by the last part of the setting's name, its factors; and its biases."""

    scaling: dict[str, Any]
    factors: np.ndarray | None
    others: bool
    biases: int


def check(file: Path, model: nn.Module) -> None:
    """Raises InputError for a file with more biases than the model that transformers makes of it has a place for."""
    names = (*(name for name, _ in model.named_parameters()), *(name for name, _ in model.named_buffers()))
    there, has = _facts(file).biases, sum(name.endswith("bias") for name in names)
    if there > has:
        raise InputError(
            f"model {file} has {there} biases, and what transformers makes of it {has}: it would be another model; give the "
            "safetensors checkpoint that it was converted from"
        )


def with_scaling(file: Path, config: Any) -> Any:
    """A model's configuration with the scaling of positions that its file says. Raises InputError for one that is not known."""
    facts, text = _facts(file), config.get_text_config()
    scaled = facts.scaling.get("type", "none") != "none" or facts.factors is not None or facts.others
    rope = getattr(text, "rope_parameters", None)
    if not scaled or not isinstance(rope, dict) or _is_scaled(rope):
        return config
    nested = rope.get("full_attention")
    plain = nested if isinstance(nested, dict) else rope
    found = _scaling(facts, text, plain)
    if found is None:
        raise InputError(
            f"model {file} scales its positions in a way that is lost when it is read "
            f"({facts.scaling.get('type', 'factors of its own')}); give the safetensors checkpoint that it was converted from"
        )
    scaled_plain = {"rope_theta": plain["rope_theta"], **found}
    text.rope_parameters = rope | {"full_attention": scaled_plain} if isinstance(nested, dict) else scaled_plain
    return config


def _is_scaled(rope: dict[str, Any]) -> bool:
    return any(
        _is_scaled(value) if isinstance(value, dict) else key == "rope_type" and value != "default"
        for key, value in rope.items()
    )


def _scaling(facts: Facts, config: Any, plain: dict[str, Any]) -> dict[str, Any] | None:
    """The scaling in transformers' words; None where it has none, or another."""
    kind, factor, context = (facts.scaling.get(name) for name in ("type", "factor", "original_context_length"))
    if (
        facts.others
        or "rope_theta" not in plain
        or any(NEUTRAL.get(name) != value for name, value in facts.scaling.items() if name not in KNOWN)
    ):
        return None
    if facts.factors is not None:
        return _llama3(facts.factors, config, plain)
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and factor and context:
        return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": int(context)}
    return None


def _llama3(factors: np.ndarray, config: Any, plain: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of Llama 3's scaling that give these factors; None if none do."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    trial, largest = deepcopy(config), float(factors.max())
    for context in CONTEXTS:
        found = {"rope_type": "llama3", "factor": largest, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        found |= {"original_max_position_embeddings": context}
        trial.rope_parameters = {"rope_theta": plain["rope_theta"], **found}
        frequencies = ROPE_INIT_FUNCTIONS["llama3"](trial, "cpu")[0].double().numpy()
        usual = plain["rope_theta"] ** -(np.arange(len(frequencies)) / len(frequencies))
        if len(factors) == len(frequencies) and np.allclose(usual / frequencies, factors, rtol=1e-3):
            return found
    return None


def _facts(file: Path) -> Facts:
    stat = file.stat()
    return _read(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)
def _read(file: Path, changed: int, size: int) -> Facts:
    """changed, size: so that a file that is written again is read again."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    scaling = {
        name.rpartition(".rope.scaling.")[2]: field.contents()
        for name, field in reader.fields.items()
        if ".rope.scaling." in name
    }
    older = next((field.contents() for name, field in reader.fields.items() if name.endswith(".rope.scale_linear")), 1)
    if older != 1:
        scaling = {"type": "linear", "factor": older} | scaling
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = np.array(tensors[FACTORS].data, dtype=np.float64).reshape(-1) if FACTORS in tensors else None
    biases = sum(name.endswith(".bias") for name in tensors)
    return Facts(scaling, factors, any(name in tensors for name in OTHER_FACTORS), biases)
