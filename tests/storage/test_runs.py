"""Runs on disk: killed at any moment they go on from their last commit, and nobody else's files are touched."""

import json
import math
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from processes import die, said, start, stop, touches
from uniprune.errors import InputError, MismatchError
from uniprune.storage import files, runs
from uniprune.storage.tensor_store import Store

IDENTITY = {"format": 1, "recipe": {"sparsity": 0.5, "targets": ["0.5", "2:4"]}, "model": "a" * 64}
NAMES = ["model.layers.0.q", "model.layers.0.k", "../../x"]
Interrupted = KeyboardInterrupt


def interrupt(output, work=lambda run: run.commit("sweep", {"done": 1}), identity=IDENTITY, **flags):
    """A run that works and is then interrupted."""
    with pytest.raises(Interrupted), runs.open_run(output, identity, **flags) as run:
        work(run)
        raise Interrupted
    return run.folder


# ---------------------------------------------------------------------------------------------------------------- Run


def test_a_run_that_ends_well_leaves_nothing(tmp_path):
    with runs.open_run(tmp_path / "out", IDENTITY) as run:
        assert run.folder == runs.folder_of(tmp_path / "out") == tmp_path / ".run-out"
        assert run.folder.stat().st_mode & 0o777 == 0o700
        run.commit("sweep", {})
        Store(run, "descent")["w"] = {"dual": torch.ones(2)}
    assert not any(tmp_path.iterdir())


def test_an_interrupted_run_goes_on(tmp_path):
    interrupt(tmp_path / "out")
    with runs.open_run(tmp_path / "out", IDENTITY, resume=True) as run:
        assert run.facts("sweep") == {"done": 1}
        assert run.facts("descent") is None


def test_a_folder_that_another_machine_does_not_see_is_said_to_be_one(tmp_path):
    with (
        pytest.raises(InputError, match="which process 0 has made, is not there for this one"),
        runs.process_run(tmp_path / "a", "b"),
    ):
        pass


def test_what_an_interrupted_run_holds_counts_as_free(tmp_path):
    """Who goes on uses it, who begins anew frees it; a name more of the same file takes no more of the disk."""
    output = tmp_path / "out"
    assert runs.held(output) == 0
    folder = interrupt(output, lambda run: ((run.aside() / "a").write_bytes(os.urandom(1 << 20)), run.commit("sweep", {})))
    os.link(folder / "stash" / "a", folder / "stash" / "b")
    assert 1 << 20 <= runs.held(output) < 1.5 * (1 << 20)
    needed = shutil.disk_usage(tmp_path).free + (1 << 40)
    with pytest.raises(InputError, match="of disk"):
        files.check_disk_space(output, needed)
    files.check_disk_space(output, needed, 1 << 41)


def test_without_a_commit_there_is_nothing_to_go_on_with(tmp_path):
    interrupt(tmp_path / "out", lambda run: Store(run, "descent").__setitem__("w", {"dual": torch.ones(2)}))
    assert not any(tmp_path.iterdir())


def test_a_run_without_a_commit_is_none_that_was_interrupted(tmp_path):
    """A process that was killed leaves its identity behind, but nothing that binds the next one."""
    folder = runs.folder_of(tmp_path / "out")
    folder.mkdir()
    (folder / "identity.json").write_text(json.dumps({"uniprune": "run", "identity": {"execution": "resident"}}))
    assert runs.identity_of(tmp_path / "out") is None
    (folder / "sweep.json").write_text('{"facts": {}}')
    assert runs.identity_of(tmp_path / "out") == {"execution": "resident"}


def test_resume_and_overwrite_decide_about_an_interrupted_run(tmp_path):
    output = tmp_path / "out"
    folder = interrupt(output, resume=True)  # where there is none, one begins
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with (
        pytest.raises(InputError, match=r"unfinished run of .*out found in .*\.run-out: --resume .*--overwrite"),
        runs.open_run(output, IDENTITY),
    ):
        pass
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    interrupt(output, lambda run: None, resume=True, overwrite=True)  # resumes
    assert (folder / "sweep.json").exists()
    with runs.open_run(output, {"other": 1}, overwrite=True) as run:
        assert run.facts("sweep") is None
        assert {path.name for path in folder.iterdir()} == {"lock", "identity.json"}


