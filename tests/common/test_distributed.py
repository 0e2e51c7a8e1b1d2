"""Several processes: their windows, and how they end."""

import errno
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import processes
import uniprune
from uniprune.artefacts.writer import MASKS
from uniprune.common import distributed
from uniprune.controller.descent import _steps
from uniprune.data import text
from uniprune.errors import InputError
from uniprune.job import prepare as job
from uniprune.storage import runs


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("tokens", [1, 16, 40, 1000])
def test_every_step_has_a_window_for_each_process(monkeypatch, processes, tokens):
    monkeypatch.setattr(distributed, "count", lambda: processes)
    for count in range(processes, 30):
        windows = torch.arange(8 * count).reshape(count, 8)
        steps = _steps(windows, tokens)
        assert torch.equal(torch.cat(steps), windows)
        assert min(map(len, steps)) >= processes
        assert max(map(len, steps)) < max(2 * processes, tokens // 8 + processes, 2)


@pytest.mark.parametrize(("settings", "windows"), [({"controller": "none"}, 2), ({}, 3)])
def test_too_few_windows_for_the_processes_are_refused_before_weights_are_read(
    folder, tmp_path, monkeypatch, settings, windows
):
    monkeypatch.setattr(distributed, "count", lambda: 3)
    monkeypatch.setattr(job, "load_weights", None)
    recipe = uniprune.Recipe(sparsity="2:4", windows=windows, length=32, **settings)
    with pytest.raises(InputError, match=rf"{windows} calibration samples.* cannot be split over 3 processes"):
        uniprune.prune(str(folder), recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("device", "begin"), [("cpu", ["init_process_group"]), ("cuda:0", ["set_device", "init_process_group", "new_group"])]
)
def test_an_error_is_not_held_up_by_the_other_processes(monkeypatch, device, begin):
    """Taking the group down would wait for them, and they wait for this process."""
    called = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: called.append("set_device"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    for name in ("init_process_group", "new_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *a, name=name, **k: called.append(name))
    with pytest.raises(ZeroDivisionError), distributed.joined(torch.device(device)):
        raise ZeroDivisionError
    assert called == begin
    with distributed.joined(torch.device(device)):
        pass
    assert called == [*begin, *begin, "destroy_process_group"]


SHORT = ["-s", "2:4", "--num-samples", "14", "--length", "32", "--set", "batch_tokens=32", "--set", "checks=1"]


def test_torchrun_as_documented(folder, tmp_path):
    """A step has fewer samples than there are processes, and the last one fewer still."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "uniprune"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    (tmp_path / "text.txt").write_text(text.read("builtin", "calibration"))  # another process knows of no shorter one
    process = [
        *launch,
        "prune",
        str(folder),
        *SHORT,
        "--dataset",
        str(tmp_path / "text.txt"),
        "-o",
        str(tmp_path / "out"),
        "--json",
    ]
    done = subprocess.run(process, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["sparsity"] == 0.5
    assert len(report["controller"]["loss"]) == 6  # of 2 samples, the last of 3; one is held out
    assert report["controller"]["tokens"] == 13 * 32


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "disk")


def ended_by(end, change, place, *words):
    """A command in which the second process comes to an end just before it changes the disk for the N-th time."""
    runs.Pace.due = lambda self: True  # every step is committed
    if distributed.local_rank() == 1:
        processes.touches(place, lambda number: end() if number == change else None)
    processes.command(*words)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The masks of two processes that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert [done.code for done in processes.together(2, processes.command, "prune", folder, *SHORT, "-o", out)] == [0, 0]
    return (out / MASKS).read_bytes()


@pytest.mark.parametrize("end", [processes.die, full])
def test_a_process_that_ends_ends_the_others(folder, tmp_path, whole, end):
    """Within a minute; what was complete is resumed to the same masks."""
    command = "prune", folder, *SHORT, "--resume", "-o", tmp_path / "out"
    failed = processes.torchrun(2, ended_by, end, 40, tmp_path, *command).wait(60)
    assert failed.code == 1, failed.err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".run-out" / "descent").is_dir()
    again = processes.torchrun(2, processes.command, *command).wait()
    assert again.code == 0, again.err
    assert (tmp_path / "out" / MASKS).read_bytes() == whole
    assert not list(tmp_path.glob(".*"))


def test_the_others_say_why_they_end(folder, tmp_path):
    """Also where nobody ends them."""
    command = "prune", folder, *SHORT, "-o", tmp_path / "out"
    first, second = processes.together(2, ended_by, processes.die, 40, tmp_path, *command)
    assert (first.code, second.code) == (1, -9)
    assert re.fullmatch("error: another process has ended.* --resume continues it\n", first.err)
