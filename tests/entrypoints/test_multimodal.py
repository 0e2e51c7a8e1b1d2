"""Models of images and text, by the command line: the text decoder is pruned, every other byte is the source's."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

import uniprune
from command import run
from conftest import VOCABULARY
from small_models import config_of
from uniprune.checkpoints.origin import resolve
from uniprune.data.windows import Windows, save_windows
from uniprune.errors import InputError
from uniprune.models.loading import load_weights, skeleton
from uniprune.models.matrices import find_blocks

RECIPE = uniprune.Recipe(sparsity="2:4", text="builtin", windows=8, length=32, steps=1)
FAMILIES = ["llava", "qwen2_vl", "gemma3"]  # without a causal class, with positions in three axes, with a causal class


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory, tokenizer):
    """A checkpoint as it is published: weights, tokenizer, and files of a processor."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    config = config_of(request.param)
    config.get_text_config().vocab_size = VOCABULARY
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).bfloat16().save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor", "size": 28}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def pruned(source):
    computing = RECIPE.model_copy(update={"dtype": "bfloat16"})  # as the model in memory, also where that is only emulated
    uniprune.prune(source, computing, source.parent / "out")
    return source.parent / "out"


def tensors(folder):
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def test_only_the_text_decoder_changes_and_half_of_it_is_zero(source, pruned):
    before, after = tensors(source), tensors(pruned)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    expected = {key for key in before if ".layers." in key and key.endswith("proj.weight")}
    assert changed == {key for key in expected if not any(part in key for part in ("vision_tower", "visual"))}
    assert changed == {f"{name}.weight" for name in load_file(pruned / "pruning" / "masks.safetensors")}
    for key in changed:
        assert torch.equal(after[key], torch.where(after[key] == 0, 0, before[key]))
        assert bool(((after[key].unflatten(-1, (-1, 4)) == 0).sum(-1) == 2).all())


def test_all_other_files_are_the_same(source, pruned):
    for file in ("config.json", "preprocessor_config.json", "chat_template.jinja", "tokenizer.json", "generation_config.json"):
        assert (source / file).exists() == (pruned / file).exists()
        if (source / file).exists():
            assert (source / file).read_bytes() == (pruned / file).read_bytes()


def test_what_sees_images_sees_the_same(source, pruned):
    """The features of an image, and what the decoder makes of them, in plain transformers."""
    load = AutoModelForImageTextToText.from_pretrained
    dense, sparse = (load(folder, dtype=torch.float32).eval() for folder in (source, pruned))
    parts = [
        {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.language_model.layers")}
        for model in (dense, sparse)
    ]
    assert parts[0].keys() == parts[1].keys()
    assert all(torch.equal(tensor, parts[1][name]) for name, tensor in parts[0].items())
    ids = torch.arange(16)[None]
    assert not torch.equal(dense(input_ids=ids).logits, sparse(input_ids=ids).logits)


def test_plan_apply_evaluate_and_masks_by_the_command_line(capsys, monkeypatch, source, pruned, tmp_path):
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "200")  # names are not cut
    code, printed, _ = run(capsys, monkeypatch, "plan", source, "-s", "2:4")
    assert code == 0
    assert "mlp.down_proj" in printed
    assert not {"vision", "visual", "projector"} & set(re.findall(r"\w+", printed))
    masks = pruned / "pruning" / "masks.safetensors"
    assert run(capsys, monkeypatch, "apply", source, masks, "-o", tmp_path / "applied")[0] == 0
    ours, theirs = tensors(tmp_path / "applied"), tensors(pruned)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert run(capsys, monkeypatch, "masks", "verify", masks, "--model", source, "--pruned", pruned)[0] == 0
    ids, text, result = torch.randint(0, VOCABULARY, (4, 32)), tmp_path / "tokens.safetensors", tmp_path / "result.json"
    save_windows(Windows(ids, "random", 4, "none"), text)
    asked = ("--text", text, "--against", source, "--new-tokens", 8, "-o", result)
    assert run(capsys, monkeypatch, "evaluate", pruned, *asked)[0] == 0
    found = json.loads(result.read_text())
    assert found["sparsity"] == pytest.approx(0.5)
    assert found["closeness"]["kl"] > 0
    assert found["perplexity"] == pytest.approx(perplexity(pruned, ids), rel=0.02)  # in bfloat16


