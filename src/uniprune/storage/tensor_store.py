"""The tensors of a run on disk, by name, in versions that are committed one after the other.

    <stage>.json                           the last commit: its facts, and the file of each name
    <stage>/<name>.<number>.safetensors    written once, and never changed

Every file that a commit names is on the disk before it: they go there while the process works on, and the commit waits for the
rest. So a process may be killed at any moment: the last commit stands, and files that it does not name are removed when the
store is opened again. What is read in the same order again and again, as in the steps of a descent, is read ahead.
"""

from __future__ import annotations

import errno
import os
import re
from collections import ChainMap
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from uniprune.common import distributed
from uniprune.errors import UniPruneError
from uniprune.storage import strict_json
from uniprune.storage.files import announce, sync, sync_if_there
from uniprune.storage.runs import Run, damaged
from uniprune.storage.stash import moved

FULL = f"(os error {errno.ENOSPC})"  # as safetensors says it
HOST = torch.device("cpu")
NAME = re.compile(r"[\w.~%-]{0,220}\.\d{1,20}\.safetensors")  # quoted, so that none leads out of the folder


class Store(Mapping[str, dict[str, Tensor]]):
    """Tensors by matrix name, in versions: what is set belongs to the next version, which ``commit`` makes the current one.

    Reads see what this process has set, committed or not; what it does not set, the next version takes over. Several names may
    share a file (``share``). Opened on a stage that has committed, the store goes on from there. Raises InputError if a file of
    the current version is missing or damaged.

    shared: among all processes (``common.distributed``). Each then sets names that no other sets, and reads those, and what was
    committed by any; all open it, and commit, together.
    version: the number of commits so far. facts: as last committed, ``{}`` at first.
    """

    def __init__(self, run: Run, stage: str, shared: bool = False) -> None:
        place = run.shared if shared else run.folder
        self._run, self._stage, self._folder = Run(place, run.durable), stage, place / stage
        self._processes = distributed.count() if shared else 1
        self._leads = self._processes == 1 or not distributed.rank()
        self._disk, self._syncs = ThreadPoolExecutor(1), list[Future[None]]()
        self._read, self._next = ("", ""), dict[tuple[str, str], str]()  # the names read last; what was read after such two
        if self._leads:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._load()
            self._tidy()
        if self._processes > 1:
            distributed.barrier()
            self._load()
        for name in self:
            try:
                with self._open(name):
                    pass
            except (OSError, SafetensorError) as error:
                raise damaged(self._folder / self._files[name], error) from None

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        """The tensors of one matrix; they map the file, privately, and outlive it."""
        self._read_ahead(name)
        with self._open(name) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def tensor(self, name: str, key: str) -> Tensor:
        """One of the tensors of a matrix; the others are not read."""
        self._read_ahead(name)
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
            save_file({key: moved(tensor.detach(), HOST).contiguous() for key, tensor in tensors.items()}, path)
        except SafetensorError as error:
            if FULL in str(error):  # what would be raised if Python wrote the file
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
            raise UniPruneError(f"{path} could not be written ({error}); what was committed before is kept") from None
        if self._run.durable:
            self._syncs.append(self._disk.submit(sync_if_there, path))
        self._files[name] = path.name

    def share(self, name: str, other: str) -> None:
        """Has ``name`` be in the next version what ``other`` is now, in the same file; it stays that when ``other`` is set."""
        file = self._files[other]
        self._unset(name)
        self._files[name] = file

    def commit(self, facts: Mapping[str, Any]) -> None:
        """Makes the next version the current one, and deletes what it replaces. If this fails, what was set is dropped.

        Of several processes that share the store all commit at once, each what it has set, and the first one's facts count.
        """
        if self._run.durable:
            self._wait()
        files, written = dict(self._files), self._written
        if self._processes > 1:
            set_by = distributed.all_gather((dict(self._files.maps[0]), self._written))
            files = dict(self._files.maps[1]) | {name: file for new, _ in set_by for name, file in new.items()}
            written = max(count for _, count in set_by)
        try:
            if self._leads:
                if self._run.durable:
                    sync(self._folder)
                content = {"version": self.version + 1, "written": written, "files": files, "facts": facts}
                self._run.write(self._stage, content)
        finally:
            self._load()
            if self._leads:
                self._tidy()
        if self._processes > 1:
            distributed.barrier()
            self._load()

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _load(self) -> None:
        """Takes over what the disk says."""
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

    def _tidy(self) -> None:
        """Removes files that are not of the current version."""
        current = {*self._files.values()}
        for path in self._folder.iterdir():
            if path.name not in current:
                path.unlink()

    def _wait(self) -> None:
        """Until all that was set is on the disk."""
        try:
            for done in self._syncs:
                done.result()
        except OSError as error:
            raise UniPruneError(f"{self._folder} could not be written ({error}); what was committed before is kept") from None
        finally:
            self._syncs.clear()

    def _read_ahead(self, name: str) -> None:
        """Tells the system what will be read next, if it is as it was the last time."""
        self._next[self._read], self._read = name, (self._read[1], name)
        coming = self._files.get(self._next.get(self._read, ""))
        if coming is not None:
            announce(self._folder / coming)

    def _unset(self, name: str) -> None:
        """Takes back what was set since the last commit. Tensors read from the file map it still."""
        new, committed = self._files.maps
        file = new.pop(name, None)
        if file is not None and file not in {*new.values(), *committed.values()}:
            (self._folder / file).unlink()

    def _open(self, name: str) -> Any:
        return safe_open(self._folder / self._files[name], framework="pt")
