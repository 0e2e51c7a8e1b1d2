"""Several processes: their windows, and how they end."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch

import processes
import uniprune
from conftest import VOCABULARY, tiny_model
from uniprune import Loaded
from uniprune.artefacts.masks import MasksFile
from uniprune.artefacts.writer import MASKS
from uniprune.common import distributed
from uniprune.controller.descent import loop, masks, states
from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.controller.schedule import in_steps
from uniprune.data import text
from uniprune.data.windows import Windows, save_windows
from uniprune.errors import InputError
from uniprune.job import prepare as job
from uniprune.job.forecast.prospect import use_device
from uniprune.job.options import RunOptions
from uniprune.models.matrices import find_matrices
from uniprune.saliency.calibration import Calibration
from uniprune.saliency.metrics import Wanda
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.tiled import Tiled
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.storage import runs

CPU = torch.device("cpu")


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("tokens", [1, 16, 40, 1000])
def test_every_step_has_a_window_for_each_process(monkeypatch, processes, tokens):
    monkeypatch.setattr(distributed, "count", lambda: processes)
    for count in range(processes, 30):
        windows = torch.arange(8 * count).reshape(count, 8)
        steps = in_steps(windows, tokens)
        assert torch.equal(torch.cat(steps), windows)
        assert min(map(len, steps)) >= processes
        assert max(map(len, steps)) < max(2 * processes, tokens // 8 + processes, 2)


@pytest.mark.parametrize("processes", [1, 8])
@pytest.mark.parametrize("length", [512, 700, 2048])
def test_a_budget_is_of_the_tokens_that_steps_really_have(monkeypatch, processes, length):
    monkeypatch.setattr(distributed, "count", lambda: processes)
    recipe = uniprune.Recipe(budget_tokens=65_536)
    step = len(in_steps(torch.zeros(64, length), recipe.parsed_controller().batch_tokens)[0]) * length
    assert recipe.step_tokens(length) == step
    assert 65_536 - step < recipe.steps_within(length) * step <= 65_536


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


def ranks_own(place, *words):
    """A command of two processes in a folder each, where the same names may be of other files."""
    os.chdir(place / str(distributed.local_rank()))
    processes.command(*words)


@pytest.mark.parametrize("controller", ["none", "feedback"])
@pytest.mark.parametrize(
    ("differs", "said"), [("text", "another text than process 0"), ("model", "another model than process 0")]
)
def test_processes_with_other_files_are_refused(folder, tmp_path, controller, differs, said):
    """They would wait for each other without end, or mix what they have found."""
    for rank in range(2):
        words = text.read("builtin", "calibration")
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "text.txt").write_text(words.upper() if rank and differs == "text" else words)
        if differs == "model":
            shutil.copytree(folder, tmp_path / str(rank) / "model")
    if differs == "model":
        tiny_model(initializer_range=0.3).save_pretrained(tmp_path / "1" / "model")
    model = "model" if differs == "model" else folder
    words = "prune", model, *SHORT[:6], "--dataset", "text.txt", "--controller", controller, "-o", tmp_path / "out"
    for done in processes.together(2, ranks_own, tmp_path, *words):
        assert done.code == 2
        assert said in done.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_of_other_settings_the_first_one_is_named(monkeypatch):
    monkeypatch.setattr(distributed, "all_gather", lambda facts: [facts, facts | {"seed": 1}])
    with pytest.raises(InputError, match="process 1 has another seed than process 0 \\(1 and 0\\); start all with the same"):
        distributed.check_alike({"metric": "wanda", "seed": 0})


def test_a_complete_run_is_resumed_by_many(folder, tmp_path, whole):
    """All that is left of it is deleted once."""
    command = "prune", folder, *SHORT, "-o", tmp_path / "out"
    assert [done.code for done in processes.together(2, processes.command, *command)] == [0, 0]
    left = tmp_path / ".run-out"
    (left / "descent").mkdir(parents=True)
    (left / "identity.json").write_text('{"uniprune": "run", "identity": {}}')
    (left / "done.json").write_text('{"facts": {}}')
    for number in range(200):
        (left / "descent" / str(number)).touch()
    for done in processes.together(4, processes.command, *command, "--resume"):
        assert done.code == 0, done.err
    assert not left.exists()


@pytest.mark.parametrize("begins", [False, True])
def test_refined_masks_of_two_processes_are_those_of_one(folder, tmp_path, begins):
    """First tokens, too, are those of all samples."""
    tokens = torch.randint(1, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(0))
    if begins:
        tokens[:, 0] = 0
    save_windows(Windows(tokens, "made up", 12, "none"), tmp_path / "tokens.safetensors")
    words = "prune", folder, "-s", "2:4", "--refine", "--dataset", tmp_path / "tokens.safetensors", "-o"
    for count in (1, 2):
        for done in processes.together(count, processes.command, *words, tmp_path / str(count)):
            assert done.code == 0, done.err
    one, two = (MasksFile(tmp_path / str(count) / MASKS) for count in (1, 2))
    differ = [float((one[name] != two[name]).float().mean()) for name in one]
    assert sum(differ) / len(differ) < 2e-3


def wrapped(place):
    """A model in memory that FSDP2 has divided."""
    from torch.distributed.fsdp import fully_shard

    with distributed.joined(CPU):
        model = tiny_model()
        fully_shard(model)
        try:
            uniprune.prune_in_place(Loaded(model), uniprune.Recipe(sparsity="2:4", metric="magnitude", controller="none"))
        except InputError as error:
            (place / str(distributed.rank())).write_text(str(error))


def test_a_model_that_is_divided_already_is_refused(tmp_path):
    assert [done.code for done in processes.together(2, wrapped, tmp_path)] == [0, 0]
    for rank in "01":
        assert "the model is divided among processes (FSDP); give its folder instead" in (tmp_path / rank).read_text()


def test_work_is_divided_evenly(monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 4)
    sizes = {f"{block}.{name}": size for block in range(8) for name, size in (("q", 16), ("k", 4), ("v", 4), ("up", 43))}
    owners = distributed.owners(sizes)
    assert owners.keys() == sizes.keys()
    shares = [sum(sizes[name] for name, owner in owners.items() if owner == rank) for rank in range(4)]
    assert max(shares) <= 1.05 * sum(sizes.values()) / 4


def descended(place, targets):
    """A descent that several processes make together: what each has at the end, and what it held of the states."""
    with distributed.joined(CPU):
        model, held = tiny_model(initializer_range=0.3, num_hidden_layers=4), []
        save = states.InMemory.save

        def saved(self, facts, last):
            held.append(sum(state.dual.nbytes for state in self._states.values()))
            save(self, facts, last)

        states.InMemory.save = saved
        tokens = torch.randint(0, VOCABULARY, (24, 16), generator=torch.Generator().manual_seed(0))
        calibration = Calibration(model, find_matrices(model), tokens)
        duals, record = MirrorDescent(batch_tokens=128, step_size=0.05).calibrate(calibration, Wanda(), targets, 4)
        torch.save((dict(duals), record, max(held)), place / f"{distributed.rank()}.pt")


@pytest.mark.parametrize(
    "targets", [[NM(2, 4), Unstructured(0.5, "model")], [Tiled(Unstructured(0.5, "model"), 4, 4)]], ids=str
)
def test_states_are_divided(tmp_path, targets):
    """Each of four processes keeps a quarter; all have the same in the end, which is what one process finds."""
    (tmp_path / "one").mkdir()
    assert processes.together(1, descended, tmp_path / "one", targets)[0].code == 0
    duals, record, whole = torch.load(tmp_path / "one" / "0.pt", weights_only=False)
    done = processes.together(4, descended, tmp_path, targets)
    assert [one.code for one in done] == [0] * 4, done[0].err
    for rank in range(4):
        found, again, held = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert held < whole / 3.5
        assert again.held_out_loss == pytest.approx(record.held_out_loss, rel=1e-3)
        assert again.flips == pytest.approx(record.flips, abs=1e-3)
        for name, dual in duals.items():
            differ = (found[name] > found[name].median()) != (dual > dual.median())
            assert float(differ.float().mean()) < 5e-3, name


def created(place):
    """A descent that two processes make together; the matrices whose masks each created because they were asked for."""
    with distributed.joined(CPU):
        model, asked, make = tiny_model(), [], masks.Masks._make
        masks.Masks._make = lambda self, name: asked.append(name) or make(self, name)
        tokens = torch.randint(0, VOCABULARY, (24, 16), generator=torch.Generator().manual_seed(0))
        calibration = Calibration(model, find_matrices(model), tokens)
        MirrorDescent(batch_tokens=64, checks=1).calibrate(calibration, Wanda(), [NM(2, 4)], 4)
        (place / f"{distributed.rank()}.json").write_text(json.dumps(asked))


def test_masks_are_created_as_the_duals_move(tmp_path):
    """By the owner alone: asked for they are before and in the first step, and at the end; each step creates the next one's."""
    done = processes.together(2, created, tmp_path)
    assert [one.code for one in done] == [0, 0], done[0].err
    asked = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert not set(asked[0]) & set(asked[1])
    assert Counter(asked[0]) + Counter(asked[1]) == dict.fromkeys(find_matrices(tiny_model()), 3)


