"""Other people's libraries, each in an environment of its own under the system's temporary folder, where it stays.

They need versions of packages that ours does not have, and each other's; nothing of theirs is a dependency of uniprune.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HOME = Path(tempfile.gettempdir()) / "uniprune-peers"
TORCH = "torch==2.13.0"  # first and alone: a plain `torch` can pull several GB of CUDA packages
TAIL = 3000  # characters of what a failed command printed


class PeerError(RuntimeError):
    """An installation or a run of another library failed; the text is the end of what it printed."""


def environment(name: str, *installs: Sequence[str]) -> Path:
    """The Python of an environment; made if there is none with just these packages.

    installs: the arguments of one ``pip install`` each, in order. Raises PeerError if one fails.
    """
    folder, wanted = HOME / name, {"python": sys.version.split()[0], "installs": [list(one) for one in installs]}
    note, python = folder / "installed.json", folder / "bin" / "python"
    if not note.exists() or json.loads(note.read_text()) != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        for arguments in installs:
            call([python, "-m", "pip", "install", "--quiet", "--no-compile", *arguments])
        note.write_text(json.dumps(wanted))
    return python


def run(python: Path, script: str, *arguments: str | Path, **variables: str) -> Any:
    """What a script beside this one prints in its last line, as JSON. Raises PeerError if it fails."""
    printed = call([python, Path(__file__).with_name(script), *arguments], **variables)
    return json.loads(printed.splitlines()[-1])


@contextmanager
def worker(python: Path, script: str, *arguments: str | Path) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """A process of a script beside this one that answers requests, a line of JSON each; PeerError once it has failed."""
    command = list(map(str, (python, Path(__file__).with_name(script), *arguments)))
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command, env=surroundings(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
        ) as process,
    ):
        assert process.stdin
        assert process.stdout

        def ask(request: dict[str, Any]) -> Any:
            print(json.dumps(request), file=process.stdin, flush=True)
            if not (answer := process.stdout.readline()):
                said.seek(0)
                raise PeerError(f"{script} failed:\n{said.read()[-TAIL:]}")
            return json.loads(answer)

        yield ask


def surroundings(**variables: str) -> dict[str, str]:
    """The variables that other libraries run under: they see no hub, and none of our packages."""
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", **variables}
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | settings


def call(command: Sequence[str | Path], **variables: str) -> str:
    """What a command prints."""
    done = subprocess.run(list(map(str, command)), env=surroundings(**variables), capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(f"{command[0]} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-TAIL:]}")
    return done.stdout
