"""The command line: its commands, and how it ends. A command's module is loaded when the command is called, not before."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
from importlib import import_module
from keyword import iskeyword
from typing import NoReturn

import click

from uniprune.errors import InputError, UniPruneError

# What is wrong with a path, not with a machine.
PATHS = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS}

# Commands: the module of uniprune.cli that has the function of this name, and what the command does.
MASKS = {
    "verify": ("masks", "Check that a masks file is complete, has its pattern, and belongs to a model."),
    "diff": ("masks", "Count the weights that two files both keep, and those that only one of them keeps."),
    "intersect": ("masks", "Keep the weights that all files keep."),
    "union": ("masks", "Keep the weights that any file keeps."),
    "stats": ("masks", "Show the sparsity of each matrix and block, empty rows and columns, and whether 2:4 holds."),
    "import": ("masks", "Make a masks file of another tool's masks, or of the zeros of a pruned checkpoint."),
    "export": ("masks", "Write masks as other tools read them."),
}
COMMANDS = {
    "plan": (
        "prune",
        "Show which linear layers would be pruned, whether they support the pattern, time and memory; write nothing.",
    ),
    "calibrate": (
        "prune",
        "Score every prunable weight, for masks of any sparsity; better ones for the sparsity that --sparsity names.",
    ),
    "mask": ("prune", "Create masks of one sparsity from scores."),
    "apply": ("prune", "Write the pruned checkpoint of a model from masks."),
    "prune": ("prune", "Calibrate, create masks and write the pruned checkpoint, in one go."),
    "permute": (
        "prune",
        "Reorder the channels of a model for N:M pruning, and write the equivalent dense model.",
    ),
    "evaluate": ("evaluate", "Measure token perplexity or zero-shot accuracy of a model or of an output folder."),
    "sweep": (
        "evaluate",
        "Create masks of many sparsities from one scores file; measure perplexity and packed size of each.",
    ),
    "compare": (
        "compare",
        "Fill a table: the dense model and each method at each sparsity, calibrated and evaluated in one way; write no model.",
    ),
    "pack": ("package", "Pack a pruned checkpoint, without loss: into one smaller file (.upz), or to run it (--runtime)."),
    "unpack": ("package", "Unpack an archive into the folder it was made of, and verify every file."),
    "card": ("package", "Rewrite a checkpoint's model card, with results; upload the folder if asked to."),
    "bench": (
        "evaluate",
        "Measure whether a pruned model would be faster on this machine: its matrix products, dense and by sparse kernels.",
    ),
    "report": ("evaluate", "Put results on one HTML page: figures, plots, tables and the evaluation protocol."),
}


SETTINGS = {"max_content_width": 120, "help_option_names": ["-h", "--help"]}


class Commands(click.Group):
    """Commands that are made when they are called. Listed are their names and what they do, for which nothing is loaded."""

    def __init__(self, name: str, help: str, table: dict[str, tuple[str, str]], *groups: Commands) -> None:
        super().__init__(name, help=help, no_args_is_help=True, context_settings=SETTINGS)
        self._table, self._groups = table, {group.name: group for group in groups}
        self.commands.update({name: click.Command(name) for name in self.list_commands()})  # what a misspelled one may mean

    def list_commands(self, ctx: click.Context | None = None) -> list[str]:
        return [*self._table, *map(str, self._groups)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self._table:
            return self._groups.get(name)
        from uniprune.cli.options import Command

        module, help = self._table[name]
        function = f"{name}_" if iskeyword(name) else name
        return Command(name, help, getattr(import_module(f"uniprune.cli.{module}"), function))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, help) for name, (_, help) in self._table.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows + [(str(name), str(group.help)) for name, group in self._groups.items()])


app = Commands(
    "uniprune",
    "Prunes language models after training: calibrate once, create masks of any sparsity, keep every remaining weight's bits.",
    COMMANDS,
    Commands("masks", "Verify, compare, combine, count, import and export masks files.", MASKS),
)


def _show_versions(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from uniprune.common.provenance import versions

        click.echo("\n".join(f"{name} {version}" for name, version in versions().items()))
        ctx.exit()


app.params.append(
    click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_show_versions,
        help="Show the versions of uniprune and of what results depend on, and exit.",
    )
)


def main() -> NoReturn:
    """Runs the command line: exit code 0 done, 2 bad input (one line on stderr), 1 anything else."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # who started this has closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # results are shown, and some are nowhere else, whatever the locale can write
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if "RANK" not in os.environ:  # torchrun's way to end a process that waits for others must not wait for Python
        signal.signal(signal.SIGTERM, lambda *_: _fail("terminated", 128 + signal.SIGTERM))  # what is half written is removed
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup has it ignored
            signal.signal(signal.SIGHUP, _hang_up)
    try:
        code = app.main(prog_name="uniprune", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 1)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except InputError as error:
        _fail(str(error), 2)
    except UniPruneError as error:
        _fail(str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        reason = ". ".join(str(error).split(". ")[:2])
        _fail(f"out of memory ({reason}); lower --length, --max-memory or the tokens of a step (--set batch_tokens=N)", 1)
    except OSError as error:  # a full disk, a folder that may not be written
        if error.strerror is None:
            raise
        if error.errno in PATHS:
            _fail(f"{str(error.filename)[-200:]}: {error.strerror}; give another path", 2)
        remedy = "mend that and run the command again, with --resume if it has begun a run that can go on"
        _fail(f"{error.filename or 'the disk'}: {error.strerror}; {remedy}", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _is_of_memory(error: Exception) -> bool:
    """Whether memory ran out: Python's, a GPU's or, as torch says it, the CPU's. torch is not imported for it."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def _hang_up(*_: object) -> NoReturn:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the shell sends it, too: what is half written is removed meanwhile
    _fail("terminated: its terminal was closed", 128 + signal.SIGHUP)


def _fail(message: str, code: int) -> NoReturn:
    try:
        sys.stderr.write("error: " + " ".join(message.split())[:2000] + "\n")
        sys.stderr.flush()
    except OSError:  # of a terminal that is closed
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.exit(code)


if __name__ == "__main__":
    main()
