"""The runtime layout on disk: every bit comes back, of any type and pattern; what is hostile or damaged is refused."""

import errno
import json
import os
import struct

import pytest
import torch
from magnitude import prune
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from command import run
from conftest import tiny_model
from uniprune import accelerate
from uniprune.artefacts import reports
from uniprune.artefacts.binding import fingerprint
from uniprune.checkpoints.checkpoint import PACKED
from uniprune.checkpoints.origin import resolve
from uniprune.errors import InputError
from uniprune.models.matrices import find_matrices
from uniprune.runtime import layout
from uniprune.runtime.packed import Packed, unpack

pytestmark = pytest.mark.usefixtures("compiled")

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def pruned(tmp_path):
    def make(spec="0.5", dtype=torch.bfloat16, family="llama", **changes):
        model = prune(tiny_model(family, **changes), spec).to(dtype)
        model.save_pretrained(tmp_path / "pruned", max_shard_size="30KB")
        return tmp_path / "pruned"

    return make


def tensors(folder):
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def unpacked(folder):
    """The checkpoint that a runtime folder was made of."""
    found = tensors(folder)
    with safe_open(folder / PACKED, "pt") as file:
        matrices = json.loads(file.metadata()["uniprune"])["matrices"]
    for name, matrix in matrices.items():
        values, bits = found.pop(f"{name}.values"), found.pop(f"{name}.bits")
        dense = Packed(values, bits, tuple(matrix["shape"])).dense()
        found[matrix["key"]] = dense.T if matrix["transposed"] else dense
    return found


@pytest.mark.parametrize("spec", ["0.5", "0.7", "2:4", "6:8", "1:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_bit_comes_back(pruned, tmp_path, spec, dtype):
    folder = pruned(spec, dtype)
    report = layout.pack(folder, tmp_path / "out")
    expected, found = tensors(folder), unpacked(tmp_path / "out")
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)), key
    assert report.packed == 21
    assert not report.left_dense
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("copies", [0, 100])
def test_tensors_are_the_same_where_the_system_does_not_copy_them(pruned, tmp_path, monkeypatch, copies):
    """From one file system to another it does not, and it may stop in the middle."""
    folder, copy_range = pruned(), os.copy_file_range

    def some(source, file, size, place, offset):
        if not copies or size <= copies:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return copy_range(source, file, copies, place, offset)

    layout.pack(folder, tmp_path / "out")
    monkeypatch.setattr(os, "copy_file_range", some)
    layout.pack(folder, tmp_path / "other")
    assert (tmp_path / "out" / PACKED).read_bytes() == (tmp_path / "other" / PACKED).read_bytes()


def test_half_of_bfloat16_takes_nine_sixteenths(tmp_path):
    """Of matrices large enough that padding and offsets are nothing beside them."""
    model = prune(tiny_model(hidden_size=256, intermediate_size=512, num_hidden_layers=1), "0.5").bfloat16()
    model.save_pretrained(tmp_path / "pruned")
    assert layout.pack(tmp_path / "pruned", tmp_path / "out").ratio_of_packed == pytest.approx(0.5 + 1 / 16, abs=0.002)


def test_transposed_matrices_are_packed_by_rows_of_outputs(pruned, tmp_path):
    folder = pruned(family="gpt2")
    layout.pack(folder, tmp_path / "out")
    expected, found = tensors(folder), unpacked(tmp_path / "out")
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    stored = json.loads(safe_open(tmp_path / "out" / PACKED, "pt").metadata()["uniprune"])["matrices"]
    assert all(matrix["transposed"] for matrix in stored.values())


def test_the_report_says_what_it_was_made_of(pruned, tmp_path):
    folder = pruned()
    names = find_matrices(tiny_model())
    source = reports.ModelFacts(name="dense", fingerprint="f" * 64)
    pruning = reports.Pruning(model=source, pattern="0.5", sparsity=0.5, masks_sha256="a" * 64, matrices={
        name: reports.PrunedMatrix(shape=matrix.shape, sparsity=0.5) for name, matrix in names.items()
    })  # fmt: skip
    pruning.write(folder / "pruning.json")
    report = layout.pack(folder, tmp_path / "out")
    assert report.source.fingerprint == fingerprint(resolve(folder).files.digests(names))
    assert (report.source.model, report.source.pattern, report.source.masks_sha256) == (source, "0.5", "a" * 64)
    assert layout.Packing.read(tmp_path / "out" / "pruning.json") == report
    with pytest.raises(InputError, match="holds packing, not pruning"):
        reports.read_report(tmp_path / "out" / "pruning.json")