def test_what_another_command_began_that_command_goes_on_with(tmp_path):
    with pytest.raises(KeyboardInterrupt), runs.open_run(tmp_path / "out", {"command": "prune"}) as run:
        run.commit("sweep", {})
        raise KeyboardInterrupt
    with (
        pytest.raises(InputError, match=r"uniprune prune --resume continues it; or give another output$"),
        runs.open_run(tmp_path / "out", {"command": "apply"}),
    ):
        pass


@pytest.mark.parametrize("command", ["permute", "prune"])
def test_what_has_no_resume_is_begun_again(tmp_path, command):
    interrupt(tmp_path / "out", identity={"command": "permute"})
    with (
        pytest.raises(InputError, match=r"unfinished run of .*: --overwrite restarts$"),
        runs.open_run(tmp_path / "out", {"command": command}),
    ):
        pass


def test_what_writes_at_once_does_not_write_beside_an_interrupted_run(tmp_path):
    runs.check_none_unfinished(tmp_path / "out")
    for command, way in (("permute", "--overwrite restarts it$"), ("prune", "--resume continues")):
        interrupt(tmp_path / command, identity={"command": command})
        with pytest.raises(InputError, match=f"uniprune {command} {way}"):
            runs.check_none_unfinished(tmp_path / command)


def test_another_identity_is_refused_with_what_differs(tmp_path):
    folder = interrupt(tmp_path / "out")
    other = {"recipe": {"sparsity": 0.6, "targets": ["0.5", "4:8"]}, "model": "b" * 64, "format": 1, "seed": None}
    with pytest.raises(MismatchError) as caught, runs.open_run(tmp_path / "out", other, resume=True):
        pass
    message = str(caught.value)
    assert "recipe.sparsity was 0.5, is 0.6" in message
    assert 'recipe.targets.1 was "2:4", is "4:8"' in message
    assert "seed was absent, is null" in message
    assert "aaaa..." in message
    assert "a" * 64 not in message
    assert "format" not in message
    assert (folder / "sweep.json").exists()


def test_identities_are_equal_if_their_json_is(tmp_path):
    interrupt(tmp_path / "out", identity={"targets": ("a", "b"), "rate": math.nan, "levels": {1: 2}})
    with runs.open_run(tmp_path / "out", {"levels": {"1": 2}, "targets": ["a", "b"], "rate": math.nan}, resume=True) as run:
        assert run.facts("sweep") == {"done": 1}


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {"identity.json": '{"name": "mine"}'}, {"sweep.json": "{}"}])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, flags, content):
    folder = runs.folder_of(tmp_path / "out")
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)
    with pytest.raises(InputError, match="not written by uniprune"), runs.open_run(tmp_path / "out", IDENTITY, **flags):
        pass
    assert {path.name: path.read_text() for path in folder.iterdir()} == content


