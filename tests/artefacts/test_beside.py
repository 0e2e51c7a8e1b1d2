"""What goes with the weights into every kind of output, of a folder here and of a repository on the Hub."""

import shutil

import pytest
import torch
from transformers import AutoTokenizer

import local_hub
import uniprune
from small_models import tiny
from uniprune import Recipe
from uniprune.artefacts import archive
from uniprune.artefacts.beside import copy_beside
from uniprune.checkpoints.checkpoint import Files
from uniprune.checkpoints.origin import resolve
from uniprune.data.windows import Windows, save_windows
from uniprune.runtime import layout

NAMED = {"default": "{{ messages }}", "rag": "{{ documents }}", "tool_use": "{{ tools }}"}


@pytest.fixture
def source(folder, tmp_path):
    """A model with chat templates that have names."""
    shutil.copytree(folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = NAMED
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tokens(tmp_path):
    file = tmp_path / "tokens.safetensors"
    save_windows(Windows(torch.arange(32).reshape(2, 16), "made up", 2, "none"), file)
    return str(file)


def templates(folder):
    return AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.usefixtures("compiled")
def test_chat_templates_with_names_go_into_every_output(source, tokens, tmp_path):
    assert templates(source) == NAMED
    recipe, out = Recipe(sparsity="2:4", metric="magnitude", controller="none", text=tokens), tmp_path / "pruned"
    uniprune.prune(source, recipe, out)
    uniprune.apply(source, out / "pruning" / "masks.safetensors", tmp_path / "applied")
    uniprune.permute(source, recipe, tmp_path / "permuted")
    layout.pack(out, tmp_path / "runtime")
    archive.pack(out, tmp_path / "a.upz")
    archive.unpack(tmp_path / "a.upz", tmp_path / "unpacked")
    for name in ("pruned", "applied", "permuted", "runtime", "unpacked"):
        assert templates(tmp_path / name) == NAMED, name


def test_chat_templates_with_names_go_with_experts(source, tokens, tmp_path):
    for file in source.glob("model*.safetensors*"):
        file.unlink()
    tiny("mixtral").save_pretrained(source)
    uniprune.prune(source, Recipe(experts=0.5, metric="reap", text=tokens), tmp_path / "out")
    assert templates(tmp_path / "out") == NAMED


def test_chat_templates_with_names_are_downloaded(source, real_hub):
    files = local_hub.files_of(source)
    real_hub.add("owner/chat", files | {"additional_chat_templates/run.py": b"", "other/x.jinja": b""})
    assert templates(resolve("owner/chat").folder) == NAMED
    assert local_hub.files_of(resolve("owner/chat").folder) == files
    real_hub.add("owner/steps", {f"last/{name}": data for name, data in files.items()})
    assert templates(resolve("owner/steps/last").folder) == NAMED


def test_only_the_index_of_the_models_weights_goes(source, tmp_path):
    others = ["pytorch_model.bin.index.json", "model.safetensors.index.fp16.json", "flax_model.msgpack.index.json"]
    for name in (*others, "pytorch_model-00001-of-00002.bin"):
        (source / name).write_text("{}")
    files = Files(source)
    copy_beside(files, tmp_path)
    there = {file.name for file in tmp_path.glob("*")}
    assert files.weights.name == "model.safetensors.index.json"
    assert files.weights.name in there
    assert not there & {*others, "pytorch_model-00001-of-00002.bin"}
