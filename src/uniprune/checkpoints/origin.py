"""Models by name: a Hugging Face folder, a GGUF file, or one of these on the Hub."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch

from uniprune.checkpoints import gguf_files, hub
from uniprune.checkpoints.checkpoint import INDEX, PACKED, WHOLE, Files
from uniprune.checkpoints.hub import Address
from uniprune.checkpoints.protocol import Checkpoint
from uniprune.checkpoints.quantised.formats import Quantised
from uniprune.common import formatting
from uniprune.errors import InputError
from uniprune.storage import strict_json
from uniprune.storage.dtypes import PLAIN
from uniprune.storage.files import path_of

# What goes with weights: no pickle, no code. Licences may ask that they do, and terms of use (*.md).
CARD = "README.md"
WORDS = ("LICEN[CS]E", "Licen[cs]e", "licen[cs]e")
TERMS = (*(f"{start}{word}*" for word in WORDS for start in ("", "*[-_]")), "NOTICE*", "Notice*", "COPYING*")
CODE = ("*.py", "*.sh", "*.exe", "*.so", "*.dll")
WRITTEN = ("", ".txt", ".md", ".rst", ".html", ".pdf")  # endings of terms
COMPANIONS = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.md", *TERMS)
SNAPSHOT = re.compile(r"(?P<home>.*/models--(?P<repository>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40}))(/.*)?")  # in the cache
MODULE = re.compile(r"\w[\w.-]*")  # a folder right inside the model's
TEMPLATES = "additional_chat_templates/*.jinja"  # chat templates with a name, in a folder of their own
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SHOWN = 5  # names in a message


class ModelSource(Protocol):
    """A model as functions are given it: by its files alone (``Origin``), or in memory (``models.loading.Loaded``)."""

    @property
    def origin(self) -> Origin | None:
        """The files that it comes from, if any."""
        ...

    @property
    def checkpoint(self) -> Checkpoint | None:
        """Its weights as they are stored, or would be; None if they are yet to be read from a file in another format."""
        ...


@dataclass(frozen=True)
class Origin:
    """Where a model lies on this machine. ``gguf`` is the file's name inside ``folder``, or None for a Hugging Face folder.

    Of one from the Hub, repository: ``owner/name``; commit: whose files these are. home: another folder that may have its card
    and its licence: the repository's of a part of one, the files' of those that were put together.
    """

    name: str
    folder: Path
    gguf: str | None = None
    repository: str | None = None
    commit: str | None = None
    home: Path | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def path(self) -> Path:
        """The folder, or the GGUF file: what an output must keep away from."""
        return self.folder / self.gguf if self.gguf else self.folder

    @property
    def card(self) -> Path | None:
        """The model's card, if there is one."""
        places = (self.folder, self.home) if self.home else (self.folder,)
        return next((place / CARD for place in places if (place / CARD).is_file()), None)

    @property
    def terms(self) -> list[Path]:
        """Licences and notices that do not lie among the files of a checkpoint folder, which go with it anyway."""
        home = None if self.home == self.folder else self.home
        places = [place for place in (self.folder if self.gguf else None, home) if place is not None]
        every = (file for place in reversed(places) for kind in TERMS for file in place.glob(kind))
        return sorted({file.name: file for file in every if file.is_file() and file.suffix.lower() in WRITTEN}.values())

    @cached_property
    def files(self) -> Files | None:
        """Its safetensors files, whose headers are read once; None for other formats."""
        return None if self.gguf else Files(self.folder)

    @property
    def origin(self) -> Origin:
        return self

    @property
    def checkpoint(self) -> Files | None:
        return self.files

    @property
    def quantised(self) -> Quantised | None:
        """How its files store weights as codes, if they do, and what these stand for is known."""
        found = self.files.quantised if self.files else None
        return found if found and found.tensors else None

    def options(self) -> dict[str, Any]:
        """Keyword arguments for every ``from_pretrained`` of this model: no code that comes with it is run."""
        return {"trust_remote_code": False} | ({"gguf_file": self.gguf} if self.gguf else {})


def resolve(source: str | Path | Origin) -> Origin:
    """Finds a model: a folder, a .gguf file, or one on the Hub (from the cache if it is there, else downloaded).

    One that was found stays as it is. Raises InputError that says what was tried.
    """
    if isinstance(source, Origin):
        return source
    if not isinstance(source, (str, Path)) or not str(source):
        what = "no model was given" if source in (None, "") else f"model is a {type(source).__name__}"
        memory = "in memory, Loaded(model, tokenizer), for prune, calibrate, evaluate, sweep, compare and permute"
        raise InputError(f"{what}; give a folder, a Hub name or a .gguf file, or a model {memory}")
    path = path_of(source)
    if path.is_file():
        return _of_gguf(Origin(str(source), path.parent, path.name, *_cached(path)))
    if path.is_dir():
        origin = Origin(str(source), path, None, *_cached(path))
        _check_files(str(source), _names(path))
        _check_folder(origin)
        return origin
    address = hub.parse(str(source))
    if address is None:
        raise InputError(f"model {str(source)[:200]!r} does not exist here, and is not a Hub name of the form {hub.FORMS}")
    return _from_hub(address)


