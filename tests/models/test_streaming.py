"""Block by block from disk, against the same model in memory; interrupted and resumed, against the same run in one go."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
import torch

import catalogue
import kills
import processes
import uniprune
from conftest import VOCABULARY, Stopped, Stops, tiny_model
from processes import Forked
from small_models import MATRICES, Looped, kind_of, tiny
from uniprune import Recipe
from uniprune.checkpoints.origin import Origin, resolve
from uniprune.common.formatting import parse_size
from uniprune.controller import controllers
from uniprune.controller.descent import loop
from uniprune.controller.descent.loss import Loss
from uniprune.controller.descent.states import OnDisk
from uniprune.controller.fisher import Fisher
from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.controller.passes.resident import Resident
from uniprune.controller.passes.streamed import Streamed
from uniprune.controller.straight_through import StraightThrough
from uniprune.errors import InputError, MismatchError, UniPruneError
from uniprune.job.execution import choose
from uniprune.job.forecast.memory import Bytes, Work, _Parts, needs
from uniprune.job.options import RunOptions
from uniprune.job.prepare import progress_of
from uniprune.models.blocks import last_hidden
from uniprune.models.matrices import find_blocks, find_matrices
from uniprune.models.replay.replay import Replay
from uniprune.models.replay.sweep import BlockSweep
from uniprune.models.residency.streaming import attached, open_streamed
from uniprune.saliency.calibration import Calibration, one_shot
from uniprune.saliency.metrics import Wanda
from uniprune.saliency.sequential import sequential
from uniprune.saliency.statistics import Gram
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.storage import files, runs
from uniprune.storage.stash import Stash
from uniprune.storage.tensor_store import Store

CPU = torch.device("cpu")
SMALL = {"windows": 16, "length": 32}
GIVEN_TOKENS = ["deepseek_v4", "gemma4", "gemma3n_text"]  # or what depends on them
HAND_ON = ["glm_moe_dsa", "hy_v4", "zaya"]  # a choice of keys, or a router's states, from block to block


def tokens(count=8, length=16, vocabulary=64):
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=MATRICES)
def pair(request, tmp_path_factory):
    return paired(tiny(request.param), tmp_path_factory.mktemp("family"))


def paired(model, folder):
    """A model in memory, and the same one streamed from its checkpoint."""
    model.save_pretrained(folder, max_shard_size="20KB")
    loaded = open_streamed(resolve(folder), None, torch.float32, CPU)
    hollow = attached(find_matrices(loaded.model), loaded.residency)
    return (model, find_matrices(model)), (loaded.model, hollow, loaded.residency)


def small(family):
    torch.manual_seed(0)
    config = catalogue.small(family)
    return kind_of(config).from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("family", ["llama", "xlnet", *GIVEN_TOKENS, *HAND_ON])
def test_batches_go_through_the_blocks_as_through_the_model(family):
    """Of models that give their blocks the tokens, or embeddings of their own, or what the block before put out beside hidden
    states, or have other axes before the windows, too."""
    model = small(family)
    replay = Replay.probed(model, find_blocks(model)[1], tokens())
    parts = tokens().split(3)
    with torch.no_grad():
        hidden = [replay.enter(part) for part in parts]
        for index in range(len(replay)):
            hidden = [replay.run(index, state, part) for state, part in zip(hidden, parts, strict=True)]
        for state, part in zip(hidden, parts, strict=True):
            torch.testing.assert_close(replay.leave(state.hidden, part), last_hidden(model, part))


def test_blocks_that_hand_on_two_streams_are_refused():
    model = small("reformer")
    with pytest.raises(UniPruneError, match="blocks of ReformerLayer hand on two streams"):
        Replay.probed(model, find_blocks(model)[1], tokens())


SHARED_KEYS = {  # keys and values of a layer that others use, in an object that all blocks are given
    "gemma3n_text": {"num_kv_shared_layers": 1, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    "gemma4_text": {"num_kv_shared_layers": 1, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    "mistral_large4": {},
}


@pytest.mark.parametrize("family", SHARED_KEYS)
def test_blocks_that_use_what_others_computed_are_refused(family):
    """Batch after batch through each block, all would see that of the last one."""
    config = catalogue.small(family, **SHARED_KEYS[family])
    if family == "mistral_large4":
        config.text_config.kv_source_layers = [0, 0]
    model = kind_of(config).from_config(config).eval().requires_grad_(False)
    with pytest.raises(UniPruneError, match=r"depend on each other beyond their inputs.* leave out --sequential"):
        Replay.probed(model, find_blocks(model)[1], tokens())


def test_the_probe_loads_each_block_once():
    model, loaded = tiny("llama"), []

    @contextmanager
    def residency(index):
        loaded.append(index)
        yield

    Replay.probed(model, find_blocks(model)[1], tokens(), residency)
    assert loaded == list(range(len(find_blocks(model)[1])))


def test_a_pass_that_comes_to_a_block_twice_is_refused():
    model = tiny("llama")
    model.model.layers = Looped(model.model.layers)
    with pytest.raises(UniPruneError, match=r"a pass calls the 2 of them 4 times\); they cannot be run one by one"):
        Replay.probed(model, model.model.layers, tokens())


@pytest.mark.parametrize("family", ["llama", *HAND_ON])
def test_blocks_go_on_where_an_earlier_process_stopped(family, tmp_path):
    model = small(family)
    blocks = find_blocks(model)[1]
    (tmp_path / "whole").mkdir()
    expected = BlockSweep(Replay.probed(model, blocks, tokens()), tokens(), Stash(tmp_path / "whole"))
    for index in expected:
        expected.run(index, advance=True)
        if index == 0:
            shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    found = BlockSweep(Replay.probed(model, blocks, tokens()), tokens(), Stash(tmp_path / "stopped"), done=1)
    for index in found:
        found.run(index, advance=True)
    assert all(torch.equal(one.hidden, other.hidden) for one, other in zip(found.flows, expected.flows, strict=True))


def gradients(passes, ids, **settings):
    found = {}
    generator, network = torch.Generator().manual_seed(1), passes.network
    masks = {n: torch.rand(m.shape, generator=generator) < 0.5 for n, m in network.matrices.items()}
    with network, network.training(masks, found.__setitem__):
        loss = Loss(passes.head(ids), evenness=0.5)
        student, teacher = passes.forward(ids)
        kl, gradient = loss.gradient(student, teacher, ids)
        passes.backward(gradient)
    return kl, found


def test_gradients_are_those_of_the_model_in_memory(pair, tmp_path, monkeypatch):
    check_gradients(pair, tmp_path, monkeypatch)


@pytest.mark.parametrize("family", GIVEN_TOKENS)
def test_gradients_of_blocks_that_are_given_what_depends_on_the_tokens(family, tmp_path, monkeypatch):
    check_gradients(paired(tiny(family), tmp_path / "model"), tmp_path, monkeypatch)


@pytest.mark.parametrize("family", HAND_ON)
def test_gradients_of_blocks_that_hand_on_more_than_hidden_states(family, tmp_path, monkeypatch):
    check_gradients(paired(small(family), tmp_path / "model"), tmp_path, monkeypatch, rounding=1e-4, least=1e-7)


def check_gradients(pair, tmp_path, monkeypatch, rounding=1e-5, least=1e-12):
    """Also when the windows go through a block in several parts, and states lie in files in between."""
    (model, matrices), (streamed, hollow, residency) = pair
    ids = tokens()
    kl, expected = gradients(Resident(model, find_blocks(model)[1], StraightThrough(matrices)), ids)
    monkeypatch.setattr("uniprune.controller.passes.streamed.PART_TOKENS", 64)
    blocks = find_blocks(streamed)[1]
    assert all(parameter.is_meta for parameter in blocks.parameters())
    passes = Streamed(streamed, Replay.probed(streamed, blocks, ids, residency), StraightThrough(hollow), Stash(tmp_path))
    found_kl, found = gradients(passes, ids)
    assert all(parameter.is_meta for parameter in blocks.parameters())
    assert found_kl == pytest.approx(kl, rel=rounding, abs=least)
    assert found.keys() == expected.keys()
    assert any(gradient is not None for gradient in expected.values())
    for name, gradient in expected.items():
        if gradient is None:  # ZAYA's keys are all 0 before it is trained
            assert found[name] is None, name
            continue
        assert float((found[name] - gradient).norm()) <= rounding * float(gradient.norm()), name


def test_local_masks_are_those_of_the_model_in_memory(pair):
    (model, matrices), (streamed, hollow, residency) = pair
    ids = tokens()
    for pattern in (NM(2, 4), Unstructured(0.5, "row")):
        expected = dict(pattern(one_shot(Calibration(model, matrices, ids), Wanda())))
        found = dict(pattern(one_shot(Calibration(streamed, hollow, ids, residency), Wanda())))
        assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    expected, _ = sequential(Calibration(model, matrices, ids), Wanda(), NM(2, 4))
    found, _ = sequential(Calibration(streamed, hollow, ids, residency), Wanda(), NM(2, 4))
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


def test_descents_agree(tmp_path):
    model = tiny_model(initializer_range=0.3)
    model.save_pretrained(tmp_path)
    loaded = open_streamed(resolve(tmp_path), None, torch.float32, CPU)
    hollow = attached(find_matrices(loaded.model), loaded.residency)
    ids, settings = tokens(32, 32, VOCABULARY), MirrorDescent(step_size=0.05, batch_tokens=128)
    targets = controllers.any_sparsity()
    expected, record = settings.calibrate(Calibration(model, find_matrices(model), ids), Wanda(), targets, 8)
    found, again = settings.calibrate(Calibration(loaded.model, hollow, ids, loaded.residency), Wanda(), targets, 8)
    assert again.held_out_loss == pytest.approx(record.held_out_loss, rel=1e-4)
    for name, dual in expected.items():
        assert float(((found[name] > dual.mean()) != (dual > dual.mean())).float().mean()) < 1e-3


def test_the_states_take_the_disk_that_was_forecast(tmp_path, monkeypatch):
    """Two versions and the best duals, which are the second step's; and these come out, whatever became of the states."""
    model = tiny_model(hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "model")
    loaded = open_streamed(resolve(tmp_path / "model"), None, torch.float32, CPU)
    hollow = attached(find_matrices(loaded.model), loaded.residency)
    run, taken, judged = runs.Run(tmp_path / "run"), [], []
    run.folder.mkdir()

    def sync(path, sync=files.sync):
        sync(path)
        taken.append(sum(512 * file.stat().st_blocks for file in run.folder.rglob("*") if file.is_file()))

    def held_out_kl(self, targets, windows):
        judged.append({name: self.position.states.dual(name).clone() for name in hollow})
        return [1.0, 0.9, 0.5, 0.9, 0.8][len(judged) - 1]

    monkeypatch.setattr("uniprune.storage.tensor_store.sync", sync)
    monkeypatch.setattr(loop.Descent, "held_out_kl", held_out_kl)
    monkeypatch.setattr("uniprune.controller.passes.streamed.PART_TOKENS", 128)
    ids, settings = tokens(32, 32, VOCABULARY), MirrorDescent(batch_tokens=128)
    work = Work(loaded.model, hollow, Recipe(controller=settings), torch.float32, torch.float32, 32, windows=32)
    expected = needs(work)["streamed"].disk
    found, _ = settings.calibrate(Calibration(loaded.model, hollow, ids, loaded.residency, run), Wanda(), [NM(2, 4)], 5)
    assert 0.95 * expected < max(taken) <= expected
    assert found.keys() == hollow.keys()
    assert all(torch.equal(dual, judged[2][name]) for name, dual in found.items())
    assert not any(torch.equal(judged[2][name], judged[3][name]) for name in hollow)


