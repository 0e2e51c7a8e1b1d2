"""GGUF files under any name, and models that are split over several."""

import shutil

import pytest
import torch

import uniprune
from conftest import tiny_model, write_gguf
from uniprune import InputError, Recipe
from uniprune.checkpoints import origin as origin_module
from uniprune.checkpoints.gguf_files import first_parts, siblings
from uniprune.checkpoints.origin import resolve
from uniprune.job.aim import aim_of
from uniprune.models.loading import skeleton
from uniprune.models.matrices import find_matrices

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    return write_gguf(tiny_model(tie_word_embeddings=False), tokenizer, tmp_path_factory.mktemp("gguf") / "whole.gguf")


@pytest.fixture(scope="module", params=[False, True], ids=["tensors in all", "none in the first"])
def split(request, whole, tmp_path_factory):
    """The same model as gguf splits it, into files of nine tensors."""
    folder = tmp_path_factory.mktemp("split")
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama", split_max_tensors=9, small_first_shard=request.param)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.iterdir())


def test_names_of_parts():
    assert siblings("a/m-00002-of-00003.gguf") == [f"a/m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert siblings("m-00001-of-00000.gguf") == ["m-00001-of-00000.gguf"]
    assert siblings("m-99999-of-99999.gguf") == ["m-99999-of-99999.gguf"]
    assert first_parts(["b-00002-of-00002.gguf", "b-00001-of-00002.gguf", "A.GGUF", "c.bin"]) == [
        "A.GGUF",
        "b-00001-of-00002.gguf",
    ]


@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
def test_a_split_model_is_the_whole_one(whole, split, which):
    assert len(split) > 2
    found, expected = (uniprune.load(file, device="cpu") for file in (split[which], whole))
    states = [loaded.model.state_dict() for loaded in (found, expected)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert found.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert found.model.config.tie_word_embeddings is False


def test_a_split_model_is_pruned(whole, split, tmp_path):
    recipe = Recipe(sparsity="2:4", metric="magnitude", controller="none", windows=2, length=16)
    for source, out in ((split[0], "a"), (whole, "b")):
        uniprune.prune(source, recipe, tmp_path / out)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_what_was_put_together_goes_with_the_model(split):
    origin = resolve(split[0])
    folder = origin.folder
    assert folder.is_dir()
    assert split[0].parent != folder
    del origin
    assert not folder.exists()


def test_a_part_that_is_missing(split, tmp_path):
    for file in split[:-1]:
        shutil.copyfile(file, tmp_path / file.name)
    count = len(split)
    with pytest.raises(InputError, match=f"is one of {count} files, and .*{split[-1].name} is not there; put it beside"):
        resolve(tmp_path / split[0].name)
    shutil.copyfile(split[-1], tmp_path / split[-1].name)
    assert resolve(tmp_path / split[0].name).gguf == split[0].name


def test_no_room_to_put_it_together(split, monkeypatch):
    monkeypatch.setattr(origin_module.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(InputError, match=r"files, which are put together in .*; make room, set TMPDIR to another place"):
        resolve(split[0])


def test_a_folder_of_gguf_files(whole, tmp_path):
    for name in ("b-Q4.gguf", "a-Q8.GGUF", "config.json"):
        shutil.copyfile(whole, tmp_path / name)
    there = f"{tmp_path}/a-Q8.GGUF, {tmp_path}/b-Q4"
    with pytest.raises(InputError, match=f"has GGUF files, of which one is a model; give it: {there}"):
        resolve(tmp_path)
    assert uniprune.plan(tmp_path / "a-Q8.GGUF", Recipe(sparsity="2:4")).fits


def test_a_tokenizer_that_cannot_be_made_is_told(whole, tmp_path, caplog):
    data = whole.read_bytes().replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz")
    (tmp_path / "odd.gguf").write_bytes(data)
    with caplog.at_level("WARNING"):
        assert uniprune.load(tmp_path / "odd.gguf", device="cpu").tokenizer is None
    assert "odd.gguf has no usable tokenizer (" in caplog.text


@pytest.mark.parametrize(("dtype", "why"), [("bfloat16", "not multiples of 32 x 64"), ("float32", "weights of type float32")])
def test_hardware_is_asked_about_the_type_that_the_output_will_have(whole, dtype, why):
    recipe = Recipe(sparsity="2:4", hardware="nvidia-semi-structured", unsupported="dense", dtype=dtype, controller="none")
    origin = resolve(whole)
    reasons = aim_of(recipe, find_matrices(skeleton(origin)), origin).unsupported
    assert why in reasons["model.layers.0.self_attn.q_proj"]
