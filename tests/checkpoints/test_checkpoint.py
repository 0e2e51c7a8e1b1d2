"""The files of a checkpoint: which are read, which weights they are, and what is refused before any work."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, LlamaModel

import uniprune
from conftest import tiny_config, tiny_model
from families import same_files
from small_models import VOCABULARY, save, tiny
from uniprune import Loaded, Recipe
from uniprune.artefacts import mask_conversion, mask_tools
from uniprune.artefacts import masks as masks_file
from uniprune.checkpoints.checkpoint import INDEX, WHOLE, Files, checkpoint_of
from uniprune.checkpoints.origin import resolve
from uniprune.data.windows import Windows, save_windows
from uniprune.errors import InputError
from uniprune.models import loading
from uniprune.models.checks import check_loaded
from uniprune.models.matrices import find_matrices
from uniprune.models.residency.streaming import open_streamed
from uniprune.storage import safetensors_index

CPU = torch.device("cpu")


@pytest.fixture
def recipe(tmp_path):
    ids = torch.randint(0, VOCABULARY, (9, 32), generator=torch.Generator().manual_seed(0))
    save_windows(Windows(ids, "random", 9, "none"), tmp_path / "tokens.safetensors")
    return Recipe(sparsity="2:4", controller="none", text=str(tmp_path / "tokens.safetensors"))


def llama(seed, **changes):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(**changes)).eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------- the files that are read


def whole_and_sharded(folder):
    """The whole file has the weights of seed 0, the index leads to those of seed 1."""
    llama(0).save_pretrained(folder)
    llama(1).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / WHOLE).exists()
    assert (folder / INDEX).exists()


def sharded_then_whole(folder):
    """transformers leaves the index when it removes the shards."""
    llama(1).save_pretrained(folder, max_shard_size="20KB")
    llama(0).save_pretrained(folder)
    assert (folder / INDEX).exists()
    assert len(list(folder.glob("*.safetensors"))) == 1


def by_name(folder):
    """A file that config.json names, beside a whole one of other weights."""
    llama(0).save_pretrained(folder)
    (folder / WHOLE).rename(folder / "mine.safetensors")
    llama(1).save_pretrained(folder)
    edit(folder / "config.json", transformers_weights="mine.safetensors")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("write", [whole_and_sharded, sharded_then_whole, by_name], ids=lambda write: write.__name__)
def test_the_weights_are_those_of_the_file_that_transformers_loads(write, tmp_path, recipe, caplog):
    source, alone = tmp_path / "model", tmp_path / "alone"
    write(source)
    llama(0).save_pretrained(alone)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(source).lm_head.weight, llama(0).lm_head.weight)
    with caplog.at_level(logging.WARNING):
        uniprune.prune(source, recipe, tmp_path / "out")
    assert caplog.text.count("has both model.safetensors and") == (write is not by_name)
    uniprune.prune(alone, recipe, tmp_path / "alone-out")
    uniprune.prune(source, recipe, tmp_path / "streamed", execution="streamed")
    expected = load_file(tmp_path / "alone-out" / WHOLE)
    for out in ("out", "streamed"):
        (file,) = (tmp_path / out).glob("*.safetensors")  # no shards, and no index to any
        assert not (tmp_path / out / INDEX).exists()
        found = load_file(file)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        assert torch.equal(
            AutoModelForCausalLM.from_pretrained(tmp_path / out).state_dict()["model.norm.weight"], llama(0).model.norm.weight
        )


def test_files_of_other_names_are_refused_as_transformers_does(tmp_path):
    tiny_model().save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / WHOLE).exists()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    with pytest.raises(InputError, match=r"has model\.fp16\.safetensors, but neither model\.safetensors nor"):
        uniprune.plan(tmp_path, Recipe(sparsity="2:4"))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "weights.bin", 3])
def test_a_name_in_the_configuration_cannot_lead_elsewhere(tmp_path, name):
    tiny_model().save_pretrained(tmp_path)
    edit(tmp_path / "config.json", transformers_weights=name)
    with pytest.raises(InputError, match="transformers_weights"):
        uniprune.plan(tmp_path, Recipe(sparsity="2:4"))


def test_headers_are_read_once(folder, tmp_path, monkeypatch):
    read = []
    real = safetensors_index._entries

    def counted(shard, file):
        read.append(shard)
        return real(shard, file)

    monkeypatch.setattr(safetensors_index, "_entries", counted)
    small = {"windows": 4, "length": 32, "text": "builtin"}
    for execution in ("resident", "streamed"):
        recipe = Recipe(sparsity="2:4", controller="none", **small)
        uniprune.prune(folder, recipe, tmp_path / execution, execution=execution)
        shards = [shard for shard in read if shard.parent == folder]
        assert sorted(shards) == sorted(folder.glob("*.safetensors"))
        read.clear()


# ------------------------------------------------------------------------------------------------------------- tied weights


def own_head(folder):
    """As PEFT leaves one that was trained: the configuration ties it, the file has another."""
    llama(0).save_pretrained(folder)
    head = torch.randn(llama(0).lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
    put(folder, "lm_head.weight", head)


def equal_head(folder):
    llama(0).save_pretrained(folder)
    put(folder, "lm_head.weight", llama(0).lm_head.weight.clone())


def only_the_head(folder):
    """The embedding is missing, and is the head."""
    llama(0).save_pretrained(folder)
    put(folder, "lm_head.weight", llama(0).lm_head.weight.clone(), "model.embed_tokens.weight")


def put(folder, key, tensor, instead=None):
    tensors = load_file(folder / WHOLE)
    tensors.pop(instead, None)
    save_file(tensors | {key: tensor}, folder / WHOLE, {"format": "pt"})


@pytest.mark.parametrize("write", [own_head, equal_head, only_the_head], ids=lambda write: write.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_by_block_a_head_is_tied_as_transformers_ties_it(write, dtype, tmp_path):
    write(tmp_path)
    expected = loading.load(tmp_path, str(dtype).removeprefix("torch."), "cpu").model
    found = open_streamed(resolve(tmp_path), None, dtype, CPU).model
    tied = expected.lm_head.weight is expected.model.embed_tokens.weight
    assert tied == (write is not own_head)
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    assert torch.equal(found.lm_head.weight, expected.lm_head.weight)
    assert torch.equal(found.model.embed_tokens.weight, expected.model.embed_tokens.weight)


def test_a_head_that_differs_beyond_the_type_computed_in_is_tied(tmp_path):
    """transformers compares what it has loaded."""
    llama(0).save_pretrained(tmp_path)
    head = llama(0).lm_head.weight.clone()
    put(tmp_path, "lm_head.weight", head * (1 + 1e-4))
    for dtype, tied in ((torch.float32, False), (torch.bfloat16, None)):
        expected = loading.load(tmp_path, str(dtype).removeprefix("torch."), "cpu").model
        found = open_streamed(resolve(tmp_path), None, dtype, CPU).model
        same = expected.lm_head.weight is expected.model.embed_tokens.weight
        assert tied is None or same == tied
        assert (found.lm_head.weight is found.model.embed_tokens.weight) == same


def test_the_controller_fits_the_head_that_the_model_has(tmp_path, recipe):
    own_head(tmp_path / "model")
    controlled = recipe.model_copy(update={"controller": "feedback", "steps": 2, "tuning": {"batch_tokens": 128}})
    reports = {}
    for execution in ("resident", "streamed"):
        reports[execution] = uniprune.prune(tmp_path / "model", controlled, tmp_path / execution, execution=execution)
    kl, again = (reports[name].controller.held_out_loss for name in ("resident", "streamed"))
    assert again == pytest.approx(kl, rel=1e-4)
    assert same_files(tmp_path / "resident", tmp_path / "streamed")


# ------------------------------------------------------------------------------------------------- one model, many layouts


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_5_moe"])
def test_the_same_weights_are_pruned_alike_in_either_layout(family, tmp_path, recipe):
    """Experts one by one or fused: what plain transformers loads from the outputs is the same."""
    states = []
    for kind in (family, f"{family}, fused"):
        save(kind, tmp_path / kind)
        uniprune.prune(tmp_path / kind, recipe, tmp_path / f"{kind}-out")
        states.append(AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}-out").state_dict())
    one, other = states
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_names_are_the_keys_of_this_checkpoint(tmp_path):
    save("qwen3_5_moe", tmp_path / "parts")
    save("qwen3_5_moe, fused", tmp_path / "fused")
    text_model = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    text_model.save_pretrained(tmp_path / "text")  # transformers puts the prefix back
    experts = "model.language_model.layers.0.mlp.experts"
    names = {name: set(find_matrices(loading.skeleton(resolve(tmp_path / name)))) for name in ("parts", "fused", "text")}
    assert {f"{experts}.{n}.{part}_proj" for n in range(4) for part in ("gate", "up", "down")} < names["parts"]
    assert {f"{experts}.{part}_proj.{n}" for n in range(4) for part in ("gate_up", "down")} < names["fused"]
    assert names["text"] == names["fused"] == set(find_matrices(text_model))
    tiny("qwen3_5_moe").save_pretrained(tmp_path / "new")  # a text model that never had one
    assert "model.layers.0.mlp.gate_proj" not in names["parts"]
    new = set(find_matrices(loading.skeleton(resolve(tmp_path / "new"))))
    assert {name.replace("language_model.", "") for name in names["parts"]} == new


def test_a_text_model_out_of_a_larger_one_is_pruned_in_memory_and_saved(tmp_path, recipe):
    save("qwen3_5", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    uniprune.prune(Loaded(model), recipe, tmp_path / "memory")
    uniprune.prune(tmp_path / "model", recipe, tmp_path / "disk")
    found = {key: tensor for file in (tmp_path / "memory").glob("*.safetensors") for key, tensor in load_file(file).items()}
    expected = {key: tensor for file in (tmp_path / "disk").glob("*.safetensors") for key, tensor in load_file(file).items()}
    assert {key for key in expected if "language_model" in key} == {key for key in found if "lm_head" not in key}
    assert all(torch.equal(expected[key], tensor) for key, tensor in found.items() if key in expected)
    masks = [masks_file.MasksFile(tmp_path / out / "pruning" / "masks.safetensors") for out in ("memory", "disk")]
    assert masks[0].facts.base == masks[1].facts.base
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[1])


# --------------------------------------------------------------------------------------------------------------- the guards


def test_a_model_in_memory_that_is_not_what_its_files_have_is_refused(tmp_path, recipe):
    tiny("deepseek_v3").save_pretrained(tmp_path / "model")
    origin = resolve(tmp_path / "model")
    model = loading.load_weights(origin, torch.float32, CPU)
    matrices = find_matrices(model)
    check_loaded(model, matrices)
    name, buffer = next((name, buffer) for name, buffer in model.named_buffers() if "e_score_correction_bias" in name)
    buffer[1] += 1
    with pytest.raises(InputError, match=rf"{name} is not in memory what it is in .*model, whose weights would be pruned"):
        check_loaded(model, matrices)
    buffer[1] -= 1
    model.model.layers[0].self_attn.q_a_proj.weight[3, 5] += 1
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_a_proj is not in memory"):
        uniprune.prune(Loaded(model, None, origin), recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    check_loaded(tiny("llama"), find_matrices(tiny("llama")))  # has no files


def test_the_guard_looks_at_another_kind_in_each_block(tmp_path):
    """So an error that all blocks have in one kind of matrices is seen."""
    tiny("qwen3_moe, fused", num_hidden_layers=12).save_pretrained(tmp_path, save_original_format=False)
    model = loading.load_weights(resolve(tmp_path), torch.float32, CPU)
    matrices = find_matrices(model)
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.copy_(layer.mlp.experts.down_proj.flip(0))
    with pytest.raises(InputError, match=r"experts\.down_proj\.\d is not in memory"):
        check_loaded(model, matrices)


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_checkpoint_without_a_head_is_refused_for_what_it_is(kind, tmp_path, recipe):
    kind(tiny_config(tie_word_embeddings=False)).save_pretrained(tmp_path / "model")
    for ask in (
        lambda: uniprune.plan(tmp_path / "model", recipe),
        lambda: uniprune.prune(tmp_path / "model", recipe, tmp_path / "out"),
        lambda: uniprune.load(tmp_path / "model"),
    ):
        with pytest.raises(InputError, match=rf"lack 1 tensors, e\.g\. lm_head\.weight; config\.json says {kind.__name__}: no"):
            ask()


def test_plan_refuses_files_that_lack_a_tensor_or_have_it_in_another_shape(tmp_path, recipe):
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / WHOLE
    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if "lm_head" not in key}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 tensors, e\.g\. lm_head\.weight; fetch it again"):
        uniprune.plan(tmp_path / "model", recipe)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name][1:].clone()}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"config\.json makes .*\.1\.mlp\.up_proj\.weight \[64, 32\], .* \[63, 32\]"):
        uniprune.plan(tmp_path / "model", recipe)
    shutil.rmtree(tmp_path / "model")


def test_a_model_knows_the_files_that_it_was_made_from(folder):
    origin = resolve(folder)
    for model in (
        loading.skeleton(origin),
        loading.without_weights(origin, torch.float32),
        loading.load_weights(origin, None, CPU),
    ):
        assert checkpoint_of(model) is origin.files
    assert not isinstance(checkpoint_of(tiny_model()), Files)
    assert Loaded(model := tiny_model(), None, origin).checkpoint is checkpoint_of(model) is origin.files


# ---------------------------------------------------------------------------------- quantised, though config.json hides it


def packed(folder, pieces, config=None):
    """A model whose matrices lie packed into integers, each as ``pieces`` makes it; config: added to config.json."""
    llama(0).save_pretrained(folder)
    stored = {}
    for key, tensor in load_file(folder / WHOLE).items():
        small = tensor.dim() < 2 or "embed" in key
        stored |= {key: tensor} if small else {key.removesuffix("weight") + name: made for name, made in pieces(tensor).items()}
    save_file(stored, folder / WHOLE, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | (config or {})))


def as_mlx(tensor):
    rows, columns = tensor.shape
    return {"weight": torch.zeros(rows, columns // 8, dtype=torch.uint32), "scales": torch.ones(rows, columns // 8)}


def as_gptq(tensor):
    rows, columns = tensor.shape
    return {"qweight": torch.zeros(columns // 8, rows, dtype=torch.int32), "scales": torch.ones(1, rows)}


@pytest.mark.parametrize(
    ("pieces", "config", "message"),
    [
        (as_mlx, {"quantization": {"group_size": 32, "bits": 4}}, r"is quantised \(.*\): its weights are no plain matrices"),
        (as_mlx, None, "is quantised: .* as MLX stores weights"),
        (as_gptq, None, "is quantised: .* as GPTQ and AWQ store weights"),
    ],
)
def test_packed_weights_are_called_quantised(tmp_path, pieces, config, message):
    dense, masks = tmp_path / "dense", tmp_path / "masks.safetensors"
    llama(0).save_pretrained(dense)
    mask_conversion.from_checkpoint(dense, dense, masks)
    packed(tmp_path / "packed", pieces, config)
    for look in (
        lambda: uniprune.plan(tmp_path / "packed", Recipe(sparsity="2:4")),
        lambda: uniprune.apply(tmp_path / "packed", masks, tmp_path / "out"),
        lambda: mask_tools.verify(masks, pruned=tmp_path / "packed"),
        lambda: mask_conversion.from_checkpoint(tmp_path / "packed", dense, tmp_path / "out.safetensors"),
    ):
        with pytest.raises(InputError, match=message):
            look()


def test_a_pointer_of_git_lfs_is_called_one(tmp_path):
    llama(0).save_pretrained(tmp_path)
    (tmp_path / WHOLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match="pointer of Git LFS"):
        uniprune.plan(tmp_path, Recipe(sparsity="2:4"))
