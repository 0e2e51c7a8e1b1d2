"""Ways to run a model: what each takes, which is chosen, and which are refused."""

import json
import math

import pytest
import torch
from transformers import AutoModelForImageTextToText, BlipConfig

import uniprune
from conftest import Stopped, Stops, kept_bytes, tiny_model
from small_models import Looped, tiny
from uniprune import Recipe
from uniprune.checkpoints.origin import Origin, resolve
from uniprune.common import distributed
from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.controller.passes.resident import Resident
from uniprune.errors import InputError
from uniprune.job.execution import choose
from uniprune.job.forecast import machine
from uniprune.job.forecast.memory import PROCESS, Bytes, Work, _Parts, needs
from uniprune.job.options import RunOptions
from uniprune.models.loading import skeleton
from uniprune.models.matrices import find_blocks, find_matrices
from uniprune.storage import runs

CPU = torch.device("cpu")
SMALL = {"windows": 12, "length": 32, "steps": 3, "dtype": "float32"}


def limit_of(folder, recipe, execution):
    """Memory that is enough for this way and for no faster one."""
    return uniprune.plan(str(folder), recipe).executions[execution].memory


SHARED_KEYS = {"num_kv_shared_layers": 1, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}


@pytest.mark.parametrize(
    ("family", "settings", "admitted"),
    [
        ("llama", {}, ["resident", "recomputed", "streamed"]),
        ("zamba2", {}, ["resident", "recomputed"]),
        ("gemma3n_text", SHARED_KEYS, ["resident"]),
    ],
)
def test_executions_that_a_model_does_not_admit_are_not_offered(family, settings, admitted, tokenizer, tmp_path):
    tiny(family, **settings).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    source, recipe = str(tmp_path / "model"), Recipe(sparsity="2:4", **SMALL)
    plan = uniprune.plan(source, recipe)
    assert list(plan.executions) == admitted
    little = plan.executions[admitted[-1]].memory - 1
    assert uniprune.plan(source, recipe, max_memory=little).execution == "none"
    if "streamed" not in admitted:
        with pytest.raises(InputError, match="streamed is not to be had here: blocks of this model share weights, or keys"):
            uniprune.plan(source, recipe, execution="streamed")


def test_blocks_that_are_passed_twice_are_not_offered_one_by_one():
    model = tiny("llama")
    model.model.layers = Looped(model.model.layers)
    work = Work(model, find_matrices(model), Recipe(sparsity="2:4"), torch.float32, torch.float32, 32)
    assert list(needs(work)) == ["resident", "recomputed"]


def test_what_fits_is_chosen(folder, tmp_path):
    recipe = Recipe(sparsity="2:4", **SMALL)
    plan = uniprune.plan(str(folder), recipe, max_memory=limit_of(folder, recipe, "recomputed"))
    sizes = {name: one.memory for name, one in plan.executions.items()}
    assert sizes["resident"] > sizes["recomputed"] > sizes["streamed"]
    assert plan.execution == "recomputed"
    assert plan.executions["recomputed"].seconds > plan.executions["resident"].seconds
    whole = uniprune.prune(str(folder), recipe, tmp_path / "whole")
    again = uniprune.prune(str(folder), recipe, tmp_path / "again", max_memory=plan.memory)
    assert again.masks_sha256 == whole.masks_sha256


def test_a_model_in_memory_is_recomputed_where_memory_is_short(loaded, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Resident, "_checkpointed", lambda self, index, forward: seen.append(index) or forward)
    recipe = Recipe(sparsity="2:4", **SMALL)
    matrices = find_matrices(loaded.model)
    needed = needs(Work(loaded.model, matrices, recipe, torch.float32, torch.float32, 32))
    there = PROCESS + sum(parameter.nbytes for parameter in loaded.model.parameters())
    for execution in ("resident", "recomputed"):
        free = needed[execution].memory - there
        monkeypatch.setattr("uniprune.job.forecast.machine.free_memory", lambda device, free=free: free)
        uniprune.prune(loaded, recipe, tmp_path / execution)
        assert bool(seen) == (execution == "recomputed")


def test_a_run_goes_on_with_less_memory(folder, tmp_path, monkeypatch):
    """What was begun with activations kept is resumed where they do not fit, to the same masks."""
    monkeypatch.setattr(runs.Pace, "due", lambda self: True)
    recipe = Recipe(sparsity="2:4", **SMALL)
    expected = uniprune.prune(str(folder), recipe, tmp_path / "whole").masks_sha256
    with pytest.raises(Stopped):
        uniprune.prune(str(folder), recipe, tmp_path / "out", execution="resident", progress=Stops(2))
    limit = limit_of(folder, recipe, "recomputed")
    assert uniprune.prune(str(folder), recipe, tmp_path / "out", max_memory=limit, resume=True).masks_sha256 == expected


