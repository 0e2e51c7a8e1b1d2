"""An archive gives back every byte, or says that it cannot; and it never writes elsewhere."""

import contextlib
import hashlib
import json
import os
import random
import struct
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from uniprune.artefacts import archive, archive_codec, writer
from uniprune.artefacts import masks as masks_file
from uniprune.artefacts.archive import CHUNK, FORMAT, HEADER, INDEX, MAGIC
from uniprune.artefacts.archive_codec import Chunk, Zstd
from uniprune.artefacts.binding import Binding
from uniprune.errors import InputError
from uniprune.sparsity import bits
from uniprune.storage import files as files_module

WEIGHTS = "model.safetensors"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_index(path):
    raw = path.read_bytes()
    _, _, offset, size, _ = HEADER.unpack(raw[: HEADER.size])
    return raw[HEADER.size : offset], json.loads(raw[offset : offset + size])


def write_archive(path, data, index):
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    header = HEADER.pack(MAGIC, FORMAT, HEADER.size + len(data), len(text), hashlib.sha256(text).digest())
    path.write_bytes(header + data + text)


def layouts(path, name):
    """The layouts of a file's chunks, those of one byte left out (what lies between tensors)."""
    (file,) = [file for file in read_index(path)[1]["files"] if file["path"] == name]
    return [f"{layout} {word}" for layout, word, *_ in file["chunks"]]