def test_matrices_with_few_zeros_are_stored_as_they_are(tmp_path):
    model = prune(tiny_model(), "0.5")
    model.model.layers[1].mlp.up_proj.weight.fill_(1.0)
    model.save_pretrained(tmp_path / "pruned")
    report = layout.pack(tmp_path / "pruned", tmp_path / "out")
    assert report.left_dense == {"model.layers.1.mlp.up_proj": "0% of its weights are zero, and packing pays from 25% on"}
    assert torch.equal(tensors(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"], torch.ones(64, 32))


def test_a_dense_model_is_refused(folder, tmp_path):
    with pytest.raises(
        InputError, match=r"none of 21 matrices can be packed, e.g. .* 0% of its weights .* give a pruned model"
    ):
        layout.pack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_are_whole_and_replaced_only_if_that_is_asked_for(pruned, tmp_path, monkeypatch):
    folder, out = pruned(), tmp_path / "out"
    layout.pack(folder, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(InputError, match="exists; give another name, or --overwrite"):
        layout.pack(folder, out)
    with pytest.raises(InputError, match="in the runtime layout"):
        layout.pack(out, tmp_path / "twice")
    with monkeypatch.context() as patch:
        patch.setattr(layout.ToPack, "parts", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            layout.pack(folder, out, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    layout.pack(folder, out, overwrite=True)
    assert {file.name for file in tmp_path.iterdir()} == {"pruned", "out"}


def test_opening_maps_the_file(pruned, tmp_path):
    layout.pack(pruned(dtype=torch.float32), tmp_path / "out")
    with (tmp_path / "out" / PACKED).open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        places = json.loads(file.read(length))
    files = layout.RuntimeFiles(tmp_path / "out")
    found = {name: files.packed(name, torch.float32, Packed) for name in files.facts.matrices}
    start = {name: places[f"{name}.values"]["data_offsets"][0] for name in found}
    for name, one in found.items():  # as far from each other in memory as in the file
        assert one.values.data_ptr() - found[NAME].values.data_ptr() == start[name] - start[NAME]


def rewrite(path, change):
    """The file with another header and, if it is that long, other data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    facts = json.loads(header["__metadata__"]["uniprune"])
    data = change(header, facts, data) or data
    header["__metadata__"]["uniprune"] = json.dumps(facts)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def shape_of(name, shape):
    def change(header, facts, data):
        facts["matrices"].setdefault(name, {"key": "k"})["shape"] = shape

    return change


def without(key):
    def change(header, facts, data):
        del header[key]

    return change


def all_ones(header, facts, data):
    start, stop = header[f"{NAME}.bits"]["data_offsets"]
    return data[:start] + b"\xff" * (stop - start) + data[stop:]


def bits_as(shape):
    def change(header, facts, data):
        header[f"{NAME}.bits"]["shape"] = shape

    return change


def fewer_values(header, facts, data):
    """The last of them are another tensor's."""
    values = header[f"{NAME}.values"]
    values["shape"][0] -= 64
    values["data_offsets"][1] -= 64 * 2
    stop = values["data_offsets"][1]
    header["rest"] = {"dtype": "BF16", "shape": [64], "data_offsets": [stop, stop + 64 * 2]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (all_ones, "values, 64 of padding among them, but 1024 bits"),
        (shape_of(NAME, [32, 64]), r"makes .* \[32, 32\], its files have \[32, 64\]"),
        (shape_of(NAME, [16, 64]), r"makes .* \[32, 32\], its files have \[16, 64\]"),
        (shape_of(NAME, [2**62, 2**62]), r"makes .* \[32, 32\], its files have \[4611686018427387904, "),
        (bits_as([16, 8]), r"bits are torch.uint8 \(16, 8\), which is not one for each of 32 x 32"),
        (bits_as([128]), "not one for each of 32 x 32"),
        (fewer_values, "values, 64 of padding among them, but"),
        (shape_of(NAME, [-1, 32]), "damaged"),
        (shape_of(NAME, [32]), "damaged"),
        (shape_of(NAME, "32"), "damaged"),
        (shape_of("model.layers.9.q", [32, 32]), "lacks values or bits of 'model.layers.9.q'"),
        (without(f"{NAME}.bits"), "not a complete safetensors file|damaged"),
        (lambda header, facts, data: data[:-8], "not a complete safetensors file|cut off"),
        (lambda header, facts, data: facts.update(kind="masks"), "holds masks, not runtime"),
        (lambda header, facts, data: facts.update(format=2), "has format 2"),
        (lambda header, facts, data: facts.update(matrices={}), "damaged"),
        (lambda header, facts, data: facts.pop("source") and None, "damaged: it lacks 'source'"),
        (
            lambda header, facts, data: facts["matrices"].pop(NAME) and None,
            "lack 1 tensors, e.g. model.layers",
        ),
    ],
)
def test_hostile_files_are_refused(pruned, tmp_path, change, reason):
    layout.pack(pruned(), tmp_path / "out")
    rewrite(tmp_path / "out" / PACKED, change)
    with pytest.raises(InputError, match=reason):
        accelerate(tmp_path / "out")


def test_values_may_begin_anywhere_in_a_file(pruned, tmp_path):
    """One byte further on, behind a tensor that nobody asks for."""

    def change(header, facts, data):
        for key, entry in header.items():
            if key != "__metadata__":
                entry["data_offsets"] = [place + 1 for place in entry["data_offsets"]]
        header["odd"] = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
        return b"\0" + data

    folder = pruned()
    layout.pack(folder, tmp_path / "out")
    rewrite(tmp_path / "out" / PACKED, change)
    found = layout.RuntimeFiles(tmp_path / "out").packed(NAME, torch.bfloat16, Packed)
    assert found.values.data_ptr() % 2 == 0
    assert torch.equal(found.dense(), tensors(folder)[f"{NAME}.weight"])


def test_bits_past_the_last_column_are_refused(tmp_path):
    values, bits = torch.ones(100), torch.full((3, 2), 255, dtype=torch.uint8)
    matrix = layout.PackedMatrix(shape=(3, 9), key="a.weight")
    facts = layout.RuntimeFacts(matrices={"a": matrix}, source=layout.Provenance(fingerprint=""))
    save_file({"a.values": values, "a.bits": bits}, tmp_path / PACKED, {"uniprune": json.dumps(facts.record())})
    for kind in (Packed, unpack):
        with pytest.raises(InputError, match="'a': bits past the last column are set"):
            layout.RuntimeFiles(tmp_path).packed("a", torch.float32, kind)


def test_a_file_that_changes_while_it_is_packed_is_an_error(pruned, tmp_path, monkeypatch):
    folder = pruned(dtype=torch.float32)
    original = layout.count
    monkeypatch.setattr(layout, "count", lambda piece, dtype: (original(piece, dtype)[0] - 1, True))
    with pytest.raises(InputError, match=r"model-.*: model.layers.* its weights changed while they were packed; pack it again"):
        layout.pack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_has_the_name_of_a_packed_one_is_an_error(tmp_path):
    model = prune(tiny_model(), "0.5")
    model.save_pretrained(tmp_path / "pruned")
    file = tmp_path / "pruned" / "model.safetensors"
    save_file(load_file(file) | {f"{NAME}.bits": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(InputError, match=f"has a tensor {NAME}.bits, the name of a packed matrix"):
        layout.pack(tmp_path / "pruned", tmp_path / "out")


def test_the_command_packs_a_folder_to_run(pruned, tmp_path, capsys, monkeypatch):
    folder, out = pruned(), tmp_path / "out"
    code, printed, _ = run(capsys, monkeypatch, "pack", folder, "--runtime", "-o", out, "--json")
    assert (code, json.loads(printed)["packed"]) == (0, 21)
    code, printed, _ = run(capsys, monkeypatch, "pack", folder, "--runtime", "-o", out, "--overwrite")
    assert code == 0
    assert "open it with uniprune.accelerate" in printed
    code, _, message = run(capsys, monkeypatch, "pack", folder, "--runtime", "--level", 3, "-o", tmp_path / "other")
    assert code == 2
    assert "leave it out with --runtime" in message


def test_other_commands_say_what_such_a_folder_is(pruned, tmp_path):
    layout.pack(pruned(), tmp_path / "out")
    with pytest.raises(InputError, match=r"in the runtime layout, which uniprune.accelerate opens; give the pruned checkpoint"):
        resolve(tmp_path / "out")