@pytest.mark.parametrize("controller", [Fisher(batch_tokens=128), MirrorDescent(batch_tokens=128)], ids=["fisher", "feedback"])
@pytest.mark.parametrize("family", ["llama", "glm_moe_dsa"])
def test_hidden_states_take_the_disk_that_was_forecast(family, controller, tmp_path, monkeypatch):
    """Of a batch, or of the longer text that a descent starts from; and what blocks hand on beside them."""
    tiny(family).save_pretrained(tmp_path / "model")
    loaded = open_streamed(resolve(tmp_path / "model"), None, torch.float32, CPU)
    hollow = attached(find_matrices(loaded.model), loaded.residency)
    written, taken, put = {}, [], Stash.put

    def noted(self, name, tensor):
        if not name.startswith("mask"):
            written[name] = tensor.nbytes
            taken.append(sum(written.values()))
        return put(self, name, tensor)

    monkeypatch.setattr(Stash, "put", noted)
    (tmp_path / "run").mkdir()
    ids = tokens(16, 32, 64)
    calibration = Calibration(loaded.model, hollow, ids, loaded.residency, runs.Run(tmp_path / "run"))
    controller.calibrate(calibration, Wanda(), [Unstructured(0.5, "model")], 1)
    work = Work(loaded.model, hollow, Recipe(controller=controller), torch.float32, torch.float32, 32, windows=len(ids))
    assert 0.6 * _Parts(work).hidden < max(taken) <= _Parts(work).hidden


