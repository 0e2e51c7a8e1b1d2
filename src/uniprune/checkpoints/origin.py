"""Models by name: a Hugging Face folder, a hub name or a GGUF file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from uniprune.checkpoints.checkpoint import INDEX, PACKED, WHOLE, Files
from uniprune.checkpoints.quantised.formats import Quantised
from uniprune.errors import InputError, first_line
from uniprune.storage import strict_json

HUB_FILES = ["README.md", "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # no pickle, no code
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Origin:
    """Where a model lies on this machine. ``gguf`` is the file's name inside ``folder``, or None for a Hugging Face folder."""

    name: str
    folder: Path
    gguf: str | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def path(self) -> Path:
        """The folder, or the GGUF file: what an output must keep away from."""
        return self.folder / self.gguf if self.gguf else self.folder

    @cached_property
    def files(self) -> Files | None:
        """Its safetensors files, whose headers are read once; None for other formats."""
        return None if self.gguf else Files(self.folder)

    @property
    def quantised(self) -> Quantised | None:
        """How its files store weights as codes, if they do, and what these stand for is known."""
        found = self.files.quantised if self.files else None
        return found if found and found.tensors else None

    def options(self) -> dict[str, Any]:
        """Keyword arguments for every ``from_pretrained`` of this model: no code that comes with it is run."""
        return {"trust_remote_code": False} | ({"gguf_file": self.gguf} if self.gguf else {})


def resolve(source: str | Path) -> Origin:
    """Finds a model: a folder, a .gguf file, or a hub name (from the cache if it is there, else downloaded).

    Raises InputError that says what was tried.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"model {source} is a file, but not a .gguf one; give the folder it is in")
        return Origin(str(source), path.parent, path.name)
    folder = path if path.is_dir() else _from_hub(str(source))
    origin = Origin(str(source), folder)
    _check_folder(origin)
    return origin


def _check_folder(origin: Origin) -> None:
    """Raises InputError for a folder that holds no model, or one that could only be read by unpickling it."""
    folder = origin.folder
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"model {origin} is an adapter (PEFT), or has one; merge it (merge_and_unload, save_pretrained) first")
    if not (folder / "config.json").is_file():
        raise InputError(f"model folder {origin} has no config.json; give the folder of a Hugging Face checkpoint")
    for file in folder.iterdir():
        if file.exists() and not file.is_file() and not file.is_dir():
            raise InputError(f"{file} is neither a file nor a folder; remove it")
    try:
        strict_json.parse((folder / "config.json").read_bytes())
    except ValueError as error:
        raise InputError(f"{folder / 'config.json'} is damaged: {error}; fetch the checkpoint again") from None
    if origin.files is not None and not origin.files.shards:
        if (folder / PACKED).is_file():
            raise InputError(
                f"model folder {origin} is in the runtime layout, which uniprune.accelerate opens; give the pruned checkpoint "
                "that it was made of"
            )
        if others := sorted(file.name for file in folder.glob("*.safetensors")):
            raise InputError(
                f"model folder {origin} has {', '.join(others[:3])}, but neither {WHOLE} nor {INDEX}, the names "
                "that transformers loads; rename it"
            )
        if any(file for kind in PICKLES for file in folder.glob(kind)):
            raise InputError(
                f"model folder {origin} has pickled weights alone, which can run code when they are read; convert them to "
                "safetensors (load the model with transformers where you trust it, and save_pretrained)"
            )
        raise InputError(f"model folder {origin} has no weights (.safetensors)")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith(".") or name.endswith(".gguf"):
        # Not a hub name ("owner/model"), so it was meant as a path.
        raise InputError(f"model {name[:200]!r} does not exist here, and is not a hub name of the form owner/model")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client's errors have no base class short of this
        reason = first_line(error)
        raise InputError(f"model {name!r} is no folder here and could not be downloaded from the Hub: {reason}") from error
