"""What the command line shows: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from uniprune.storage.record import Record

Item = TypeVar("Item")


class Bars:
    """Progress bars on stderr for people; nothing where stderr is not a terminal."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._task: TaskID | None = None  # the bar that is drawn now

    def __enter__(self) -> Bars:
        if sys.stderr.isatty() and first():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            label, note = (TextColumn(f"{{task.{what}}}", markup=False) for what in ("description", "fields[note]"))
            columns = label, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note
            self._bar = Progress(*columns, console=console(stderr=True))
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
        if self._bar is None:
            yield from items
            return
        outer, task = self._task, self._bar.add_task(label, total=total, note="")
        self._task, self._tokens = task, 0
        try:
            for item in items:
                yield item
                self._bar.advance(task)
        finally:
            self._task = outer
            if outer is not None:  # a bar within another one has said what it had to
                self._bar.remove_task(task)

    def note(self, text: str, tokens: int = 0) -> None:
        if self._bar and self._task is not None:
            self._tokens += tokens
            seconds = next(task.elapsed for task in self._bar.tasks if task.id == self._task)
            speed = f", {self._tokens / seconds:,.0f} tokens/s" if self._tokens and seconds else ""
            self._bar.update(self._task, note=text + speed)


def quiet() -> None:
    """Keeps the bars and advice of the libraries below off the terminal: ours say what users need."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the GGUF reader; ours are not tqdm's
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    transformers_logging.disable_progress_bar()


def first() -> bool:
    """Whether this is the first of the processes that ``torchrun`` started, or the only one: the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def show(result: Record | dict[str, Any], as_json: bool, *shown: Any) -> None:
    """Prints a result as one JSON object, or what is shown of it to people."""
    if as_json:
        sys.stdout.write(json.dumps(result if isinstance(result, dict) else result.record()) + "\n")
        return
    out = console()
    for item in shown:
        out.print(item, highlight=False, soft_wrap=isinstance(item, str))  # a path is not to be broken


def console(**settings: Any) -> Console:
    """The terminal. Names and text of others are shown as they are: what stands in brackets or between colons is no markup."""
    from rich.console import Console

    return Console(markup=False, emoji=False, **settings)
