"""Statistics and block-by-block execution against the plain model."""

import pytest
import torch

from conftest import VOCABULARY, tiny_model
from small_models import MATRICES, tiny
from uniprune.errors import InputError, UniPruneError
from uniprune.models import masking
from uniprune.models.blocks import batches
from uniprune.models.matrices import Matrix, find_blocks, find_matrices
from uniprune.models.replay.replay import Replay
from uniprune.models.replay.sweep import BlockSweep
from uniprune.saliency.calibration import Calibration, one_shot
from uniprune.saliency.metrics import Magnitude, Wanda
from uniprune.saliency.observation import observing
from uniprune.saliency.sequential import sequential
from uniprune.saliency.statistics import SquaredNorm
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.unstructured import Unstructured


def tokens(count=5, length=16, vocabulary=VOCABULARY):
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))


def test_statistics_are_the_sums_over_all_tokens():
    """The first block's first matrix sees the normalised embeddings, which can be had by hand."""
    model = tiny_model()
    matrices = find_matrices(model, include=["q_proj"])
    windows = tokens()
    saliency = one_shot(Calibration(model, matrices, windows), Wanda())
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(windows)).reshape(-1, 32)
    name = "model.layers.0.self_attn.q_proj"
    expected = matrices[name].weight.abs() * x.double().square().mean(0).sqrt().float()
    torch.testing.assert_close(saliency[name], expected)


def test_statistics_do_not_depend_on_the_batches(monkeypatch):
    model = tiny_model()
    matrices = find_matrices(model)
    whole = dict(one_shot(Calibration(model, matrices, tokens()), Wanda()))
    monkeypatch.setattr("uniprune.saliency.calibration.batches", lambda windows: batches(windows, 16))
    single = dict(one_shot(Calibration(model, matrices, tokens()), Wanda()))
    for name in matrices:
        torch.testing.assert_close(whole[name], single[name], rtol=1e-5, atol=1e-6)


def test_an_input_that_is_changed_in_place_is_another_one():
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    matrices = {name: Matrix(name, layer, 0, False) for name, layer in (("first", first), ("second", second))}
    with torch.no_grad(), observing(matrices, SquaredNorm) as seen:
        inputs = torch.ones(1, 3, 4)
        first(inputs)
        second(inputs.mul_(10))
    assert seen["first"].rms.tolist() == [1] * 4
    assert seen["second"].rms.tolist() == [10] * 4


def test_conv1d_inputs_and_weights_agree():
    model = tiny_model("gpt2")
    matrices = find_matrices(model, include=[r"h\.0\.attn\.c_attn"])
    windows = tokens()
    saliency = one_shot(Calibration(model, matrices, windows), Wanda())["transformer.h.0.attn.c_attn"]
    embedded = model.transformer.wte(windows) + model.transformer.wpe(torch.arange(16))
    x = model.transformer.h[0].ln_1(embedded).reshape(-1, 32)
    expected = model.transformer.h[0].attn.c_attn.weight.T.abs() * x.square().mean(0).sqrt()
    assert saliency.shape == (96, 32)
    torch.testing.assert_close(saliency, expected)


@pytest.mark.parametrize("family", MATRICES)
def test_replayed_blocks_are_the_model(family):
    """Captured arguments, whatever a family calls them, give the model's own last hidden state."""
    model = tiny(family)
    _, blocks = find_blocks(model)
    windows = tokens(count=5, length=32, vocabulary=64)
    runner = BlockSweep(Replay.probed(model, blocks, windows), windows)
    outputs = []
    handle = blocks[-1].register_forward_hook(lambda m, a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(windows, use_cache=False)
    handle.remove()
    for index in runner:
        runner.run(index, advance=True)
    torch.testing.assert_close(torch.cat([flow.hidden for flow in runner.flows]), outputs[0], rtol=1e-4, atol=1e-5)


def test_sequential_scores_each_block_on_pruned_inputs():
    """Against the slow way: prune the first blocks for good, run the whole model, score the next block."""
    model, reference = tiny_model(), tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    matrices, windows = find_matrices(model), tokens()
    found, _ = sequential(Calibration(model, matrices, windows), Wanda(), NM(2, 4))
    everything = find_matrices(reference)
    for index in range(3):
        here = {name: matrix for name, matrix in everything.items() if matrix.block == index}
        expected = dict(NM(2, 4)(one_shot(Calibration(reference, here, windows), Wanda())))
        for name, mask in expected.items():
            assert torch.equal(found[name], mask), name
        masking.apply(here, expected.items())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_sequential_refuses_a_model_wide_budget():
    model = tiny_model()
    with pytest.raises(InputError, match="needs all scores"):
        sequential(Calibration(model, find_matrices(model), tokens()), Magnitude(), Unstructured(0.5, "model"))


def test_what_the_model_does_not_call_is_found_by_the_first_batch():
    """Mamba multiplies by the weight of dt_proj without calling the layer: hours of calibration would tell no more."""
    model = tiny("mamba")
    ids, run = torch.randint(0, 64, (64, 1024)), []
    model.register_forward_pre_hook(lambda *_: run.append(None))
    model.backbone.register_forward_pre_hook(lambda *_: run.append(None))
    with pytest.raises(
        InputError, match=r"the model does not call their layers; leave them out \(--exclude\), e\.g\. --exclude mixer\.dt_proj"
    ):
        one_shot(Calibration(model, find_matrices(model), ids), Wanda())
    assert len(run) == 1 < len(batches(ids))
    one_shot(Calibration(model, find_matrices(model, exclude=["dt_proj"]), ids[:1]), Wanda())


def test_a_matrix_that_sees_no_token_is_an_error():
    model = tiny_model()
    matrices = find_matrices(model)
    model.model.layers[2].mlp.forward = lambda x: x
    with pytest.raises(UniPruneError, match=r"3 matrices saw no calibration token, e\.g\. model\.layers\.2\.mlp"):
        one_shot(Calibration(model, matrices, tokens()), Wanda())


def test_applied_masks_come_off_again_bit_for_bit():
    model = tiny_model()
    matrices = find_matrices(model)
    name = next(iter(matrices))
    before = matrices[name].weight.clone()
    mask = torch.rand(before.shape) < 0.5
    with pytest.raises(RuntimeError, match="inside"), masking.applied(matrices, {name: mask}):
        assert torch.equal(matrices[name].weight, before * mask)
        raise RuntimeError("inside")
    assert torch.equal(matrices[name].weight, before)