def perplexity(folder, ids):
    """By plain transformers."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp())


def test_the_card_says_what_was_pruned_and_loads_the_model_as_it_is(source, pruned):
    card = ModelCard.load(pruned / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "calibrated on text alone" in card.text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    space = {}
    exec(code.replace("path/of/this/folder", str(pruned)).partition("processor =")[0], space)
    assert type(space["model"]).__name__ == json.loads((source / "config.json").read_text())["architectures"][0]


def test_a_card_of_a_text_model_says_nothing_of_images(folder, tmp_path):
    uniprune.prune(folder, uniprune.Recipe(sparsity="2:4", windows=2, length=32, controller="none"), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert "image" not in card.text.lower()


def test_a_model_in_memory_is_the_same_as_its_files(source, pruned, tokenizer, tmp_path):
    model = load_weights(resolve(source), None, torch.device("cpu"))
    assert find_blocks(model)[0] == find_blocks(skeleton(resolve(source)))[0] == "model.language_model.layers"
    whole = AutoModelForImageTextToText.from_pretrained(source).eval()
    uniprune.prune(uniprune.Loaded(whole, tokenizer), RECIPE, tmp_path / "memory")
    ours, theirs = tensors(tmp_path / "memory"), tensors(pruned)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("family", ["musicgen", "vision-encoder-decoder", "udop"])
def test_encoder_decoders_of_several_models_are_refused_with_the_reason(family, tmp_path):
    """MusicGen's configuration does not say which of its two text models is the one."""
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(InputError, match="is an encoder-decoder"):
        uniprune.plan(tmp_path, uniprune.Recipe(sparsity="2:4"))


def test_encoder_decoders_of_images_are_refused_with_the_reason(tmp_path):
    config = config_of("llava").to_dict() | {"model_type": "florence2", "is_encoder_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in ("model_type", "is_encoder_decoder")}))
    (tmp_path / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(InputError, match="is an encoder-decoder"):
        uniprune.plan(tmp_path, uniprune.Recipe(sparsity="2:4"))


def test_a_model_that_reads_no_text_alone_is_refused_with_a_remedy_that_works(tokenizer, tmp_path):
    """BLIP-2, whose forward pass has no default for an image."""
    part = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 64, "vocab_size": VOCABULARY, **part}
    vision, former = part | {"image_size": 28}, part | {"encoder_hidden_size": 32}
    config = AutoConfig.for_model("blip-2", text_config=text, vision_config=vision, qformer_config=former)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    magnitude = {"sparsity": "2:4", "text": "builtin", "windows": 2, "length": 32, "metric": "magnitude"}
    model = tmp_path / "model"
    for attempt in (
        lambda: uniprune.prune(model, RECIPE, tmp_path / "out"),
        lambda: uniprune.prune(model, uniprune.Recipe(controller="feedback", **magnitude), tmp_path / "out"),
        lambda: uniprune.prune(model, uniprune.Recipe(controller="unipruning", steps=1, **magnitude), tmp_path / "out"),
        lambda: uniprune.evaluate(model, text_source="builtin", windows=2, length=32),
        lambda: uniprune.evaluate(model, prompts=["Once"], new_tokens=2, against=model),
    ):
        with pytest.raises(InputError, match=r"Blip2\w+ needs an image with every text .*--metric magnitude --controller none"):
            attempt()
    assert uniprune.prune(model, uniprune.Recipe(controller="none", **magnitude), tmp_path / "out").sparsity == 0.5
