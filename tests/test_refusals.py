"""Refusals as a new user meets them: each names what and where, and a remedy, which is then done and works.

A case is a function that makes something wrong in a folder, and gives the words of a command. It yields them, is sent the
error, does what that says, and yields the words that work. What the error must say stands in its docstring.
"""

import inspect
import json
import re
import shutil

import pytest
import torch
from huggingface_hub import constants
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import catalogue
import local_hub
from command import run
from conftest import VOCABULARY, tiny_config, tiny_model, write_gguf
from small_models import tiny

SMALL = ["--windows", "2", "--length", "16", "--controller", "none"]


class World:
    """What a case has: a folder of its own, a checkpoint, a server that is the Hub."""

    def __init__(self, path, folder, tokenizer, hub, monkeypatch):
        self.path, self.folder, self.tokenizer, self.hub, self.patch = path, folder, tokenizer, hub, monkeypatch

    def copy(self, name="model", *left_out):
        """A copy of the checkpoint, without some files."""
        shutil.copytree(self.folder, self.path / name, ignore=shutil.ignore_patterns(*left_out))
        return self.path / name

    def change(self, folder, **settings):
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_bytes()) | settings))

    def files(self):
        return local_hub.files_of(self.folder)


def after(message, words):
    """What an error says after some words, up to a blank, comma or semicolon."""
    return re.search(re.escape(words) + r" ([^ ,;]+)", message)[1]


# --------------------------------------------------------------------------------------------------------- names and files


def a_path_that_is_not_there(world):
    """model './modle' does not exist here, and is not a Hub name of the form owner/name"""
    world.copy()
    world.patch.chdir(world.path)
    yield "plan", "./modle"
    yield "plan", "./model"


def one_file_of_a_checkpoint(world):
    """is a file, but not a .gguf one; give the folder it is in"""
    file = next(world.copy().glob("*.safetensors"))
    yield "plan", after((yield "plan", file), "give the folder it is in:")


def an_archive(world):
    """is an archive; unpack it first (uniprune unpack"""
    pytest.importorskip("zstandard")
    yield None, *("prune", world.folder, "-s", "0.5", "--metric", "magnitude", *SMALL, "-o", world.path / "out")
    yield None, *("pack", world.path / "out", "-o", world.path / "m.upz")
    message = yield "plan", world.path / "m.upz"
    command = re.search(r"\(uniprune (.*?)\)", message)[1].replace("FOLDER", str(world.path / "again")).split()
    yield None, *command
    yield "plan", world.path / "again"


def a_folder_of_gguf_files(world):
    """has GGUF files, of which one is a model; give it"""
    for name in ("b.gguf", "a.gguf"):
        write_gguf(tiny_model(), world.tokenizer, world.path / "gguf" / name)
    yield "plan", after((yield "plan", world.path / "gguf"), "give it:")


def a_part_of_a_gguf_model(world):
    """is one of 2 files, and"""
    file = write_gguf(tiny_model(), world.tokenizer, world.path / "m-00001-of-00002.gguf")
    missing = after((yield "plan", file), "is one of 2 files, and")
    write_gguf(tiny_model(), world.tokenizer, world.path / "empty.gguf").rename(missing)
    gguf = pytest.importorskip("gguf")
    data = bytearray((world.path / "m-00002-of-00002.gguf").read_bytes())
    first = gguf.GGUFReader(missing)
    end = max(field.offset + sum(part.nbytes for part in field.parts) for field in first.fields.values())
    data[8:16] = bytes(8)  # no tensors: the other part has them
    (world.path / "m-00002-of-00002.gguf").write_bytes(data[:end] + bytes(-end % 32))
    yield "plan", file


def pickled_weights(world):
    """has pickled weights alone (pytorch_model.bin), which can run code when they are read"""
    old = world.copy("old", "*.safetensors*")
    torch.save(tiny_model().state_dict(), old / "pytorch_model.bin")
    message = yield "plan", old
    code = re.search(r"AutoModelForCausalLM\.from_pretrained\('(.*?)'\)", message)[1]
    new = world.path / "new"
    AutoModelForCausalLM.from_pretrained(code).save_pretrained(new)
    world.tokenizer.save_pretrained(new)
    yield "prune", new, "-s", "2:4", *SMALL, "-o", world.path / "out"


def weights_under_another_name(world):
    """has model.fp16.safetensors, but neither model.safetensors nor model.safetensors.index.json"""
    tiny_model().save_pretrained(world.path / "model")
    (world.path / "model" / "model.safetensors").rename(world.path / "model" / "model.fp16.safetensors")
    message = yield "plan", world.path / "model"
    assert "rename it" in message
    (world.path / "model" / "model.fp16.safetensors").rename(world.path / "model" / "model.safetensors")
    yield "plan", world.path / "model"


