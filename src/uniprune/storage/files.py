"""Outputs that appear whole or not at all, and the checks whether they may be written."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from uniprune.errors import InputError

REPORT = "pruning.json"  # written last: a folder without it is incomplete
INSTEAD = "give another name, or --overwrite"
OTHER = f"{INSTEAD} without --resume: it is complete, and of other settings or another model"  # to one that is resumed
JUST_MADE = 60  # seconds in which a temporary file may not be locked yet
ADDED = 8  # letters that tempfile adds to a prefix
ROWS = "--resume keeps its rows and adds those that are missing, --overwrite starts over; or give another name"  # of a table


def _umask() -> int:
    """The permissions that new files are not to have; the system tells only who sets others."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


FILE, FOLDER = 0o666 & ~_umask(), 0o777 & ~_umask()  # permissions of what is made to be read


def path_of(name: str | Path) -> Path:
    """A path as it was given, ``~`` being the home folder; as in a shell, that of nobody is an ordinary name."""
    return Path(os.path.expanduser(name))  # pathlib raises RuntimeError for a user that is not known


def check_again_readable(what: str, name: str) -> None:
    """Raises InputError for a pipe or a device, which can be read only once, under the name of a file or folder."""
    path = path_of(name)
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # pathlib raises for long names
        raise InputError(f"{what} {name} is a pipe or a device, which cannot be read twice; write it to a file and give that")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside ``with``, a write that fails (a full disk) says where: the system does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """A temporary path that takes the place of ``path`` when the ``with`` block ends well, and vanishes otherwise.

    Afterwards the file is on the disk, also after a loss of power. temporary: by default beside ``path``, under a name that no
    other process has, and then what killed processes have left there a minute ago is removed; a caller whose folder is locked
    may name one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    public = temporary is None
    if temporary is None:
        _remove_abandoned(path)
        handle, name = tempfile.mkstemp(**_partial(path))
        os.close(handle)
        temporary = Path(name)
    else:
        temporary.unlink(missing_ok=True)
    try:
        with writing(path), _held(temporary) if public else nullcontext():
            yield temporary
            move(temporary, path, FILE if public else None)
    finally:
        temporary.unlink(missing_ok=True)


def _partial(path: Path) -> dict[str, Any]:
    """How ``tempfile`` is to name what will take the place of ``path``: beside it, hidden."""
    return {"prefix": f".partial-{path.name}-", "dir": path.parent}


@contextmanager
def _held(temporary: Path) -> Iterator[None]:
    """Inside ``with``, other processes see that somebody writes here; the system lets go of it when this process dies."""
    handle = os.open(temporary, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)  # for a moment another process may have it, to see whether anybody does
        yield
    finally:
        os.close(handle)


def _remove_abandoned(path: Path) -> None:
    """Deletes what processes that were killed have left of an output at ``path``: all that nobody holds any more."""
    where = _partial(path)
    for left in where["dir"].glob(f"{glob.escape(where['prefix'])}{'?' * ADDED}"):
        with suppress(OSError):  # somebody writes there, or has just finished
            handle = os.open(left, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(handle).st_mtime > JUST_MADE:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(handle)


def move(path: Path, target: Path, mode: int | None = None) -> None:
    """Puts a file, on the same disk, in the place of another: whoever looks sees the old one or the whole new one.

    mode: its permissions from then on; until it is complete nobody else may read it.
    """
    sync(path)
    if mode is not None:
        path.chmod(mode)
    os.replace(path, target)
    sync(target.parent)


def check_output_file(
    path: Path, overwrite: bool, *sources: Path, suffix: str = ".safetensors", instead: str = INSTEAD
) -> None:
    """Raises InputError if ``path`` exists and may not be replaced, or may not be written, before any work is done.

    sources: files and folders that are read meanwhile, and never written to. instead: what to do about one that exists.
    """
    if path.suffix != suffix:
        raise InputError(f"output {path} would be a {suffix[1:]} file; let its name end in {suffix}")
    if path.is_dir():
        raise InputError(f"output {path} is a folder; give a file name")
    here = path.resolve()
    for source in sources:
        if any(here.is_relative_to(place) for place in _places(source)):
            raise InputError(f"output {path} is, or lies in, the input {source}; give another place")
    if path.exists() and not overwrite:
        raise InputError(f"output {path} exists; {instead}")
    check_place(path)


def check_place(path: Path) -> None:
    """Raises InputError unless an output may be made at ``path``: below folders only, and where one may write."""
    parent = path.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"output {path} cannot be made: nothing can be written in {parent}; give another place")


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a result file, at once or not at all."""
    with replacing(path_of(path)) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _places(source: Path) -> Iterator[Path]:
    """Where an input lies, links followed; of a folder also the files that links in it lead to, as in the Hub's cache."""
    yield source.resolve()
    if source.is_dir():
        yield from (path.resolve() for path in source.rglob("*") if path.is_symlink() and path.is_file())


