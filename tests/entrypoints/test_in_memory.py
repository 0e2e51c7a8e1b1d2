"""Models that a caller has in memory: of his own making, compiled, changed since they were loaded, set up in other ways."""

import copy
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import uniprune
from conftest import tiny_model
from uniprune import Loaded, Recipe
from uniprune.errors import InputError

SMALL = {"windows": 8, "length": 32, "metric": "magnitude", "controller": "none"}


def masks_of(model, **settings):
    """The masks that a recipe gives a copy of a model."""
    pruned = copy.deepcopy(model)
    uniprune.prune_in_place(Loaded(pruned, None), Recipe(sparsity="2:4", **SMALL | settings))
    return {name: parameter != 0 for name, parameter in pruned.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def tokens(loaded, tmp_path):
    """A token file: the models here have no tokenizer."""
    file = tmp_path / "tokens.safetensors"
    uniprune.prune_in_place(Loaded(tiny_model(), loaded.tokenizer), Recipe(sparsity="2:4", **SMALL), save_tokens=file)
    return str(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, layer: layer.self_attn.q_proj.weight,
        lambda model, layer: layer.input_layernorm.weight,
        lambda model, layer: model.model.embed_tokens.weight,
    ],
)
def test_what_is_left_dense_must_be_what_the_files_have_as_well(folder, tmp_path, change):
    """A run prunes the files: what a first run, or a training, did to other weights in memory would be lost without a word."""
    loaded = uniprune.load(str(folder), dtype="float32")
    with torch.no_grad():
        for layer in loaded.model.model.layers:
            change(loaded.model, layer).mul_(0.5)
    with pytest.raises(InputError, match="is not in memory what it is in"):
        uniprune.prune(loaded, Recipe(sparsity=0.5, include="up_proj", **SMALL), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["prune", "calibrate"])
def test_resume_tells_models_without_files_by_their_weights(loaded, tmp_path, command):
    out = tmp_path / ("out" if command == "prune" else "scores.safetensors")
    recipe = Recipe(sparsity="2:4", **SMALL)
    run = getattr(uniprune, command)
    first = run(loaded, recipe, out)
    assert run(loaded, recipe, out, resume=True) == first
    other = Loaded(copy.deepcopy(loaded.model), loaded.tokenizer)
    with torch.no_grad():
        other.model.model.layers[1].mlp.up_proj.weight[2, 3] += 1
    with pytest.raises(InputError, match="exists; give another name"):
        run(other, recipe, out, resume=True)


def test_a_model_that_was_compiled_as_a_whole_is_the_model(loaded, tmp_path):
    recipe = Recipe(sparsity="2:4", **SMALL)
    uniprune.prune(Loaded(torch.compile(loaded.model, backend="eager"), loaded.tokenizer), recipe, tmp_path / "out")
    pruned = uniprune.load(str(tmp_path / "out")).model
    expected = masks_of(loaded.model, text=_tokens(loaded, tmp_path))
    assert all(torch.equal(pruned.get_parameter(name) != 0, mask) for name, mask in expected.items() if "proj" in name)