def test_the_best_duals_lie_beside_earlier_ones_where_states_are_in_memory(tmp_path, monkeypatch):
    model = tiny_model(initializer_range=0.3, hidden_size=64, intermediate_size=256)
    matrices, taken, commit = find_matrices(model), [], Store.commit

    def noted(self, facts):
        taken.append(sum(file.stat().st_size for file in (tmp_path / "run" / "descent").glob("*.safetensors")))
        commit(self, facts)

    monkeypatch.setattr(runs.Pace, "due", lambda self: True)
    monkeypatch.setattr(Store, "commit", noted)
    monkeypatch.setattr(loop.Descent, "held_out_kl", lambda self, *_: 1 / (1 + len(taken)))  # always better
    (tmp_path / "run").mkdir()
    settings = MirrorDescent(batch_tokens=64)
    calibration = Calibration(model, matrices, tokens(16, 16, VOCABULARY), run=runs.Run(tmp_path / "run"))
    settings.calibrate(calibration, Wanda(), [NM(2, 4)], 4)
    work = Work(model, matrices, Recipe(sparsity="2:4", tuning={"batch_tokens": 64}), torch.float32, torch.float32, 16)
    assert 0.9 * max(taken) < needs(work)["resident"].disk <= 1.02 * max(taken)


@pytest.mark.parametrize(("target", "again"), [(NM(2, 4), 0), (Unstructured(0.5, "row"), 0), (Unstructured(0.5, "model"), 2)])
def test_a_step_reads_the_duals_once(tmp_path, monkeypatch, target, again):
    """To move them; the masks of the next step are created then. A budget that all share is known only when all have moved."""
    model = tiny_model(initializer_range=0.3)
    model.save_pretrained(tmp_path)
    loaded = open_streamed(resolve(tmp_path), None, torch.float32, CPU)
    hollow, read = attached(find_matrices(loaded.model), loaded.residency), []
    monkeypatch.setattr(OnDisk, "dual", lambda self, name, dual=OnDisk.dual: read.append(name) or dual(self, name))
    settings, steps = MirrorDescent(batch_tokens=32, checks=1), 3
    settings.calibrate(Calibration(loaded.model, hollow, tokens(8, 16, VOCABULARY), loaded.residency), Wanda(), [target], steps)
    judged, first = 2, 1
    assert all(read.count(name) == judged + first + steps + again for name in hollow)