def pruned(shape, dtype=torch.bfloat16, keep=0.5, seed=0):
    """Gaussian weights and the mask that some of them were zeroed with."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.02
    mask = torch.rand(shape, generator=generator) < keep
    return weight.masked_fill(~mask, 0).to(dtype), mask


@pytest.fixture
def made(tmp_path):
    """A pruned checkpoint as uniprune writes it: two matrices, their masks, a dense tensor, and files of other kinds."""
    folder = tmp_path / "model"
    (folder / "pruning").mkdir(parents=True)
    tensors, masks = {"embed.weight": pruned((300, 64), keep=1.0)[0]}, {}
    for seed, name in enumerate(("layers.0.up", "layers.0.down")):
        tensors[f"model.{name}.weight"], masks[f"model.{name}"] = pruned((96, 257), seed=seed)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    binding = Binding(base="0", base_name="tiny", digests={}, transposed=[])
    masks_file.write_masks(folder / writer.MASKS, masks.items(), shapes, binding, "50%")
    (folder / "config.json").write_text('{"a": 1}' * 100)
    (folder / "empty.txt").touch()
    (folder / "tokenizer.model").write_bytes(random.Random(0).randbytes(5000))
    (folder / files_module.REPORT).write_text("{}")
    return folder


def round_trip(folder, tmp_path, **options):
    packed, back = tmp_path / "x.upz", tmp_path / "back"
    facts = archive.pack(folder, packed, **options)
    assert archive.unpack(packed, back) == facts
    assert contents(back) == contents(folder)
    assert facts["archive_bytes"] == packed.stat().st_size
    assert facts["bytes"] == sum(map(len, contents(folder).values()))
    return packed


# -------------------------------------------------------------------------------------------------------- round trips


def test_a_pruned_checkpoint_comes_back_bit_for_bit(made, tmp_path):
    packed = round_trip(made, tmp_path)
    assert layouts(packed, WEIGHTS) == ["dense u8", "dense bf16", "sparse bf16", "sparse bf16"]
    assert layouts(packed, writer.MASKS) == ["dense u8", "bits u8", "bits u8"]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "back", "x.upz"}


def test_masks_are_stored_once(made, tmp_path):
    data, index = read_index(round_trip(made, tmp_path))
    (file,) = [file for file in index["files"] if file["path"] == writer.MASKS]
    assert all(sum(pieces) < size // 20 for layout, _, size, pieces, *_ in file["chunks"] if layout == "bits")
    assert len(data) < 0.6 * sum(file["size"] for file in index["files"])


def test_masks_of_transposed_matrices_are_stored_as_they_are(tmp_path):
    (tmp_path / "model" / "pruning").mkdir(parents=True)
    weight, mask = pruned((64, 96))
    save_file({"c.weight": weight}, tmp_path / "model" / WEIGHTS)
    save_file({"c": bits.pack(mask.T.contiguous())}, tmp_path / "model" / writer.MASKS)
    assert "bits u8" not in layouts(round_trip(tmp_path / "model", tmp_path), writer.MASKS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_floating_point_types(dtype, keep, tmp_path):
    (tmp_path / "model").mkdir()
    save_file({"a": pruned((33, 65), dtype, keep)[0], "b": torch.tensor(1.5, dtype=dtype)}, tmp_path / "model" / WEIGHTS)
    round_trip(tmp_path / "model", tmp_path)


def test_other_tensors(tmp_path):
    (tmp_path / "model").mkdir()
    tensors = {str(dtype): (torch.arange(-50, 50) * 7919).to(dtype) for dtype in (torch.int8, torch.int16, torch.int32)}
    tensors |= {"long": torch.arange(-50, 50) << 40, "bool": torch.arange(50) % 3 == 0, "none": torch.empty(0, 5)}
    tensors |= {"odd": torch.arange(7, dtype=torch.uint8), "zeros": torch.zeros(4096, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model" / WEIGHTS)
    round_trip(tmp_path / "model", tmp_path)


def test_shards_with_an_index(folder, tmp_path):
    round_trip(folder, tmp_path)


def test_tensors_longer_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "CHUNK", 1 << 10)
    (tmp_path / "model" / "pruning").mkdir(parents=True)
    weight, mask = pruned((123, 57))
    name = "weights.safetensors"  # the masks are last in the archive, not by name
    save_file({"a.weight": weight, "b": torch.arange(5000)}, tmp_path / "model" / name)
    save_file({"a": bits.pack(mask)}, tmp_path / "model" / writer.MASKS)
    packed = round_trip(tmp_path / "model", tmp_path)
    assert layouts(packed, writer.MASKS).count("bits u8") == -(-123 * 57 * 2 // (1 << 10))
    _, index = read_index(packed)
    assert max(chunk[2] for file in index["files"] for chunk in file["chunks"]) <= 1 << 10


def test_damaged_and_alien_weight_files_are_packed_as_bytes(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "a.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (model / "b.safetensors").write_bytes(b"")
    overlap = json.dumps({n: {"dtype": "F32", "shape": [2], "data_offsets": [o, o + 8]} for n, o in (("a", 0), ("b", 4))})
    (model / "c.safetensors").write_bytes(struct.pack("<Q", len(overlap)) + overlap.encode() + bytes(range(12)))
    ragged = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [1, 8]}})
    (model / "d.safetensors").write_bytes(struct.pack("<Q", len(ragged)) + ragged.encode() + bytes(range(20)))
    packed = round_trip(model, tmp_path)
    assert layouts(packed, "c.safetensors") == ["dense u8"]


def test_linked_files_are_packed_and_linked_folders_refused(made, tmp_path):
    (tmp_path / "blob").write_bytes(b"blob")
    (made / "linked.bin").symlink_to(tmp_path / "blob")
    packed = round_trip(made, tmp_path)
    assert not any(path.is_symlink() for path in (tmp_path / "back").rglob("*"))
    (made / "loop").symlink_to(made)
    with pytest.raises(InputError, match="neither a file nor a folder"):
        archive.pack(made, packed, overwrite=True)


def test_progress_counts_chunks(made, tmp_path):
    seen = []

    class Count(type(archive.silent)):
        def __call__(self, items, label, total):
            seen.append((label, total, len(done := list(items))))
            return iter(done)

    archive.pack(made, tmp_path / "x.upz", progress=Count())
    archive.unpack(tmp_path / "x.upz", tmp_path / "back", progress=Count())
    assert seen[0][1:] == seen[1][1:]
    assert [label for label, _, _ in seen] == ["pack", "unpack"]
    assert seen[0][1] == seen[0][2]


def read_slowly(path):
    """The reader that docs/archive.md describes, written from it word by word."""
    import zstandard

    data, index = read_index(path)
    widths = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "bf16": 2, "f32": 4}
    swaps = {"bf16": (14, 7), "f32": (30, 23)}
    files = []

    def swap(value, word):
        high, low = swaps.get(word, (0, 0))
        rest = value & ~(1 << high) & ~(1 << low)
        return rest | (value >> high & 1) << low | (value >> low & 1) << high

    def planes(pieces, word):
        return [swap(int.from_bytes(bytes(word_bytes), "big"), word) for word_bytes in zip(*pieces, strict=True)]

    def bits(packed, count):
        return [packed[i // 8] >> i % 8 & 1 for i in range(count)]

    for file in index["files"]:
        raw = b""
        for layout, word, size, sizes, *reference in file["chunks"]:
            pieces = []
            for length in sizes:
                pieces.append(zstandard.ZstdDecompressor().decompress(data[:length]))
                data = data[length:]
            width = widths[word]
            count = size // width
            if layout == "dense":
                values = planes(pieces, word)
            elif layout == "sparse":
                kept = iter(planes(pieces[1:], word))
                values = [next(kept) if bit else 0 for bit in bits(pieces[0], count)]
            elif layout == "scaled":
                scales = struct.unpack(f"<{count // 32}e", pieces[0])
                products = [scales[i // 32] * integer for i, integer in enumerate(struct.unpack(f"<{count}b", pieces[1]))]
                values = torch.tensor(products).bfloat16().view(torch.int16).tolist()
                values = [value & 0xFFFF for value in values]
            else:
                number, offset, count, wide = reference
                assert layout == "bits"
                words = [any(files[number][offset + wide * i : offset + wide * (i + 1)]) for i in range(count)]
                values = [
                    byte ^ sum(bit << i for i, bit in enumerate(words[8 * at : 8 * at + 8]))
                    for at, byte in enumerate(pieces[0])
                ]
            raw += b"".join(value.to_bytes(width, "little") for value in values)
        files.append(raw)
    assert data == b""
    return {file["path"]: raw for file, raw in zip(index["files"], files, strict=True)}


def test_the_specification_is_enough_to_read_an_archive(made, tmp_path):
    tensors = {"scaled": torch.from_numpy(dequantised(4).view(np.int16).copy()).view(torch.bfloat16)}
    tensors |= {
        f"{dtype}{keep}": pruned((9, 7), dtype, keep)[0] for dtype in (torch.float32, torch.float16) for keep in (0.5, 1)
    }
    tensors |= {
        "minus": -torch.zeros(64, dtype=torch.bfloat16),
        "long": torch.arange(9),
        "int": torch.arange(9, dtype=torch.int32),
    }
    save_file(tensors, made / "other.safetensors")
    packed = round_trip(made, tmp_path)
    found = {layout for name in (WEIGHTS, "other.safetensors", writer.MASKS) for layout in layouts(packed, name)}
    assert {layout.split()[0] for layout in found} == {"dense", "sparse", "scaled", "bits"}
    assert {layout.split()[1] for layout in found} == set(archive_codec.WORDS)
    assert read_slowly(packed) == contents(made)


# -------------------------------------------------------------------------------------------------------------- chunks


def recode(raw, word):
    zstd = Zstd()
    layout, pieces = archive_codec.encode(Chunk("tensor", word, len(raw)), raw, zstd)
    assert archive_codec.decode(Chunk(layout, word, len(raw)), pieces, zstd) == raw
    return layout, pieces


@given(
    st.sampled_from(sorted(archive_codec.WORDS)),
    st.lists(st.one_of(st.just(0), st.integers(0, 2**64 - 1)), min_size=1, max_size=200),
)
def test_any_words_come_back(word, values):
    width = archive_codec.WORDS[word][0]
    recode(b"".join((value % 256**width).to_bytes(width, "little") for value in values), word)


@pytest.mark.parametrize("zeros", [True, False])
def test_all_patterns_of_bfloat16_come_back(zeros):
    """Every NaN and its payload, both zeros, subnormals and infinities."""
    words = np.arange(1 << 16, dtype="<u2")
    words = np.concatenate([words, np.zeros(1 << 14, "<u2")]) if zeros else words
    layout, pieces = recode(words.tobytes(), "bf16")
    assert layout == ("sparse" if zeros else "dense")
    if zeros:
        bits = np.unpackbits(np.frombuffer(Zstd().expand(pieces[0], len(words) // 8), np.uint8), bitorder="little")
        assert bits[0x8000] == 1, "-0.0 is a weight, not a zero"


@given(st.integers(1, 9), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_masks_and_words_are_compared_bit_by_bit(count, same, seed):
    generator = np.random.default_rng(seed)
    words = generator.integers(0, 2, 8 * count - 3).astype("<u2")
    raw = generator.integers(0, 256, count, dtype=np.uint8).tobytes()
    delta = archive_codec.xor(raw, words)
    slow = [(raw[i // 8] >> i % 8 & 1) ^ (int(words[i]) if i < len(words) else 0) for i in range(8 * count)]
    assert [delta[i // 8] >> i % 8 & 1 for i in range(8 * count)] == slow
    assert archive_codec.xor(delta, words) == raw


def test_planes_have_sign_and_exponent_first():
    words = torch.tensor([0.02, -0.013, 1.5], dtype=torch.bfloat16).view(torch.int16).numpy().view("<u2")
    first, second = archive_codec._planes(words, "bf16")
    for word, high, low in zip(words.tolist(), first, second, strict=True):
        sign, exponent, mantissa = word >> 15, word >> 7 & 0xFF, word & 0x7F
        assert high == sign << 7 | (exponent & 1) << 6 | (exponent >> 1 & 0x3F)
        assert low == (exponent >> 7) << 7 | mantissa


def dequantised(groups, seed=0):
    """Weights as GGUF's Q8_0 stores a bfloat16 tensor, dequantised to bfloat16 again."""
    weights = (torch.randn(groups, 32, generator=torch.Generator().manual_seed(seed)) * 0.1).bfloat16().float()
    scales = weights.abs().amax(1, keepdim=True) / 127
    integers = torch.where(scales > 0, weights / scales, 0).round().to(torch.int8)  # which has no -0
    return (integers * scales.half().float()).bfloat16().view(torch.int16).numpy().view("<u2").ravel()


