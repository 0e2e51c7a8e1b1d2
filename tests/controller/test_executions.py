"""Ways to run a descent on a model in memory: activations computed again give the same bits, in less memory."""

from functools import partial

import pytest
import torch

from conftest import kept_bytes
from small_models import MATRICES, Looped, tiny
from uniprune.controller.descent.masks import Masks, PackedMasks
from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.controller.passes.opening import open_passes
from uniprune.controller.straight_through import StraightThrough
from uniprune.models.blocks import last_hidden
from uniprune.models.matrices import find_blocks, find_matrices
from uniprune.saliency.calibration import Calibration
from uniprune.saliency.metrics import Wanda
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.storage.stash import Stash

CPU = torch.device("cpu")
EXPERTS = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]
LOUD = {"step_size": 0.05, "batch_tokens": 64, "checks": 1}


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


def test_the_model_is_left_as_it_was():
    model = tiny("llama")
    calibration = Calibration(model, find_matrices(model), tokens(), recompute=True)
    MirrorDescent(**LOUD).calibrate(calibration, Wanda(), [NM(2, 4)], 2)
    assert not any("forward" in vars(block) or block._forward_pre_hooks for block in find_blocks(model)[1])
