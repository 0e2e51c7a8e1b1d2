"""Fine-tuning that keeps zeros, against a model that multiplies by its masks in plain autograd."""

import copy
import logging
import pickle
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import uniprune
from conftest import tiny_model
from small_models import VOCABULARY, tiny
from uniprune.artefacts.mask_tools import verify
from uniprune.errors import InputError, MismatchError
from uniprune.models import masking
from uniprune.models.matrices import find_matrices
from uniprune.sparsity.patterns.spelling import parse
from uniprune.training import KeepZeros, merge_adapters

ROWS = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(0, VOCABULARY, (24, 16), generator=torch.Generator().manual_seed(0))
]

BEGINNING = SimpleNamespace(fsdp=None, deepspeed=None)


def pruned(model, pattern="0.5"):
    """The model without its smallest weights, and its masks."""
    matrices = find_matrices(model)
    masks = {name: dict(parse(pattern)({"": matrix.weight.abs()}))[""] for name, matrix in matrices.items()}
    masking.apply(matrices, masks.items())
    return model.requires_grad_(True), masks


def train(model, folder, *callbacks, optimizer=None, **settings):
    options = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.5}
    arguments = TrainingArguments(
        str(folder),
        **options | settings,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=ROWS, callbacks=list(callbacks), optimizers=(optimizer, None)).train()
    return model


def weights(model):
    return {name: matrix.weight.clone() for name, matrix in find_matrices(model).items()}