def test_weights_dequantised_from_eight_bits_are_stored_as_such():
    words = dequantised(1000)
    words[:32] = 0
    layout, pieces = recode(words.tobytes(), "bf16")
    assert layout == "scaled"
    assert sum(map(len, pieces)) < 0.55 * words.nbytes
    words[-1] ^= 1  # one bit off
    assert recode(words.tobytes(), "bf16")[0] == "dense"
    assert archive_codec.fit_scales(words[:31]) is None


def test_scaled_words_are_rounded_as_bfloat16_is():
    scales = np.arange(1 << 16, dtype="<u2").view("<f2")
    scales = scales[np.isfinite(scales)]
    integers = np.random.default_rng(0).integers(-128, 128, (len(scales), 32)).astype(np.int8)
    exact = torch.from_numpy(integers).float() * torch.from_numpy(scales.astype(np.float32))[:, None]
    expected = exact.bfloat16().view(torch.int16).numpy().view("<u2")
    np.testing.assert_array_equal(archive_codec._scaled(scales, integers), expected)


@pytest.mark.parametrize(("pattern", "bits"), [("2:4", 0.66), ("4:8", 0.78)])
def test_masks_of_n_of_m_cost_less_than_a_bit(pattern, bits):
    keep, group = map(int, pattern.split(":"))
    order = np.random.default_rng(0).random((1 << 16, group)).argsort(1)
    words = np.where(order < keep, 0x3C00, 0).astype("<u2").ravel()
    layout, pieces = recode(words.tobytes(), "bf16")
    if layout == "sparse":  # a constant can be scaled, too
        assert len(pieces[0]) * 8 < bits * len(words)
    mask = np.packbits(words != 0, bitorder="little").tobytes()
    assert len(Zstd().plane(mask)) * 8 < bits * len(words)


