"""The tensors of a run on disk, by name, in versions that are committed one after the other.

    <stage>.json                           the last commit: its facts, and the file of each name
    <stage>/<name>.<number>.safetensors    written once, and never changed

Every file that a commit names is on the disk before it. So a process may be killed at any moment: the last commit stands, and
files that it does not name are removed when the store is opened again.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from uniprune.errors import UniPruneError
from uniprune.storage import strict_json
from uniprune.storage.files import sync
from uniprune.storage.runs import Run, damaged

NAME = re.compile(r"[\w.~%-]{0,220}\.\d{1,20}\.safetensors")  # quoted, so that none leads out of the folder


class Store(Mapping[str, dict[str, Tensor]]):
    """Tensors by matrix name, in versions: what is set belongs to the next version, which ``commit`` makes the current one.

    Reads see what this process has set, committed or not; what it does not set, the next version takes over. Several names may
    share a file (``share``). Opened on a stage that has committed, the store goes on from there. Raises InputError if a file of
    the current version is missing or damaged.

    version: the number of commits so far. facts: as last committed, ``{}`` at first.
    """

    def __init__(self, run: Run, stage: str) -> None:
        self._run, self._stage, self._folder = run, stage, run.folder / stage
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._restore()
        for name in self:
            try:
                with self._open(name):
                    pass
            except (OSError, SafetensorError) as error:
                raise damaged(self._folder / self._files[name], error) from None

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        """The tensors of one matrix; they map the file, privately, and outlive it."""
        with self._open(name) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def tensor(self, name: str, key: str) -> Tensor:
        """One of the tensors of a matrix; the others are not read."""
        with self._open(name) as file:
            if key not in file.keys():  # noqa: SIM118
                raise KeyError(key)
            tensor = file.get_tensor(key)
        assert isinstance(tensor, Tensor)
        return tensor

    def __setitem__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes the tensors of one matrix into the next version; none may share memory with another."""
        self._unset(name)  # if this fails, there is none
        self._written += 1
        path = self._folder / f"{quote(name, safe='')}.{self._written}.safetensors"  # no name leads out of the folder
        try:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
        except SafetensorError as error:  # a full disk, for one
            raise UniPruneError(f"{path} could not be written ({error}); what was committed before is kept") from None
        sync(path)
        self._files[name] = path.name

    def share(self, name: str, other: str) -> None:
        """Has ``name`` be in the next version what ``other`` is now, in the same file; it stays that when ``other`` is set."""
        file = self._files[other]
        self._unset(name)
        self._files[name] = file

    def commit(self, facts: Mapping[str, Any]) -> None:
        """Makes the next version the current one, and deletes what it replaces. If this fails, what was set is dropped."""
        sync(self._folder)
        content = {"version": self.version + 1, "written": self._written, "files": dict(self._files), "facts": facts}
        try:
            self._run.write(self._stage, content)
        finally:
            self._restore()

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _restore(self) -> None:
        """Takes over what the disk says, and removes the files that are not of it."""
        first: dict[str, Any] = {"version": 0, "written": 0, "files": {}, "facts": {}}
        content = self._run.read(self._stage) or first
        try:
            strict_json.check(content, {name: type(value) for name, value in first.items()})
            if not all(type(file) is str and NAME.fullmatch(file) for file in content["files"].values()):
                raise ValueError("it names a file that is none of its own")
        except ValueError as error:
            raise damaged(self._folder.with_suffix(".json"), error) from None
        self.version: int = content["version"]
        self.facts: dict[str, Any] = content["facts"]
        self._written: int = content["written"]  # files so far: no two have the same name
        self._files: ChainMap[str, str] = ChainMap({}, content["files"])  # set since the last commit, committed
        current = {*self._files.values()}
        for path in self._folder.iterdir():
            if path.name not in current:
                path.unlink()

    def _unset(self, name: str) -> None:
        """Takes back what was set since the last commit. Tensors read from the file map it still."""
        new, committed = self._files.maps
        file = new.pop(name, None)
        if file is not None and file not in {*new.values(), *committed.values()}:
            (self._folder / file).unlink()

    def _open(self, name: str) -> Any:
        return safe_open(self._folder / self._files[name], framework="pt")
