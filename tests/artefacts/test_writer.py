"""The pruned checkpoint is the source's bytes with zeros, and belongs to one model."""

import io
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from conftest import tiny_model, train_tokenizer
from small_models import tiny
from uniprune import Loaded
from uniprune.artefacts import masks as masks_file
from uniprune.artefacts import writer
from uniprune.artefacts.binding import Binding, fingerprint
from uniprune.checkpoints.checkpoint import Files
from uniprune.checkpoints.origin import Origin
from uniprune.errors import InputError, UniPruneError
from uniprune.models.matrices import find_matrices
from uniprune.storage import files


def random_masks(matrices):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(matrix.shape, generator=generator) < 0.5 for name, matrix in matrices.items()}


@pytest.fixture
def write(tmp_path):
    """Writes the checkpoint that masks, given as booleans, make into tmp_path/out."""

    def write(source, masks, transposed=(), check=None, out="out"):
        binding = Binding(base="", base_name="", digests={}, transposed=list(transposed))
        file = tmp_path / "masks.safetensors"
        masks_file.write_masks(file, masks.items(), {name: tuple(mask.shape) for name, mask in masks.items()}, binding, "any")
        (tmp_path / out).mkdir()
        writer.write_checkpoint(source, masks_file.MasksFile(file), tmp_path / out, check)
        return tmp_path / out

    return write


def test_kept_weights_are_bitwise_the_source(folder, write):
    matrices = find_matrices(tiny_model())
    masks = random_masks(matrices)
    out = write(Origin("tiny", folder), masks)
    for shard in folder.glob("*.safetensors"):
        source, pruned = load_file(shard), load_file(out / shard.name)
        assert source.keys() == pruned.keys()
        for key, weight in source.items():
            mask = masks.get(key.removesuffix(".weight"), torch.ones_like(weight, dtype=torch.bool))
            assert pruned[key].dtype == torch.bfloat16
            expected = torch.where(mask, weight, 0)
            assert torch.equal(pruned[key].view(torch.int16), expected.view(torch.int16)), key


def test_keeping_everything_is_a_bitwise_copy(folder, write):
    masks = {name: torch.ones(matrix.shape, dtype=torch.bool) for name, matrix in find_matrices(tiny_model()).items()}
    out = write(Origin("tiny", folder), masks)
    assert {file.name for file in out.iterdir()} == {file.name for file in folder.iterdir()}
    for file in folder.iterdir():
        assert file.read_bytes() == (out / file.name).read_bytes(), file.name


def test_transposed_weights_are_zeroed_where_the_mask_says(write):
    model = tiny_model("gpt2")
    matrices = find_matrices(model)
    masks = random_masks(matrices)
    pruned = find_matrices(AutoModelForCausalLM.from_pretrained(write(Loaded(model), masks, matrices)))
    for name, mask in masks.items():
        assert torch.equal(pruned[name].weight, matrices[name].weight * mask)


def test_fingerprint_is_of_the_weights_not_of_the_files(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    matrices = find_matrices(model)
    sharded = fingerprint(Files(folder).digests(matrices))
    model.save_pretrained(tmp_path)  # one shard
    assert fingerprint(Files(tmp_path).digests(list(matrices)[::-1])) == sharded
    before = Loaded(model).checkpoint.digests(matrices)
    assert fingerprint(before) == sharded
    matrices["model.layers.0.mlp.up_proj"].weight[0, 0] += 1
    after = Loaded(model).checkpoint.digests(matrices)
    assert [name for name in after if after[name] != before[name]] == ["model.layers.0.mlp.up_proj"]
    assert fingerprint(after) != sharded


def test_writing_finds_the_digests_of_what_it_read(folder, write):
    origin, matrices, found = Origin("tiny", folder), find_matrices(tiny_model()), {}
    write(origin, random_masks(matrices), check=found.__setitem__)
    assert found == Files(folder).digests(matrices)


def test_pieces_smaller_than_a_tensor_give_the_same_checkpoint(folder, write, monkeypatch):
    masks, found = random_masks(find_matrices(tiny_model())), []
    for size in (writer.PIECE, 960):
        monkeypatch.setattr(writer, "PIECE", size)
        digests = {}
        out = write(Origin("tiny", folder), masks, check=digests.__setitem__, out=str(size))
        found.append([(file.name, file.read_bytes()) for file in sorted(out.iterdir())] + [digests])
    assert found[0] == found[1]


def test_keys_without_the_outer_prefix_are_found(tmp_path):
    keys = ("h.0.mlp.c_fc.weight", "model.layers.1.x.weight")
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "model.safetensors")
    files = Files(tmp_path)
    assert files.key("transformer.h.0.mlp.c_fc") == files.key("h.0.mlp.c_fc") == "h.0.mlp.c_fc.weight"
    with pytest.raises(UniPruneError, match="no tensor"):
        files.region("model.layers.0.x")


