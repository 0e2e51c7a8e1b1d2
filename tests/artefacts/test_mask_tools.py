"""Masks files: what they promise is checked, set algebra is that of sets, and every conversion comes back."""

import hashlib
import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import uniprune
from conftest import tiny_model, write_gguf
from small_models import tiny
from uniprune.artefacts import mask_conversion, mask_tools, writer
from uniprune.artefacts import masks as masks_file
from uniprune.artefacts.binding import Binding, fingerprint
from uniprune.checkpoints.origin import resolve
from uniprune.errors import InputError, MismatchError
from uniprune.models import loading
from uniprune.models.matrices import find_matrices
from uniprune.sparsity.patterns.mixed import Mixed
from uniprune.sparsity.patterns.nm import DENSE, NM
from uniprune.sparsity.patterns.ruled import Rule, Ruled
from uniprune.sparsity.patterns.tiled import Tiled
from uniprune.sparsity.patterns.unstructured import Unstructured

DOCS = Path(__file__).parents[2] / "docs" / "masks.md"
PATTERNS = [NM(2, 4), NM(1, 4), NM(7, 16), *(Unstructured(0.37, scope) for scope in ("row", "matrix", "model"))]


def write(path, masks, pattern="any", seed="0", changes=None):
    """Masks of no model: the facts are well-formed, the digests are not of any weights."""
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    bits = hashlib.sha256(seed.encode()).hexdigest()
    digests = {name: f"F32 {shape} {bits}" for name, shape in shapes.items()}
    binding = Binding(base=fingerprint(digests), base_name="none", digests=digests, transposed=[])
    masks_file.write_masks(path, masks.items(), shapes, binding, pattern)
    if changes:
        save_file(load_file(path), path, metadata={"uniprune": json.dumps(facts_of(path) | changes)})
    return path