def _cached(path: Path) -> tuple[str | None, str | None, Path | None]:
    """Repository, commit and home of what lies in the Hub's cache, as ``snapshot_download`` gives its place."""
    found = SNAPSHOT.fullmatch(path.absolute().as_posix())
    return (found["repository"].replace("--", "/"), found["commit"], Path(found["home"])) if found else (None, None, None)


def called(name: str) -> str:
    """What a model is called in what is written about it: "." says where somebody stood, not which model it is."""
    return Path(name).resolve().name or name if Path(name).name in ("", "..") else name


def spelled(source: object) -> str:
    """The name that a model's origin has, whichever way it is given, without a look at the Hub."""
    text = str(source)
    address = None if path_of(text).exists() else hub.parse(text)
    return text if address is None else str(address)


# ------------------------------------------------------------------------------------------------------------------ here


def _of_gguf(origin: Origin) -> Origin:
    """A GGUF file that can be read: itself, or, of several that are one model, what they are together.

    Raises InputError for another kind of file, and for one of several that are not all there.
    """
    path = origin.path
    if path.suffix == ".upz":
        raise InputError(
            f"model {origin} is an archive; unpack it first (uniprune unpack {path} -o FOLDER) and give the folder"
        )
    if path.suffix.lower() != ".gguf":
        raise InputError(f"model {origin} is a file, but not a .gguf one; give the folder it is in: {path.absolute().parent}")
    files = gguf_files.parts(path)
    if len(files) == 1:
        return origin
    size, place = sum(file.stat().st_size for file in files), Path(tempfile.gettempdir())
    if shutil.disk_usage(place).free < size:
        raise InputError(
            f"model {origin} has {len(files)} files, which are put together in {place}, and {formatting.size(size)} are not "
            "free there; make room, set TMPDIR to another place, or merge them with llama.cpp: llama-gguf-split --merge"
        )
    folder = Path(tempfile.mkdtemp(prefix="uniprune-", dir=place))
    merged = replace(origin, folder=folder, gguf=files[0].name, home=origin.home or origin.folder)
    weakref.finalize(merged, shutil.rmtree, folder, ignore_errors=True)  # at the latest when Python ends
    gguf_files.merge(files, merged.path)
    return merged


def _names(folder: Path) -> list[str]:
    """The files of a folder, and those below that say where a model lies; as the Hub would list them."""
    below = [file for kind in ("config.json", "*.[gG][gG][uU][fF]") for file in folder.glob(f"*/{kind}")]
    return [file.relative_to(folder).as_posix() for file in sorted([*folder.iterdir(), *below])]


def _check_files(name: str, files: Collection[str]) -> None:
    """Raises InputError for a folder whose files are no checkpoint, by their names; ``name``: of the folder."""
    here = {file for file in files if "/" not in file}
    weights = [file for file in here if file.endswith((".safetensors", INDEX))]
    if "adapter_config.json" in here:
        raise InputError(f"model {name} is an adapter (PEFT), or has one; merge it (merge_and_unload, save_pretrained) first")
    if "config.json" in here and weights:
        return
    if found := gguf_files.first_parts(files):
        raise InputError(f"model {name} has GGUF files, of which one is a model; give it: {_listed(name, found)}")
    if "config.json" not in here:
        folders = sorted({file.rpartition("/")[0] for file in files if file.endswith("/config.json")})
        if folders:
            raise InputError(f"model {name} has no config.json, but its folders have; give one: {_listed(name, folders)}")
        raise InputError(f"model folder {name} has no config.json; give the folder of a Hugging Face checkpoint")
    pickled = sorted(file for file in here if file.endswith(PICKLES))
    if pickled:
        raise InputError(
            f"model folder {name} has pickled weights alone ({pickled[0]}), which can run code when they are read; where you "
            "trust them, convert them to safetensors and give the new folder: AutoModelForCausalLM.from_pretrained"
            f"({name!r}).save_pretrained(FOLDER) in transformers, its tokenizer likewise"
        )
    raise InputError(f"model folder {name} has no weights (.safetensors)")


def _listed(name: str, files: Sequence[str]) -> str:
    rest = f" and {len(files) - SHOWN} others" if len(files) > SHOWN else ""
    return ", ".join(f"{name.rstrip('/')}/{file}" for file in files[:SHOWN]) + rest