def test_the_gram_matrices_of_a_block_are_forecast():
    model = tiny_model()
    matrices = find_matrices(model)
    recipes = Recipe(sequential=True), Recipe(refine=True)
    plain, refined = (needs(Work(model, matrices, recipe, torch.float32, torch.float32, 32)) for recipe in recipes)
    held = sum(Gram(matrix.shape[1], CPU).total.nbytes for matrix in matrices.values() if matrix.block == 0)
    for execution, before in plain.items():
        assert held < refined[execution].memory - before.memory < 2 * held


def test_what_is_pruned_for_a_while_is_forecast():
    """Its masks, a byte each, and its weights as they were: of a block that the next one runs after, of all in ``compare``."""
    model = tiny_model()
    matrices = find_matrices(model)
    block = sum(matrix.size for matrix in matrices.values() if matrix.block == 0)

    def parts(compared=False, **settings):
        recipe = Recipe(controller="none", **settings)
        work = Work(model, matrices, recipe, torch.float32, torch.float32, 32, compared=compared)
        return {name: needed.parts["preserved"] for name, needed in needs(work).items()}

    assert set(parts().values()) == {0}
    assert set(parts(sequential=True).values()) == {5 * block}
    assert parts(compared=True)["resident"] == 5 * sum(matrix.size for matrix in matrices.values())


