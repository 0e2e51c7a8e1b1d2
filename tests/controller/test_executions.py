"""Ways to run a descent on a model in memory: activations computed again give the same bits, in less memory."""

import json
import math
from functools import partial

import pytest
import torch
from transformers import AutoModelForImageTextToText, BlipConfig

import uniprune
from conftest import Stopped, Stops, kept_bytes
from small_models import MATRICES, Looped, tiny
from uniprune import Recipe
from uniprune.checkpoints.origin import resolve
from uniprune.controller.descent.masks import Masks, PackedMasks
from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.controller.passes.opening import open_passes
from uniprune.controller.passes.resident import Resident
from uniprune.controller.straight_through import StraightThrough
from uniprune.errors import InputError
from uniprune.job.execution import choose
from uniprune.job.forecast import machine
from uniprune.job.forecast.memory import PROCESS, Work, _Parts, needs
from uniprune.job.options import RunOptions
from uniprune.models.blocks import last_hidden
from uniprune.models.loading import skeleton
from uniprune.models.matrices import find_blocks, find_matrices
from uniprune.saliency.calibration import Calibration
from uniprune.saliency.metrics import Wanda
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.storage import runs
from uniprune.storage.stash import Stash

CPU = torch.device("cpu")
EXPERTS = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]
LOUD = {"step_size": 0.05, "batch_tokens": 64, "checks": 1}
SMALL = {"windows": 12, "length": 32, "steps": 3, "dtype": "float32"}


def tokens(count=12, length=16):
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(0))


def descended(family, targets, recompute):
    model = tiny(family)
    calibration = Calibration(model, find_matrices(model), tokens(), recompute=recompute)
    return MirrorDescent(**LOUD).calibrate(calibration, Wanda(), targets, 4)


@pytest.mark.parametrize("family", [*MATRICES, *EXPERTS, "zamba2"])
def test_recomputed_activations_give_the_same_bits(family):
    targets = [NM(2, 4), Unstructured(0.5, "model")]
    expected, record = descended(family, targets, False)
    found, again = descended(family, targets, True)
    assert again == record
    assert all(torch.equal(found[name], dual) for name, dual in expected.items())
    assert len({float(dual.mean()) for dual in found.values()}) > 1


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_that_a_model_passes_through_twice_has_one_gradient(recompute):
    model, found = tiny("llama"), []
    model.model.layers = Looped(model.model.layers)
    matrices = find_matrices(model)
    passes = open_passes(Calibration(model, matrices, tokens(), recompute=recompute), None)
    with passes.network as network, network.training({}, lambda name, gradient: found.append((name, gradient))):
        passes.backward(torch.ones_like(passes.forward_student(tokens())))
    assert sorted(name for name, _ in found) == sorted(matrices)

    model.requires_grad_(True)
    last_hidden(model, tokens()).sum().backward()
    for name, gradient in found:
        torch.testing.assert_close(gradient, matrices[name].parameter.grad)


def test_recomputed_activations_are_not_kept():
    model = tiny("llama", num_hidden_layers=6)
    assert kept_bytes(model, tokens(), recompute=True) < 0.2 * kept_bytes(model, tokens())


def test_masks_are_cut_once_a_step_and_wait_as_bits():
    model = tiny("llama", num_hidden_layers=3)
    matrices, cut = find_matrices(model), []
    duals = {name: torch.rand(matrix.shape) for name, matrix in matrices.items()}

    def hard(name, dual):
        cut.append(name)
        return NM(2, 4).prepare({})(name, dual)

    masks = PackedMasks(NM(2, 4), hard, duals.__getitem__, matrices, CPU, stash=Stash())
    expected = Masks(NM(2, 4), NM(2, 4).prepare({}), duals.__getitem__, matrices, CPU)
    for name in [*matrices, *reversed(matrices)]:
        assert torch.equal(masks[name], expected[name])
        assert len({matrices[other].block for other in masks._kept}) == 1
    assert sorted(cut) == sorted(matrices)
    assert sum(packed.nbytes for packed in masks._packed.values()) == sum(m.size for m in matrices.values()) // 8


@pytest.mark.parametrize("kind", [Masks, partial(PackedMasks, stash=Stash())])
def test_masks_follow_their_duals(kind):
    """Also those that were asked for before: a check between two steps asks for the next step's, and may go back to others."""
    model = tiny("llama", num_hidden_layers=1)
    matrices, cut = find_matrices(model), NM(2, 4).prepare({})
    duals = {name: torch.rand(matrix.shape) for name, matrix in matrices.items()}
    masks = kind(NM(2, 4), cut, duals.__getitem__, matrices, CPU)
    for _ in range(2):
        for name, mask in masks.items():
            assert torch.equal(mask, cut(name, duals[name]))
        for name in matrices:
            duals[name] = torch.rand(matrices[name].shape)
            masks.update(name, duals[name])


def test_a_pattern_that_fails_with_a_key_error_fails():
    """Though a mapping takes that for a name it does not have, and a matrix without a mask is dense."""
    model = tiny("llama", num_hidden_layers=1)
    matrices = find_matrices(model)

    def hard(name, dual):
        raise KeyError("of the pattern's own")

    masks = Masks(NM(2, 4), hard, lambda name: torch.rand(matrices[name].shape), matrices, CPU)
    with StraightThrough(matrices) as network, network.pruned(masks), pytest.raises(KeyError, match="of the pattern's own"):
        model(input_ids=torch.arange(8)[None])


def test_masks_that_another_process_sends_again_take_the_place_of_the_old(monkeypatch):
    model = tiny("llama", num_hidden_layers=1)
    matrices = find_matrices(model)
    owners, sent = dict.fromkeys(matrices, 1), []
    monkeypatch.setattr("uniprune.common.distributed.broadcast", lambda owner, ours: torch.full_like(ours, sent[-1]))
    masks = PackedMasks(NM(2, 4), NM(2, 4).prepare({}), {}.__getitem__, matrices, CPU, stash=Stash())
    for byte, kept in ((255, True), (0, False)):
        sent.append(byte)
        masks.share(owners)
        assert all(bool((masks[name] == kept).all()) for name in matrices)


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
    model, ids = tiny(family, **experts), tokens(8, 64)
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


def test_the_model_is_left_as_it_was():
    model = tiny("llama")
    calibration = Calibration(model, find_matrices(model), tokens(), recompute=True)
    MirrorDescent(**LOUD).calibrate(calibration, Wanda(), [NM(2, 4)], 2)
    assert not any("forward" in vars(block) or block._forward_pre_hooks for block in find_blocks(model)[1])


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