def test_neither_a_file_nor_a_link_is_a_run(tmp_path):
    elsewhere = interrupt(tmp_path / "elsewhere")
    runs.folder_of(tmp_path / "link").symlink_to(elsewhere)
    runs.folder_of(tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(InputError, match="not written"), runs.open_run(tmp_path / name, IDENTITY, overwrite=True):
            pass
    assert (elsewhere / "sweep.json").exists()


@pytest.mark.parametrize("names", [[], ["lock"], ["lock", "identity.json.partial"]])
def test_killed_before_it_had_an_identity_is_new(tmp_path, names):
    folder = runs.folder_of(tmp_path / "out")
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    with runs.open_run(tmp_path / "out", IDENTITY) as run:
        assert run.facts("sweep") is None
    assert not folder.exists()


@pytest.mark.parametrize("name", ["identity.json", "sweep.json"])
@pytest.mark.parametrize("damage", ["", "[]", '{"uniprune"', "\x00"])
def test_damaged_files_are_named_with_the_remedy(tmp_path, name, damage):
    folder = interrupt(tmp_path / "out")
    (folder / name).write_text(damage)
    with (
        pytest.raises(InputError, match=rf"{name} is damaged .*--overwrite"),
        runs.open_run(tmp_path / "out", IDENTITY, resume=True) as run,
    ):
        run.facts("sweep")
    assert (folder / "sweep.json").exists()
    with runs.open_run(tmp_path / "out", IDENTITY, overwrite=True) as run:
        assert run.facts("sweep") is None


def test_facts_come_back_bit_for_bit(tmp_path):
    random.seed(0)
    floats = [random.uniform(-1, 1) * 10.0 ** random.randint(-320, 300) for _ in range(500)] + [0.1 + 0.2, -0.0, 5e-324]

    def work(run):
        run.commit("descent", {"floats": floats, "odd": [math.nan, math.inf, -math.inf], "text": "ä\ud800"})

    interrupt(tmp_path / "out", work)
    with runs.open_run(tmp_path / "out", IDENTITY, resume=True) as run:
        facts = run.facts("descent")
    assert [value.hex() for value in facts["floats"]] == [value.hex() for value in floats]
    assert math.isnan(facts["odd"][0])
    assert facts["odd"][1:] == [math.inf, -math.inf]
    assert facts["text"] == "ä\ud800"


@pytest.mark.parametrize("stage", ["identity", "lock", "../x", "a/b", "", ".", "X"])
def test_a_stage_cannot_take_another_file(tmp_path, stage):
    with runs.open_run(tmp_path / "out", IDENTITY) as run, pytest.raises(AssertionError):
        run.commit(stage, {})


# -------------------------------------------------------------------------------------------------------------- Store


@pytest.fixture
def run(tmp_path):
    with runs.open_run(tmp_path / "out", IDENTITY) as run:
        yield run


def as_bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_every_dtype_comes_back_bit_for_bit(run):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (64,), dtype=torch.uint8, generator=generator)  # with NaNs of many payloads
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int32, torch.int64]
    tensors = {str(dtype): bits.view(dtype).view(-1, 2) for dtype in dtypes}
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    tensors["bool"], tensors["scalar"], tensors["empty"] = bits > 99, torch.tensor(3.5), torch.empty(0, 3)
    tensors["transposed"] = torch.arange(6.0).view(2, 3).T
    store = Store(run, "descent")
    store["w"] = tensors
    store.commit({})
    for found in (store["w"], Store(run, "descent")["w"]):
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
            assert (
                found[key].contiguous().numpy(force=True).tobytes() == tensor.contiguous().numpy().tobytes()
                if (tensor.dtype != torch.bfloat16)
                else torch.equal(found[key].view(torch.int16), tensor.view(torch.int16))
            )


def test_what_is_set_is_seen_here_at_once_and_elsewhere_after_the_commit(run):
    store = Store(run, "descent")
    assert (store.version, store.facts, dict(store)) == (0, {}, {})
    store["w"] = {"dual": torch.zeros(2)}
    assert (list(store), store["w"]["dual"].tolist()) == (["w"], [0, 0])
    assert run.read("descent") is None
    store.commit({"step": (1, 2)})
    assert (store.version, store.facts, list(store)) == (1, {"step": [1, 2]}, ["w"])
    store["w"] = {"dual": torch.full((2,), 9.0)}
    store["w"] = {"dual": torch.ones(2)}  # the last one counts
    assert store["w"]["dual"].tolist() == [1, 1]
    store.commit({})
    assert Store(run, "descent")["w"]["dual"].tolist() == [1, 1]
    assert run.facts("descent") == {}


def test_what_is_not_set_is_carried_over_and_old_files_go(run):
    store = Store(run, "descent")
    for name in "ab":
        store[name] = {"dual": torch.zeros(2)}
    store.commit({})
    for value in (1, 2):
        store["b"] = {"dual": torch.full((2,), float(value))}
        store.commit({})
    assert {name: store[name]["dual"].tolist() for name in store} == {"a": [0, 0], "b": [2, 2]}
    assert sorted(os.listdir(run.folder / "descent")) == ["a.1.safetensors", "b.4.safetensors"]


