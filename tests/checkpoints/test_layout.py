"""Where parameters lie in a checkpoint, against what transformers itself loads and saves."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    PermuteForRope,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

import uniprune
from families import same_files
from small_models import VOCABULARY, save, tiny
from uniprune import Loaded, Recipe
from uniprune.artefacts import mask_conversion, mask_tools
from uniprune.artefacts import masks as masks_file
from uniprune.checkpoints.checkpoint import Files, Memory
from uniprune.checkpoints.layout import Computed
from uniprune.data.windows import Windows, save_windows
from uniprune.errors import InputError
from uniprune.models.matrices import find_matrices

CPU = torch.device("cpu")
FAMILIES = (
    "llama",
    "gpt2",
    "gpt_neox",
    "mixtral",
    "deepseek_v3",
    "granitemoe",
    "gpt_oss",
    "zamba2",
    "qwen3_next",
    "nemotron_h",
    "qwen3_5",
    "qwen3_5_moe",
    "llama4",
    "mixtral, fused",
    "deepseek_v3, fused",
    "nemotron_h, fused",
    "qwen3_5_moe, fused",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_transformers_loads(family, tmp_path):
    """Every parameter and persistent buffer, bit for bit."""
    save(family, tmp_path, shard="20KB")
    model, files = AutoModelForCausalLM.from_pretrained(tmp_path), Files(tmp_path)
    located = files.layout(model).located
    for name, tensor in model.state_dict().items():
        assert torch.equal(files.read(located[name], tensor.dtype, CPU), tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_in_memory_are_named_and_stored_as_they_are_saved(family, tmp_path):
    model = tiny(family)
    memory = Memory(model)
    model.save_pretrained(tmp_path)
    files = Files(tmp_path)
    names = list(find_matrices(model))
    assert all(name in files for name in names)  # by their names alone
    assert memory.digests(names) == files.digests(names)
    assert {name: memory.region(name) for name in names} == {name: files.region(name) for name in names}
    assert {name: memory.key(name) for name in names} == {name: files.key(name) for name in names}


# ------------------------------------------------------------------------- conversions that no small family happens to have

CONVERSIONS = {
    "several modules in one tensor": [
        WeightConverter(
            "self_attn.qkv.weight", [f"self_attn.{name}.weight" for name in ("q_proj", "o_proj")], operations=[Chunk(dim=0)]
        ),
        WeightConverter("mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], operations=[Chunk(dim=0)]),
    ],
    "a module in several tensors": [
        WeightConverter(["mlp.up_a.weight", "mlp.up_b.weight"], "mlp.up_proj.weight", operations=[Concatenate(dim=0)]),
        WeightConverter(["mlp.down_a.weight", "mlp.down_b.weight"], "mlp.down_proj.weight", operations=[Concatenate(dim=1)]),
    ],
    "transposed": [WeightConverter("mlp.up_t", "mlp.up_proj.weight", operations=[Transpose(0, 1)])],
    "rows in another order": [
        WeightConverter("mlp.w1.weight", "mlp.up_proj.weight", operations=[Interleave(dim=0)]),
        WeightConverter("self_attn.wq.weight", "self_attn.q_proj.weight", operations=[PermuteForRope()]),
    ],
    "columns in another order": [WeightConverter("mlp.w2.weight", "mlp.down_proj.weight", operations=[Interleave(dim=1)])],
    "renamed, and a prefix": [
        PrefixChange(prefix_to_remove="decoder", model_prefix="model"),
        WeightRenaming(r"\.attention\.", ".self_attn."),
    ],
}


@pytest.fixture(params=CONVERSIONS)
def source(request, monkeypatch, tmp_path):
    """A llama that is stored as conversions of its own have it."""
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", None)
    monkeypatch.setattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", set())
    conversion_mapping.register_checkpoint_conversion_mapping("llama", CONVERSIONS[request.param])
    torch.manual_seed(0)
    config = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **config)).eval()
    model.save_pretrained(tmp_path / "model")
    if "prefix" in request.param:  # which transformers only saves if it has loaded it
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        tensors = {key.replace("model.", "model.decoder."): tensor for key, tensor in tensors.items()}
        save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored.keys() != model.state_dict().keys()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in model.state_dict().items())
    return tmp_path / "model"


def recipe_in(folder):
    ids = torch.randint(0, VOCABULARY, (9, 32), generator=torch.Generator().manual_seed(0))
    save_windows(Windows(ids, "random", 9, "none"), folder / "tokens.safetensors")
    return Recipe(sparsity="2:4", controller="none", text=str(folder / "tokens.safetensors"))


def test_any_arrangement_is_pruned_where_it_lies(source, tmp_path, monkeypatch):
    recipe = recipe_in(tmp_path)
    out, file = tmp_path / "out", tmp_path / "out" / "pruning" / "masks.safetensors"
    assert uniprune.plan(source, recipe).fits
    uniprune.prune(source, recipe, out)
    # As transformers loads it, the output is the source with 2 of every 4 inputs gone, as the masks say.
    model, masks, pruned = uniprune.load(source).model, masks_file.MasksFile(file), AutoModelForCausalLM.from_pretrained(out)
    parameters = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    expected = dict(model.state_dict())
    for name, matrix in find_matrices(model).items():
        assert bool((masks[name].unflatten(1, (-1, 4)).sum(-1) == 2).all())
        expected[parameters[id(matrix.module)]] = torch.where(masks[name], matrix.parameter, 0)
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    # Every other way to the same files and masks.
    uniprune.apply(source, file, tmp_path / "applied")
    uniprune.prune(source, recipe, tmp_path / "streamed", execution="streamed")
    assert same_files(tmp_path / "applied", out)
    assert same_files(tmp_path / "streamed", out)
    assert mask_tools.verify(file, source, out)["checked"] == ["file", "pattern", "model", "pruned"]
    mask_conversion.from_checkpoint(out, source, tmp_path / "zeros.safetensors")
    mask_conversion.export_masks(file, tmp_path / "plain.safetensors", model=source)
    mask_conversion.from_foreign(tmp_path / "plain.safetensors", source, tmp_path / "back.safetensors")
    for other in ("zeros", "back"):
        found = masks_file.MasksFile(tmp_path / f"{other}.safetensors")
        assert found.facts.base == masks.facts.base
        assert all(torch.equal(found[name], mask) for name, mask in masks.items())


def test_a_model_in_memory_is_written_in_its_arrangement(source, tmp_path):
    """Also with the prefix that its checkpoint had."""
    model = AutoModelForCausalLM.from_pretrained(source)
    recipe = recipe_in(tmp_path)
    uniprune.prune(Loaded(model), recipe, tmp_path / "out")
    uniprune.prune(source, recipe, tmp_path / "from disk")
    names = [tmp_path / out / "model.safetensors" for out in ("out", "from disk")]
    one, other = map(load_file, names)
    assert one.keys() == other.keys() == load_file(source / "model.safetensors").keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_values_are_computed_where_a_conversion_is_more_than_moves(monkeypatch, tmp_path):
    """Of what is not pruned; a matrix like that is refused."""

    class Doubled(Transpose):
        def convert(self, input_dict, source_patterns, target_patterns, **keywords):
            (tensors,) = input_dict.values()
            return {target_patterns[0]: 2 * tensors[0]}

    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", None)
    monkeypatch.setattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", set())
    conversion_mapping.register_checkpoint_conversion_mapping(
        "llama", [WeightConverter("model.half_norm.weight", "model.norm.weight", operations=[Doubled()])]
    )
    model = tiny("llama")
    model.save_pretrained(tmp_path, save_original_format=False)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.half_norm.weight"] = tensors.pop("model.norm.weight") / 2
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    files, loaded = Files(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    place = files.layout(loaded).located["model.norm.weight"]
    assert isinstance(place, Computed)
    assert torch.equal(files.read(place, torch.float32, CPU), loaded.model.norm.weight)
    conversion_mapping.register_checkpoint_conversion_mapping(
        "llama", [WeightConverter("mlp.half.weight", "mlp.up_proj.weight", operations=[Doubled()])], overwrite=True
    )
    with pytest.raises(InputError, match=r"mlp\.up_proj: it is not known how"):
        find_matrices(tiny("llama"))