# ---------------------------------------------------------------------------------------------------- hostile archives


def refused(path, tmp_path, match=""):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=match):
        archive.unpack(path, out)
    assert not out.exists()
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".partial")]


def test_truncated_archives(made, tmp_path):
    archive.pack(made, tmp_path / "x.upz")
    raw, cut = (tmp_path / "x.upz").read_bytes(), tmp_path / "cut.upz"
    lengths = {0, 7, 63, 64, 65, len(raw) // 2, len(raw) - 1} | {random.Random(0).randrange(len(raw)) for _ in range(40)}
    for length in lengths:
        cut.write_bytes(raw[:length])
        refused(cut, tmp_path, "is damaged|is not an archive")
    cut.write_bytes(raw + b"x")
    refused(cut, tmp_path, "is damaged")


def test_flipped_bits_are_noticed_or_do_no_harm(made, tmp_path):
    """A few bits of a zstandard frame have no meaning; every other one must be noticed."""
    archive.pack(made, tmp_path / "x.upz")
    raw, flipped, draw = (tmp_path / "x.upz").read_bytes(), tmp_path / "flipped.upz", random.Random(0)
    places = [8 * at + draw.randrange(8) for at in range(HEADER.size)] + [draw.randrange(8 * len(raw)) for _ in range(200)]
    harmless = 0
    for place in places:
        damaged = bytearray(raw)
        damaged[place // 8] ^= 1 << place % 8
        flipped.write_bytes(damaged)
        with contextlib.suppress(InputError):
            archive.unpack(flipped, tmp_path / f"harmless{harmless}")
            assert contents(tmp_path / f"harmless{harmless}") == contents(made)
            harmless += 1
    assert harmless < 5
    assert not list(tmp_path.glob(".partial*"))


def small(path="a", size=2, layout="dense", word="u8", pieces=None, words=(), sha256=None):
    """An archive of one file ``ab``, with changes."""
    data = Zstd().bytes(b"ab")
    chunk = [layout, word, size, [len(data)] if pieces is None else pieces, *words]
    return data, {
        "files": [{"path": path, "size": size, "sha256": sha256 or hashlib.sha256(b"ab").hexdigest(), "chunks": [chunk]}]
    }


def test_an_archive_written_by_hand(tmp_path):
    write_archive(tmp_path / "x.upz", *small("deep/er/a.txt"))
    archive.unpack(tmp_path / "x.upz", tmp_path / "out")
    assert contents(tmp_path / "out") == {"deep/er/a.txt": b"ab"}


@pytest.mark.parametrize(
    "name",
    [
        "../a",
        "a/../../b",
        "/etc/a",
        "",
        ".",
        "a/",
        "a//b",
        "./a",
        "..\\a",
        "C:a",
        "C:/a",
        "//host/a",
        "a\0b",
        "\ud800",
        "\x1b[0m",
    ],
)
def test_paths_never_leave_the_folder(name, tmp_path):
    write_archive(tmp_path / "x.upz", *small(name))
    refused(tmp_path / "x.upz", tmp_path, "may not")


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000 + "a"])
def test_names_that_this_system_cannot_have(name, tmp_path):
    write_archive(tmp_path / "x.upz", *small(name))
    refused(tmp_path / "x.upz", tmp_path, "cannot be written")