def a_shard_that_is_missing(world):
    """cannot be read: No such file or directory; fetch the checkpoint again"""
    model = world.copy()
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.unlink()
    message = yield "plan", model
    assert str(shard) in message
    shutil.copyfile(world.folder / shard.name, shard)
    yield "plan", model


def folders_of_checkpoints(world):
    """has no config.json, but its folders have; give one"""
    world.copy("steps/100")
    yield "plan", after((yield "plan", world.path / "steps"), "give one:")


def a_configuration_that_is_damaged(world):
    """config.json is damaged: not JSON"""
    model = world.copy()
    (model / "config.json").write_text("{")
    yield "plan", model
    shutil.copyfile(world.folder / "config.json", model / "config.json")
    yield "plan", model


def a_size_that_is_not_the_files(world):
    """config.json makes model.embed_tokens.weight [513, 32], its files have [512, 32]; correct config.json"""
    model = world.copy()
    world.change(model, vocab_size=513)
    message = yield "plan", model
    world.change(model, vocab_size=int(re.search(r"its files have \[(\d+)", message)[1]))
    yield "plan", model


def a_packed_folder_to_run(world):
    """is in the runtime layout, which uniprune.accelerate opens; give the pruned checkpoint that it was made of"""
    pruned, packed = world.path / "pruned", world.path / "packed"
    yield None, *("prune", world.folder, "-s", "0.9", "--metric", "magnitude", *SMALL, "-o", pruned)
    yield None, *("pack", pruned, "--runtime", "-o", packed)
    yield "plan", packed
    yield "plan", pruned


# ------------------------------------------------------------------------------------------------------------ what it is


def an_adapter(world):
    """is an adapter (PEFT), or has one; merge it (merge_and_unload, save_pretrained) first"""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(world.folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    adapted.save_pretrained(world.path / "adapter")
    yield "plan", world.path / "adapter"
    peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(world.folder), world.path / "adapter"
    ).merge_and_unload().save_pretrained(world.path / "merged")
    yield "plan", world.path / "merged"


def no_language_model(world):
    """lack 1 tensors, e.g. lm_head.weight; config.json says LlamaForSequenceClassification: no model that predicts tokens"""
    config = tiny_config(tie_word_embeddings=False)
    LlamaForSequenceClassification(config).save_pretrained(world.path / "reward")
    yield "plan", world.path / "reward"
    AutoModelForCausalLM.from_config(config).save_pretrained(world.path / "language")
    yield "plan", world.path / "language"


def an_embedding_model(world):
    """config.json says LlamaModel: no model that predicts tokens, which is what can be pruned"""
    LlamaModel(tiny_config(tie_word_embeddings=False)).save_pretrained(world.path / "embeds")
    yield "plan", world.path / "embeds"
    yield "plan", world.folder


def an_encoder_and_decoder(world):
    """is an encoder-decoder (t5); only decoders (causal models) are supported"""
    small = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 64}
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(world.path / "t5")
    yield "plan", world.path / "t5"
    yield "plan", world.folder


