"""Files: round trips, formats that others can read, and nothing half-written."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import uniprune
from uniprune import Recipe
from uniprune.artefacts import masks as masks_file
from uniprune.artefacts import scores as scores_file
from uniprune.artefacts.binding import Binding, fingerprint
from uniprune.artefacts.scores import ScoresFacts
from uniprune.errors import InputError
from uniprune.sparsity.bits import apply_to_array, kept_count, pack, unpack
from uniprune.storage import files

BINDING = {"base": "b" * 64, "base_name": "model", "digests": {}, "transposed": []}
BOUND = Binding(**BINDING)


@given(st.integers(1, 7), st.integers(1, 19), st.integers(0, 99))
def test_packed_masks_come_back(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(mask)
    assert len(packed) == -(-rows * columns // 8)
    assert torch.equal(unpack(packed, (rows, columns)), mask)


def test_first_weight_is_the_lowest_bit():
    assert pack(torch.tensor([[True, False, False, True, False, False, False, False, True]])).tolist() == [9, 1]


def write_masks(path, **masks):
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    return masks_file.write_masks(path, masks.items(), shapes, BOUND, "any")


def test_masks_round_trip(tmp_path):
    masks = {name: torch.rand(5, 9) < 0.5 for name in ("b.10", "b.9", "a")}
    removed = write_masks(tmp_path / "m.safetensors", **masks)
    file = masks_file.MasksFile(tmp_path / "m.safetensors")
    assert set(file) == set(masks)
    assert file.removed() == removed
    for name, mask in masks.items():
        assert torch.equal(file[name], mask)
        assert removed[name] == pytest.approx(1 - float(mask.float().mean()))


def test_scores_round_trip_in_their_order(tmp_path):
    scores = {name: torch.randn(3, 5) for name in ("b.10", "b.9", "a")}
    digests = dict.fromkeys(scores, "F32")
    bound = BINDING | {"digests": digests, "base": fingerprint(digests)}
    facts = ScoresFacts(**bound, matrices=list(scores), comparable=True)
    scores_file.write_scores(tmp_path / "s.safetensors", scores.items(), dict.fromkeys(scores, (3, 5)), facts)
    file = scores_file.ScoresFile(tmp_path / "s.safetensors")
    assert list(file) == list(scores)  # ties across matrices are broken by this order
    for name in scores:
        assert torch.equal(file[name], scores[name])
    assert load_file(tmp_path / "s.safetensors").keys() == scores.keys()  # the safetensors library reads it


def test_same_content_same_bytes(tmp_path):
    mask = torch.rand(5, 9) < 0.5
    for name in ("one", "two"):
        write_masks(tmp_path / f"{name}.safetensors", w=mask)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.safetensors"
    write_masks(path, w=torch.ones(2, 2, dtype=torch.bool))
    before = path.read_bytes()

    def broken():
        yield "a", torch.ones(2, 2, dtype=torch.bool)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        masks_file.write_masks(path, broken(), {"a": (2, 2), "b": (2, 2)}, BOUND, "any")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_unusable_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(InputError, match="does not exist"):
        masks_file.MasksFile(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(InputError, match="not written by uniprune"):
        masks_file.MasksFile(path)
    write_masks(path, w=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(InputError, match="holds masks, not scores"):
        scores_file.ScoresFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="not a complete safetensors file"):
        masks_file.MasksFile(path)
    save_file({"w": torch.ones(2)}, path, metadata={"uniprune": json.dumps({"kind": "masks", "format": 99})})
    with pytest.raises(InputError, match="format 99"):
        masks_file.MasksFile(path)


def test_output_files_are_checked_first(tmp_path):
    path = tmp_path / "m.safetensors"
    files.check_output_file(path, overwrite=False)
    path.touch()
    files.check_output_file(path, overwrite=True)
    for bad, message in ((path, "exists"), (tmp_path, "safetensors"), (tmp_path / "m.pt", "end in .safetensors")):
        with pytest.raises(InputError, match=message):
            files.check_output_file(bad, overwrite=False)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_zeroing_bits_is_zeroing_weights(size):
    """Whatever the bits are: those of NaN, infinity and -0.0, too."""
    words = np.random.default_rng(0).integers(0, 256, 50 * size, dtype=np.uint8).view(f"u{size}")
    words[:2] = np.iinfo(words.dtype).max, 1 << 8 * size - 1
    mask = torch.rand(5, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    pruned = words.copy()
    apply_to_array(pruned, pack(mask).numpy())
    assert np.array_equal(pruned, np.where(mask.numpy().ravel(), words, 0))


def test_kept_weights_are_counted_piece_by_piece(monkeypatch):
    monkeypatch.setattr("uniprune.sparsity.bits.PIECE", 7)
    mask = torch.rand(37, 11, generator=torch.Generator().manual_seed(0)) < 0.3
    assert kept_count(pack(mask).numpy()) == int(mask.sum())


def test_files_from_before_digests_are_refused_in_one_line(tmp_path):
    facts = {"kind": "masks", "format": 1, "shapes": {}, "base": "b" * 64, "base_name": "m", "transposed": [], "pattern": "2:4"}
    save_file({}, tmp_path / "old.safetensors", metadata={"uniprune": json.dumps(facts)})
    with pytest.raises(InputError, match=r"old\.safetensors .* from before there were any; make it again"):
        masks_file.MasksFile(tmp_path / "old.safetensors")


@pytest.mark.parametrize(("comparable", "scope"), [(True, "model"), (False, "row")])
def test_a_fraction_of_scores_on_one_scale_is_of_the_whole_model(folder, tmp_path, comparable, scope):
    """Whichever command reads them."""
    made, path, small = tmp_path / "made.safetensors", tmp_path / "s.safetensors", {"windows": 2, "length": 16}
    uniprune.calibrate(str(folder), Recipe(metric="magnitude", controller="none", **small), made)
    file = scores_file.ScoresFile(made)
    facts = file.facts.model_copy(update={"comparable": comparable})
    scores_file.write_scores(path, file.items(), file.shapes, facts)
    assert uniprune.mask(path, 0.5, tmp_path / "masks.safetensors").pattern == f"0.5 by {scope}"
    (row,) = uniprune.sweep(str(folder), path, tmp_path / "sweep.json", "0.5", **small).rows
    table = uniprune.compare(str(folder), tmp_path / "table", methods=(str(path),), sparsities=("0.5",), **small)
    assert (row.scope, table.rows[1].scope) == (scope, scope)
