"""Processes that start in milliseconds: they are forked from one that has imported everything, which takes others many seconds.

That one is started when it is first asked for, once per process of pytest, and has done nothing but imports.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pkgutil
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import TCPStore

import quick
import uniprune

TIMEOUT = 600  # seconds, after which processes that wait for each other say where, and end

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "pytest",
        "rich.table",
        "torch.distributed.tensor",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
        *(
            module.name
            for module in pkgutil.walk_packages(uniprune.__path__, "uniprune.")
            if module.name != "uniprune.__main__"
        ),
    ]
)


def start(work: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """A process that does ``work(connection, *arguments)``, and the connection to it."""
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, *arguments), daemon=True)
    process.start()
    there.close()
    return process, here


def stop(process: BaseProcess) -> None:
    process.kill()
    process.join()


def said(connection: Connection) -> Iterator[Any]:
    """All that a process that is no more has sent."""
    with connection:
        while True:
            try:
                yield connection.recv()
            except EOFError:
                return


class Done(NamedTuple):
    """How a process ended: its exit code, or minus the signal that killed it, and what it wrote."""

    code: int
    out: str
    err: str


class Forked:
    """A process that does ``work(*arguments)``, as a script would: what it writes is kept, an exception is its exit code."""

    def __init__(self, work: Callable[..., Any], *arguments: Any, folder: Path | None = None, **environment: str):
        self.written = tempfile.TemporaryDirectory()
        where = Path(self.written.name), folder or Path.cwd()
        for name in ("out", "err"):  # there also if it is killed before it has begun
            (where[0] / name).touch()
        self.process = context.Process(target=_begin, args=(*where, environment, work, arguments), daemon=True)
        self.process.start()

    def wait(self, seconds: float | None = None) -> Done:
        """Until it ends, or is killed after ``seconds``."""
        self.process.join(seconds)
        stop(self.process)
        assert self.process.exitcode is not None
        with self.written as written:
            return Done(self.process.exitcode, *((Path(written) / name).read_text() for name in ("out", "err")))


def _begin(
    written: Path, folder: Path, environment: dict[str, str], work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    for name, handle in (("out", 1), ("err", 2)):
        os.dup2(os.open(written / name, os.O_WRONLY | os.O_CREAT), handle)
    os.chdir(folder)
    os.environ.update(environment)
    quick.without_waiting()
    work(*arguments)


def command(*words: Any) -> None:
    """The command line."""
    from uniprune.cli import main

    sys.argv = ["uniprune", *map(str, words)]
    main.main()


def script(path: Path, *words: Any) -> None:
    """A Python file, as ``python path words`` runs it."""
    sys.argv = [str(path), *map(str, words)]
    sys.path[0] = str(path.parent)
    runpy.run_path(str(path), run_name="__main__")


def together(count: int, work: Callable[..., Any], *arguments: Any) -> list[Done]:
    """How ``count`` processes ended that each did ``work(*arguments)``, and talked to each other as those of ``torchrun``."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    group = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(count)}
    group |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    ranks = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [one.wait() for one in [Forked(_watched, work, *arguments, **rank) for rank in ranks]]


def torchrun(count: int, work: Callable[..., Any], *arguments: Any) -> Forked:
    """``torchrun --standalone`` itself, which watches over ``count`` forked processes that each do ``work(*arguments)``."""
    return Forked(_launch, count, work, arguments)


def _launch(count: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    multiprocessing.current_process().daemon = False  # one may not have children
    place = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(os.getpid())}
    elastic_launch(LaunchConfig(1, 1, count, **place, max_restarts=0, start_method="fork", monitor_interval=0.05), work)(
        *arguments
    )


def _watched(work: Callable[..., Any], *arguments: Any) -> None:
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    work(*arguments)


def touches(folder: Path, touched: Callable[[int], None]) -> None:
    """From now on ``touched(n)`` is called just before this process changes the folder on disk for the ``n``-th time."""
    count = 0

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        reads = name == "open" and arguments[1] in ("r", "rb")
        if name not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") or reads:
            return
        if str(arguments[0]).startswith(str(folder)):
            touched(count)
            count += 1

    sys.addaudithook(watch)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end() -> None:
    """Ends the process that the others are forked from, and waits for it."""
    forkserver._forkserver._stop()