def test_what_is_shared_takes_no_room_and_does_not_follow(run):
    store = Store(run, "descent")

    def values():
        return {name: store[name]["dual"].tolist() for name in store}

    store["w"] = {"dual": torch.zeros(1)}
    store.share("best", "w")
    store["w"] = {"dual": torch.ones(1)}  # within the version that shared it
    assert values() == {"best": [0], "w": [1]}
    store.commit({})
    store.share("best", "w")
    store.share("first", "best")
    store.commit({})
    assert os.listdir(run.folder / "descent") == ["w.2.safetensors"]
    store["w"] = {"dual": torch.full((1,), 2.0)}
    store = Store(run, "descent")  # what was not committed is gone, and of what is shared nothing
    assert values() == {"best": [1], "first": [1], "w": [1]}
    for value in (3.0, 4.0):
        store["w"] = {"dual": torch.full((1,), value)}
    store.share("best", "w")
    store.share("best", "first")  # the last one counts
    store.commit({})
    assert values() == {"best": [1], "first": [1], "w": [4]}
    assert len(os.listdir(run.folder / "descent")) == 2


def test_leftovers_of_an_uncommitted_version_go(run):
    store = Store(run, "descent")
    store["w"] = {"dual": torch.zeros(2)}
    store.commit({"step": 1})
    store["w"] = {"dual": torch.ones(2)}
    store["v"] = {"dual": torch.ones(2)}
    again = Store(run, "descent")
    assert (again.version, again.facts, list(again)) == (1, {"step": 1}, ["w"])
    assert os.listdir(run.folder / "descent") == ["w.1.safetensors"]
    again.commit({"step": 2})  # nothing set: the leftovers do not come back
    assert again["w"]["dual"].tolist() == [0, 0]


def test_tensors_read_outlive_their_file_and_never_write_to_it(run):
    store = Store(run, "descent")
    store["w"] = {"dual": torch.arange(5000.0), "mean": torch.ones(3)}
    store.commit({})
    read, changed = store.tensor("w", "dual"), store.tensor("w", "dual")
    changed.zero_()
    assert torch.equal(store["w"]["dual"], torch.arange(5000.0))
    store["w"] = {"dual": torch.zeros(5000)}
    store.commit({})
    assert torch.equal(read, torch.arange(5000.0))
    with pytest.raises(KeyError, match="mean"):
        store.tensor("w", "mean")


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..", ".", "", "a/b", "ä b\n", "a.1", "%2e"])
def test_no_name_leads_out_of_the_folder(run, name):
    store = Store(run, "descent")
    store[name] = {"dual": torch.ones(2)}
    store.commit({})
    assert torch.equal(Store(run, "descent")[name]["dual"], torch.ones(2))
    assert len(os.listdir(run.folder / "descent")) == 1
    assert {path.name for path in run.folder.iterdir()} == {"lock", "identity.json", "descent.json", "descent"}
    assert [path.name for path in run.folder.parent.iterdir()] == [run.folder.name]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_commit_names_only_what_is_on_the_disk(run, monkeypatch):
    store = Store(run, "descent")
    synced = set()

    def fsync(handle):
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))

    def replace(source, target, replace=os.replace):
        assert str(source) in synced
        if target.suffix == ".json":
            assert {str(path) for path in (store_folder, *store_folder.iterdir())} <= synced
            synced.clear()
        else:
            synced.add(str(target))
        replace(source, target)

    store_folder = run.folder / "descent"
    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("os.replace", replace)
    for name in NAMES:
        store[name] = {"dual": torch.zeros(2)}
    store.commit({})
    assert synced == {str(run.folder)}