def nonzero(model):
    return {name: matrix.weight != 0 for name, matrix in find_matrices(model).items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def multiplied(model, masks):
    """The model with layers that multiply by their masks: zeros get no gradient, and AdamW leaves them."""
    for name, matrix in find_matrices(model).items():
        matrix.module.forward = lambda x, module=matrix.module, mask=masks[name]: functional.linear(x, module.weight * mask)
    return model


def test_a_hundred_steps_of_adamw_are_those_of_a_model_that_multiplies_by_its_masks(tmp_path):
    settings = {"max_steps": 100, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
    model, masks = pruned(tiny_model(vocab_size=VOCABULARY))
    reference, _ = pruned(tiny_model(vocab_size=VOCABULARY))
    before = weights(model)
    train(model, tmp_path, KeepZeros(), **settings)
    train(multiplied(reference, masks), tmp_path, **settings)
    assert same(nonzero(model), masks)
    assert not any(torch.equal(before[name], weight) for name, weight in weights(model).items())
    for name, parameter in reference.named_parameters():
        assert torch.allclose(model.get_parameter(name), parameter, rtol=1e-4, atol=1e-6), name
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_without_the_callback_zeros_are_filled(tmp_path):
    model, _ = pruned(tiny_model(vocab_size=VOCABULARY))
    assert all(mask.all() for mask in nonzero(train(model, tmp_path)).values())


@pytest.mark.parametrize("family", ["gpt2", "zamba2", "mixtral", "gpt_oss", "llama4", "qwen3_moe, fused"])
def test_zeros_stay_in_shared_transposed_and_fused_weights(tmp_path, family):
    model, masks = pruned(tiny(family), "2:4")
    before = weights(model)
    train(model, tmp_path, KeepZeros(), max_steps=2)
    assert same(nonzero(model), masks)
    assert not all(torch.equal(before[name], weight) for name, weight in weights(model).items())


def test_what_an_optimiser_remembers_does_not_fill_zeros(tmp_path):
    model, masks = pruned(tiny_model(vocab_size=VOCABULARY))
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    model(input_ids=ROWS[0]["input_ids"][None], labels=ROWS[0]["labels"][None]).loss.backward()
    optimizer.step()
    assert not same(nonzero(model), masks)
    train(model, tmp_path, KeepZeros(masks), optimizer=optimizer)
    assert same(nonzero(model), masks)


def test_masks_of_a_file_are_put_on_a_dense_model(tmp_path, folder):
    recipe = uniprune.Recipe(sparsity="2:4", windows=2, length=32, controller="none")
    uniprune.prune(str(folder), recipe, tmp_path / "pruned")
    file = tmp_path / "pruned/pruning/masks.safetensors"
    model = uniprune.load(folder, dtype="float32", device="cpu").model.requires_grad_(True)
    expected = nonzero(uniprune.load(tmp_path / "pruned", dtype="float32", device="cpu").model)
    train(model, tmp_path, KeepZeros(file), max_steps=1)
    assert same(nonzero(model), expected)
    model.save_pretrained(tmp_path / "tuned")
    assert verify(file, pruned=tmp_path / "tuned")["sparsity"] == 0.5


# ----------------------------------------------------------------------------------------------------------- adapters


def adapted(model, **settings):
    torch.manual_seed(0)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": "all-linear"} | settings)
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ROWS[0]["input_ids"][None]).logits


LORA = {
    "plain": {},
    "dropout": {"lora_dropout": 0.2},
    "scaled": {"use_rslora": True, "lora_alpha": 3},
    "some": {"target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("settings", LORA.values(), ids=LORA)
def test_merging_lora_changes_nothing_and_keeps_zeros(tmp_path, settings):
    model, masks = pruned(tiny_model(vocab_size=VOCABULARY))
    model, zeros = adapted(model, **settings), KeepZeros()
    before = logits(model)
    train(model, tmp_path, zeros, max_steps=10)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    trained = logits(model)
    merged = merge_adapters(model)
    assert same(nonzero(merged), masks)
    assert not torch.allclose(trained, before, atol=1e-2)
    assert torch.allclose(logits(merged), trained, atol=1e-5)
    assert not [name for name, _ in merged.named_modules() if "lora" in name or "base_layer" in name]


def test_merging_lora_of_transposed_weights(tmp_path):
    model, masks = pruned(tiny("gpt2"))
    model, zeros = adapted(model, fan_in_fan_out=True, target_modules=["c_attn", "c_fc"]), KeepZeros()
    assert any(isinstance(module, Conv1D) for module in model.modules())
    trained = logits(train(model, tmp_path, zeros, max_steps=10))
    merged = merge_adapters(model)
    assert same(nonzero(merged), masks)
    assert torch.allclose(logits(merged), trained, atol=1e-5)


def test_gradients_of_a_masked_update_are_those_of_the_masked_product():
    model, masks = pruned(tiny_model(vocab_size=VOCABULARY))
    name = "model.layers.1.mlp.up_proj"
    model = adapted(model, target_modules=["up_proj"])
    layer = model.base_model.model.get_submodule(name)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(B)
    zeros = KeepZeros()
    zeros.on_train_begin(BEGINNING, None, None, model=model)
    x = torch.randn(3, 32)
    layer(x).square().sum().backward()
    found = A.grad.clone(), B.grad.clone()
    weight = layer.base_layer.weight + masks[name] * (B @ A) * layer.scaling["default"]
    expected = torch.autograd.grad((x @ weight.T).square().sum(), (A, B))
    assert all(torch.allclose(one, other, rtol=1e-4) for one, other in zip(found, expected, strict=True))
    zeros.on_train_end(None, None, None)
    assert torch.allclose(layer(x), x @ weight.T, atol=1e-5)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_model_with_masked_updates_computes_by_itself(again):
    model, masks = pruned(tiny_model(vocab_size=VOCABULARY))
    model, zeros = adapted(model, target_modules=["up_proj"]), KeepZeros()
    zeros.on_train_begin(BEGINNING, None, None, model=model)
    before, copied = logits(model), again(model)
    for layer in copied.base_model.model.model.layers:
        torch.nn.init.normal_(layer.mlp.up_proj.lora_B["default"].weight)
    found = logits(copied)
    assert not torch.allclose(found, before, atol=1e-2)
    assert torch.equal(logits(model), before)
    merged = merge_adapters(copied)
    assert same(nonzero(merged), masks)
    assert torch.allclose(logits(merged), found, atol=1e-5)


def test_a_further_training_has_its_own_masks():
    model, masks = pruned(tiny_model(vocab_size=VOCABULARY))
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    model = adapted(model, target_modules=["up_proj"])
    for name in names:
        torch.nn.init.normal_(model.base_model.model.get_submodule(name).lora_B["default"].weight)
    KeepZeros().on_train_begin(BEGINNING, None, None, model=model)
    KeepZeros({names[0]: masks[names[0]]}).on_train_begin(BEGINNING, None, None, model=model)
    x = torch.randn(3, 32)
    for name in names:
        layer = model.base_model.model.get_submodule(name)
        update = layer.get_delta_weight("default")
        weight = layer.base_layer.weight + (masks[name] * update if name == names[0] else update)
        assert torch.allclose(layer(x), x @ weight.T, atol=1e-4)


def test_merging_without_masks_fills_zeros(tmp_path):
    model, _ = pruned(tiny_model(vocab_size=VOCABULARY))
    merged = train(adapted(model), tmp_path).merge_and_unload()
    assert all(mask.all() for mask in nonzero(merged).values())


def test_other_adapters_are_trained_without_masks_and_merged_with_them(tmp_path, caplog):
    model, masks = pruned(tiny_model(vocab_size=VOCABULARY))
    model = adapted(model, use_dora=True)
    with caplog.at_level(logging.WARNING):
        train(model, tmp_path, KeepZeros())
    assert "adapters lora.Linear are trained without masks" in caplog.text
    assert same(nonzero(merge_adapters(model)), masks)


def test_adapters_of_fused_experts_are_merged_with_masks(tmp_path):
    model, masks = pruned(tiny("mixtral"))
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapted(model, target_modules=["q_proj"], target_parameters=names)
    train(model, tmp_path, KeepZeros())
    assert same(nonzero(merge_adapters(model)), masks)


def test_biases_without_a_place_are_said_at_the_beginning_and_not_merged(tmp_path, caplog):
    """PEFT raises a RuntimeError for the first such layer, when others are merged already."""
    model, _ = pruned(tiny_model(vocab_size=VOCABULARY))
    model = adapted(model, lora_bias=True)
    with caplog.at_level(logging.WARNING):
        train(model, tmp_path, KeepZeros())
    assert "adapters learn biases (lora_bias) for layers without one" in caplog.text
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="into which PEFT merges none; save the adapters as they are"):
        merge_adapters(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_layer_that_is_trained_as_a_copy_keeps_its_zeros(tmp_path):
    model, masks = pruned(tiny_model(vocab_size=VOCABULARY))
    model = adapted(model, target_modules=["q_proj"], modules_to_save=["layers.0.mlp.up_proj", "lm_head"])
    merged = merge_adapters(train(model, tmp_path, KeepZeros()))
    assert same(nonzero(merged), masks)


def test_an_adapter_that_rewrites_its_base_needs_the_masks(tmp_path):
    model, masks = pruned(tiny_model(vocab_size=VOCABULARY))
    start = logits(model)
    model = adapted(model, init_lora_weights="pissa", target_modules=["q_proj"])
    with pytest.raises(InputError, match="no adapted layer of the base model has a zero; give the masks"):
        merge_adapters(model)
    zeros = KeepZeros(masks)
    zeros.on_train_begin(BEGINNING, None, None, model=model)
    assert torch.allclose(logits(model), start, atol=1e-5)
    zeros.on_train_end(None, None, None)
    assert same(nonzero(merge_adapters(model, masks)), masks)


# ------------------------------------------------------------------------------------------------------------- errors


def test_errors(tmp_path, folder):
    dense = tiny_model(vocab_size=VOCABULARY).requires_grad_(True)
    with pytest.raises(InputError, match="none of the model's prunable matrices has a zero; prune it first"):
        train(dense, tmp_path, KeepZeros())
    other = {"model.layers.0.mlp.up_proj": torch.ones(8, 8, dtype=torch.bool)}
    with pytest.raises(MismatchError, match=r"no matrix \S+up_proj of shape \(8, 8\), but one of \(64, 32\)"):
        train(dense, tmp_path, KeepZeros(other))
    with pytest.raises(MismatchError, match=r"made for another model: the model in training has no matrix x of shape \(1, 1\)"):
        train(dense, tmp_path, KeepZeros({"x": torch.ones(1, 1, dtype=torch.bool)}))
    with pytest.raises(InputError, match="whole weights"):
        KeepZeros().on_train_begin(SimpleNamespace(fsdp="full_shard", deepspeed=None), None, None, model=dense)
    launched = SimpleNamespace(fsdp=None, deepspeed=None, deepspeed_plugin=object())  # by accelerate launch
    with pytest.raises(InputError, match="whole weights"):
        KeepZeros().on_train_begin(launched, None, None, model=dense)
    with pytest.raises(InputError, match="LlamaForCausalLM has no adapters to merge"):
        merge_adapters(dense)


def test_weights_of_which_each_process_has_a_part_are_refused_whoever_cut_them_up():
    model, masks = pruned(tiny_model(vocab_size=VOCABULARY))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = model.model.layers[1].mlp.up_proj
        layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(InputError, match="whole weights"):
            KeepZeros(masks).on_train_begin(BEGINNING, None, None, model=model)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, None])
def test_masks_of_numbers_are_refused_before_a_weight_is_changed(kind):
    """``~`` of 1 is 254, which is True as well: every weight would go."""
    model, masks = pruned(tiny_model(vocab_size=VOCABULARY))
    before, numbers = weights(model), {name: mask.numpy() if kind is None else mask.to(kind) for name, mask in masks.items()}
    complaint = r"the mask of model\.layers\.0\.self_attn\.q_proj is of type .*; give boolean tensors"
    with pytest.raises(InputError, match=complaint):
        KeepZeros(numbers).on_train_begin(BEGINNING, None, None, model=model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["up_proj"]))
    with pytest.raises(InputError, match=complaint):
        merge_adapters(adapted, numbers)
    assert same(weights(adapted.unload()), before)


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning"])
def test_what_is_learned_beside_the_weights_is_not_merged(kind):
    model, _ = pruned(tiny_model(vocab_size=VOCABULARY))
    settings = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(
        InputError, match=f"PeftModelForCausalLM is tuned by {kind}, .* nothing can be merged into them; save it"
    ):
        merge_adapters(peft.get_peft_model(model, settings))


def test_adapters_that_transformers_put_in_are_loaded_as_a_peft_model_first():
    model, _ = pruned(tiny_model(vocab_size=VOCABULARY))
    try:
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["up_proj"]))
    except ValueError as refusal:  # transformers 5.24.0 asks for PEFT 0.22.0, before that was out
        if "version of PEFT" not in str(refusal):
            raise
        pytest.skip(str(refusal))
    with pytest.raises(InputError, match=r"adapters of its own; .*PeftModel.from_pretrained"):
        merge_adapters(model)