def test_wrong_shapes_are_refused(folder, write):
    mask = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(UniPruneError, match="the mask is"):
        write(Origin("tiny", folder), {"model.layers.0.mlp.up_proj": mask})


def test_output_folders_are_checked_first(folder, tmp_path):
    check = files.check_output_folder
    check(tmp_path / "new", False, folder)
    (tmp_path / "empty").mkdir()
    check(tmp_path / "empty", False, folder)
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / files.REPORT).touch()
    check(ours, True, folder)
    with pytest.raises(InputError, match="--overwrite"):
        check(ours, False, folder)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").touch()
    with pytest.raises(InputError, match="not written by uniprune"):
        check(precious, True, folder)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        check(tmp_path / "file", True, folder)
    for bad in (folder, folder / "sub", folder.parent):
        with pytest.raises(InputError, match="overlap"):
            check(bad, True, folder)


def test_full_disks_are_noticed_first(tmp_path, monkeypatch):
    files.check_disk_space(tmp_path / "a" / "b", 1)
    with pytest.raises(InputError, match=r"needs 1,000,000,000,000 MB of disk"):
        files.check_disk_space(tmp_path / "a" / "b", 10**18)


def test_a_failed_run_leaves_the_old_folder(tmp_path):
    out = tmp_path / "out"
    for content in ("first", "second"):
        with files.new_folder(out, mark="file") as folder:
            (folder / "file").write_text(content)
    with pytest.raises(KeyboardInterrupt), files.new_folder(out, mark="file") as folder:
        (folder / "file").write_text("third")
        raise KeyboardInterrupt
    assert (out / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="there is no such step")
def test_a_folder_takes_the_place_of_another_in_one_step(tmp_path, monkeypatch):
    """So that a kill between two steps cannot leave nothing there."""
    out, moves = tmp_path / "out", []
    for content in ("first", "second"):
        with files.new_folder(out, mark="file") as folder:
            (folder / "file").write_text(content)
        monkeypatch.setattr(files.os, "replace", lambda *given: moves.append(given))
    assert not moves
    assert (out / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_appears_in_the_place_of_an_output_is_kept(tmp_path, kind):
    """Which was nothing, or a folder, when the run began."""
    out = tmp_path / "out"
    with pytest.raises(InputError, match="is no folder"), files.new_folder(out, mark="file") as folder:
        (folder / "file").write_text("ours")
        if kind == "file":
            out.write_text("theirs")
        else:
            (tmp_path / "elsewhere").mkdir()
            out.symlink_to(tmp_path / "elsewhere")
    assert out.is_symlink() if kind == "link" else out.read_text() == "theirs"
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def in_two_steps(monkeypatch):
    """As on systems that cannot exchange two folders."""
    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)


def test_a_folder_that_cannot_be_moved_leaves_the_old_one(tmp_path, monkeypatch, in_two_steps):
    """Though that one is out of the way already."""
    out, moves, replace = tmp_path / "out", [], files.os.replace
    with files.new_folder(out, mark="file") as folder:
        (folder / "file").write_text("first")

    def failing(source, target):
        moves.append(source)
        if len(moves) == bad:
            raise OSError("no more links")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    for bad in (1, 2):
        moves.clear()
        with pytest.raises(OSError, match="no more links"), files.new_folder(out, tmp_path, mark="file") as folder:
            (folder / "file").write_text("second")
        assert len(moves) == 2 * bad - 1
        assert (out / "file").read_text() == "first"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_appears_between_the_moves_costs_nobody_the_old_folder(tmp_path, monkeypatch, in_two_steps):
    out, replace, other = tmp_path / "out", files.os.replace, []
    with files.new_folder(out, mark="file") as folder:
        (folder / "file").write_text("first")

    def shared(source, target):
        replace(source, target)
        if source == out:
            out.mkdir()
            (out / "theirs").write_text("x")
            other.append(target)

    monkeypatch.setattr(files.os, "replace", shared)
    with pytest.raises(OSError, match="not empty"), files.new_folder(out, mark="file") as folder:
        (folder / "file").write_text("second")
    assert (other[0] / "file").read_text() == "first"