def test_a_run_that_was_killed_before_it_kept_anything_may_be_run_otherwise(folder, tmp_path):
    """As when there was too little memory for the way that was chosen."""
    recipe, origin = Recipe(sparsity="2:4", **SMALL), resolve(str(folder))
    model = skeleton(origin)
    needed = needs(Work(model, find_matrices(model), recipe, torch.float32, torch.bfloat16, 32))
    options, left = RunOptions(max_memory=needed["streamed"].memory, resume=True), runs.folder_of(tmp_path / "out")
    left.mkdir()
    (left / "identity.json").write_text(json.dumps({"uniprune": "run", "identity": {"execution": "resident"}}))
    assert choose(origin, needed, options, CPU, tmp_path / "out") == "streamed"
    (left / "descent.json").write_text('{"facts": {}}')
    assert choose(origin, needed, options, CPU, tmp_path / "out") == "resident"


@pytest.mark.parametrize("settings", [{"controller": "unipruning"}, {"controller": "none", "steps": None, "text": "self"}])
def test_a_plan_chooses_no_way_that_prune_refuses(folder, tmp_path, settings):
    recipe = Recipe(sparsity="2:4", **(SMALL | settings))
    limit = limit_of(folder, recipe, "streamed")
    assert uniprune.plan(str(folder), recipe).execution == "resident"
    assert uniprune.plan(str(folder), recipe, max_memory=limit).execution == "none"
    with pytest.raises(uniprune.InputError, match="whole model in memory") as refused:
        uniprune.prune(str(folder), recipe, tmp_path / "out", max_memory=limit)
    with pytest.raises(uniprune.InputError) as planned:
        uniprune.plan(str(folder), recipe, execution="streamed")
    assert str(planned.value) == str(refused.value)


def test_a_model_whose_text_decoder_has_the_output_head_is_forecast():
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(BlipConfig(text_config=text | {"bos_token_id": 1}))
    assert model.get_output_embeddings() is None
    needed = needs(Work(model, find_matrices(model), Recipe(sparsity="2:4"), torch.float32, torch.float32, 32))
    assert needed["resident"].memory > needed["streamed"].memory


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_token_is_forecast_to_go_to_few_experts(family):
    """With all of them the forecast was several times what is taken."""
    experts = {"num_experts": 64} if family == "qwen3_moe" else {"n_routed_experts": 64}
    model, ids = tiny(family, **experts), torch.randint(0, 64, (8, 64), generator=torch.Generator().manual_seed(0))
    matrices = find_matrices(model)
    taken = kept_bytes(model, ids)
    # A step of all 8 samples.
    forecast = _Parts(Work(model, matrices, Recipe(sparsity="2:4", tuning={"batch_tokens": 512}), torch.float32, None, 64))
    assert taken / 3 < forecast.resident_step < 3 * taken
    assert forecast.work.active < 0.3 * forecast.work.prunable


GROUPS = {  # two versions of Linux's control groups: in a container that sees its own as the root, and in one that does not
    "version 2": ("0::/", "", {"memory.max": "5000", "memory.current": "4000"}),
    "version 2, no limit": ("0::/", "", {"memory.max": "max", "memory.current": "4000"}),
    "version 2, of a job": ("0::/job/step", "job", {"memory.max": "5000", "memory.current": "4000"}),
    "version 1": ("4:memory:/docker/7", "memory", {"memory.limit_in_bytes": "5000", "memory.usage_in_bytes": "4000"}),
    "version 1, another": ("4:cpu:/docker/7", "memory", {"memory.limit_in_bytes": "5000", "memory.usage_in_bytes": "4000"}),
}


@pytest.mark.parametrize(("case", "left"), zip(GROUPS, [1300, math.inf, 1300, 1300, math.inf], strict=True))
def test_a_container_has_less_memory_than_its_machine(tmp_path, monkeypatch, case, left):
    line, place, files = GROUPS[case]
    (tmp_path / "mounted" / place).mkdir(parents=True)
    ours = {"memory.stat": "anon 9\nactive_file 100\ninactive_file 200"}
    if "version 1" in case:
        ours = {"memory.stat": "active_file 1\ninactive_file 2\ntotal_active_file 100\ntotal_inactive_file 200"}
    for name, text in (files | ours).items():
        (tmp_path / "mounted" / place / name).write_text(f"{text}\n")
    (tmp_path / "cgroup").write_text(f"{line}\n")
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "MOUNTED", tmp_path / "mounted")
    assert machine.left_by_groups() == left
    assert left == math.inf or machine.free_memory(CPU) == left
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "nowhere")
    assert machine.left_by_groups() == math.inf