@pytest.mark.parametrize("other", ["a", "a/b"])
def test_two_files_never_share_a_name(other, tmp_path):
    data, index = small("a")
    index["files"] += small(other)[1]["files"]
    write_archive(tmp_path / "x.upz", data + data, index)
    refused(tmp_path / "x.upz", tmp_path, "cannot be written")


HUGE = 1 << 62


@pytest.mark.parametrize(
    "change",
    [
        {"size": HUGE},
        {"size": CHUNK + 1},
        {"size": 0},
        {"size": -2},
        {"size": 2.0},
        {"size": True},
        {"size": "2"},
        {"size": None},
        {"pieces": [HUGE]},
        {"pieces": [-11]},
        {"pieces": []},
        {"pieces": [5, 6]},
        {"pieces": [10]},
        {"pieces": "11"},
        {"pieces": [2 * CHUNK + 1]},
        {"word": "bf16"},
        {"word": "u9"},
        {"word": ["u8"]},
        {"layout": "plain"},
        {"layout": "sparse"},
        {"layout": "scaled"},
        {"layout": "bits"},
        {"layout": "bits", "words": [0, 0, 16, 1]},
        {"layout": "bits", "words": [0, 0, HUGE, 1]},
        {"layout": "bits", "words": [0, 0, 16]},
        {"words": [0, 0, 16, 1]},
        {"sha256": "0"},
        {"sha256": 5},
        {"path": 5},
        {"path": None},
    ],
    ids=str,
)
def test_impossible_indices(change, tmp_path):
    write_archive(tmp_path / "x.upz", *small(**change))
    refused(tmp_path / "x.upz", tmp_path, "is damaged")