def test_a_table_is_calibrated_and_measured_one_after_the_other():
    model = tiny_model()
    matrices = find_matrices(model)
    forecast = {
        compared: needs(Work(model, matrices, Recipe(), torch.float32, torch.float32, 2048, compared=compared))["resident"]
        for compared in (False, True)
    }
    assert forecast[True] == forecast[False]  # the activations of a step are more than all masks and weights


@pytest.mark.parametrize("settings", [{"controller": "none"}, {"steps": 3}, {"sequential": True}, {"refine": True}], ids=str)
def test_a_model_that_does_not_fit_is_streamed(folder, tmp_path, settings):
    recipe = Recipe(sparsity="2:4", dtype="float32", **SMALL, **settings)
    whole = uniprune.prune(str(folder), recipe, tmp_path / "whole")
    memory = uniprune.plan(str(folder), recipe).executions["streamed"].memory
    assert uniprune.plan(str(folder), recipe, max_memory=memory).execution == "streamed"
    streamed = uniprune.prune(str(folder), recipe, tmp_path / "streamed", max_memory=memory)
    assert streamed.masks_sha256 == whole.masks_sha256
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "streamed" / file.name).read_bytes() == file.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_what_fits_nowhere_is_refused(folder, tmp_path):
    with pytest.raises(
        InputError, match=r"needs \d+\.\d MB resident, .*, \d+\.\d MB streamed of memory; --max-memory allows 1000 bytes"
    ):
        uniprune.prune(str(folder), Recipe(sparsity="2:4", **SMALL), tmp_path / "out", max_memory=1000)
    assert uniprune.plan(str(folder), Recipe(sparsity="2:4"), max_memory=1000).execution == "none"
    gguf = Origin("m.gguf", tmp_path, "m.gguf")
    with pytest.raises(InputError, match="convert it: only safetensors files are read block by block"):
        choose(gguf, {"resident": Bytes(10**10), "streamed": Bytes(10**9)}, RunOptions(max_memory=2 * 10**9), CPU)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "size"), [("8GB", 8 * 10**9), ("1.5 gb", 15 * 10**8), ("2GiB", 2**31), ("700M", 7 * 10**8)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "8XB", "-1GB", "GB", "0"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="is not a size"):
        parse_size(text)