def test_a_failed_commit_drops_what_was_set(run, monkeypatch):
    store = Store(run, "descent")
    store["w"] = {"dual": torch.zeros(2)}
    store.commit({"step": 1})

    def full(*paths):
        raise OSError("no space left on device")

    store["w"] = {"dual": torch.ones(2)}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("os.replace", full)
        store.commit({"step": 2})
    with pytest.raises(TypeError, match="JSON"):
        store.commit({"step": torch})
    for found in (store, Store(run, "descent")):
        assert (found.version, found.facts, found["w"]["dual"].tolist()) == (1, {"step": 1}, [0, 0])
    store["w"] = {"dual": torch.full((2,), 2.0)}
    store.commit({"step": 2})
    assert (store.version, store["w"]["dual"].tolist()) == (2, [2, 2])


def test_a_failed_set_is_as_if_nothing_was_set(run):
    store = Store(run, "descent")
    store["w"] = {"dual": torch.zeros(2)}
    store.commit({})
    store["w"] = {"dual": torch.ones(2)}
    shared = torch.ones(2)
    with pytest.raises(RuntimeError, match="share memory"):
        store["w"] = {"dual": shared, "mean": shared}
    assert store["w"]["dual"].tolist() == [0, 0]
    store.commit({})
    assert store["w"]["dual"].tolist() == [0, 0]
    assert os.listdir(run.folder / "descent") == ["w.1.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_store_with_a_broken_file_says_so(run, damage):
    store = Store(run, "descent")
    store["w"] = {"dual": torch.zeros(99)}
    store.commit({})
    (file,) = (run.folder / "descent").iterdir()
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
    with pytest.raises(InputError, match=r"w\.1\.safetensors is damaged .*--overwrite"):
        Store(run, "descent")


def test_a_store_of_another_layout_says_so(run):
    """As an interrupted run of another version may have."""
    run.write("descent", {"version": 1, "names": ["w"], "facts": {"step": 3}})
    with pytest.raises(InputError, match=r"descent\.json is damaged \(it lacks files, written\).*--overwrite"):
        Store(run, "descent")


# ---------------------------------------------------------------------------------------------------- other processes


def step(store):
    """One version: sets two of the three matrices, and says in the facts what each must hold."""
    version = store.version + 1
    values = dict(store.facts.get("values", {}))
    for name in NAMES:
        if NAMES.index(name) != version % 3:
            values[name] = version
            store[name] = {"dual": torch.full((300,), float(version)), "moment": torch.full((7,), version).bfloat16()}
    store.commit({"step": version, "values": values})


def check(run):
    """Every tensor is what the facts say; returns the version."""
    store = Store(run, "descent")
    values = store.facts.get("values", {})
    assert store.version == store.facts.get("step", 0)
    assert set(store) == set(values)
    for name, value in values.items():
        assert torch.equal(store[name]["dual"], torch.full((300,), float(value)))
        assert torch.equal(store.tensor(name, "moment"), torch.full((7,), value).bfloat16())
    assert len(list((run.folder / "descent").iterdir())) == len(values)
    return store.version


def go_on_forever(connection, output):
    with runs.open_run(output, IDENTITY, resume=True) as run:
        store = Store(run, "descent")
        while True:
            connection.send(store.version)
            step(store)


def test_killed_at_random_moments_it_goes_on_from_the_last_commit(tmp_path):
    moments = random.Random(0)
    version = 0
    for _ in range(12):
        process, connection = start(go_on_forever, tmp_path / "out")
        assert connection.recv() == version
        for _ in range(moments.randint(0, 3)):
            version = connection.recv()
        time.sleep(moments.uniform(0, 0.01))
        stop(process)
        assert process.exitcode == -signal.SIGKILL
        version = max(said(connection), default=version)
        with pytest.raises(Interrupted), runs.open_run(tmp_path / "out", IDENTITY, resume=True) as run:
            assert check(run) in (version, version + 1)  # killed after the commit and before it said so
            version = check(run)
            raise Interrupted
    assert version > 12


def die_at(connection, output, event):
    """A whole run of two versions, killed just before it touches the disk for the ``event``-th time."""
    touches(output.parent, lambda count: die() if count == event else None)
    with runs.open_run(output, IDENTITY) as run:
        store = Store(run, "descent")
        connection.send(store.version)
        for _ in range(2):
            step(store)
            connection.send(store.version)
    connection.send("done")


def test_killed_at_every_single_moment_it_goes_on_from_the_last_commit(tmp_path):
    messages, events = [], 0
    while messages[-1:] != ["done"]:
        output = tmp_path / str(events) / "out"
        output.parent.mkdir()
        process, connection = start(die_at, output, events)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        messages = list(said(connection))
        with runs.open_run(output, IDENTITY, resume=True) as run:
            version = check(run)
            known = max((message for message in messages if message != "done"), default=0)
            assert version in (known, known + 1) or (known, version) == (2, 0)  # killed while it deleted the run
            step(Store(run, "descent"))
            assert check(run) == version + 1
        assert not any(output.parent.iterdir())
        events += 1
    assert events > 20


def hold(connection, output):
    with runs.open_run(output, IDENTITY, resume=True) as run:
        run.commit("sweep", {"done": 1})
        connection.send("in")
        connection.recv()


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_two_processes_are_not_let_into_one_run(tmp_path, flags):
    process, connection = start(hold, tmp_path / "out")
    connection.recv()
    with pytest.raises(InputError, match="another process works in"), runs.open_run(tmp_path / "out", IDENTITY, **flags):
        pass
    assert process.is_alive()
    assert json.loads((runs.folder_of(tmp_path / "out") / "sweep.json").read_text()) == {"facts": {"done": 1}}
    stop(process)  # its lock dies with it
    with runs.open_run(tmp_path / "out", IDENTITY, resume=True) as run:
        assert run.facts("sweep") == {"done": 1}


def test_a_run_is_held_until_the_last_of_it_is_deleted(tmp_path, monkeypatch):
    deleted = []

    def unlink(path, unlink=Path.unlink, **options):
        if path.name != "lock":
            with pytest.raises(InputError, match="another process"), runs.open_run(tmp_path / "out", IDENTITY, overwrite=True):
                pass
            deleted.append(path.name)
        unlink(path, **options)

    with runs.open_run(tmp_path / "out", IDENTITY) as run:
        run.commit("sweep", {})
        monkeypatch.setattr(Path, "unlink", unlink)
    assert deleted == ["sweep.json", "identity.json"]
    assert not any(tmp_path.iterdir())


def come_and_go(connection, output):
    """Runs one after the other; the file ``inside`` is there as long as one works."""
    inside, count = output.with_name("inside"), 0
    while count < 50:
        try:
            with runs.open_run(output, IDENTITY) as run:
                inside.touch(exist_ok=False)
                run.commit("sweep", {})
                inside.unlink()
                count += 1
        except InputError as error:
            if "another process works" not in str(error):
                raise
    connection.send(count)


def test_a_run_that_ends_and_one_that_begins_do_not_meet(tmp_path):
    counts = []
    for process, connection in [start(come_and_go, tmp_path / "out") for _ in range(3)]:
        process.join()
        counts += said(connection)
    assert counts == [50, 50, 50]
    assert not any(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------- Pace


@pytest.mark.parametrize("cost", [0.0, 0.3, 2.0, 100.0])
def test_saving_takes_its_share(monkeypatch, cost):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    pace, saves = runs.Pace(), []
    while now < 3000:
        if pace.due():
            with pace.saving():
                now += cost
            saves.append(now)
            if len(saves) > 1:
                assert cost * len(saves) <= 0.1 * (now - 1000) * 1.0001
        now += 0.5
    assert saves[0] == 1005 + cost
    if cost >= 2:
        assert len(saves) >= 0.1 * 2000 / cost - 1  # and no less than it may


def test_a_failed_save_counts(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    pace = runs.Pace(share=0.5)
    now = 5.0
    assert pace.due()
    with pytest.raises(OSError, match="full"), pace.saving():
        now = 15.0
        raise OSError("full")
    assert not pace.due()
    now = 30.0
    assert pace.due()