class Gate(torch.nn.Module):
    """No gradient comes through it until it is opened."""

    opened = False

    def forward(self, x):
        return x if self.opened else x.sign()


def reached(place, opens):
    """A descent in which gradients reach some matrices only in the steps, if at all."""
    with distributed.joined(CPU):
        model, gate, step = tiny_model(), Gate(), loop.Descent.step
        for layer in model.model.layers:
            layer.mlp.act_fn = gate

        def stepped(self, *arguments):
            gate.opened = opens
            return step(self, *arguments)

        loop.Descent.step = stepped
        tokens = torch.randint(0, VOCABULARY, (10, 16), generator=torch.Generator().manual_seed(0))
        calibration = Calibration(model, find_matrices(model), tokens)
        _, record = MirrorDescent(batch_tokens=64).calibrate(calibration, Wanda(), [NM(2, 4)], 2)
        (place / f"{distributed.rank()}.json").write_text(json.dumps(record.without_gradient))


@pytest.mark.parametrize("opens", [False, True])
def test_gradients_of_all_processes_are_reported(tmp_path, opens):
    """Each knows of those that its own matrices get."""
    done = processes.together(2, reached, tmp_path, opens)
    assert [one.code for one in done] == [0, 0], done[0].err
    expected = [] if opens else [f"model.layers.{index}.mlp.gate_proj" for index in range(3)]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [expected] * 2


def test_a_group_of_the_callers_gets_a_long_timeout_for_barriers_and_is_his_again(tmp_path):
    """NCCL's own is ten minutes, in which a large checkpoint is not written; and he may go on after an error."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(InputError, match="no"), distributed.joined(CPU):
            assert distributed._waiting is not None
            distributed.barrier()
            raise InputError("no")
        assert distributed._waiting is None
        assert torch.distributed.is_initialized()
        assert distributed.all_gather("still here") == ["still here"]
    finally:
        torch.distributed.destroy_process_group()


def test_a_process_that_has_no_memory_says_so_itself(monkeypatch):
    """Not that another one has ended."""
    monkeypatch.setattr(distributed, "count", lambda: 2)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.distributed, "all_reduce", full)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        distributed.total(torch.ones(1))


def test_a_model_in_memory_is_where_it_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", None)  # would change the caller's
    assert use_device(RunOptions(), Loaded(tiny_model(), None)) == CPU