def check_output_folder(
    path: Path,
    overwrite: bool,
    source: Path | None = None,
    inputs: Iterable[Path] = (),
    mark: str = REPORT,
    replaced: bool = True,
    instead: str = INSTEAD,
) -> None:
    """Raises InputError if ``path`` may not become an output folder, before any work is done.

    Only folders that this package wrote (or empty ones) are ever replaced, however the flags are set. source: the model;
    inputs: other files and folders that are read. mark: the file that tells that it wrote one. replaced: whether another folder
    will take its place, instead of files in it. instead: what to do about one that exists.
    """
    here = path.resolve()
    if source is not None and any(here.is_relative_to(there) or there.is_relative_to(here) for there in _places(source)):
        raise InputError(f"output {path} and model {source} overlap; give another output folder")
    for given in inputs:
        if any(place.is_relative_to(here) for place in _places(given)):
            raise InputError(f"output {path} would take the place of the input {given}; give another output folder")
    if path.is_symlink():
        raise InputError(f"output {path} is a link, which is not followed; give the folder itself")
    if path.exists() and not path.is_dir():
        raise InputError(f"output {path} is a file; give the name of a folder")
    mounted = os.path.ismount(path.resolve())
    if replaced and (mounted or Path.cwd().is_relative_to(path.resolve())):
        what = "a mount point" if mounted else "the working folder, or above it"
        raise InputError(f"output {path} is {what}, whose place no other folder can take; give a new one, {path / 'out'} say")
    _check_replaceable(path, mark)
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise InputError(f"output folder {path} exists; {instead}")
    check_place(path)


def _check_replaceable(path: Path, mark: str) -> None:
    """Raises InputError for a folder that this package did not write, unless it is empty, and for what is no folder."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"output {path} is no folder; give another name")
    if path.is_dir() and any(path.iterdir()) and not (path / mark).is_file():
        raise InputError(f"output folder {path} exists and was not written by uniprune; give another name")


def check_disk_space(path: Path, needed: int, held: int = 0) -> None:
    """Raises InputError if the disk that ``path`` lies on has less than ``needed`` bytes free.

    held: bytes on it that an interrupted run has, which the run that goes on or starts over uses or frees.
    """
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free + held
    if free < needed:
        raise InputError(f"output {path} needs {-(-needed // 10**6):,} MB of disk, {free // 10**6:,} MB are free; make room")


@contextmanager
def new_folder(path: Path, inside: Path | None = None, mark: str = REPORT) -> Iterator[Path]:
    """A temporary folder that takes the place of ``path`` when the ``with`` block ends well, and vanishes otherwise.

    inside: where it lies, on the same disk: the folder of a run, so that who goes on with a killed run removes it; by default
    beside ``path``, where what killed processes have left is removed. mark: as in :func:`check_output_folder`.
    Raises InputError if somebody has put other files at ``path`` meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in inside.glob("output-*") if inside else ():
        shutil.rmtree(left)
    where = {"prefix": "output-", "dir": inside} if inside else _partial(path)
    if not inside:
        _remove_abandoned(path)
    temporary = Path(tempfile.mkdtemp(**where))
    try:
        with _held(temporary):
            with writing(path):
                yield temporary
            temporary.chmod(FOLDER)
            _check_replaceable(path, mark)
            for written in (*temporary.rglob("*"), temporary):
                sync(written)
            _put_in_place(temporary, path, where)
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(folder: Path, path: Path, where: Mapping[str, Any]) -> None:
    """Moves a folder to ``path``. One that is there is then where the new one was, deleted, or there again if that fails."""
    if not path.exists():
        os.replace(folder, path)
        return
    if path.is_dir() and not path.is_symlink() and _exchanged(folder, path):
        return
    retired = Path(tempfile.mkdtemp(**where))
    try:
        os.replace(path, retired)
        os.replace(folder, path)
    except BaseException:
        if not path.exists():
            os.replace(retired, path)
        elif not folder.exists():  # it is in its place
            shutil.rmtree(retired)
        with suppress(OSError):
            retired.rmdir()  # if it is empty: else what is in it is nowhere else
        raise
    shutil.rmtree(retired)


def _exchanged(one: Path, other: Path) -> bool:
    """Swaps two folders in one step, so that there is always one at either path; False where the system has no such step."""
    system: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    first, second, swap = os.fsencode(one), os.fsencode(other), ctypes.c_uint(2)
    if hasattr(system, "renameat2"):  # Linux: RENAME_EXCHANGE
        here = ctypes.c_int(-100)  # AT_FDCWD
        return bool(system.renameat2(here, first, here, second, swap) == 0)
    if hasattr(system, "renamex_np"):  # macOS: RENAME_SWAP
        return bool(system.renamex_np(first, second, swap) == 0)
    return False


def sync(path: Path) -> None:
    """Returns when a file, or the list of the files in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_if_there(path: Path) -> None:
    """The same for another thread, of a file that may be deleted or replaced meanwhile."""
    with suppress(FileNotFoundError):
        sync(path)


def changed(path: Path) -> float:
    """When a file, or the newest of the files in a folder and below it, was last written, in seconds since the epoch.

    Hidden files, which nothing reads, do not count, nor links to nothing.
    """
    if not path.is_dir():
        return path.stat().st_mtime
    seen = (file for file in path.rglob("*") if not any(part.startswith(".") for part in file.relative_to(path).parts))
    return max((file.stat().st_mtime for file in seen if file.exists()), default=0.0)


def readers() -> int:
    """How many threads read, hash and write files: as many as this process may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def announce(path: Path, start: int = 0, stop: int | None = None) -> None:
    """Tells the system that bytes of a file will be read, so that it reads them meanwhile, where it can be told."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), start, 0 if stop is None else stop - start, os.POSIX_FADV_WILLNEED)