def _check_folder(origin: Origin) -> None:
    """Raises InputError for a folder of a checkpoint that cannot be read."""
    folder = origin.folder
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
        others = sorted(file.name for file in folder.glob("*.safetensors")) or ["weights by other names"]
        raise InputError(
            f"model folder {origin} has {', '.join(others[:3])}, but neither {WHOLE} nor {INDEX}, the names "
            "that transformers loads; rename it"
        )


# ------------------------------------------------------------------------------------------------------------ on the Hub


def _from_hub(address: Address) -> Origin:
    """A model on the Hub: its files are looked at by their names, and those that are needed are downloaded."""
    files = hub.listing(address)
    if address.path.lower().endswith(".gguf"):
        return _gguf_from_hub(address, files)
    inside = f"{address.path}/" if address.path else ""
    if files is not None:
        _check_listing(address, files)
    kinds = [f"{inside}{kind}" for kind in COMPANIONS]
    snapshot = hub.download(address, kinds, ignored=[f"{inside}*/*", *CODE])  # the client's * matches slashes, too
    _fetch_terms(address)
    commit, folder = hub.commit_of(snapshot), snapshot / address.path
    if files is None:
        if not folder.is_dir():
            raise _absent(address, [])
        _check_files(str(address), _names(folder))
    here = files if files is not None else [f"{inside}{file}" for file in _names(folder)]
    weights = [f"{inside}{name}" for name in _weights(folder, whole=f"{inside}{WHOLE}" in here)]
    modules = [f"{inside}{module}/{kind}" for module in module_folders(folder) for kind in (*COMPANIONS, "*.safetensors")]
    if weights:
        hub.download(address._replace(revision=commit or address.revision), [*weights, f"{inside}{TEMPLATES}", *modules])
    origin = Origin(str(address), folder, None, address.repository, commit, snapshot if inside else None)
    _check_folder(origin)
    return origin


def module_folders(folder: Path) -> list[str]:
    """The folders inside a model's that sentence-transformers has further modules in (pooling, dense layers), as its
    ``modules.json`` names them."""
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    paths = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return [path for path in paths if isinstance(path, str) and MODULE.fullmatch(path)]


def _weights(folder: Path, whole: bool) -> list[str]:
    """The safetensors files that transformers loads, of which none need be there yet. whole: whether all of them are one."""
    files = Files(folder)
    if whole and (files.weights is None or files.weights.name == INDEX):
        return [WHOLE]
    return [shard.name for shard in files.shards]


def _check_listing(address: Address, files: Collection[str]) -> None:
    """Raises InputError if what an address names in a repository is no checkpoint, by the names of its files."""
    path = PurePosixPath(address.path)
    if address.path in files:
        folder = address._replace(path="" if len(path.parts) < 2 else path.parent.as_posix())
        raise InputError(f"model {address} is a file, but not a .gguf one; give the folder it is in: {folder}")
    inside = f"{address.path}/" if address.path else ""
    here = [file.removeprefix(inside) for file in files if file.startswith(inside)]
    if not here:
        raise _absent(address, sorted({file.rpartition("/")[0] for file in files if file.endswith("/config.json")}))
    _check_files(str(address), here)


def _gguf_from_hub(address: Address, files: Collection[str] | None) -> Origin:
    wanted = gguf_files.siblings(address.path)
    if files is not None and not {*wanted} <= {*files}:
        raise _absent(address, gguf_files.first_parts(files))
    snapshot = hub.download(address, wanted)
    file = snapshot / address.path
    if not file.is_file():
        raise _absent(address, [])
    _fetch_terms(address)
    return _of_gguf(Origin(str(address), file.parent, file.name, address.repository, hub.commit_of(snapshot), snapshot))


def _fetch_terms(address: Address) -> None:
    """The repository's card and licences, of what is a part of it."""
    if address.path:
        hub.download(address, [CARD, *TERMS], ignored=["*/*", *CODE])


def _absent(address: Address, there: Sequence[str]) -> InputError:
    """The error for a folder or a GGUF file that a repository has not; ``there``: those that it has."""
    root = address._replace(path="")
    others = f"it has {_listed(str(root), there)}" if there else f"see {address.url}/tree/{address.revision or 'main'}"
    return InputError(f"model {address}: {root} has no {address.path}; {others}")


def stored_dtype(origin: Origin, matrices: Iterable[str]) -> torch.dtype | None:
    """The type of a model's matrices on disk, None of codes; what a GGUF file has quantised is float32 here."""
    if origin.quantised:
        return None
    return PLAIN.get(origin.files.stored(next(iter(matrices))).dtype, torch.float32) if origin.files else torch.float32
