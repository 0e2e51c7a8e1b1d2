"""Every way to load a model gives the parameters and the buffers that transformers gives, in the same types."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import uniprune
from conftest import tiny_model, write_gguf
from small_models import FAMILIES, tiny
from uniprune import InputError, Recipe
from uniprune.checkpoints.origin import resolve
from uniprune.evaluation.model import EvaluatedModel
from uniprune.models.loading import load_weights, native_dtype, without_weights
from uniprune.models.residency.streaming import open_streamed

CPU = torch.device("cpu")


def by_hand(folder, dtype):
    return uniprune.load(folder, dtype="auto" if dtype is None else str(dtype).removeprefix("torch.")).model


def to_evaluate(folder, dtype):
    return EvaluatedModel(folder).load(None if dtype is None else str(dtype).removeprefix("torch."), "cpu").model


def streamed(folder, dtype):
    origin = resolve(folder)
    loaded = open_streamed(origin, None, dtype or native_dtype(origin), CPU)
    for index in range(len(loaded.residency._blocks)):
        loaded.residency.fill(index)
    return loaded.model


@pytest.fixture(scope="module", params=["llama", "deepseek_v3", "gemma2"])
def source(request, tmp_path_factory):
    """A checkpoint in bfloat16 whose persistent buffers are not what the model starts with."""
    model = tiny(request.param)
    for buffer in model.buffers():
        if buffer.dtype == torch.float32 and bool((buffer == 0).all()):  # a router's bias
            buffer.uniform_()
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("native", [True, False], ids=["native bfloat16", "emulated bfloat16"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("way", [by_hand, to_evaluate, streamed])
def test_parameters_and_buffers_are_those_of_transformers(monkeypatch, source, way, dtype, native):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native, raising=False)
    expected_dtype = dtype or torch.bfloat16
    if way is to_evaluate and dtype is None and not native:
        expected_dtype = torch.float32
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=expected_dtype)
    found = way(source, dtype)
    for tensors in ("named_parameters", "named_buffers"):
        theirs, ours = (dict(getattr(model, tensors)()) for model in (expected, found))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name
    assert all(buffer.dtype == torch.float32 for name, buffer in found.named_buffers() if name.endswith("inv_freq"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gguf_file_has_the_same_buffers(tmp_path, tokenizer, dtype):
    file = write_gguf(tiny_model(), tokenizer, tmp_path / "model.gguf")
    model = load_weights(resolve(file), dtype, CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for name, buffer in tiny_model().named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name
    assert native_dtype(resolve(file)) == torch.float32


def test_the_type_is_the_files_where_the_config_names_none(tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"dtype": "bfloat16"', '"unused": 0'))
    assert native_dtype(resolve(tmp_path)) == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
def test_a_model_without_weights_has_the_buffers_that_are_in_no_file(family, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    origin = resolve(tmp_path)
    found, expected = without_weights(origin, torch.float32), load_weights(origin, torch.float32, CPU)
    stored = expected.state_dict()
    computed = {name: buffer for name, buffer in expected.named_buffers() if name not in stored}
    assert computed.keys() == {name for name, _ in found.named_buffers() if name not in stored}
    for name, buffer in computed.items():
        assert torch.equal(found.get_buffer(name), buffer), name


# ------------------------------------------------------------------------------------------------------------- refusals


def changed(folder, tmp_path, **settings):
    """A copy of a checkpoint with other settings in its config.json."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_bytes())
    (copy / "config.json").write_text(json.dumps(config | settings))
    return copy


@pytest.mark.parametrize("wanted", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_attention_that_needs_a_package_is_not_needed(folder, tmp_path, wanted, key):
    """Attention by another kernel is the same attention; one from the Hub would be somebody's code."""
    source = changed(folder, tmp_path, **{key: wanted})
    uniprune.plan(source, Recipe(sparsity="2:4"))
    ids = torch.arange(20)[None]
    for load in (by_hand, streamed):
        found, expected = (load(path, torch.float32)(ids).logits for path in (source, folder))
        assert torch.equal(found, expected)


def test_attention_by_hand_stays(folder, tmp_path):
    source = changed(folder, tmp_path, attn_implementation="eager")
    assert by_hand(source, None).config._attn_implementation == "eager"


def planned(folder):
    uniprune.plan(folder, Recipe(sparsity="2:4"))


@pytest.mark.parametrize("load", [planned, lambda path: to_evaluate(path, None)], ids=["plan", "evaluate"])
def test_a_size_that_is_not_the_files(folder, tmp_path, load):
    source = changed(folder, tmp_path, vocab_size=511)
    sizes = r"\[511, 32\], its files have \[512, 32\]; correct config\.json"
    with pytest.raises(InputError, match=rf"config\.json makes model\.embed_tokens\.weight {sizes}"):
        load(source)
    config = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 512}))
    load(source)


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("mps", "is not supported, only cpu and cuda are; use --device cpu"),
        ("xpu:0", "is not supported, only cpu and cuda are; use --device cpu"),
        ("meta", "is not supported, only cpu and cuda are; use --device cpu"),
        ("gpu", "is unknown; use cpu, cuda or cuda:N"),
        ("cuda:99", "sees no CUDA device; use --device cpu|sees . CUDA devices; use cuda:0"),
    ],
)
def test_devices_that_cannot_compute(folder, device, reason):
    with pytest.raises(InputError, match=reason):
        uniprune.load(folder, device=device)
    with pytest.raises(InputError, match=reason):
        uniprune.plan(folder, Recipe(sparsity="2:4"), device=device)


def test_a_tokenizer_that_needs_packages(folder, tmp_path, monkeypatch):
    for name in ("config.json", "tokenizer_config.json", *(file.name for file in folder.glob("model*"))):
        shutil.copyfile(folder / name, tmp_path / name)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    missing = {"sentencepiece", "google"}
    monkeypatch.setattr("uniprune.checkpoints.tokenizer.find_spec", lambda name: None if name in missing else find_spec(name))
    with pytest.raises(InputError, match=r"tokenizer\.model, needs packages that are not installed; pip install sent"):
        uniprune.load(tmp_path, device="cpu")
    missing.clear()
    if find_spec("sentencepiece") is None:
        with pytest.raises(InputError, match=r"cannot be read \(.*\); fetch it again, or move its files away"):
            monkeypatch.setattr("uniprune.checkpoints.tokenizer.find_spec", lambda name: True)
            uniprune.load(tmp_path, device="cpu")


@pytest.mark.skipif(find_spec("timm") is not None, reason="it is installed")
def test_a_model_that_needs_a_package_says_how_to_get_it(tmp_path):
    """transformers says so on several lines."""
    AutoConfig.for_model("gemma3n").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(InputError, match=r"needs a package that is not installed: \w+ requires the timm .*`pip install timm`"):
        uniprune.plan(tmp_path, Recipe(sparsity="2:4"))