def test_a_model_that_was_compiled_in_place_is_the_model(loaded):
    """Whose blocks were, too; a graph of them would hold no masks. Afterwards it is compiled as before."""
    recipe = Recipe(sparsity="2:4", **SMALL)
    other = Loaded(copy.deepcopy(loaded.model), loaded.tokenizer)
    uniprune.prune_in_place(other, recipe)
    modules = (loaded.model, loaded.model.model.layers[0])
    for module in modules:
        module.compile(backend="eager")
    calls = [module._compiled_call_impl for module in modules]
    uniprune.prune_in_place(loaded, recipe)
    assert [module._compiled_call_impl for module in modules] == calls
    for ours, theirs in zip(loaded.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_that_nothing_computes_with_are_refused(loaded):
    layer = loaded.model.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj: weights of type float8_e4m3fn .* give the model in"):
        uniprune.prune_in_place(loaded, Recipe(sparsity="2:4", **SMALL))


def _tokens(loaded, folder):
    file = folder / "t.safetensors"
    uniprune.prune_in_place(
        Loaded(copy.deepcopy(loaded.model), loaded.tokenizer), Recipe(sparsity="2:4", **SMALL), save_tokens=file
    )
    return str(file)


@pytest.mark.parametrize("command", ["prune", "calibrate"])
def test_blocks_that_were_compiled_are_refused_where_their_names_matter(loaded, tmp_path, command):
    layers = loaded.model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")
    recipe = Recipe(sparsity="2:4", **SMALL)
    with pytest.raises(InputError, match=r"model\.layers\.0 is what torch\.compile put in place of a module"):
        getattr(uniprune, command)(loaded, recipe, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())
    assert uniprune.prune_in_place(loaded, recipe).sparsity == 0.5


def test_what_save_pretrained_refuses_is_refused_before_the_work(loaded, tmp_path):
    recipe = Recipe(sparsity="2:4", **SMALL)
    loaded.model.generation_config.temperature = 0.5  # and nothing is sampled
    with pytest.raises(InputError, match=r"generation_config cannot be saved; correct it on the model: .*temperature"):
        uniprune.prune(loaded, recipe, tmp_path / "out")
    loaded.model.generation_config.do_sample = True
    layers = loaded.model.model.layers
    own, layers[2].mlp.up_proj.weight = layers[2].mlp.up_proj.weight, layers[0].mlp.up_proj.weight
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj\.weight and model\.layers\.2\S+ are one parameter"):
        uniprune.prune(loaded, recipe, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    uniprune.prune_in_place(Loaded(copy.deepcopy(loaded.model), loaded.tokenizer), recipe)  # which saves nothing
    layers[2].mlp.up_proj.weight = own
    uniprune.prune(loaded, recipe, tmp_path / "out")


def test_a_generation_config_as_it_was_published_is_no_reason(folder, tmp_path):
    """Of a model that is used as it was loaded transformers saves it back, whatever it says."""
    source = tmp_path / "model"
    shutil.copytree(folder, source)
    (source / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    recipe = Recipe(sparsity="2:4", **SMALL)
    uniprune.prune(Loaded(model, AutoTokenizer.from_pretrained(source)), recipe, tmp_path / "out")
    model.generation_config = None
    with pytest.raises(InputError, match="generation_config is None"):
        uniprune.prune(Loaded(model, AutoTokenizer.from_pretrained(source)), recipe, tmp_path / "other")


def test_embeddings_that_are_tied_unsaid_are_told(tokenizer, tmp_path):
    loaded = Loaded(tiny_model(tie_word_embeddings=False), tokenizer)
    loaded.model.lm_head.weight = loaded.model.model.embed_tokens.weight
    with pytest.raises(InputError, match="the config says they are not tied; set tie_word_embeddings"):
        uniprune.prune(loaded, Recipe(sparsity="2:4", **SMALL), tmp_path / "out")


def test_tied_embeddings_are_no_such_weights(tokenizer, tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    assert uniprune.prune(Loaded(model, tokenizer), Recipe(sparsity="2:4", **SMALL), tmp_path / "out").sparsity == 0.5


@pytest.mark.parametrize("controller", ["none", "feedback", "fisher"])
def test_settings_of_the_caller_change_no_masks(tokens, controller):
    settings = {"text": tokens, "controller": controller, "metric": "wanda"}
    expected = masks_of(tiny_model(), **settings)
    model = tiny_model()
    model.config.return_dict = False
    assert same(masks_of(model, **settings), expected)
    assert model.config.return_dict is False
    with torch.device("meta"):  # as torch.set_default_device("cuda") is in many notebooks
        assert torch.get_default_device() == torch.device("meta")
        found = masks_of(tiny_model_on_cpu(), **settings)
    assert same(found, expected)


def tiny_model_on_cpu() -> nn.Module:
    with torch.device("cpu"):
        return tiny_model()


def test_one_recipe_has_one_record():
    one = Recipe(sparsity=".5", allow=("2:4,dense", "1:4"))
    other = Recipe(sparsity="0.50", allow=("2:4", "dense", "1:4"))
    assert one.record() == other.record()
    assert Recipe(**one.record()).record() == one.record()
    assert Recipe().record()["sparsity"] is None
