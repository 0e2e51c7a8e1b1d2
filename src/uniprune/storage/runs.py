"""The progress of a long run on disk, so that an interrupted run goes on where it was: what is read is what was written.

    .run-<output>/             beside the output; there while the run works, and after it was interrupted
        lock                   held by the process that works here; the kernel frees it when that process dies
        identity.json          what the run is; a run goes on only as what it began
        <stage>.json           the last commit of a stage: its facts, and what a store keeps beside them
        <stage>/               the tensors of a stage (see tensor_store)

A commit is one atomic replacement of ``<stage>.json``, so a process may be killed at any moment: the last commit stands.
A run that has committed nothing is started again, whatever it was.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from uniprune.common import distributed
from uniprune.errors import InputError, MismatchError
from uniprune.storage import strict_json
from uniprune.storage.files import replacing, sync

KEY = "uniprune"  # marks an identity file as ours
IDENTITY = "identity.json"
LOCK = "lock"
DONE = "done.json"  # committed when the output is complete
PARTIAL = ".partial"  # ends the name of a JSON file that is being written; the lock lets no two write the same
STAGE = re.compile(r"(?!identity$|lock$)[a-z][a-z0-9_-]*")
SHOWN = 60  # characters of a value in an error message
OLDER = "the interrupted run is of an earlier version of uniprune; --overwrite without --resume restarts it"

logger = logging.getLogger(__name__)
_absent = object()


def folder_of(output: Path) -> Path:
    """Where the progress of the run that makes ``output`` lies: beside it, and always the same."""
    output = output if output.name not in ("", "..") else output.resolve()
    return output.parent / f".run-{output.name}"


@contextmanager
def open_run(output: Path, identity: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False) -> Iterator[Run]:
    """The run that makes ``output``, new or resumed; deleted when the ``with`` block ends well, kept when it does not.

    identity: JSON data that says what the run is (settings, model, text, versions).
    With ``resume``, an interrupted run goes on; where there is none, one begins, so that a job may always ask for it. With
    ``overwrite`` alone, an interrupted run is discarded.
    Raises InputError if there is an interrupted run and neither is set, if another process works in its folder, if the folder
    is not ours or damaged; MismatchError, with the settings that differ, if the interrupted run has another identity.
    """
    folder = folder_of(output)
    identity = json.loads(json.dumps(identity))  # as it will be read: lists for tuples, strings for keys
    discard = overwrite and not resume
    with _locked(folder, discard):
        if discard or not _committed(folder):
            folder.chmod(0o700)
            _empty(folder)
            _write(folder / IDENTITY, {KEY: "run", "identity": identity})
            sync(folder.parent)
        elif not resume:
            _refuse(output, identity)
        else:
            _check_identity(folder, identity)
        try:
            yield Run(folder)
        except BaseException:
            if not _committed(folder):
                _delete(folder)
            raise
        _delete(folder)


def check_none_unfinished(output: Path) -> None:
    """Raises InputError if there is an interrupted run of ``output``: for what writes a folder at once, without a run."""
    if identity_of(output) is not None:
        _refuse(output, {})


def _refuse(output: Path, identity: Mapping[str, Any]) -> NoReturn:
    """Raises InputError that says how to go on with what was interrupted: as what it began."""
    begun = (identity_of(output) or {}).get("command")
    ways = "--resume continues it, --overwrite restarts"
    if begun == "permute":  # whose pass is short: it has no --resume
        ways = "--overwrite restarts" if "command" in identity else "uniprune permute --overwrite restarts it"
    elif begun not in (None, identity.get("command")):
        ways = f"uniprune {begun} --resume continues it; or give another output"
    raise InputError(f"unfinished run of {output} found in {folder_of(output)}: {ways}")


def identity_of(output: Path) -> dict[str, Any] | None:
    """What the interrupted run of ``output`` is, None if there is none: one that committed nothing begins again."""
    path = folder_of(output) / IDENTITY
    return dict(_read(path).get("identity", {})) if path.is_file() and _committed(path.parent) else None


def pending(output: Path) -> bool:
    """Whether there is an interrupted run of ``output`` that still has something to do: it did not commit ``done``."""
    folder = folder_of(output)
    return folder.is_dir() and _committed(folder) and not (folder / DONE).is_file()


def held(output: Path) -> int:
    """Bytes of disk that the folder of an interrupted run of ``output`` takes; a file with several names counts once."""
    sizes = {}
    for folder, _, names in os.walk(folder_of(output)):
        for name in names:
            with suppress(FileNotFoundError):  # of a process that works there, which will be found out when the run is opened
                file = os.lstat(os.path.join(folder, name))
                sizes[file.st_ino] = file.st_blocks * 512
    return sum(sizes.values())


def discard(output: Path) -> None:
    """Deletes what is left of a run of ``output``, if anything is."""
    folder = folder_of(output)
    if folder.is_dir():
        with _locked(folder, discard=True):
            _delete(folder)


@contextmanager
def process_run(folder: Path, name: str) -> Iterator[Run]:
    """The run of another process of those that share the run in a folder, with room of its own, deleted afterwards.

    Raises InputError if the folder is not there, as on another machine.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}, which process 0 has made, is not there for this one; on several machines give an output, and set "
            "TMPDIR to a folder, that all of them see"
        )
    own = folder / name
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(mode=0o700)
    try:
        yield Run(own, shared=folder)
    finally:
        shutil.rmtree(own, ignore_errors=True)


