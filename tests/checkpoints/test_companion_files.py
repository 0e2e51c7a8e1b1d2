"""What goes with the weights into every kind of output, of a folder here and of a repository on the Hub."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

import local_hub
import uniprune
from conftest import tiny_model
from small_models import tiny
from uniprune import Loaded, Recipe
from uniprune.artefacts import archive
from uniprune.artefacts.writer import write_checkpoint
from uniprune.checkpoints import origin as origin_module
from uniprune.checkpoints.checkpoint import Files
from uniprune.checkpoints.companion_files import copy_companions
from uniprune.checkpoints.origin import Origin, resolve
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
    copy_companions(files, tmp_path)
    there = {file.name for file in tmp_path.glob("*")}
    assert files.weights.name == "model.safetensors.index.json"
    assert files.weights.name in there
    assert not there & {*others, "pytorch_model-00001-of-00002.bin"}


def test_no_dense_weights_go_whatever_their_format(source, tmp_path):
    others = ["last.ckpt", "64.tflite", "model.pdparams", "x.nemo", "tf_model.h5", "weights.npz", "rust_model.ot", "a.onnx"]
    others += ["model.onnx_data", "model.onnx.data", "saved_model.pb", "model.ckpt.data-00000-of-00001", "a.PT", "a.pkl"]
    others += ["model.task", "m.litertlm", "m.keras", "m.engine", "pytorch_model.bin.zst", "m.gguf.part1of2"]
    for name in others:
        (source / name).write_bytes(b"dense")
    copy_companions(Files(source), tmp_path)
    assert not set(others) & {file.name for file in tmp_path.iterdir()}


MODULES = {
    "modules.json": json.dumps([{"path": path} for path in ("", "1_Pooling", "2_Dense", "../up", "/etc", "a/b", None, "gone")]),
    "1_Pooling/config.json": '{"embedding_dimension": 64}',
    "2_Dense/config.json": "{}",
    "2_Dense/model.safetensors": "dense, and not the model's",
}


def with_modules(source):
    """The folder of a model as sentence-transformers saves it, and a file where it must not look."""
    for name, text in MODULES.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    (source.parent / "up").mkdir()
    (source.parent / "up" / "config.json").write_text("{}")


def modules_of(folder):
    return {file.relative_to(folder).as_posix(): file.read_text() for file in folder.glob("[12]_*/*")}


def test_modules_of_sentence_transformers_go(source, tmp_path, real_hub):
    with_modules(source)
    expected = {name: text for name, text in MODULES.items() if "/" in name}
    recipe = Recipe(sparsity="2:4", metric="magnitude", controller="none", windows=2, length=16)
    uniprune.prune(source, recipe, tmp_path / "out")
    assert modules_of(tmp_path / "out") == expected
    assert not (tmp_path / "out" / "up").exists()
    archive.pack(tmp_path / "out", tmp_path / "a.upz")
    archive.unpack(tmp_path / "a.upz", tmp_path / "again")
    assert modules_of(tmp_path / "again") == expected
    files = local_hub.files_of(source) | {name: text.encode() for name, text in expected.items()}
    real_hub.add("owner/embedder", files | {"2_Dense/code.py": b"", "3_Other/config.json": b"{}"})
    assert modules_of(resolve("owner/embedder").folder) == expected


TERMS = ["LICENSE", "LICENSE-MODEL", "LICENCE.txt", "NOTICE", "Notice", "COPYING", "USE_POLICY.md"]


def test_licences_and_notices_are_downloaded(source, real_hub, tmp_path):
    terms = {name: name.encode() for name in TERMS}
    real_hub.add("owner/name", local_hub.files_of(source) | terms | {"LICENSES/a.txt": b"", "tensorboard": b""})
    (tmp_path / "out").mkdir()
    copy_companions(resolve("owner/name").files, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in TERMS} == terms
    assert not {"LICENSES", "tensorboard"} & {path.name for path in resolve("owner/name").folder.iterdir()}


@pytest.mark.parametrize("name", ["owner/name/step-1000", "owner/name/files/m.gguf"])
def test_of_a_part_of_a_repository_card_and_licence_are_the_repositorys(source, real_hub, tmp_path, name, monkeypatch):
    """Of a GGUF file nothing else goes along. In the Hub's cache the folder is the same."""
    monkeypatch.setattr(origin_module, "_of_gguf", lambda origin: origin)
    part = {f"step-1000/{file}": data for file, data in local_hub.files_of(source).items()} | {"files/m.gguf": b"GGUF"}
    whole = {"README.md": b"---\nlicense: llama3.2\n---\n", "MODEL_LICENSE": b"root", "License.pdf": b"root"}
    real_hub.add("owner/name", part | whole | {"files/LICENSE": b"x", "other/LICENSE": b""})
    origin = resolve(name)
    assert origin.card.read_bytes() == whole["README.md"]
    assert {"License.pdf", "MODEL_LICENSE"} <= {file.name for file in origin.terms}
    cached = resolve(origin.path)
    assert (cached.repository, cached.commit) == ("owner/name", origin.commit)


def test_a_licence_beside_a_gguf_file_goes_along(tmp_path):
    (tmp_path / "LICENSE").write_text("terms")
    (tmp_path / "out").mkdir()
    write_checkpoint(Loaded(tiny_model(), None, Origin("m.gguf", tmp_path, "m.gguf")), None, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"


def change(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_bytes()) | settings))


def test_outputs_name_no_code_that_is_not_there(source, real_hub, tmp_path):
    """transformers would take a model's own class where it is told to trust its code, and not find it."""
    named = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoModel": "owner/code--own.Model"}
    change(source / "config.json", auto_map=named)
    change(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokenizer", None]}, é=1e-5)
    (source / "own.py").write_text("raise SystemExit")
    real_hub.add("owner/name", source)
    outs = {"here": Files(source), "hub": resolve("owner/name").files}
    for name, files in outs.items():
        (tmp_path / name).mkdir()
        copy_companions(files, tmp_path / name)
    for file in ("config.json", "tokenizer_config.json", "own.py"):
        assert (tmp_path / "here" / file).read_bytes() == (source / file).read_bytes()
    names = ("config.json", "tokenizer_config.json")
    config, tokenizer = (json.loads((tmp_path / "hub" / name).read_bytes()) for name in names)
    before = json.loads((source / "tokenizer_config.json").read_bytes())
    assert config["auto_map"] == {"AutoModel": "owner/code--own.Model"}
    assert type(AutoConfig.from_pretrained(tmp_path / "hub", trust_remote_code=True)).__name__ == "LlamaConfig"
    assert tokenizer == {name: value for name, value in before.items() if name != "auto_map"}


@pytest.mark.parametrize("text", ['{"auto_map": {"A": 1, "B": [null]}}', '{"auto_map": []}', "[]", "{", '{"a":1}'])
def test_settings_that_name_no_code_are_as_they_were(source, tmp_path, text):
    (source / "processor_config.json").write_text(text)
    (tmp_path / "out").mkdir()
    copy_companions(Files(source), tmp_path / "out")
    assert (tmp_path / "out" / "processor_config.json").read_text() == text
