"""Where outputs may be made, and what becomes of them when something is in their way."""

import os
import pty
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import uniprune
from command import run
from uniprune import InputError, Recipe
from uniprune.storage import files

SMALL = ("-s", "2:4", "--metric", "magnitude", "--controller", "none", "--windows", "2", "--length", "32")


@pytest.mark.parametrize("output", [".", "..", "../here", "sub/.."])
def test_the_working_folder_is_no_output(capsys, monkeypatch, folder, tmp_path, output):
    """No other folder can take its place; and that would be known after all the work."""
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    monkeypatch.chdir(here)
    code, _, errors = run(capsys, monkeypatch, "prune", str(folder), *SMALL, "-o", output)
    assert code == 2
    assert "the working folder, or above it" in errors or "not written by uniprune" in errors
    assert sorted(os.listdir(tmp_path)) == ["here"]


def test_a_mount_point_is_no_output(monkeypatch, tmp_path):
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="is a mount point, whose place no other folder can take"):
        files.check_output_folder(tmp_path / "out", overwrite=False)
    files.check_output_folder(tmp_path / "out" / "pruned", overwrite=False)


def test_what_somebody_puts_there_meanwhile_stays(folder, tmp_path, monkeypatch):
    """A folder that was not there when the run began is not ours to replace; what was calibrated is kept."""
    write = uniprune.entrypoints.prune.writer.write_checkpoint

    def slowly(*given):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        write(*given)

    monkeypatch.setattr("uniprune.artefacts.writer.write_checkpoint", slowly)
    recipe = Recipe(sparsity="2:4", metric="wanda", controller="none", windows=2, length=32)
    with pytest.raises(InputError, match="was not written by uniprune"):
        uniprune.prune(str(folder), recipe, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["notes.txt"]


@pytest.mark.parametrize("mask", ["077", "022"])
def test_outputs_have_the_permissions_that_new_files_have(folder, tmp_path, mask):
    command = f"umask {mask}; exec {sys.executable} -m uniprune prune {folder} {' '.join(SMALL)} -o {tmp_path / 'out'}"
    subprocess.run(["sh", "-c", command], check=True, capture_output=True)
    for path in (tmp_path / "out").rglob("*"):
        forbidden = stat.S_IMODE(path.stat().st_mode) & int(mask, 8)
        assert not forbidden, path
    weights = next((tmp_path / "out").glob("*.safetensors"))
    assert stat.S_IMODE(weights.stat().st_mode) == 0o666 & ~int(mask, 8)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~int(mask, 8)


@pytest.mark.parametrize(("number", "said"), [(signal.SIGTERM, ""), (signal.SIGHUP, ": its terminal was closed")])
def test_a_terminated_command_leaves_nothing_half_written(tmp_path, number, said):
    """SIGTERM is what schedulers and ``timeout`` send, SIGHUP what a closed terminal does."""
    code = (
        "from pathlib import Path; import signal, time; from uniprune.cli import main as it\n"
        "from uniprune.storage.files import *\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # whoever runs the tests may be under nohup
        "def slow(**_):\n"
        f"    with new_folder(Path({str(tmp_path / 'out')!r})) as folder:\n"
        "        (folder / 'half').write_text('x'); print('here', flush=True); time.sleep(60)\n"
        "it.app.main = slow; it.main()"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(number)
        assert process.wait(30) == 128 + number
        assert process.stderr.read() == f"error: terminated{said}\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="terminals differ")
def test_a_command_whose_terminal_is_gone_cleans_up(tmp_path):
    """Nobody reads its last line, and the shell and the system both send SIGHUP."""
    code = (
        "from pathlib import Path; import os, signal, time; from uniprune.cli import main as it\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "def slow(**_):\n"
        "    try:\n"
        f"        Path({str(tmp_path / 'begun')!r}).touch(); time.sleep(60)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.2)\n"
        f"        Path({str(tmp_path / 'cleaned')!r}).touch()\n"
        "it.app.main = slow; it.main()"
    )
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, [sys.executable, "-c", code])
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize("moment", ["importing", "at work", "at the end"])
def test_an_interrupted_command_says_so_at_any_moment(moment):
    """And what is done cannot be interrupted: Python's own end prints tracebacks."""
    work = {
        "importing": "sys.meta_path.insert(0, type('Stop', (), {'find_spec': lambda *_: interrupt()}))",
        "at work": "import uniprune.cli.main as it; it.main = interrupt",
        "at the end": "import uniprune.cli.main as it; it.main = lambda: sys.exit(0); atexit.register(interrupt)",
    }
    code = "import atexit, os, signal, sys, uniprune.__main__\ninterrupt = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # shells start what is in the background without it
    code += f"{work[moment]}\nuniprune.__main__.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = (0, "") if moment == "at the end" else (1, "error: interrupted\n")
    assert (done.returncode, done.stderr) == expected


@pytest.mark.parametrize("what", ["replacing", "new_folder"])
def test_what_killed_commands_left_is_removed(tmp_path, what):
    """By the next one with the same output; what another one is writing, or has just begun, stays."""
    code = (
        "from pathlib import Path; import time; from uniprune.storage.files import *\n"
        f"with {what}(Path({str(tmp_path / 'out')!r})) as partial:\n"
        "    print(partial, flush=True); time.sleep(60)"
    )
    working, killed = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    theirs, left = [Path(process.stdout.readline().strip()) for process in (working, killed)]
    killed.kill()
    killed.wait()
    try:
        others = tmp_path / ".partial-another"
        others.touch()
        for old in (False, True):
            if old:
                for path in (theirs, left, others):
                    os.utime(path, (0, 0))
            with getattr(files, what)(tmp_path / "out"):
                assert theirs.exists()
                assert others.exists()
                assert left.exists() is not old
            assert (tmp_path / "out").exists()
    finally:
        working.kill()
        working.communicate()
        killed.stdout.close()


def test_what_links_in_the_input_lead_to_is_input(folder, tmp_path):
    """A model's folder may consist of links, as the Hub's cache does."""
    model, store = tmp_path / "model", tmp_path / "store"
    model.mkdir()
    shutil.copytree(folder, store)
    for file in store.iterdir():
        (model / file.name).symlink_to(file)
    weights = next(store.glob("*.safetensors"))
    (store / "pruning.json").write_text("{}")  # as if it were an output
    before = weights.read_bytes()
    recipe = Recipe(sparsity="2:4", metric="magnitude", controller="none", windows=2, length=32)
    with pytest.raises(InputError, match="overlap"):
        uniprune.prune(str(model), recipe, store, overwrite=True)
    with pytest.raises(InputError, match="is, or lies in, the input"):
        uniprune.calibrate(str(model), recipe.model_copy(update={"sparsity": None}), weights, overwrite=True)
    (tmp_path / "text").mkdir()
    (store / "text.txt").write_text("some text " * 999)
    (tmp_path / "text" / "linked.txt").symlink_to(store / "text.txt")
    with pytest.raises(InputError, match="would take the place of the input"):
        files.check_output_folder(store, overwrite=True, inputs=[tmp_path / "text"])
    assert weights.read_bytes() == before


def test_an_output_is_held_until_it_is_in_its_place(tmp_path, monkeypatch):
    """While a large folder is written to the disk, another command with the same output, or one whose name begins alike, may
    begin and end."""
    synced, beside = [], []

    def slowly(path):
        synced.append(path)
        if len(synced) == 1:
            for partial in tmp_path.glob(".partial-*"):
                os.utime(partial, (0, 0))
            for name in ("out", "out-2"):
                with files.replacing(tmp_path / "elsewhere" / name):
                    pass
                files._remove_abandoned(tmp_path / name)
            beside.extend(tmp_path.glob(".partial-*"))

    monkeypatch.setattr(files, "sync", slowly)
    with files.new_folder(tmp_path / "out-2") as folder:
        (folder / "weights").write_text("all the work")
    assert len(beside) == 1
    assert (tmp_path / "out-2" / "weights").read_text() == "all the work"


def test_links_in_the_input_that_are_no_files_are_in_nobodys_way(tmp_path):
    """A link to itself, to nothing, or to a folder, in which nothing is read."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "loop").symlink_to("loop")
    (model / "nothing").symlink_to("missing")
    (model / "home").symlink_to(tmp_path)
    files.check_output_folder(tmp_path / "out", overwrite=False, source=model)
    files.check_output_file(tmp_path / "out.safetensors", False, model)