@pytest.mark.parametrize("words", [[0, 0, 16, 3], [1, 0, 16, 1], [0, 1, 16, 2], [0, 0, 8, 1], [0, HUGE, 16, 1]], ids=str)
def test_masks_are_compared_only_with_what_is_there(words, tmp_path):
    first = Zstd().bytes(b"c" * 16)
    data, index = small("b", layout="bits", words=words)
    record = {"path": "a", "size": 16, "sha256": hashlib.sha256(b"c" * 16).hexdigest()}
    record["chunks"] = [["dense", "u8", 16, [len(first)]]]
    write_archive(tmp_path / "x.upz", first + data, {"files": [record, *index["files"]]})
    refused(tmp_path / "x.upz", tmp_path, "is compared with")


def test_limits_hold_for_archives_that_are_otherwise_right(tmp_path):
    """What a reader must be able to hold: a chunk, the pieces of a chunk, the words that a chunk is compared with."""
    path, zstd = tmp_path / "x.upz", Zstd()

    def whole(size):
        frame = zstd.bytes(bytes(size))
        sha256 = hashlib.sha256(bytes(size)).hexdigest()
        return frame, {"path": f"a{size}", "size": size, "sha256": sha256, "chunks": [["dense", "u8", size, [len(frame)]]]}

    frame, record = whole(CHUNK + 1)
    write_archive(path, frame, {"files": [record]})
    refused(path, tmp_path, "impossible size")

    junk = bytes(2 * CHUNK + 1)
    write_archive(path, junk, small(pieces=[len(junk)])[1])
    refused(path, tmp_path, "impossible pieces")

    frame, record = whole(CHUNK)
    _, second = whole(16)
    record |= {"size": CHUNK + 16, "chunks": record["chunks"] + second["chunks"]}
    bits = small("b", CHUNK // 8 + 1, "bits", words=[0, 0, CHUNK + 8, 1])[1]["files"]
    write_archive(path, b"", {"files": [record, *bits]})
    refused(path, tmp_path, "impossible number of words")

    for impossible in ({"word": "bf16", "size": 3, "pieces": [11, 11]}, {"layout": "scaled", "word": "u16", "size": 64}):
        write_archive(path, b"", small(**impossible)[1])
        refused(path, tmp_path, "impossible size")
    for impossible in ({"layout": "bits"}, {"words": [0, 0, 16, 1]}):
        write_archive(path, b"", small(**impossible)[1])
        refused(path, tmp_path, "impossible pieces")

    data, index = small()
    write_archive(path, data + b"more", index)
    refused(path, tmp_path, "do not fill it")

    path.write_bytes(HEADER.pack(MAGIC, FORMAT, HEADER.size, INDEX + 1, bytes(32)))
    os.truncate(path, HEADER.size + INDEX + 1)
    refused(path, tmp_path, "its header is wrong")


@pytest.mark.parametrize(
    "index",
    [b"", b"{", b"[]", b"{}", b'{"files": 3}', b'{"files": [3]}', b'{"files": [{}]}', b"[" * 100_000, b"\xff", b"9" * 9999],
    ids=lambda index: index[:16].decode("latin1"),
)
def test_indices_that_are_none(index, tmp_path):
    write_archive(tmp_path / "x.upz", b"", index)
    refused(tmp_path / "x.upz", tmp_path, "is damaged")


def test_pieces_that_unpack_to_more_than_they_say(tmp_path):
    """The frame names its size, or does not; either way no more memory is taken than the index allows."""
    import zstandard

    for options in ({}, {"write_content_size": False}):
        bomb = zstandard.ZstdCompressor(**options).compress(bytes(1 << 20))
        _, index = small(pieces=[len(bomb)])
        write_archive(tmp_path / "x.upz", bomb, index)
        refused(tmp_path / "x.upz", tmp_path, "does not unpack")


def test_archives_larger_than_the_disk(tmp_path, monkeypatch):
    write_archive(tmp_path / "x.upz", *small())
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1}))
    refused(tmp_path / "x.upz", tmp_path, "of disk")