STEPS = {"steps": 4, "tuning": {"checks": 1}}
WAYS = {
    "local, streamed": ({"controller": "none"}, "streamed"),
    "sequential": ({"sequential": True}, None),
    "sequential, streamed": ({"sequential": True}, "streamed"),
    "refine": ({"refine": True}, None),
    "controller": (STEPS, None),
    "controller, recomputed": (STEPS, "recomputed"),
    "controller, streamed": (STEPS, "streamed"),
    "controller for any": (STEPS | {"sparsity": None}, None),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_run_goes_on_to_the_same_masks(folder, tmp_path, way, monkeypatch):
    changes, execution = WAYS[way]
    monkeypatch.setattr(runs.Pace, "due", lambda self: True)
    recipe = Recipe(**({"sparsity": "2:4", "dtype": "float32"} | SMALL | changes))

    def start(output, **more):
        if recipe.sparsity:
            return uniprune.prune(str(folder), recipe, tmp_path / output, execution=execution, **more).masks_sha256
        uniprune.calibrate(str(folder), recipe, tmp_path / f"{output}.safetensors", execution=execution, **more)
        return (tmp_path / f"{output}.safetensors").read_bytes()

    expected = start("whole")
    for after in (1, 2):
        with pytest.raises(Stopped):
            start(f"out{after}", progress=Stops(after))
        name = f".run-out{after}" + ("" if recipe.sparsity else ".safetensors")
        assert (tmp_path / name / "identity.json").is_file()
        with pytest.raises(InputError, match=r"unfinished run of .* --resume continues it"):
            start(f"out{after}")
        with monkeypatch.context() as seen:
            seen.setattr("uniprune.storage.files.check_disk_space", checked := Mock())
            assert start(f"out{after}", resume=True) == expected
        assert all(call.args[2] > 0 for call in checked.call_args_list)  # what the run has on the disk already
        assert checked.called
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("way", ["local, streamed", "sequential", "refine"])
def test_hidden_states_are_on_the_disk_before_the_commit_that_goes_on_from_them(folder, tmp_path, monkeypatch, way):
    """After a loss of power a file may have its size and not its content."""
    changes, execution = WAYS[way]
    synced, written, missing = set(), {}, []
    put, commit = Stash.put, Store.commit
    monkeypatch.setattr("uniprune.storage.files.sync", lambda path: synced.add(path))

    def noted(self, name, tensor):
        if self._folder is not None:
            synced.discard(self._folder / name)
            written[self._folder / name] = tensor.nbytes
        return put(self, name, tensor)

    def checked(self, facts):
        missing.extend(path for path in written if path not in synced and self._stage == "sweep")
        commit(self, facts)

    monkeypatch.setattr(Stash, "put", noted)
    monkeypatch.setattr(Store, "commit", checked)
    recipe = Recipe(sparsity="2:4", dtype="float32", **SMALL | changes)
    forecast = uniprune.plan(str(folder), recipe).executions[execution or "resident"].disk
    uniprune.prune(str(folder), recipe, tmp_path / "out", execution=execution)
    assert 0.5 * forecast < sum(written.values()) <= forecast  # masks of a block lie there as well
    assert not missing


def test_hidden_states_that_are_gone_are_an_error(tmp_path):
    stash = Stash(tmp_path)
    stash.put("hidden-0-0", torch.ones(2, 3))
    assert Stash(tmp_path).take("hidden-0-0").tolist() == [[1] * 3] * 2
    (tmp_path / "hidden-0-0").write_bytes(bytes(23))
    for name in ("hidden-1-0", "hidden-0-0"):
        with pytest.raises(UniPruneError, match="is missing or damaged"):
            Stash(tmp_path).take(name)


def test_a_sweep_of_several_processes_begins_anew(tmp_path, monkeypatch):
    """Hidden states are of one process's own windows, and other processes would take up a sweep without any."""
    with pytest.raises(Stopped), progress_of(tmp_path / "out", RunOptions(), {}) as run:
        for stage in ("sweep", "outputs", "descent"):
            store = Store(run, stage)
            store["w"] = {"dual": torch.ones(2)}
            store.commit({"done": 1})
        raise Stopped
    monkeypatch.setattr("uniprune.common.distributed.count", lambda: 2)
    monkeypatch.setattr("uniprune.common.distributed.rank", lambda: 0)
    monkeypatch.setattr("uniprune.common.distributed.barrier", lambda: None)
    with progress_of(tmp_path / "out", RunOptions(resume=True), {}) as run:
        assert run.facts("descent") == {"done": 1}
        for stage in ("sweep", "outputs"):
            assert (run.facts(stage), dict(Store(run, stage))) == (None, {})


def test_another_run_is_not_resumed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.Pace, "due", lambda self: True)
    recipe = Recipe(sparsity="2:4", **STEPS, **SMALL)
    with pytest.raises(Stopped):
        uniprune.prune(str(folder), recipe, tmp_path / "out", progress=Stops(2))
    with pytest.raises(MismatchError, match=r"recipe\.seed was 0, is 1"):
        uniprune.prune(str(folder), recipe.model_copy(update={"seed": 1}), tmp_path / "out", resume=True)
    uniprune.prune(str(folder), recipe, tmp_path / "out", overwrite=True)
    assert not list(tmp_path.glob(".*"))


def test_resume_finishes_what_was_complete_already(folder, tmp_path, monkeypatch):
    """Killed between the move of the output and the end of the run."""
    recipe = Recipe(sparsity="2:4", steps=2, **SMALL)
    with monkeypatch.context() as patched:
        patched.setattr(runs, "_delete", lambda folder: None)
        report = uniprune.prune(str(folder), recipe, tmp_path / "out")
        uniprune.calibrate(str(folder), recipe, tmp_path / "s.safetensors")
    with pytest.raises(InputError, match="exists; give another name, or --overwrite"):
        uniprune.prune(str(folder), recipe, tmp_path / "out")
    assert uniprune.prune(str(folder), recipe, tmp_path / "out", resume=True).masks_sha256 == report.masks_sha256
    assert uniprune.calibrate(str(folder), recipe, tmp_path / "s.safetensors", resume=True).base
    assert not list(tmp_path.glob(".*"))