def facts_of(path):
    """What a masks file says of itself, as it is written."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["uniprune"])


def random_masks(seed=0, shape=(5, 12), names=("model.layers.0.up", "model.layers.1.up"), keep=0.5):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < keep for name in names}


def cut(folder, pattern, path, stored=None):
    """Masks of a model by magnitude, bound to it as calibrate and mask do; and the checkpoint pruned by them."""
    origin = resolve(folder)
    matrices = find_matrices(loading.load(folder, "float32").model)
    masks = dict(pattern({name: matrix.weight.abs() for name, matrix in matrices.items()}))
    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    digests = origin.files.digests(matrices)
    transposed = [name for name, matrix in matrices.items() if matrix.stored_transposed]
    binding = Binding(base=fingerprint(digests), base_name=str(origin), digests=digests, transposed=transposed)
    masks_file.write_masks(path, masks.items(), shapes, binding, str(pattern))
    if stored is not None:
        stored.mkdir()
        writer.write_checkpoint(origin, masks_file.MasksFile(path), stored)
    return masks


def same_masks(a, b):
    one, other = masks_file.MasksFile(a), masks_file.MasksFile(b)
    keys = ("base", "digests", "shapes")
    return (
        set(one.transposed) == set(other.transposed)
        and all(getattr(one.facts, key) == getattr(other.facts, key) for key in keys)
        and all(torch.equal(one[name], other[name]) for name in one)
    )


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "gpt2"
    tiny_model("gpt2").save_pretrained(path)
    return path


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def made(request, folder, gpt2, tmp_path_factory):
    """A dense model, its 2:4 masks and the checkpoint pruned by them. Tests write into none of these."""
    place = tmp_path_factory.mktemp("made")
    dense = {"llama": folder, "gpt2": gpt2}[request.param]
    masks = cut(dense, NM(2, 4), place / "m.safetensors", place / "pruned")
    return dense, place / "m.safetensors", place / "pruned", masks


def edited(source, target, change):
    """A copy of a checkpoint in which ``change`` was let loose on the tensors of its first shard with a decoder matrix."""
    shutil.copytree(source, target)
    for shard in sorted(target.glob("*.safetensors")):
        tensors = load_file(shard)
        key = next((key for key in tensors if key.endswith(("up_proj.weight", "c_fc.weight"))), None)
        if key is not None:
            change(tensors, key)
            save_file(tensors, shard, metadata={"format": "pt"})
            return key.removesuffix(".weight")
    raise AssertionError


# -------------------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_what_the_patterns_cut_is_verified(folder, tmp_path, pattern):
    path = tmp_path / "m.safetensors"
    masks = cut(folder, pattern, path)
    found = mask_tools.verify(path)
    assert found["checked"] == ["file", "pattern"]
    assert found["pattern"] == str(pattern)
    assert found["matrices"] == len(masks)
    assert found["sparsity"] == pytest.approx(
        1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    )
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("change", ["more", "fewer", "moved"])
def test_a_weight_too_many_or_too_few_is_found(tmp_path, pattern, change):
    generator = torch.Generator().manual_seed(0)
    masks = dict(pattern({name: torch.rand(6, 32, generator=generator) for name in ("a", "b")}))
    mask = masks["b"]
    kept, removed = mask[3].nonzero().squeeze(1), (~mask[3]).nonzero().squeeze(1)
    if change != "more":
        mask[3, kept[-1]] = False
    if change != "fewer":
        mask[2 if change == "moved" else 3, (~mask[2]).nonzero()[0] if change == "moved" else removed[0]] = True
    path = write(tmp_path / "m.safetensors", masks, str(pattern))
    wide = isinstance(pattern, Unstructured) and pattern.scope != "row"
    if wide and change == "moved":  # within the budget group
        mask_tools.verify(path)
        return
    with pytest.raises(InputError, match=rf"[ab] is not {pattern}, which would (not )?keep the weight in row") as error:
        mask_tools.verify(path)
    assert ("safetensors: b is" in str(error.value)) or (wide and pattern.scope == "model")


COMPOSED = [
    Unstructured(0.4, "block"),
    Tiled(Unstructured(0.5, "model"), 2, 4),
    Tiled(Unstructured(0.5, "row"), 1, 4),
    Mixed(0.35, (NM(2, 4), NM(1, 4), DENSE)),
    Ruled(Unstructured(0.5, "model"), (Rule("1.up", "0.1..0.4"),)),
    Ruled(NM(2, 4), (Rule("layers.0", "dense"), Rule("1.down", "0.3"))),
    Ruled(Mixed(0.3, (NM(2, 4), DENSE)), (Rule("0.up", "1:4"),)),
]


@pytest.mark.parametrize("pattern", COMPOSED, ids=str)
@given(seed=st.integers(0, 1000), row=st.integers(0, 7), column=st.integers(0, 31))
def test_budgets_tiles_and_rules_are_verified_and_any_one_bit_breaks_them(tmp_path, pattern, seed, row, column):
    generator = torch.Generator().manual_seed(seed)
    names = [f"layers.{index}.{kind}" for index in range(2) for kind in ("up", "down")]
    masks = dict(pattern({name: torch.rand(8, 32, generator=generator) for name in names}))
    path = tmp_path / "m.safetensors"
    write(path, masks, str(pattern))
    assert mask_tools.verify(path)["checked"] == ["file", "pattern"]
    name = names[seed % 4]
    masks[name][row, column] ^= True
    write(path, masks, str(pattern))
    with pytest.raises(InputError, match=f"is not {re.escape(str(pattern))}, which would"):
        mask_tools.verify(path)


def test_the_fault_is_located(tmp_path):
    mask = torch.tensor([[True, False, False, True] * 2] * 3)
    mask[1, 4:] = torch.tensor([True, True, True, False])
    with pytest.raises(InputError, match="w is not 2:4, which would not keep the weight in row 1, input 6"):
        mask_tools.verify(write(tmp_path / "m.safetensors", {"w": mask}, "2:4"))
    with pytest.raises(InputError, match=r"w is not 3:5: .*8 inputs are not divisible by 5"):
        mask_tools.verify(write(tmp_path / "m.safetensors", {"w": mask}, "3:5"))


@pytest.mark.parametrize(
    "pattern", ["union of (2:4) and (1:4), sparsity 0.4", "2:4 permuted", "0.333333 by row", "1e-300000 by x"]
)
def test_patterns_that_cannot_be_checked_are_said_to_be(tmp_path, pattern):
    assert mask_tools.verify(write(tmp_path / "m.safetensors", random_masks(), pattern))["checked"] == ["file"]


@pytest.mark.parametrize("pattern", ["2:04", "0.50 by row", ".5 by model", "5:4", "0:4", "1.5 by row", "..- by row"])
def test_patterns_have_one_spelling(tmp_path, pattern):
    with pytest.raises(InputError, match=r"m\.safetensors: .*(spelled|impossible|not between|neither)"):
        mask_tools.verify(write(tmp_path / "m.safetensors", random_masks(), pattern))


def test_masks_belong_to_their_model_and_to_what_was_pruned(made):
    dense, path, pruned, _ = made
    assert mask_tools.verify(path, dense, pruned)["checked"] == ["file", "pattern", "model", "pruned"]


def test_masks_of_another_model_are_refused(made, tmp_path):
    dense, path, _, _ = made

    def change(tensors, key):
        tensors[key][0, 0] += 1

    name = edited(dense, tmp_path / "other", change)
    with pytest.raises(MismatchError, match=f"made for another model.*other weights in {name}"):
        mask_tools.verify(path, tmp_path / "other")


def test_masks_of_another_architecture_are_refused(folder, gpt2, tmp_path):
    path = tmp_path / "m.safetensors"
    cut(folder, NM(2, 4), path)
    with pytest.raises(MismatchError, match=r"has no matrix model\.layers\.0"):
        mask_tools.verify(path, gpt2)
    with pytest.raises(MismatchError, match=r"no matrix model\.layers\.0\S+ of shape \(32, 32\)"):
        mask_tools.verify(path, pruned=gpt2)
    tiny_model(intermediate_size=48).save_pretrained(tmp_path / "narrow")
    with pytest.raises(MismatchError, match=r"has no matrix model\.layers\.0\.mlp"):
        mask_tools.verify(path, tmp_path / "narrow")
    for work in (
        lambda: mask_tools.verify(path, pruned=tmp_path / "narrow"),
        lambda: mask_conversion.from_checkpoint(tmp_path / "narrow", folder, tmp_path / "out.safetensors"),
    ):
        with pytest.raises(MismatchError, match=r"narrow has no matrix model\.layers\.0\.mlp\.\S+ of shape \(64, 32\)"):
            work()


def test_weights_that_survived_are_found(made, tmp_path):
    _, path, pruned, masks = made

    def revive(tensors, key):
        name, weight = key.removesuffix(".weight"), tensors[key]
        stored = masks[name] if weight.shape == masks[name].shape else masks[name].T
        weight[tuple((~stored).nonzero()[-1])] = 1e-30

    name = edited(pruned, tmp_path / "other", revive)
    with pytest.raises(MismatchError, match=f"{name}: 1 weights that it removes are not 0"):
        mask_tools.verify(path, pruned=tmp_path / "other")


def test_zeros_of_any_sign_agree_with_masks(made, tmp_path):
    """-0.0 where a mask removes, 0 where it keeps: neither is a fault."""
    _, path, pruned, _ = made

    def change(tensors, key):
        tensors[key][tensors[key] == 0] = -0.0
        tensors[key][tuple(tensors[key].nonzero()[0])] = 0

    edited(pruned, tmp_path / "other", change)
    mask_tools.verify(path, pruned=tmp_path / "other")


# ------------------------------------------------------------------------------------------------------ damaged files

FACTS = {
    "no shapes": ({"shapes": None}, "damaged"),
    "shapes of numbers": ({"shapes": {"w": 5}}, "damaged"),
    "another name": ({"shapes": {"v": [5, 12]}}, "not of the same names"),
    "another shape": ({"shapes": {"w": [5, 20]}}, r"w is U8 \[8\], which is no mask of \[5, 20\]"),
    "half a row": ({"shapes": {"w": [2.5, 24]}}, r"shapes\.w\.0: .*valid integer"),
    "a negative shape": ({"shapes": {"w": [-5, -12]}}, r"shapes\.w\.0: .*greater than or equal to 1"),
    "true": ({"shapes": {"w": [True, 60]}}, r"shapes\.w\.0: .*valid integer"),
    "transposed shape": ({"shapes": {"w": [12, 5]}}, r"digest that is not of \(12, 5\)"),
    "transposed": ({"transposed": ["w"]}, r"digest that is not of \(12, 5\)"),
    "transposed others": ({"transposed": ["v"]}, "not of the same names"),
    "transposed text": ({"transposed": "w"}, "transposed: .*valid list"),
    "base": ({"base": "0" * 64}, "not the fingerprint"),
    "base of another type": ({"base": 5}, "base: .*valid string"),
    "pattern": ({"pattern": ["2:4"]}, "pattern: .*valid string"),
    "digests": ({"digests": {"w": 5}}, "damaged"),
    "format": ({"format": "1"}, "damaged"),
    "later format": ({"format": 2}, "reads up to 1"),
    "kind": ({"kind": "scores"}, "holds scores"),
}


@pytest.mark.parametrize("case", FACTS)
def test_files_whose_facts_are_wrong_are_refused(tmp_path, case):
    changes, message = FACTS[case]
    path = write(tmp_path / "m.safetensors", random_masks(names=("w",)), changes=changes)
    for operation in (mask_tools.verify, mask_tools.stats, lambda path: mask_tools.diff(path, path)):
        with pytest.raises(InputError, match=message) as error:
            operation(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["format", "base", "base_name", "pattern", "digests", "transposed", "shapes"])
def test_every_fact_is_needed(tmp_path, key):
    path = write(tmp_path / "m.safetensors", random_masks(names=("w",)))
    facts = {k: v for k, v in facts_of(path).items() if k != key}
    save_file(load_file(path), path, metadata={"uniprune": json.dumps(facts)})
    with pytest.raises(InputError, match=f"damaged: it lacks '?{key}'?"):
        mask_tools.verify(path)


@pytest.mark.parametrize("text", ["5", "[]", "{}", "{", "null", '"masks"', "[" * 100_000])
def test_metadata_that_is_something_else_is_refused(tmp_path, text):
    save_file({"w": torch.zeros(8, dtype=torch.uint8)}, tmp_path / "m.safetensors", metadata={"uniprune": text})
    with pytest.raises(InputError) as error:
        mask_tools.verify(tmp_path / "m.safetensors")
    assert len(str(error.value)) < 500


def test_files_without_masks_with_others_or_with_loose_bits_are_refused(tmp_path):
    path = write(tmp_path / "m.safetensors", random_masks(names=("w",)))
    metadata = {"uniprune": json.dumps(facts_of(path))}
    packed = load_file(path)["w"]
    loose = packed.clone()
    loose[-1] |= 0b10000
    for tensors, message in (
        ({}, "not of the same names"),
        ({"w": packed, "v": packed.clone()}, "not of the same names"),
        ({"w": packed[:-1]}, "w is U8"),
        ({"w": packed.float()}, "w is F32"),
        ({"w": loose}, "w has bits set beyond its last weight"),
    ):
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(InputError, match=message):
            mask_tools.stats(path)


@given(st.data())
def test_flipped_bits_and_cuts_never_raise_anything_else(tmp_path, data):
    path = write(tmp_path / "m.safetensors", random_masks(), "0.5 by model")
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(len(raw) - 20, len(raw)))])
    for operation in (mask_tools.verify, mask_tools.stats):
        try:
            operation(path)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017


# -------------------------------------------------------------------------------------------------- compare and combine


@given(st.integers(1, 5), st.integers(1, 19), st.integers(2, 4), st.integers(0, 999), st.sampled_from([0.0, 0.3, 0.8, 1.0]))
def test_set_algebra(tmp_path, rows, columns, count, seed, keep):
    all_masks = [random_masks(seed + i, (rows, columns), keep=keep if i else 0.5) for i in range(count)]
    paths = [write(tmp_path / f"{i}.safetensors", masks, f"p{i}") for i, masks in enumerate(all_masks)]
    inside, outside = tmp_path / "inside.safetensors", tmp_path / "outside.safetensors"
    realised = mask_tools.intersect(paths, inside, overwrite=True)
    mask_tools.union(paths, outside, overwrite=True)
    both, either = masks_file.MasksFile(inside), masks_file.MasksFile(outside)
    for name in both:
        stack = torch.stack([masks[name] for masks in all_masks])
        assert torch.equal(both[name], stack.all(0))
        assert torch.equal(either[name], stack.any(0))
    for path, masks in zip(paths, all_masks, strict=True):
        assert mask_tools.diff(inside, path)["only_a"] == 0
        assert mask_tools.diff(path, outside)["only_a"] == 0
        found = mask_tools.diff(path, paths[0])
        kept = sum(int(mask.sum()) for mask in masks.values())
        assert found["both"] + found["only_a"] == kept == sum(m["both"] + m["only_a"] for m in found["matrices"].values())
        swapped = mask_tools.diff(paths[0], path)
        assert (swapped["only_a"], swapped["only_b"], swapped["jaccard"]) == (
            found["only_b"],
            found["only_a"],
            found["jaccard"],
        )
    assert realised["sparsity"] == pytest.approx(mask_tools.verify(inside)["sparsity"])


def test_similarity_by_hand(tmp_path):
    a = write(tmp_path / "a.safetensors", {"w": torch.tensor([[1, 1, 1, 0, 0]]).bool(), "v": torch.zeros(3, 1).bool()})
    b = write(tmp_path / "b.safetensors", {"w": torch.tensor([[0, 1, 1, 1, 0]]).bool(), "v": torch.zeros(3, 1).bool()})
    found = mask_tools.diff(a, b)
    assert found["matrices"]["w"] == {"both": 2, "only_a": 1, "only_b": 1, "jaccard": 0.5}
    assert found["matrices"]["v"]["jaccard"] == 1
    assert (found["both"], found["jaccard"], found["same_base"]) == (2, 0.5, True)
    assert json.loads(json.dumps(found)) == found


def test_only_masks_of_the_same_matrices_and_model_are_compared(tmp_path):
    masks = random_masks()
    a, b = write(tmp_path / "a.safetensors", masks), write(tmp_path / "b.safetensors", masks, seed="1")
    with pytest.raises(MismatchError, match="made for different models"):
        mask_tools.diff(a, b)
    forced = mask_tools.diff(a, b, force=True)
    assert forced["same_base"] is False
    assert forced["jaccard"] == 1
    out = tmp_path / "out.safetensors"
    with pytest.raises(MismatchError, match="made for different models"):
        mask_tools.union([a, b], out)
    c = write(tmp_path / "c.safetensors", {**masks, "extra": torch.ones(2, 2).bool()})
    d = write(tmp_path / "d.safetensors", random_masks(shape=(12, 5)))
    for other, message in ((c, r"extra is missing and \(2, 2\)"), (d, r"model\.layers\.0\.up is \(5, 12\) and \(12, 5\)")):
        for operation in (lambda x, y: mask_tools.diff(x, y, force=True), lambda x, y: mask_tools.intersect([x, y], out)):
            with pytest.raises(InputError, match=message):
                operation(a, other)
    assert not out.exists()


def test_combined_masks_say_what_they_are(tmp_path):
    generator = torch.Generator().manual_seed(0)
    paths = []
    for pattern in (NM(2, 4), NM(2, 4), Unstructured(0.3)):
        masks = dict(pattern({"w": torch.rand(8, 16, generator=generator)}))
        paths.append(write(tmp_path / f"{len(paths)}.safetensors", masks, str(pattern)))
    out = tmp_path / "out.safetensors"
    found = mask_tools.intersect(paths, out)
    assert found["pattern"] == f"intersection of (2:4) and (2:4) and (0.3 by row), sparsity {found['sparsity']:.6g}"
    assert mask_tools.verify(out)["checked"] == ["file"]
    assert mask_tools.stats(out)["at_most"]["2:4"]
    before = out.read_bytes()
    with pytest.raises(InputError, match="exists"):
        mask_tools.union(paths, out)
    assert out.read_bytes() == before
    assert mask_tools.union(paths[:2], out, overwrite=True)["pattern"].startswith("union of (2:4) and (2:4), sparsity 0.")
    assert not mask_tools.stats(out)["at_most"]["2:4"]
    before = out.read_bytes()
    with pytest.raises(InputError, match="the input"):
        mask_tools.union([out, paths[0]], out, overwrite=True)
    assert out.read_bytes() == before
    with pytest.raises(InputError, match="two or more"):
        mask_tools.intersect(paths[:1], out, overwrite=True)


# --------------------------------------------------------------------------------------------------------------- stats


def test_statistics_by_hand(tmp_path):
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 0, 0], [0] * 8, [1, 0, 0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0, 0, 0]]).bool()
    names = ("model.layers.10.mlp.up", "model.layers.2.mlp.up", "model.layers.2.mlp.down")
    masks = dict(zip(names, (mask, torch.ones(4, 5).bool(), torch.zeros(4, 8).bool()), strict=True))
    found = mask_tools.stats(write(tmp_path / "m.safetensors", masks))
    assert list(found["matrices"]) == list(names)  # as the file has them
    assert found["matrices"][names[0]] == {
        "shape": [4, 8],
        "weights": 32,
        "kept": 10,
        "sparsity": 0.6875,
        "empty_rows": 1,
        "empty_columns": 3,
        "kept_per_row": {"min": 0, "q1": 2.25, "median": 3, "q3": 3.25, "max": 4},
        "at_most": {"2:4": False, "4:8": True},
    }
    assert found["matrices"][names[1]]["at_most"] == {"2:4": False, "4:8": False}  # 5 inputs are in no groups of 4
    assert list(found["blocks"]) == ["model.layers.10", "model.layers.2"]
    block = {"weights": 52, "kept": 20, "empty_rows": 4, "empty_columns": 8, "sparsity": 1 - 20 / 52}
    assert found["blocks"]["model.layers.2"] == block | {"at_most": {"2:4": False, "4:8": False}}
    assert (found["weights"], found["kept"], found["sparsity"]) == (84, 30, 1 - 30 / 84)
    assert json.loads(json.dumps(found)) == found


# ------------------------------------------------------------------------------------------------------------- convert


def test_the_masks_of_a_pruned_checkpoint_come_back(made, tmp_path):
    dense, path, pruned, _ = made
    out = tmp_path / "out.safetensors"
    found = mask_conversion.from_checkpoint(pruned, dense, out)
    assert same_masks(path, out)
    assert found["pattern"] == f"zeros of {pruned}"
    assert (found["left_dense"], found["sparsity"]) == ([], 0.5)
    assert mask_tools.verify(out, dense, pruned)["checked"] == ["file", "model", "pruned"]
    with pytest.raises(InputError, match="exists"):
        mask_conversion.from_checkpoint(pruned, dense, out)


def test_zeros_by_multiplication_are_zeros(made, tmp_path):
    dense, path, pruned, _ = made

    def change(tensors, key):
        tensors[key][tensors[key] == 0] = -0.0

    edited(pruned, tmp_path / "other", change)
    mask_conversion.from_checkpoint(tmp_path / "other", dense, tmp_path / "out.safetensors")
    assert same_masks(path, tmp_path / "out.safetensors")


def test_tuned_checkpoints_are_taken_when_asked_to(made, tmp_path):
    dense, path, pruned, _ = made
    out = tmp_path / "out.safetensors"
    name = edited(pruned, tmp_path / "tuned", lambda tensors, key: tensors[key].mul_(1.5))
    with pytest.raises(MismatchError, match=f"other kept weights in {name} than .*: --no-check-bits"):
        mask_conversion.from_checkpoint(tmp_path / "tuned", dense, out)
    assert not list(tmp_path.glob("*out*"))
    mask_conversion.from_checkpoint(tmp_path / "tuned", dense, out, check_bits=False)
    assert same_masks(path, out)


def test_converted_checkpoints_are_taken_when_asked_to(made, tmp_path):
    dense, path, pruned, _ = made
    model = loading.load(pruned).model
    model.to(torch.float16 if model.dtype == torch.float32 else torch.float32).save_pretrained(tmp_path / "converted")
    out = tmp_path / "out.safetensors"
    with pytest.raises(MismatchError, match="other kept weights"):
        mask_conversion.from_checkpoint(tmp_path / "converted", dense, out)
    mask_conversion.from_checkpoint(tmp_path / "converted", dense, out, check_bits=False)
    assert same_masks(path, out)


def test_dense_models_need_not_be_safetensors(folder, tokenizer, tmp_path):
    """A GGUF file, whose bits are had from the model in memory."""
    path, pruned = tmp_path / "m.safetensors", tmp_path / "pruned"
    cut(folder, NM(2, 4), path, pruned)
    gguf = write_gguf(loading.load(folder).model, tokenizer, tmp_path / "gguf" / "model.gguf")
    assert "model" in mask_tools.verify(path, gguf, dtype="bfloat16")["checked"]
    other = r"was made with weights in bfloat16, .*model.gguf was read in float32; give --dtype bfloat16"
    with pytest.raises(MismatchError, match=other):
        mask_tools.verify(path, gguf, dtype="float32")
    with pytest.raises(MismatchError, match=other):
        uniprune.apply(gguf, path, tmp_path / "applied")
    with pytest.raises(MismatchError, match=other):
        uniprune.evaluate(gguf, text_source="builtin", windows=1, length=32, masks=path, dtype="float32")
    with pytest.raises(MismatchError, match="other kept weights"):
        mask_conversion.import_masks(gguf.rename(gguf.with_suffix(".GGUF")), folder, tmp_path / "imported.safetensors")
    gguf.with_suffix(".GGUF").rename(gguf)
    mask_conversion.from_checkpoint(pruned, gguf, tmp_path / "out.safetensors", dtype="bfloat16")
    assert same_masks(path, tmp_path / "out.safetensors")


@pytest.mark.parametrize(("kind", "kept"), [("F32", True), ("Q8_0", True), ("Q4_0", True), ("Q4_1", False)])
def test_a_pruned_model_as_a_gguf_file(folder, tokenizer, tmp_path, kind, kept):
    """Zeros are looked for in what a quantised type gives back; Q4_1 has none to give."""
    path, pruned, out = tmp_path / "m.safetensors", tmp_path / "pruned", tmp_path / "out.safetensors"
    cut(folder, NM(2, 4), path, pruned)
    gguf = write_gguf(loading.load(pruned).model, tokenizer, tmp_path / "gguf" / "model.gguf", kind)
    if not kept:
        with pytest.raises(MismatchError, match=r"model\.gguf was not pruned by .*: \d+ weights that it removes are not 0"):
            mask_tools.verify(path, pruned=gguf)
        return
    assert "pruned" in mask_tools.verify(path, folder, gguf)["checked"]
    if kind == "F32":
        mask_conversion.from_checkpoint(gguf, folder, out, dtype="bfloat16")
        assert same_masks(path, out)
    else:
        with pytest.raises(MismatchError, match="other kept weights"):
            mask_conversion.from_checkpoint(gguf, folder, out, dtype="bfloat16")


def test_a_model_at_home_is_not_written_into(folder, tmp_path, monkeypatch):
    """No shell makes a path of ``~`` in ``--model=~/model``; models are found there, and their weights were replaced."""
    dense, path = tmp_path / "model", tmp_path / "masks.safetensors"
    shutil.copytree(folder, dense)
    cut(dense, NM(2, 4), path)
    monkeypatch.setenv("HOME", str(tmp_path))
    weights = next(dense.glob("*.safetensors"))
    for write in (
        lambda: mask_conversion.export_masks(path, weights, model="~/model", overwrite=True),
        lambda: mask_conversion.from_foreign(path, "~/model", weights, overwrite=True),
        lambda: mask_conversion.from_checkpoint(folder, "~/model", weights, overwrite=True),
    ):
        with pytest.raises(InputError, match="lies in, the input"):
            write()


@pytest.mark.parametrize("given", [True, False])
def test_plain_masks_come_back(made, tmp_path, given):
    dense, path, _, masks = made
    plain, out = tmp_path / "plain.safetensors", tmp_path / "out.safetensors"
    found = mask_conversion.export_masks(path, plain, model=dense if given else None)
    assert found == {"format": "boolean", "pattern": "2:4", "matrices": len(masks)}
    tensors = load_file(plain)
    weights = {key: value for shard in dense.glob("*.safetensors") for key, value in load_file(shard).items()}
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.bool
        assert tensor.shape == weights[key].shape
        mask = masks[key.removesuffix(".weight")]
        assert torch.equal(tensor, mask if dense.name == "model" else mask.T)
    mask_conversion.from_foreign(plain, dense, out)
    assert same_masks(path, out)
    with pytest.raises(InputError, match="exists"):
        mask_conversion.export_masks(path, plain)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_stack_of_experts_has_one_mask(tmp_path, family):
    """Under its own key, in its own shape; gpt-oss stores each matrix transposed."""
    dense, path, plain = tmp_path / "model", tmp_path / "m.safetensors", tmp_path / "plain.safetensors"
    tiny(family).save_pretrained(dense, save_original_format=False)
    cut(dense, NM(2, 4), path, tmp_path / "pruned")
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "pruned"))
    masks = {key: after[key] != 0 for key, weight in before.items() if not torch.equal(weight, after[key])}
    assert any(mask.ndim == 3 for mask in masks.values())
    save_file(masks, plain)
    assert mask_conversion.import_masks(plain, dense, tmp_path / "out.safetensors")["pattern"] == "2:4"
    assert same_masks(path, tmp_path / "out.safetensors")
    stack = next(key for key, mask in masks.items() if mask.ndim == 3)
    save_file({stack: masks[stack], f"{stack}.1.weight": torch.ones(masks[stack].shape[1:])}, plain)
    with pytest.raises(InputError, match=f"a mask of {stack}, which removes weights"):
        mask_conversion.import_masks(plain, dense, tmp_path / "other.safetensors")
    save_file({stack: masks[stack][:, :1].contiguous()}, plain)
    with pytest.raises(InputError, match="the weight is"):
        mask_conversion.import_masks(plain, dense, tmp_path / "other.safetensors")


def test_square_matrices_that_lie_the_other_way_round_are_refused(tmp_path):
    """gpt-oss has experts of as many inputs as outputs, stored by input in bfloat16 and by output in MXFP4."""
    dense, path, turned = tmp_path / "model", tmp_path / "m.safetensors", tmp_path / "turned.safetensors"
    tiny("gpt_oss", hidden_size=64, intermediate_size=64).save_pretrained(dense)
    masks = cut(dense, NM(2, 4), path, tmp_path / "pruned")
    square = {name: mask for name, mask in masks.items() if "down_proj" in name}
    facts, shapes = masks_file.MasksFile(path).facts, dict.fromkeys(square, (64, 64))
    assert {*square} <= {*facts.transposed}
    digests = {name: facts.digests[name] for name in square}
    for file, transposed in ((path, list(square)), (turned, [])):
        binding = Binding(base=fingerprint(digests), base_name="m", digests=digests, transposed=transposed)
        masks_file.write_masks(file, square.items(), shapes, binding, "2:4")
    mask_tools.verify(path, pruned=tmp_path / "pruned")
    uniprune.apply(dense, path, tmp_path / "out", force=True)
    with pytest.raises(MismatchError, match=r"stores \S+down_proj\S* the other way round, inputs for outputs"):
        mask_tools.verify(turned, pruned=tmp_path / "pruned")
    with pytest.raises(MismatchError, match="the other way round"):
        uniprune.apply(dense, turned, tmp_path / "other", force=True)
    assert not (tmp_path / "other").exists()


def test_a_pruned_checkpoint_of_the_hub_is_taken(folder, tmp_path, real_hub):
    path, pruned, out = tmp_path / "m.safetensors", tmp_path / "pruned", tmp_path / "out.safetensors"
    cut(folder, NM(2, 4), path, pruned)
    real_hub.add("owner/pruned", pruned)
    assert mask_conversion.import_masks("owner/pruned", folder, out)["pattern"] == "zeros of owner/pruned"
    assert same_masks(path, out)
    with pytest.raises(InputError, match="there is no such file"):
        mask_conversion.import_masks("masks/missing.npz", folder, tmp_path / "other.safetensors")


def test_folders_are_no_masks_files(made):
    _, path, pruned, _ = made
    (pruned / "pruning").mkdir(exist_ok=True)
    inside = pruned / "pruning" / "masks.safetensors"
    inside.unlink(missing_ok=True)
    with pytest.raises(InputError, match=f"masks file {pruned} is a folder; give a file"):
        mask_tools.stats(pruned)
    shutil.copyfile(path, inside)
    with pytest.raises(InputError, match=f"masks file {pruned} is a folder; give {inside}"):
        mask_tools.verify(pruned)


def test_keys_are_the_checkpoints(gpt2, tmp_path):
    """The hub's GPT-2 stores its keys without their first part."""
    bare, path, plain = tmp_path / "bare", tmp_path / "m.safetensors", tmp_path / "plain.safetensors"
    shutil.copytree(gpt2, bare)
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(gpt2 / "model.safetensors").items()}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    cut(bare, NM(2, 4), path)
    mask_conversion.export_masks(path, plain, model=bare)
    assert set(load_file(plain)) <= set(tensors)
    mask_conversion.from_foreign(plain, bare, tmp_path / "out.safetensors")
    assert same_masks(path, tmp_path / "out.safetensors")


@pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.int64])
def test_arrays_by_either_name(made, tmp_path, kind):
    dense, path, _, masks = made
    flipped = masks_file.MasksFile(path).transposed
    arrays = {}
    for index, (name, mask) in enumerate(masks.items()):
        by_key = mask.T if name in flipped else mask
        arrays[name if index % 2 else f"{name}.weight"] = (mask if index % 2 else by_key).numpy().astype(kind)
    np.savez_compressed(tmp_path / "plain.npz", **arrays)
    save_file({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, tmp_path / "plain.safetensors")
    for plain in ("plain.npz", "plain.safetensors"):
        found = mask_conversion.from_foreign(tmp_path / plain, dense, tmp_path / "out.safetensors", overwrite=True)
        assert (found["format"], found["pattern"]) == ("boolean", "2:4")
        assert same_masks(path, tmp_path / "out.safetensors")


def test_matrices_without_an_array_stay_dense(made, tmp_path):
    dense, _, _, masks = made
    names = list(masks)
    arrays = {names[0]: masks[names[0]].numpy(), names[-1]: np.ones(masks[names[-1]].shape, bool)}
    np.savez(tmp_path / "plain.npz", **arrays)
    found = mask_conversion.from_foreign(tmp_path / "plain.npz", dense, tmp_path / "out.safetensors")
    assert found["matrices"] == 2
    assert found["left_dense"] == names[1:-1]
    assert found["sparsity"] == pytest.approx(1 - sum(a.sum() for a in arrays.values()) / sum(a.size for a in arrays.values()))
    assert mask_tools.verify(tmp_path / "out.safetensors", dense)["sparsity"] == pytest.approx(found["sparsity"])


def test_arrays_that_are_no_masks_are_refused(folder, tmp_path):
    name = "model.layers.0.mlp.up_proj"  # [64, 32]
    mask = np.ones((64, 32), bool)
    out = tmp_path / "out.safetensors"
    for arrays, message in (
        ({}, r"no mask of any matrix of .*like \[\]"),
        ({"lm_head.weight": mask}, r"no mask of any matrix of .*like \['lm_head\.weight'\]"),
        ({name: mask, "lm_head.weight": mask}, "has a mask of lm_head.weight, which is not among the prunable matrices"),
        ({name: mask, f"{name}.weight": mask}, "has a mask of model.layers.0.mlp.up_proj, which is not"),
        ({name: mask.T}, r"up_proj is bool \[32, 64\], no mask .*\[64, 32\]"),
        ({name: np.packbits(mask)}, r"uint8 \[256\]"),
        ({name: mask * 0.5}, "float64 .*not all 0 and 1"),
        ({name: mask * 2}, "not all 0 and 1"),
        ({name: -mask.astype(np.int8)}, "not all 0 and 1"),
        ({name: mask.astype(object)}, "cannot be read"),
    ):
        np.savez(tmp_path / "plain.npz", **arrays)
        with pytest.raises(InputError, match=message) as error:
            mask_conversion.from_foreign(tmp_path / "plain.npz", folder, out)
        assert "\n" not in str(error.value)
    for tensors, message in (
        ({name: torch.full((64, 32), 0.5)}, "float32"),
        ({name: torch.full((64, 32), 2, dtype=torch.bfloat16)}, "not all 0 and 1"),
    ):
        save_file(tensors, tmp_path / "plain.safetensors")
        with pytest.raises(InputError, match=message):
            mask_conversion.from_foreign(tmp_path / "plain.safetensors", folder, out)
    assert not list(tmp_path.glob("*out*"))


def test_files_that_are_no_plain_masks_are_refused(folder, tmp_path):
    name, out = "model.layers.0.mlp.up_proj", tmp_path / "out.safetensors"
    np.savez_compressed(tmp_path / "whole.npz", **{name: np.random.default_rng(0).random((64, 32)) < 0.5})
    raw = (tmp_path / "whole.npz").read_bytes()
    flipped = bytearray(raw)
    flipped[200] ^= 0xFF
    np.save(tmp_path / "one.npy", np.ones(3))
    for file, content in {
        "missing.npz": None,
        "cut.npz": raw[:-30],
        "flipped.npz": bytes(flipped),
        "empty.npz": b"",
        "one.npz": (tmp_path / "one.npy").read_bytes(),
        "zip.safetensors": raw,
        "mask.pt": raw,
    }.items():
        if content is not None:
            (tmp_path / file).write_bytes(content)
        with pytest.raises(InputError, match=f"{file} cannot be read") as error:
            mask_conversion.from_foreign(tmp_path / file, folder, out)
        assert "\n" not in str(error.value)
    assert not out.exists()


def test_outputs_are_checked_before_the_work(tmp_path):
    missing = tmp_path / "missing"
    for work in (
        lambda out: mask_tools.intersect([missing, missing], out),
        lambda out: mask_conversion.from_checkpoint(missing, missing, out),
        lambda out: mask_conversion.export_masks(missing, out),
        lambda out: mask_conversion.from_foreign(missing, missing, out),
    ):
        with pytest.raises(InputError, match=r"ends? in \.safetensors"):
            work(tmp_path / "out.npz")


# ------------------------------------------------------------------------------------------------------------- the docs


def examples():
    scope = {}
    for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL):
        exec(code, scope)
    return scope