def test_folders_larger_than_the_disk(made, tmp_path, monkeypatch):
    """Refused before a byte is packed; a large folder only if what some of it is packed to says that it does not fit."""
    whole = sum(map(len, contents(made).values()))
    free = whole - 1
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free}))

    with monkeypatch.context() as patch, pytest.raises(InputError, match="of disk"):
        patch.setattr(archive, "replacing", None)
        archive.pack(made, tmp_path / "x.upz")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    monkeypatch.setattr(archive, "SAMPLE", 4)
    monkeypatch.setattr(archive, "CHUNK", 1 << 12)
    facts = archive.pack(made, tmp_path / "x.upz")
    free = facts["archive_bytes"] // 2
    with pytest.raises(InputError, match="of disk"):
        archive.pack(made, tmp_path / "x.upz", overwrite=True)


def test_other_files_and_later_formats(tmp_path):
    path = tmp_path / "x.upz"
    refused(path, tmp_path, "does not exist")
    path.write_bytes(b"PK\3\4" + bytes(100))
    refused(path, tmp_path, "is not an archive")
    path.write_bytes(HEADER.pack(MAGIC, FORMAT + 1, 64, 0, bytes(32)))
    refused(path, tmp_path, "upgrade")
    path.write_bytes(HEADER.pack(MAGIC, FORMAT, 64, HUGE, bytes(32)))
    refused(path, tmp_path, "is damaged")


# ------------------------------------------------------------------------------------------------------------- outputs


def test_existing_outputs_are_kept(made, tmp_path):
    packed, back = tmp_path / "x.upz", tmp_path / "back"
    archive.pack(made, packed)
    before = packed.read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        archive.pack(made, packed)
    archive.pack(made, packed, overwrite=True)
    assert packed.read_bytes() == before, "the same folder gives the same archive"
    archive.unpack(packed, back)
    with pytest.raises(InputError, match="--overwrite"):
        archive.unpack(packed, back)
    (back / "config.json").unlink()
    archive.unpack(packed, back, overwrite=True)
    assert contents(back) == contents(made)
    damaged = tmp_path / "damaged.upz"
    damaged.write_bytes(before[:100] + bytes(50) + before[150:])
    with pytest.raises(InputError, match="is damaged"):
        archive.unpack(damaged, back, overwrite=True)
    assert contents(back) == contents(made)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").touch()
    with pytest.raises(InputError, match="not written by uniprune"):
        archive.unpack(packed, tmp_path / "precious", overwrite=True)


def test_outputs_are_checked_first(made, tmp_path):
    (tmp_path / "folder.upz").mkdir()
    (tmp_path / "nothing").mkdir()
    for folder, output, level, match in (
        (made, tmp_path / "x.zip", 3, "end in .upz"),
        (made, tmp_path / "folder.upz", 3, "is a folder"),
        (made, made / "x.upz", 3, "lies in, the input"),
        (made, tmp_path / "x.upz", 0, "use 1 to 22"),
        (tmp_path / "nothing", tmp_path / "x.upz", 3, "give the folder of a checkpoint"),
        (tmp_path / "missing", tmp_path / "x.upz", 3, "give the folder of a checkpoint"),
        (made / "config.json", tmp_path / "x.upz", 3, "give the folder of a checkpoint"),
    ):
        with pytest.raises(InputError, match=match):
            archive.pack(folder, output, level=level)
    (made / "a\\b").touch()
    with pytest.raises(InputError, match="rename it"):
        archive.pack(made, tmp_path / "x.upz")
    archive_inside = tmp_path / "out" / "x.upz"
    archive_inside.parent.mkdir()
    write_archive(archive_inside, *small())
    with pytest.raises(InputError, match="overlap"):
        archive.unpack(archive_inside, archive_inside.parent, overwrite=True)


def test_files_that_shrink_meanwhile(made, tmp_path, monkeypatch):
    survey = archive._survey

    def shrinking(folder):
        files = survey(folder)
        (folder / "config.json").write_text("")
        return files

    monkeypatch.setattr(archive, "_survey", shrinking)
    with pytest.raises(InputError, match="became shorter"):
        archive.pack(made, tmp_path / "x.upz")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_zstandard(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for work in (lambda: archive.pack(made, tmp_path / "x.upz"), lambda: archive.unpack(tmp_path / "x.upz", tmp_path / "out")):
        with pytest.raises(InputError, match=r"pip install zstandard"):
            work()
