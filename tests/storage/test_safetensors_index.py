"""Headers of safetensors files: what is refused is what the library refuses, and pruned files can be loaded."""

import json
import struct

import pytest
from safetensors import SafetensorError, safe_open

import uniprune
from conftest import tiny_model
from uniprune.errors import InputError
from uniprune.storage.safetensors_index import entries


def tensor(start, stop, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


A, B = tensor(0, 8), tensor(8, 16)
GOOD = {  # header, bytes of tensors
    "two tensors": ({"a": A, "b": B}, 16),
    "in another order than they lie": ({"b": B, "a": A}, 16),
    "no tensor": ({}, 0),
    "a tensor of no bytes between two": ({"a": A, "none": tensor(8, 8), "b": B}, 16),
    "a tensor of no bytes before one at the same place": ({"a": A, "none": tensor(0, 0)}, 8),
    "a scalar": ({"a": tensor(0, 4, [])}, 4),
    "metadata": ({"__metadata__": {"format": "pt"}, "a": A}, 8),
    "no metadata": ({"__metadata__": None, "a": A}, 8),
}
BAD = {  # and what is said of it
    "a hole between two": ({"a": A, "b": tensor(12, 20)}, 20, "4 bytes before b belong to no tensor"),
    "a hole before the first": ({"a": tensor(4, 12)}, 12, "4 bytes before a belong to no tensor"),
    "bytes after the last": ({"a": A}, 12, "4 bytes at its end belong to no tensor"),
    "bytes and no tensor": ({}, 4, "4 bytes at its end belong to no tensor"),
    "on top of each other": ({"a": A, "b": tensor(4, 12)}, 12, "b lies on top of another tensor"),
    "a tensor of no bytes within another": ({"a": A, "none": tensor(4, 4)}, 8, "none lies on top of another tensor"),
    "cut off": ({"a": A, "b": B}, 12, "is cut off: b would end at byte"),
    "of another size": ({"a": tensor(0, 8, [3])}, 8, "which is not 8 bytes"),
    "metadata that are no text": ({"__metadata__": {"step": 1}, "a": A}, 8, "its metadata are no text by name"),
    "metadata that are a list": ({"__metadata__": ["pt"], "a": A}, 8, "its metadata are no text by name"),
}


def write(path, header, size, padding=0):
    text = json.dumps(header).encode() + b" " * padding
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    return path


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize(("header", "size"), GOOD.values(), ids=GOOD)
def test_what_the_library_opens_is_read(header, size, padding, tmp_path):
    file = write(tmp_path / "x.safetensors", header, size, padding)
    with safe_open(file, framework="np") as opened:
        assert sorted(opened.keys()) == sorted(entries([file]))


@pytest.mark.parametrize(("header", "size", "reason"), BAD.values(), ids=BAD)
def test_what_the_library_refuses_is_refused_with_the_reason(header, size, reason, tmp_path):
    file = write(tmp_path / "x.safetensors", header, size)
    with pytest.raises(SafetensorError):
        safe_open(file, framework="np")
    with pytest.raises(InputError, match=rf"x\.safetensors .*{reason}.*fetch it again"):
        entries([file])


def with_hole(file):
    """The same tensors, the last one 64 bytes further on."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    last = max((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
    start, stop = header[last]["data_offsets"]
    header[last]["data_offsets"] = [start + 64, stop + 64]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[:start] + bytes(64) + data[start:])


def test_no_output_is_made_of_a_file_with_a_hole(folder, tmp_path):
    """Its copy would have the hole, too, and nothing would load it."""
    tiny_model().save_pretrained(tmp_path / "model")
    recipe = uniprune.Recipe(sparsity="2:4", metric="magnitude", controller="none", windows=2, length=32)
    scores, masks = tmp_path / "scores.safetensors", tmp_path / "masks.safetensors"
    uniprune.calibrate(folder, recipe, scores)
    uniprune.mask(scores, "2:4", masks)
    with_hole(tmp_path / "model" / "model.safetensors")
    for attempt in (
        lambda: uniprune.plan(tmp_path / "model", recipe),
        lambda: uniprune.prune(tmp_path / "model", recipe, tmp_path / "out"),
        lambda: uniprune.apply(tmp_path / "model", masks, tmp_path / "out", force=True),
    ):
        with pytest.raises(InputError, match=r"64 bytes before .* belong to no tensor"):
            attempt()
        assert not (tmp_path / "out").exists()
