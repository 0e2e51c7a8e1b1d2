"""Files of another model are refused, and wherever they are read by the same rules."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import uniprune
from conftest import tiny_model
from uniprune import InputError, MismatchError, Recipe
from uniprune.artefacts import mask_tools
from uniprune.artefacts.binding import Binding, check_shapes
from uniprune.models.matrices import find_matrices

READ = {"windows": 2, "length": 32}
SQUARE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    scores = tmp_path_factory.mktemp("made") / "scores.safetensors"
    uniprune.calibrate(str(folder), Recipe(controller="none", **READ), scores)
    uniprune.mask(scores, "2:4", scores.with_name("masks.safetensors"))
    return scores.parent


def changed(path, target, *, tensors=None, **facts):
    """A copy of a file, other tensors in it and other facts."""
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["uniprune"])
    save_file(load_file(path) | (tensors or {}), target, {"uniprune": json.dumps(said | facts)})
    return target


USES = {
    "verify": ("masks", lambda folder, file, out: mask_tools.verify(file, folder)),
    "evaluate": ("masks", lambda folder, file, out: uniprune.evaluate(str(folder), masks=file, **READ)),
    "compare": ("masks", lambda folder, file, out: uniprune.compare(str(folder), out, methods=(str(file),), **READ)),
    "compare scores": ("scores", lambda folder, file, out: uniprune.compare(str(folder), out, methods=(str(file),), **READ)),
    "sweep": ("scores", lambda folder, file, out: uniprune.sweep(str(folder), file, out.with_suffix(".json"), "2:4", **READ)),
}


@pytest.mark.parametrize("use", USES)
def test_square_matrices_that_lie_the_other_way_round_are_refused_everywhere(folder, made, tmp_path, use):
    kind, work = USES[use]
    file = changed(made / f"{kind}.safetensors", tmp_path / "turned.safetensors", transposed=[SQUARE])
    with pytest.raises(MismatchError, match=f"made for another model: .* stores {SQUARE} the other way round"):
        work(folder, file, tmp_path / "out")


def test_scores_of_another_shape_are_refused_before_the_first_row(folder, made, tmp_path):
    file = changed(made / "scores.safetensors", tmp_path / "s.safetensors", tensors={SQUARE: torch.rand(16, 64)})
    with pytest.raises(MismatchError, match=rf"no matrix {SQUARE} of shape \(16, 64\), but one of \(32, 32\)"):
        uniprune.sweep(str(folder), file, tmp_path / "sweep.json", "2:4", **READ)


def test_scores_whose_base_is_not_that_of_their_digests_are_damaged(made, tmp_path):
    file = changed(made / "scores.safetensors", tmp_path / "s.safetensors", base="0" * 64)
    with pytest.raises(InputError, match="its base is not the fingerprint that its digests make"):
        uniprune.mask(file, "2:4", tmp_path / "masks.safetensors")


def test_shapes():
    check_shapes({"a": (1, 2)}, {"a": (1, 2), "b": (3, 4)}, "scores", "m")
    with pytest.raises(MismatchError, match=r"^scores was made for another model: m has no matrix b of shape \(3, 4\)$"):
        check_shapes({"b": (3, 4)}, {"a": (3, 4)}, "scores", "m")


def test_digests_name_the_first_matrix_with_other_weights(folder):
    matrices = find_matrices(tiny_model())
    loaded, digests = uniprune.load(folder), dict.fromkeys(matrices, "F32 (1, 1) aa")
    binding = Binding.of(matrices, digests, "tiny", 1)
    binding.check_digests(digests, "masks", loaded)
    with pytest.raises(MismatchError, match=rf"masks was made for another model \(tiny, {binding.base[:12]}\) than .*{SQUARE}"):
        binding.check_digests({SQUARE: "F32 (1, 1) ab"}, "masks", loaded)