def test_the_reader_of_the_documentation_reads(made):
    _, path, _, masks = made
    found = dict(examples()["read_masks"](path))
    assert found.keys() == masks.keys()
    for name, mask in found.items():
        assert mask.dtype == np.bool_
        assert np.array_equal(mask, masks[name].numpy())


def test_the_fingerprint_of_the_documentation_is_ours(made):
    dense, path, _, masks = made
    stored = {}
    for shard in dense.glob("*.safetensors"):
        raw = shard.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        for key, item in json.loads(raw[8 : 8 + length]).items():
            if key.removesuffix(".weight") in masks:
                start, stop = (8 + length + offset for offset in item["data_offsets"])
                stored[key.removesuffix(".weight")] = item["dtype"], item["shape"], raw[start:stop]
    assert examples()["fingerprint"](stored) == masks_file.MasksFile(path).facts.base


def test_the_documentation_names_every_fact(made):
    _, path, _, _ = made
    rows = re.findall(r"^\| `(\w+)` \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert masks_file.MasksFile(path).facts.record().keys() <= {*rows}


def test_a_type_that_nothing_is_read_in_is_refused(tmp_path):
    """Weights of safetensors files are taken as they are."""
    tiny("llama").save_pretrained(tmp_path / "model")
    cut(tmp_path / "model", NM(2, 4), tmp_path / "masks.safetensors", tmp_path / "pruned")
    with pytest.raises(InputError, match="give it with --model"):
        mask_tools.verify(tmp_path / "masks.safetensors", dtype="float16")
    with pytest.raises(InputError, match="keep their type"):
        mask_tools.verify(tmp_path / "masks.safetensors", tmp_path / "model", dtype="float16")
    with pytest.raises(InputError, match="keep their type"):
        mask_conversion.from_checkpoint(tmp_path / "pruned", tmp_path / "model", tmp_path / "new.safetensors", dtype="float16")