@contextmanager
def temporary() -> Iterator[Run]:
    """A run that leaves nothing behind, in a folder that all processes share."""
    first = not distributed.rank()
    with tempfile.TemporaryDirectory(prefix="uniprune-") if first else nullcontext("") as folder:
        place = Path(distributed.all_gather(folder)[0])
        with nullcontext(Run(place)) if first else process_run(place, f"rank-{distributed.rank()}") as run:
            yield Run(run.folder, durable=False, shared=place)
        distributed.barrier()


class Run:
    """The folder of a run, as ``open_run`` gives it; a stage is a part of the run that commits by itself, e.g. ``descent``.

    durable: whether what it commits is to outlive the machine's failures; what nobody will go on with need not. shared: the
    folder of the first of several processes, for what they commit together; this one's own by default.
    """

    def __init__(self, folder: Path, durable: bool = True, shared: Path | None = None) -> None:
        self.folder, self.durable, self.shared = folder, durable, shared or folder

    def aside(self, name: str = "stash") -> Path:
        """A folder for what is put aside between blocks."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return folder

    def facts(self, stage: str) -> dict[str, Any] | None:
        """What was last committed for ``stage``, None if nothing was. Raises InputError if it cannot be read."""
        content = self.read(stage)
        return None if content is None else content["facts"]

    def commit(self, stage: str, facts: Mapping[str, Any]) -> None:
        """Replaces what is known of ``stage``, atomically and durably.

        facts: JSON data; floats come back bit for bit, NaN and infinity too; tuples as lists, keys as strings.
        """
        self.write(stage, {"facts": facts})

    def drop(self, stage: str) -> None:
        """Forgets a stage: it will begin again."""
        self._path(stage).unlink(missing_ok=True)
        shutil.rmtree(self.folder / stage, ignore_errors=True)

    def read(self, stage: str) -> dict[str, Any] | None:
        """The whole content of a stage's file: ``facts``, and what a Store keeps beside them."""
        path = self._path(stage)
        if not path.exists():
            return None
        content = _read(path)
        if not isinstance(content.get("facts"), dict):
            raise damaged(path, "it has no facts")
        return content

    def write(self, stage: str, content: Mapping[str, Any]) -> None:
        _write(self._path(stage), content)

    def _path(self, stage: str) -> Path:
        assert STAGE.fullmatch(stage), stage
        return self.folder / f"{stage}.json"


class Pace:
    """Whether it is time to save again: for runs that hold their state in memory, and write it only now and then.

    share: the part of all time since the start that saving may take.
    """

    FIRST = 5.0  # seconds until the first save

    def __init__(self, share: float = 0.1) -> None:
        self._share, self._start = share, time.monotonic()
        self._spent = self._last = 0.0  # seconds

    def due(self) -> bool:
        """Whether saving stays within its share if it takes as long as the last time."""
        elapsed = time.monotonic() - self._start
        return elapsed >= self.FIRST and self._spent + self._last <= self._share * (elapsed + self._last)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around each save: measures it."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._last = time.monotonic() - start
            self._spent += self._last


# ------------------------------------------------------------------------------------------------------------ the folder


