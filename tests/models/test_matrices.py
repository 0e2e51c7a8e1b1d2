"""Discovery by structure, on tiny random models of many real families."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import uniprune
from conftest import tiny_model
from small_models import MATRICES, tiny
from uniprune import Recipe
from uniprune.controller.passes.resident import Resident
from uniprune.controller.straight_through import StraightThrough
from uniprune.errors import InputError
from uniprune.models import masking
from uniprune.models.checks import check_finite
from uniprune.models.matrices import choose_matrices, find_blocks, find_matrices, left_dense
from uniprune.saliency.calibration import Calibration
from uniprune.saliency.metrics import Wanda
from uniprune.saliency.observation import observing
from uniprune.saliency.sequential import sequential
from uniprune.saliency.statistics import SquaredNorm
from uniprune.sparsity.patterns.nm import NM


@pytest.mark.parametrize("family", MATRICES)
def test_every_family_is_found_by_structure(family):
    matrices = find_matrices(tiny(family))
    assert len(matrices) == 2 * MATRICES[family]
    assert {matrix.block for matrix in matrices.values()} == {0, 1}


def test_conv1d_is_seen_as_out_by_in():
    matrices = find_matrices(tiny("gpt2"))
    fc = matrices["transformer.h.0.mlp.c_fc"]
    assert fc.transposed
    assert fc.shape == tuple(fc.weight.shape) == (128, 32)
    assert tuple(fc.parameter.shape) == (32, 128)


def test_include_and_exclude():
    model = tiny_model()
    assert len(find_matrices(model)) == 21
    assert len(find_matrices(model, include=["mlp"])) == 9
    assert len(find_matrices(model, include=["mlp"], exclude=["down_proj"])) == 6
    assert len(find_matrices(model, exclude=[r"layers\.0\."])) == 14
    for wrong in ({"include": ["mpl"]}, {"exclude": ["mpl"]}):
        with pytest.raises(InputError, match=r"'mpl' matches none of the 21 matrices, e\.g\. model\.layers\.0"):
            find_matrices(model, **wrong)
    with pytest.raises(InputError, match="not a regular expression"):
        find_matrices(model, include=["("])
    with pytest.raises(InputError, match="leave no matrix"):
        find_matrices(model, include=["mlp"], exclude=["mlp"])


def sharing():
    """A model whose second block uses a weight of the first one, through a module of its own."""
    model = tiny_model()
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    return model


def test_a_shared_weight_is_listed_once_with_all_its_modules():
    model = sharing()
    matrices = find_matrices(model)
    assert len(matrices) == 20
    assert "model.layers.1.mlp.up_proj" not in matrices
    shared = matrices["model.layers.0.mlp.up_proj"]
    assert shared.modules == (model.model.layers[0].mlp.up_proj, model.model.layers[1].mlp.up_proj)
    assert [name for name, matrix in matrices.items() if matrix.spans] == [shared.name]
    model.model.layers[1].mlp = model.model.layers[0].mlp  # one module in two blocks
    assert len(find_matrices(model)) == 18
    assert find_matrices(model)["model.layers.0.mlp.gate_proj"].spans


def test_what_a_shared_weight_sees_is_what_all_its_modules_see():
    model = sharing()
    inputs = []
    for layer in model.model.layers[:2]:
        layer.mlp.up_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with observing(find_matrices(model), SquaredNorm) as statistics:
        model(torch.arange(32)[None])
    norm = statistics["model.layers.0.mlp.up_proj"]
    assert norm.tokens == 64
    assert torch.allclose(norm.rms, torch.cat(inputs).square().mean(0).sqrt())


def test_the_gradient_of_a_shared_weight_is_the_sum_over_its_modules():
    model, ids, found = sharing(), torch.arange(32)[None], {}
    matrices = find_matrices(model)
    shared = matrices["model.layers.0.mlp.up_proj"]
    mask = torch.rand(shared.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    network = StraightThrough(matrices)
    passes = Resident(model, find_blocks(model)[1], network)
    with network, network.training({shared.name: mask}, found.__setitem__):
        hidden = passes.forward_student(ids)
        passes.backward(torch.ones_like(hidden))
    masking.apply(matrices, [(shared.name, mask)])
    shared.parameter.requires_grad_()
    model.model(ids).last_hidden_state.sum().backward()
    assert torch.allclose(found[shared.name], shared.parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_weight_shared_with_something_outside_the_blocks_is_left_dense():
    model = tiny_model()
    model.extra = nn.Linear(32, 64, bias=False)
    model.extra.weight = model.model.layers[2].mlp.gate_proj.weight
    assert len(find_matrices(model)) == 20
    assert left_dense(model) == {"model.layers.2.mlp.gate_proj": ((64, 32), "shared with extra.weight")}
    assert model.lm_head.weight is model.model.embed_tokens.weight  # outside the blocks, tied or not
    assert not any("lm_head" in name for name in find_matrices(tiny_model()))


def test_a_sequential_run_refuses_weights_that_blocks_share():
    model = sharing()
    with pytest.raises(InputError, match="blocks of this model share weights"):
        sequential(Calibration(model, find_matrices(model), torch.arange(32)[None]), Wanda(), NM(2, 4))


def test_blocks_may_differ_and_lists_inside_them_do_not_compete():
    model = tiny_model()
    layers = model.model.layers
    layers[1] = type("Another", (type(layers[1]),), {})(model.config, 1)
    layers[2].extra = nn.ModuleList([nn.Linear(32, 32) for _ in range(9)])
    assert find_blocks(model)[0] == "model.layers"
    assert len(find_matrices(model)) == 30


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "modelopt", "fp8", "mxfp4"])
def test_quantised_checkpoints_are_refused_before_a_weight_is_read(method, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": method}}))
    monkeypatch.setattr("uniprune.job.prepare.load_weights", None)
    for recipe in (Recipe(sparsity="2:4"), Recipe(sparsity=0.5, controller="none")):
        with pytest.raises(
            InputError, match=rf"is quantised \({method}\).*give the model that it was made from, or dequantise"
        ):
            uniprune.prune(tmp_path, recipe, tmp_path.parent / "out")
        with pytest.raises(InputError, match="is quantised"):
            uniprune.plan(tmp_path, recipe)


def test_a_model_with_adapters_is_refused_until_they_are_merged(tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj has an adapter.*merge_and_unload"):
        find_matrices(adapted)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is an adapter.*merge_and_unload"):
        uniprune.plan(tmp_path, Recipe(sparsity="2:4"))
    merged = adapted.merge_and_unload()
    assert find_matrices(merged).keys() == find_matrices(tiny_model()).keys()


def test_encoder_decoder_is_ambiguous():
    config = AutoConfig.for_model("t5", d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8, vocab_size=64)
    with pytest.raises(InputError, match=r"several lists of blocks.*encoder\.block"):
        find_blocks(AutoModelForSeq2SeqLM.from_config(config))


def test_no_blocks_lists_what_there_is():
    with pytest.raises(InputError, match=r"no list of decoder blocks.*0 \(Linear\)"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_unknown_weights_in_the_blocks_are_an_error():
    """Weights that are no matrices of a known kind: leaving them dense in silence would be a lie about the sparsity."""
    model = tiny_model()
    model.model.layers[1].mlp.experts = nn.ParameterList([nn.Parameter(torch.zeros(4, 64, 32))])
    with pytest.raises(InputError, match=r"under 90%.*layers\.1\.mlp\.experts\.0 \(4, 64, 32\).* --include \.$"):
        choose_matrices(model)
    assert choose_matrices(model, include=["."]).keys() == find_matrices(tiny_model()).keys()


def test_a_model_without_matrices_is_refused():
    model = tiny_model()
    model.model.layers = nn.ModuleList(nn.LayerNorm(1 << 20) for _ in range(3))
    for include in ((), (".",)):
        with pytest.raises(InputError, match=r"blocks have no matrix that can be pruned \(Linear, Conv1D, experts\)$"):
            find_matrices(model, include)
    with pytest.raises(InputError, match="have no matrix that can be pruned"):
        choose_matrices(model, (".",))


def test_nan_weights_are_refused_by_name():
    model = tiny_model()
    matrices = find_matrices(model)
    check_finite(matrices)
    matrices["model.layers.1.mlp.up_proj"].parameter[3, 4] = float("nan")
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj: the weights contain NaN"):
        check_finite(matrices)