@pytest.mark.parametrize(
    ("execution", "settings", "reason"),
    [
        ("recomputed", {"controller": "none"}, "only --controller feedback has activations to compute again"),
        ("offloaded", {}, "it is for a controller on a GPU"),
        ("sharded", {}, "it takes several processes"),
    ],
)
def test_an_execution_that_cannot_be(folder, tmp_path, execution, settings, reason):
    recipe = Recipe(sparsity="2:4", **(SMALL | settings))
    with pytest.raises(uniprune.InputError, match=rf"--execution {execution} is not to be had here: {reason}"):
        uniprune.prune(str(folder), recipe, tmp_path / "out", execution=execution)


def test_small_steps_from_disk_are_warned_of(folder, monkeypatch, caplog):
    monkeypatch.setattr("uniprune.job.execution.TRAFFIC", 0)

    def warned(execution, **tuning):
        caplog.clear()
        uniprune.plan(str(folder), Recipe(sparsity="2:4", tuning=tuning), execution=execution)
        return "larger steps are fewer: --set batch_tokens=16384" in caplog.text

    assert warned("streamed")
    assert not warned("streamed", batch_tokens=16384)
    assert not warned("recomputed")


def test_pinned_memory_is_forecast_in_powers_of_two():
    model = tiny("llama", intermediate_size=48)
    matrices, recipe = find_matrices(model), Recipe(sparsity="2:4")
    needed = needs(Work(model, matrices, recipe, torch.float32, torch.float32, 16, torch.device("cuda")))
    state = MirrorDescent().init(torch.ones(48, 32), torch.ones(48))
    taken = sum(1 << (tensor.nbytes - 1).bit_length() for tensor in state[:3])
    assert any(matrix.size == 48 * 32 for matrix in matrices.values())
    others = [matrix.size for matrix in matrices.values() if matrix.size != 48 * 32]
    assert all(size & (size - 1) == 0 for size in others)
    assert needed["offloaded"].host == 6 * sum(others) + taken * (len(matrices) - len(others))


NEEDS = {"resident": Bytes(1000), "recomputed": Bytes(700), "sharded": Bytes(364), "streamed": Bytes(100)}
CHOICES = [
    (1000, "resident", "resident"),
    (999, "recomputed", "recomputed"),
    (699, "streamed", "sharded"),
    (363, "streamed", "streamed"),
]


@pytest.mark.parametrize(("limit", "alone", "together"), CHOICES)
def test_the_choice(monkeypatch, tmp_path, limit, alone, together):
    origin, options = Origin("m", tmp_path), RunOptions(max_memory=limit)
    monkeypatch.setattr(Origin, "files", True)
    assert choose(origin, {name: one for name, one in NEEDS.items() if name != "sharded"}, options, CPU) == alone
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "total_of", lambda value: 2 * value)
    assert choose(origin, NEEDS, options, CPU) == together


def test_processes_choose_by_the_one_with_least_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(Origin, "files", True)
    monkeypatch.setattr(distributed, "count", lambda: 2)
    other = iter([False, False, True])  # the whole model does not fit there, a half does
    monkeypatch.setattr(distributed, "total_of", lambda value: value + next(other))
    assert choose(Origin("m", tmp_path), NEEDS, RunOptions(max_memory=2000), CPU) == "sharded"


def test_what_two_processes_need(monkeypatch):
    """Each has half of the states; where the blocks are shared, half of those, the block that runs and the one to come."""
    model = tiny_model()
    work = Work(model, find_matrices(model), Recipe(sparsity="2:4"), torch.float32, torch.float32, 32)
    alone = needs(work)
    monkeypatch.setattr(distributed, "count", lambda: 2)
    together = needs(work)
    assert together["recomputed"].disk == alone["recomputed"].disk // 2
    assert together["streamed"].written == alone["streamed"].written // 2
    blocks = [sum(p.nbytes for p in block.parameters()) for block in find_blocks(model)[1]]
    more = together["sharded"].memory - together["streamed"].memory
    assert more == pytest.approx(sum(blocks) / 2 + 2 * max(blocks), rel=1e-3)
    assert alone.keys() == together.keys() - {"sharded"}