def test_an_interruption_after_the_last_move_leaves_the_new_folder(tmp_path, monkeypatch, in_two_steps):
    out, replace = tmp_path / "out", files.os.replace
    with files.new_folder(out, mark="file") as folder:
        (folder / "file").write_text("first")

    def interrupted(source, target):
        replace(source, target)
        if target == out:
            raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), files.new_folder(out, mark="file") as folder:
        (folder / "file").write_text("second")
    assert (out / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_quantised_checkpoints_are_refused(folder, tmp_path):
    from safetensors.torch import save_file

    save_file({"model.layers.0.x.weight": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UniPruneError, match="type I8"):
        Files(tmp_path).digests(["model.layers.0.x"])
    shutil.rmtree(tmp_path)


def test_weights_in_a_second_layout_are_not_part_of_the_model(folder, tmp_path, write):
    shutil.copytree(folder, tmp_path / "model")
    shutil.copyfile(next(folder.glob("*.safetensors")), tmp_path / "model" / "consolidated.safetensors")
    origin = Origin("two layouts", tmp_path / "model")
    assert [shard.name for shard in origin.files.shards] == [shard.name for shard in Files(folder).shards]
    assert not (write(origin, {}) / "consolidated.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_digests_name_the_matrix_that_is_not_finite(tmp_path, dtype, value):
    largest = torch.finfo(dtype).max
    weights = {name: torch.tensor([[largest, -largest], [0.0, 1.0]], dtype=dtype) for name in ("a.weight", "b.weight")}
    file = tmp_path / "model.safetensors"
    save_file(weights, file)
    assert set(Files(tmp_path).digests(["a", "b"])) == {"a", "b"}
    weights["b.weight"][1, 0] = value
    save_file(weights, file)
    with pytest.raises(InputError, match=r"^b: the weights contain NaN or infinity"):
        Files(tmp_path).digests(["a", "b"])


ROTARY = {
    "plain": {"rope_type": "default", "rope_theta": 5e5},
    "scaled": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
}


@pytest.mark.parametrize("kind", ROTARY)
def test_what_transformers_5_saves_is_spelled_as_before_too(tmp_path, tokenizer, kind):
    """By readers that know no ``rope_parameters``, and no ``TokenizersBackend``; it reads the same itself."""
    model = tiny_model(rope_parameters=ROTARY[kind])
    writer.write_checkpoint(Loaded(model, tokenizer), None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    scaling = config.get("rope_scaling")
    assert scaling == ({"rope_type": "linear", "factor": 4.0} if kind == "scaled" else None)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert saved["model_input_names"] == ["input_ids", "attention_mask"]  # that class adds token types by itself
    ids = torch.arange(40)[None]
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path)("some words").input_ids == tokenizer("some words").input_ids


def test_so_is_the_text_model_of_one_with_images(tmp_path):
    writer.write_checkpoint(Loaded(tiny("qwen2_5_vl"), None), None, tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"]
    assert text["rope_scaling"]["mrope_section"] == text["rope_parameters"]["mrope_section"]


@pytest.mark.parametrize(
    ("family", "rope", "expected"),
    [
        ("stablelm", {"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.5}),
        ("gpt_neox", {"partial_rotary_factor": 0.5}, {"rotary_pct": 0.5, "rotary_emb_base": 5e5}),
        ("gemma3_text", None, {"rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ],
)
def test_so_are_the_share_of_a_head_that_is_rotated_and_positions_by_layer(tmp_path, family, rope, expected):
    local = {"rope_type": "default", "rope_theta": 1e4}
    by_layer = {"sliding_attention": local, "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0}}
    model = tiny(family, rope_parameters=by_layer if rope is None else {"rope_type": "default", "rope_theta": 5e5, **rope})
    writer.write_checkpoint(Loaded(model), None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.items() >= {"rope_theta": 5e5, **expected}.items()
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == model.config.rope_parameters
    ids = torch.arange(40)[None]
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_settings_are_utf_8_whatever_the_locale(tmp_path, monkeypatch):
    """That of Windows is another one."""
    monkeypatch.setattr(io, "text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pàd>"})
    writer.write_checkpoint(Loaded(tiny_model(), tokenizer), None, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == "<pàd>"