def test_a_finished_output_that_is_older_than_its_inputs_is_told_apart(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("one and two and three and four\n" * 200)
    recipe = Recipe(sparsity="2:4", controller="none", text=str(text), windows=2, length=16)
    for verb, output in ((uniprune.prune, tmp_path / "out"), (uniprune.calibrate, tmp_path / "s.safetensors")):
        first = verb(str(tmp_path / "model"), recipe, output)
        assert verb(str(tmp_path / "model"), recipe, output, resume=True) == first
        assert not caplog.records
        later = files.changed(output) + 10
        for path in (tmp_path / "model" / "config.json", text):
            os.utime(path, (later, later))
            assert verb(str(tmp_path / "model"), recipe, output, resume=True) == first
        assert [f"written since: {tmp_path / 'model'};", f"written since: {tmp_path / 'model'}, {text};"] == [
            message[message.index("written") :].partition(" if")[0] for message in caplog.messages
        ]
        caplog.clear()
        for path in (tmp_path / "model" / "config.json", text):
            os.utime(path, (0, 0))


@pytest.mark.parametrize("case", kills.CASES, ids=" ".join)
def test_killed_at_any_moment(folder, tmp_path, case):
    """Again and again; what comes out in the end is what an undisturbed run writes. `make soak` kills a thousand times."""
    assert kills.survive(kills.Victim(tmp_path, folder, *case), kills=3).kills == 3


def without_looking(*words):
    """A command that takes the disk to be large enough."""
    files.check_disk_space = lambda *_: None
    processes.command(*words)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root may mount a small disk")
@pytest.mark.parametrize("execution", ["resident", "streamed"])
@pytest.mark.parametrize("size", [200_000, 400_000])
def test_a_full_disk_loses_nothing(folder, tmp_path, execution, size):
    """The disk fills up when the run is under way; with more room it goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this machine does not let us mount a small disk")
    settings = "--execution", execution, "-s", "2:4", "--windows", 16, "--length", 32, "--steps", 3, "--dtype", "float32"
    words = "prune", folder, "-o", disk / "out", *settings, "--resume"
    try:
        failed = Forked(without_looking, *words).wait()
        assert failed.code == 1, failed.err
        assert re.fullmatch(r"error: .*No space left on device; mend that and run the command again.*\n", failed.err)
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=20M", str(disk)], check=True)
        assert Forked(without_looking, *words).wait().code == 0
        assert (disk / "out" / "pruning.json").is_file()
        assert not list(disk.glob(".*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def by_two(*words):
    """What the first of two processes prints."""
    first, *others = processes.together(2, processes.command, *words)
    assert [first.code, *(other.code for other in others)] == [0, 0], first.err
    assert not any(other.out for other in others)
    return first.out


@pytest.mark.parametrize(
    ("settings", "execution"),
    [
        (("--controller", "none"), "resident"),
        (("--steps", "3"), "resident"),
        (("--steps", "3"), "streamed"),
    ],
)
def test_two_processes_make_the_masks_of_one(folder, tmp_path, settings, execution):
    common = "prune", folder, "-s", "2:4", "--windows", 16, "--length", 32, "--dtype", "float32", *settings
    common += "--execution", execution
    assert Forked(processes.command, *common, "-o", tmp_path / "one").wait().code == 0
    assert json.loads(by_two(*common, "-o", tmp_path / "two", "--json"))["sparsity"] == 0.5
    one, two = (uniprune.artefacts.masks.MasksFile(tmp_path / name / "pruning/masks.safetensors") for name in ("one", "two"))
    differing = sum(int((one[name] != two[name]).sum()) for name in one)
    assert differing <= 1e-3 * sum(mask.numel() for mask in one.values())
    assert not list(tmp_path.glob(".*"))
