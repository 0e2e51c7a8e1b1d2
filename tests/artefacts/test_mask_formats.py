"""Masks of other tools: each format is read from, and by, code that knows nothing of ours."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

from conftest import tiny_model, write_gguf
from uniprune.artefacts import mask_conversion, mask_tools, writer
from uniprune.artefacts.mask_formats import FORMATS
from uniprune.artefacts.masks import MasksFile
from uniprune.checkpoints.origin import resolve
from uniprune.errors import InputError
from uniprune.models import loading
from uniprune.models.matrices import find_matrices
from uniprune.sparsity.patterns.spelling import parse

# ---------------------------------------------------------------------------------------- the formats, written once more
# masks: key of a weight -> boolean array in the shape of the stored tensor.


def write_maskllm(path, masks):
    np.savez_compressed(path, **{f"{key}.mask": np.packbits(mask) for key, mask in masks.items()})


def read_maskllm(path, shapes):
    return {key: np.unpackbits(np.load(path)[f"{key}.mask"]).reshape(shape).astype(bool) for key, shape in shapes.items()}


def write_maskllm_unpacked(path, masks):
    torch.save({f"{key}.mask": torch.from_numpy(mask).float() for key, mask in masks.items()}, path)


def write_patch(path, masks):
    arrays = {"__meta__": np.array(json.dumps({"base_model": "x"}))}
    for key, mask in masks.items():
        arrays |= {key: np.packbits(mask), f"{key}.__shape__": np.array(mask.shape)}
    np.savez_compressed(path, **arrays)


def read_patch(path, shapes):
    data = np.load(path, allow_pickle=False)
    json.loads(str(data["__meta__"]))
    masks = [key for key in data.files if key != "__meta__" and not key.endswith(".__shape__")]
    return {
        key: np.unpackbits(data[key], count=np.prod(shape)).astype(bool).reshape(shape)
        for key in masks
        for shape in [tuple(data[f"{key}.__shape__"])]
    }


def write_compressed_tensors(path, masks):
    tensors = {"model.norm.weight": torch.ones(32)}
    for key, mask in masks.items():
        layer = key.removesuffix(".weight")
        bits = np.packbits(mask, axis=-1, bitorder="little")
        tensors |= {
            f"{layer}.bitmask": torch.from_numpy(bits),
            f"{layer}.shape": torch.tensor(mask.shape).reshape(-1, 1),
            f"{layer}.compressed": torch.ones(int(mask.sum())),
        }
    save_file(tensors, path)


def read_compressed_tensors(path, shapes):
    tensors = load_file(path)
    return {
        key: np.unpackbits(tensors[key.replace(".weight", ".bitmask")].numpy(), axis=-1, count=shape[-1], bitorder="little")
        .reshape(tensors[key.replace(".weight", ".shape")].tolist())
        .astype(bool)
        for key, shape in shapes.items()
    }


def write_torch_prune(path, masks):
    """By torch itself: a layer of each shape, in modules of these names."""
    state = {}
    for key, mask in masks.items():
        layer = torch.nn.Linear(*mask.shape[::-1], bias=False)
        prune.custom_from_mask(layer, "weight", torch.from_numpy(mask))
        state |= {key.removesuffix("weight") + name: tensor for name, tensor in layer.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, path)


def read_torch_prune(path, shapes):
    state = torch.load(path, weights_only=True)
    found = {}
    for key, shape in shapes.items():
        layer = prune.identity(torch.nn.Linear(*shape[::-1], bias=False), "weight")
        layer.load_state_dict({"weight_mask": state[f"{key}_mask"]}, strict=False)
        found[key] = layer.weight_mask.numpy() != 0
    return found


def write_modelopt(path, masks):
    state = {key.removesuffix("weight") + "_weight_mask": torch.from_numpy(mask) for key, mask in masks.items()}
    rest = {"lm_head.weight": torch.ones(4, 4)}
    torch.save({"modelopt_state": {"modelopt_version": "0", "modelopt_state_dict": []}, "model_state_dict": state | rest}, path)


def read_modelopt(path, shapes):
    return {key: load_file(path)[key.removesuffix("weight") + "_weight_mask"].numpy() for key in shapes}


def write_boolean(path, masks):
    save_file({key: torch.from_numpy(mask) for key, mask in masks.items()}, path)


def read_boolean(path, shapes):
    return {key: load_file(path)[key].numpy() for key in shapes}


WRITERS = {
    "maskllm, m.npz": write_maskllm,
    "maskllm, m.pt": write_maskllm_unpacked,
    "patch, m.npz": write_patch,
    "compressed-tensors, m.safetensors": write_compressed_tensors,
    "torch-prune, m.pth": write_torch_prune,
    "modelopt, m.pt": write_modelopt,
    "boolean, m.safetensors": write_boolean,
}
READERS = {
    "maskllm, m.npz": read_maskllm,
    "patch, m.npz": read_patch,
    "compressed-tensors, m.safetensors": read_compressed_tensors,
    "torch-prune, m.pt": read_torch_prune,
    "modelopt, m.safetensors": read_modelopt,
    "boolean, m.safetensors": read_boolean,
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def made(request, folder, tmp_path_factory):
    """A dense checkpoint, and random masks of its stored tensors by their keys."""
    dense = folder
    if request.param == "gpt2":
        dense = tmp_path_factory.mktemp("formats") / "gpt2"
        tiny_model("gpt2").save_pretrained(dense)
    files = resolve(dense).files
    rng = np.random.default_rng(0)
    names = find_matrices(loading.load(dense).model)
    return dense, {files.key(name): rng.random(files.region(name).shape) < 0.5 for name in names}


def as_stored(path, dense):
    """Masks of a masks file by the checkpoint's keys, in its tensors' shapes."""
    file, files = MasksFile(path), resolve(dense).files
    return {files.key(name): (mask.T if name in file.transposed else mask).numpy() for name, mask in file.items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(np.array_equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("case", WRITERS)
def test_what_other_tools_write_is_read(made, tmp_path, case):
    dense, masks = made
    name, file = case.split(", ")
    WRITERS[case](tmp_path / file, masks)
    found = mask_conversion.import_masks(tmp_path / file, dense, tmp_path / "out.safetensors")
    assert (found["format"], found["pattern"]) == (name, f"masks of {file}")
    assert same(as_stored(tmp_path / "out.safetensors", dense), masks)
    assert mask_tools.verify(tmp_path / "out.safetensors", dense)["checked"] == ["file", "model"]


@pytest.mark.parametrize("case", READERS)
@pytest.mark.parametrize("given", [True, False])
def test_what_is_written_other_tools_read(made, tmp_path, case, given):
    dense, masks = made
    name, file = case.split(", ")
    write_boolean(tmp_path / "plain.safetensors", masks)
    ours = tmp_path / "ours.safetensors"
    mask_conversion.import_masks(tmp_path / "plain.safetensors", dense, ours)
    found = mask_conversion.export_masks(ours, tmp_path / file, name, dense if given else None)
    assert found == {"format": name, "pattern": "masks of plain.safetensors", "matrices": len(masks)}
    assert same(READERS[case](tmp_path / file, {key: mask.shape for key, mask in masks.items()}), masks)


@pytest.mark.parametrize("case", READERS)
def test_a_round_trip_gives_the_same_bytes(made, tmp_path, case):
    dense, masks = made
    name, file = case.split(", ")
    masks = dict(parse("2:4")({key: torch.rand(mask.shape) for key, mask in masks.items()}))
    if dense.name == "gpt2":
        masks = {key: mask if mask.shape == made[1][key].shape else mask.T for key, mask in masks.items()}
    write_boolean(tmp_path / "plain.safetensors", {key: mask.numpy() for key, mask in masks.items()})
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    mask_conversion.import_masks(tmp_path / "plain.safetensors", dense, one)
    mask_conversion.export_masks(one, tmp_path / file, name, dense)
    mask_conversion.import_masks(tmp_path / file, dense, other)
    first, second = MasksFile(one).facts, MasksFile(other).facts
    assert first.pattern == ("2:4" if dense.name != "gpt2" else "masks of plain.safetensors")
    assert {**first.record(), "pattern": ""} == {**second.record(), "pattern": ""}
    assert same(as_stored(one, dense), as_stored(other, dense))
    if dense.name != "gpt2":
        assert one.read_bytes() == other.read_bytes()
        if not file.endswith(".pt"):
            again = tmp_path / f"again-{file}"
            mask_conversion.export_masks(other, again, name, dense)
            assert again.read_bytes() == (tmp_path / file).read_bytes()


def test_every_format_is_tried():
    assert {case.split(",")[0] for case in WRITERS} == {case.split(",")[0] for case in READERS} == {*FORMATS}


# --------------------------------------------------------------------------------------------------- parts of checkpoints

KEY = "model.layers.0.mlp.up_proj.weight"  # [64, 32]


def taken(path, folder, tmp_path):
    return mask_conversion.import_masks(path, folder, tmp_path / "out.safetensors", overwrite=True)


def random_mask(seed=0):
    return np.random.default_rng(seed).random((64, 32)) < 0.5


def test_a_compressed_checkpoint_of_several_files(folder, tmp_path):
    masks = {KEY: random_mask(), KEY.replace("0", "1"): random_mask(1)}
    (tmp_path / "checkpoint").mkdir()
    shards = {}
    for index, (key, mask) in enumerate(masks.items()):
        write_compressed_tensors(tmp_path / "one.safetensors", {key: mask})
        tensors = {k: v for k, v in load_file(tmp_path / "one.safetensors").items() if index == 0 or "norm" not in k}
        save_file(tensors, tmp_path / f"checkpoint/{index}.safetensors")
        shards |= dict.fromkeys(tensors, f"{index}.safetensors")
    (tmp_path / "checkpoint/model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    found = taken(tmp_path / "checkpoint", folder, tmp_path)
    assert (found["format"], found["matrices"]) == ("compressed-tensors", 2)
    assert same(as_stored(tmp_path / "out.safetensors", folder), masks)


def test_masks_of_what_is_not_pruned_must_remove_nothing(folder, tokenizer, tmp_path):
    mask, path = random_mask(), tmp_path / "m.safetensors"
    weight = loading.load(folder).model.model.embed_tokens.weight
    for source in (folder, write_gguf(loading.load(folder, "float32").model, tokenizer, tmp_path / "gguf/model.gguf")):
        key = "model.embed_tokens.weight"
        write_boolean(path, {KEY: mask, key: np.ones(weight.shape, bool)})
        assert taken(path, source, tmp_path)["matrices"] == 1
        other = np.ones(weight.shape, bool)
        other[3, 5] = False
        write_boolean(path, {KEY: mask, key: other})
        with pytest.raises(InputError, match=r"a mask of model\.embed_tokens\.weight, which is not among"):
            taken(path, source, tmp_path)
    model = loading.load(folder).model
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] = 0  # it is 0 anyway
    model.save_pretrained(tmp_path / "zero")
    assert taken(path, tmp_path / "zero", tmp_path)["matrices"] == 1


def test_a_pruned_bias_is_not_lost(folder, tmp_path):
    layer = torch.nn.Linear(32, 64)
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.l1_unstructured(layer, "bias", 0.5)
    layer_name = KEY.removesuffix("weight")
    torch.save({layer_name + key: tensor for key, tensor in layer.state_dict().items()}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"a mask of model\.layers\.0\.mlp\.up_proj\.bias, which is not among"):
        taken(tmp_path / "m.pt", folder, tmp_path)


def test_patterns_are_found(folder, tmp_path):
    shapes = {key: mask.shape for key, mask in ((KEY, random_mask()), (KEY.replace("up", "gate"), random_mask(1)))}
    scores = {key: torch.rand(shape) for key, shape in shapes.items()}
    for pattern, expected in (("2:4", "2:4"), ("4:8", "4:8"), ("1:4", "masks of m.npz"), ("0.5", "masks of m.npz")):
        masks = {key: mask.numpy() for key, mask in parse(pattern)(scores)}
        write_maskllm(tmp_path / "m.npz", masks)
        assert taken(tmp_path / "m.npz", folder, tmp_path)["pattern"] == expected
    masks[KEY][:] = True
    write_maskllm(tmp_path / "m.npz", masks)
    assert taken(tmp_path / "m.npz", folder, tmp_path)["pattern"] == "masks of m.npz"


# ------------------------------------------------------------------------------------------------------------- bad input


class Bomb:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_make_tensors_and_nothing_else(folder, tmp_path):
    sign = tmp_path / "sign"
    state = {f"{KEY}_mask": torch.ones(64, 32), "other": Bomb(sign)}
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(state))
    for file in ("new.pt", "old.pt", "bare.bin"):
        with pytest.raises(InputError, match=f"{file} cannot be read as masks") as error:
            taken(tmp_path / file, folder, tmp_path)
        assert "\n" not in str(error.value)
    assert not sign.exists()


def test_masks_in_the_old_format_of_torch_are_read(folder, tmp_path):
    mask = random_mask()
    torch.save({f"{KEY}_mask": torch.from_numpy(mask)}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    taken(tmp_path / "m.pt", folder, tmp_path)
    assert np.array_equal(as_stored(tmp_path / "out.safetensors", folder)[KEY], mask)


def test_files_that_hold_something_else_are_refused(folder, tmp_path):
    mask = torch.from_numpy(random_mask())
    sparse = {f"{KEY}_mask": mask.float().to_sparse()}
    meta = {f"{KEY}_mask": torch.empty(64, 32, device="meta")}
    wide = {f"{KEY}_mask": torch.ones(1, 1).expand(2**20, 2**20)}
    for content, message in (
        ([mask], "holds list, no state dict"),
        (mask, "holds Tensor, no state dict"),
        ({"state_dict": {1: mask}}, "no mask of any matrix"),
        (sparse, "no plain tensor"),
        (meta, "no plain tensor"),
        (wide, r"\[1048576, 1048576\], no mask .*the weight is \[64, 32\]"),
        ({f"{KEY}_mask": torch.full((64, 32), 0.5)}, "not all 0 and 1"),
    ):
        torch.save(content, tmp_path / "m.pt")
        with pytest.raises(InputError, match=message) as error:
            taken(tmp_path / "m.pt", folder, tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no such file"):
        taken(tmp_path / "missing.pt", folder, tmp_path)


def test_packed_bits_must_be_of_the_weight(folder, tmp_path):
    mask = random_mask()
    bits = np.packbits(mask)
    for arrays, message in (
        ({f"{KEY}.mask": bits[:-1]}, r"uint8 \[255\]"),
        ({f"{KEY}.mask": bits.astype(np.int64)}, r"int64 \[256\]"),
        ({f"{KEY}.mask": np.packbits(mask, axis=1)}, r"uint8 \[64, 4\]"),
        ({KEY: bits, f"{KEY}.__shape__": np.array([32, 64])}, r"its weight is \[32, 64\] there, \[64, 32\] in the model"),
        ({KEY: bits, f"{KEY}.__shape__": np.arange(100)}, r"its weight is \[\] there"),
    ):
        np.savez(tmp_path / "m.npz", **arrays)
        with pytest.raises(InputError, match=message):
            taken(tmp_path / "m.npz", folder, tmp_path)
    tiny = FORMATS["patch"].encode(torch.ones(3, 5, dtype=torch.bool))
    assert torch.equal(FORMATS["patch"].decode(tiny, (3, 5)), torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="beyond its last weight"):
        FORMATS["patch"].decode(tiny | 1, (3, 5))


def test_outputs_are_of_the_format(folder, tmp_path):
    write_boolean(tmp_path / "plain.safetensors", {KEY: random_mask()})
    mask_conversion.import_masks(tmp_path / "plain.safetensors", folder, ours := tmp_path / "ours.safetensors")
    with pytest.raises(InputError, match="format 'wanda' is unknown; use one of modelopt, "):
        mask_conversion.export_masks(ours, tmp_path / "m.npz", "wanda")
    with pytest.raises(InputError, match=r"masks in format maskllm are in a file that ends in \.npz"):
        mask_conversion.export_masks(ours, tmp_path / "m.safetensors", "maskllm")
    mask_conversion.export_masks(ours, tmp_path / "m.npz", "maskllm")
    with pytest.raises(InputError, match="exists"):
        mask_conversion.export_masks(ours, tmp_path / "m.npz", "maskllm")


def test_a_pruned_checkpoint_is_taken_by_its_zeros(folder, tmp_path):
    write_boolean(tmp_path / "plain.safetensors", {KEY: random_mask()})
    ours = tmp_path / "ours.safetensors"
    mask_conversion.import_masks(tmp_path / "plain.safetensors", folder, ours)
    (tmp_path / "pruned").mkdir()
    writer.write_checkpoint(resolve(folder), MasksFile(ours), tmp_path / "pruned")
    assert taken(tmp_path / "pruned", folder, tmp_path)["pattern"] == f"zeros of {tmp_path / 'pruned'}"
    assert np.array_equal(as_stored(tmp_path / "out.safetensors", folder)[KEY], random_mask())