@contextmanager
def _locked(folder: Path, discard: bool) -> Iterator[None]:
    """Makes the folder if it is not there, and keeps all others out of it."""
    lock = _acquire(folder, discard)
    try:
        _check_ours(folder, discard)  # again: what was seen without the lock may have changed
        yield
    finally:
        lock.release()


def _acquire(folder: Path, discard: bool) -> FileLock:
    """The lock of the folder, held. It is the file's, not the name's: filelock gives none on a file that was deleted."""
    for _ in range(10):
        _check_ours(folder, discard)  # before anything is written into it
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()  # makes the folder if it is not there
        except Timeout:
            break
        except (FileExistsError, FileNotFoundError):  # the process that worked here is deleting the folder
            continue
        return lock
    raise InputError(f"another process works in {folder}; wait until it is done, or give another output")


def _check_ours(folder: Path, discard: bool) -> None:
    """Raises InputError unless the folder is a run's, or new: not there, empty, or killed before it had an identity."""
    try:
        ours = stat.S_ISDIR(folder.lstat().st_mode)  # no link to one either
        if ours:
            paths = [*folder.iterdir()]
            names = {path.name for path in paths if _plain(path)}  # what is written to must not lead elsewhere
            known = _has_mark(folder, discard) if IDENTITY in names else names <= {LOCK, IDENTITY + PARTIAL}
            ours = known and len(names) == len(paths)
    except FileNotFoundError:
        return
    if not ours:
        raise InputError(f"{folder}, where the run would keep its progress, was not written by uniprune; move it away")


def _plain(path: Path) -> bool:
    """Whether a path is a file or a folder, and no link to one."""
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _has_mark(folder: Path, discard: bool) -> bool:
    try:
        return KEY in _read(folder / IDENTITY)
    except InputError:
        if discard:
            return True
        raise


def _committed(folder: Path) -> bool:
    return any(path.name != IDENTITY for path in folder.glob("*.json"))


def _empty(folder: Path) -> None:
    """Deletes all but identity and lock. Facts go before the tensors they name: killed in between, nothing is committed."""
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name == DONE)):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (IDENTITY, LOCK):
            path.unlink()


def _delete(folder: Path) -> None:
    """Deletes the folder. The lock goes last: as long as others see anything of the run, they see that it is held."""
    try:
        _empty(folder)
        for name in (IDENTITY, LOCK):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:  # no reason to fail: what is left has committed nothing, and the next run empties it
        logger.warning("%s could not be deleted (%s)", folder, error)
    else:
        with suppress(OSError):  # another process has begun here since the lock's file is gone
            folder.rmdir()


def _check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    differences = "; ".join(_differences(_read(folder / IDENTITY).get("identity"), identity))
    if differences:
        raise MismatchError(
            f"the interrupted run in {folder} is another one: {differences}; give its settings, or --overwrite without --resume"
        )


def _differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    """What differs between two JSON values, e.g. ``recipe.seed was 0, is 1``."""
    if isinstance(there, list) and isinstance(here, list):
        there, here = dict(enumerate(there)), dict(enumerate(here))
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            yield from _differences(there.get(key, _absent), here.get(key, _absent), f"{path}.{key}" if path else str(key))
        return
    was, now = ("absent" if value is _absent else json.dumps(value, sort_keys=True) for value in (there, here))
    if was != now:
        yield f"{path} was {_short(was)}, is {_short(now)}"


def _short(text: str) -> str:
    """Both ends of a long text: hashes differ at once, paths at the end."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}...{text[-SHOWN // 2 :]}"


# ------------------------------------------------------------------------------------------------------------- the disk


def _read(path: Path) -> dict[str, Any]:
    try:
        return strict_json.parse(path.read_bytes())
    except ValueError as error:
        raise damaged(path, error) from None


def damaged(path: Path, why: object) -> InputError:
    """The error for a file of a run that cannot be read."""
    return InputError(f"{path} is damaged ({why}), so the run cannot continue; --overwrite without --resume restarts it")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a JSON file: a reader sees the old content or the new one, even after a loss of power."""
    text = json.dumps(content)
    with (
        replacing(path, path.with_name(path.name + PARTIAL)) as temporary,
        open(temporary, "x", encoding="utf-8", opener=_private) as file,
    ):
        file.write(text)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