def its_own_code(world):
    """needs its own code (auto_map), which is never run; give one that transformers has a class for"""
    model = world.copy()
    world.change(model, model_type="mine", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    yield "plan", model
    world.change(model, model_type="llama")
    yield "plan", model


def an_inner_weight_that_is_read_past_its_layer(world):
    """leave them out (--exclude"""
    tiny("mamba", vocab_size=VOCABULARY, max_position_embeddings=128).save_pretrained(world.path / "mamba")
    world.tokenizer.save_pretrained(world.path / "mamba")
    command = ["prune", world.path / "mamba", "-s", "2:4", *SMALL, "-o", world.path / "out"]
    message = yield command
    assert "dt_proj" in message
    yield *command, "--exclude", "dt_proj"


def catalogued(world, family):
    """The folder of a tiny model of any family that transformers has."""
    config = catalogue.small(family, vocab_size=VOCABULARY, max_position_embeddings=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(world.path / family)
    world.tokenizer.save_pretrained(world.path / family)
    return world.path / family


def experts_of_a_kind_that_is_not_known(world):
    """blocks' parameters are in matrices (Linear, Conv1D, experts); not: model.layers.0.mlp.input_linear.weight (4, 128, 32)"""
    command = ["prune", catalogued(world, "jetmoe"), "-s", "2:4", *SMALL, "-o", world.path / "out"]
    message = yield command
    yield *command, *message.partition("say so: ")[2].split()


def layers_that_nothing_goes_through(world):
    """8 matrices saw no calibration token, e.g. model.decoder.layers.0.encoder_attn.k_proj"""
    command = ["prune", catalogued(world, "trocr"), "-s", "2:4", *SMALL, "-o", world.path / "out"]
    message = yield command
    assert "leave them out (--exclude)" in message
    yield *command, "--exclude", "encoder_attn"


def blocks_that_differentiate_in_their_own_way(world):
    """no gradient comes through the blocks of ReformerModelWithLMHead; use --controller none"""
    size = ["--windows", "8", "--length", "32"]
    command = ["prune", catalogued(world, "reformer"), "-s", "2:4", *size, "-o", world.path / "out"]
    yield command
    yield *command, "--controller", "none"


def a_pattern_that_does_not_fit(world):
    """--unsupported"""
    yield "prune", world.folder, "-s", "3:5", *SMALL, "-o", world.path / "out"
    yield "prune", world.folder, "-s", "3:5", "--unsupported", "dense", "--rule", "q_proj=2:4", *SMALL, "-o", world.path / "out"


def no_tokenizer(world):
    """has no tokenizer"""
    model = world.copy("model", "tokenizer*", "special*")
    command = ["prune", model, "-s", "2:4", *SMALL, "-o", world.path / "out"]
    message = yield command
    assert "give a saved token file" in message
    tokens = world.path / "tokens.safetensors"
    yield None, *("prune", world.folder, "-s", "2:4", *SMALL, "--save-tokens", tokens, "-o", world.path / "other")
    yield *command, "--text", tokens


# --------------------------------------------------------------------------------------------------------------- devices


def an_apple_gpu(world):
    """device 'mps' is not supported, only cpu and cuda are; use --device cpu"""
    yield "plan", world.folder, "--device", "mps"
    yield "plan", world.folder, "--device", "cpu"


def no_gpu_at_all(world):
    """this PyTorch sees no CUDA device; use --device cpu"""
    world.patch.setattr("torch.cuda.is_available", lambda: False)
    yield "evaluate", world.folder, "--device", "cuda:1", "--windows", "2", "--length", "16"
    yield "evaluate", world.folder, "--device", "cpu", "--windows", "2", "--length", "16"


def too_little_memory(world):
    """raise --max-memory"""
    yield "prune", world.folder, "-s", "2:4", *SMALL, "--max-memory", "1MB", "-o", world.path / "out"
    yield "prune", world.folder, "-s", "2:4", *SMALL, "--max-memory", "4GB", "-o", world.path / "out"


# --------------------------------------------------------------------------------------------------------------- experts


def mixture(world, **settings):
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128}
    tiny("mixtral", **more | settings).save_pretrained(world.path / "moe")
    world.tokenizer.save_pretrained(world.path / "moe")
    return world.path / "moe"


def too_many_experts(world):
    """leaves 1 of the 4 experts in a layer of MixtralForCausalLM, too few for tokens that go to 2 each; give at most"""
    message = yield "plan", mixture(world), "--experts", "0.9"
    yield "plan", world.path / "moe", "--experts", after(message, "give at most")


def too_few_experts(world):
    """removes none of the 4 experts in a layer of MixtralForCausalLM; give at least"""
    message = yield "plan", mixture(world), "--experts", "0.1"
    yield "plan", world.path / "moe", "--experts", after(message, "give at least")


def experts_and_a_sparsity(world):
    """--experts removes whole experts of all layers and nothing else; leave out sparsity, and prune its output afterwards"""
    command = ["prune", mixture(world), "--experts", "0.5", *SMALL, "-o", world.path / "a"]
    yield *command, "-s", "2:4"
    yield None, *command
    yield "prune", world.path / "a", "-s", "2:4", *SMALL, "-o", world.path / "b"


def experts_and_hardware(world):
    """--experts removes whole experts of all layers and nothing else; leave out hardware, unsupported, and prune its output"""
    command = ["prune", mixture(world), "--experts", "0.5", *SMALL, "-o", world.path / "a"]
    yield *command, "--hardware", "nvidia-semi-structured", "--unsupported", "dense"
    yield command


def no_experts(world):
    """has no experts that transformers holds together; leave --experts out"""
    yield "plan", world.folder, "--experts", "0.5"
    yield "plan", world.folder


# --------------------------------------------------------------------------------------------------------------- the Hub


def a_name_that_is_not_on_the_hub(world):
    """model 'owner/nmae' does not exist here, nor on the Hub"""
    world.hub.add("owner/name", world.folder)
    message = yield "plan", "owner/nmae"
    assert "correct the name" in message
    yield "plan", "owner/name"


def a_private_model(world):
    """or, if it is private, log in (hf auth login, or HF_TOKEN)"""
    world.hub.add("owner/mine", world.folder, private=True)
    yield "plan", "owner/mine"
    world.patch.setenv("HF_TOKEN", local_hub.TOKEN)
    yield "plan", "owner/mine"


def a_gated_model(world):
    """owner/gated is gated: accept its terms at"""
    world.hub.add("owner/gated", world.folder, gated=True)
    message = yield "plan", "owner/gated"
    assert "then log in (hf auth login, or HF_TOKEN)" in message
    world.patch.setenv("HF_TOKEN", local_hub.TOKEN)
    yield "plan", "owner/gated"


def a_revision_that_is_not_there(world):
    """model owner/name has no revision 'v3'; it has"""
    repository = world.hub.add("owner/name", world.folder)
    repository.tags["v2"] = repository.branches["main"]
    message = yield "plan", "owner/name", "--revision", "v3"
    assert after(message, "it has") == "main"
    yield "plan", "owner/name", "--revision", after(message, "it has main,")


def a_revision_of_a_folder(world):
    """--revision 'v1' is of a model on the Hub, and"""
    message = yield "plan", world.folder, "--revision", "v1"
    assert "leave it out" in message
    yield "plan", world.folder


def a_folder_that_a_repository_has_not(world):
    """model owner/steps/step-3: owner/steps has no step-3; it has"""
    world.hub.add("owner/steps", {f"step-2/{name}": data for name, data in world.files().items()})
    yield "plan", after((yield "plan", "owner/steps/step-3"), "it has")


def a_repository_of_gguf_files(world):
    """model owner/name-GGUF has GGUF files, of which one is a model; give it"""
    file = write_gguf(tiny_model(), world.tokenizer, world.path / "m.gguf")
    world.hub.add("owner/name-GGUF", {"m-Q8_0.gguf": file.read_bytes(), "README.md": b""})
    yield "plan", after((yield "plan", "owner/name-GGUF"), "give it:")


def a_page_about_a_model(world):
    """is a page about a model; give the model"""
    world.hub.add("owner/name", world.folder)
    yield "plan", after((yield "plan", f"{world.hub.url}/owner/name/discussions/3"), "give the model:")


def no_network_and_no_copy(world):
    """does not exist here, nor in the Hub's cache"""
    world.hub.add("owner/name", world.folder)
    world.patch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = yield "plan", "owner/name"
    assert "HF_HUB_OFFLINE is set; unset it, or give a folder" in message
    world.patch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield None, "plan", "owner/name"
    world.patch.setattr(constants, "HF_HUB_OFFLINE", True)
    yield "plan", "owner/name"


def an_upload_without_a_login(world):
    """--push-to-hub needs a login; run `hf auth login`, or set HF_TOKEN"""
    command = ["prune", world.folder, "-s", "2:4", *SMALL, "-o", world.path / "out", "--push-to-hub", "owner/out"]
    yield command
    world.patch.setenv("HF_TOKEN", local_hub.TOKEN)
    yield command


def an_upload_over_other_files(world):
    """--push-to-hub owner/out has 1 files; give another name, or --overwrite"""
    world.patch.setenv("HF_TOKEN", local_hub.TOKEN)
    world.hub.add("owner/out", {"notes.txt": b"mine"})
    yield None, *("prune", world.folder, "-s", "2:4", *SMALL, "-o", world.path / "out")
    yield "card", world.path / "out", "--push-to-hub", "owner/out"
    yield "card", world.path / "out", "--push-to-hub", "owner/out", "--overwrite"


CASES = {
    name: case
    for name, case in globals().items()
    if inspect.isgeneratorfunction(case) and case.__module__ == __name__ and case.__doc__
}


def test_there_are_enough_of_them():
    assert len(CASES) >= 25


@pytest.mark.parametrize("name", CASES)
def test_a_refusal_and_its_remedy(name, tmp_path, folder, tokenizer, real_hub, monkeypatch, capsys):
    def command(words):
        words = words if isinstance(words, list | tuple) else [words]
        code, _, errors = run(capsys, monkeypatch, *(words[0] if isinstance(words[0], list) else words))
        return code, errors

    steps = CASES[name](World(tmp_path, folder, tokenizer, real_hub, monkeypatch))
    words = next(steps)
    refused = False
    while True:
        prepares = words[0] is None
        code, errors = command(words[1:] if prepares else words)
        if prepares or refused:
            assert code == 0, errors
            last, answer = not prepares, None
        else:
            assert code in (1, 2)
            message = errors.splitlines()[-1]
            assert message.startswith("error: ")
            assert CASES[name].__doc__ in message
            refused, last, answer = True, False, message
        try:
            words = steps.send(answer)
        except StopIteration:
            assert last, "the remedy was not tried"
            return
