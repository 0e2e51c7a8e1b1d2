"""The command line, run inside the process of the tests."""

import sys

import pytest

from uniprune.cli import main


def run(capsys, monkeypatch, *arguments):
    """Exit code, stdout and stderr of a command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["uniprune", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err
