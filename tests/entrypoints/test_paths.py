"""Public functions take paths as texts, as most people write them."""

import uniprune
from uniprune import Recipe
from uniprune.artefacts import archive, mask_conversion, mask_tools

LOCAL = {"windows": 8, "length": 32, "controller": "none"}


def test_every_path_may_be_a_text(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(folder)
    uniprune.prune(model, Recipe(sparsity="2:4", **LOCAL), "pruned")
    uniprune.permute(model, Recipe(sparsity="2:4", **LOCAL), "reordered")
    uniprune.calibrate(model, Recipe(**LOCAL), "scores.safetensors")
    uniprune.mask("scores.safetensors", 0.5, "half.safetensors")
    uniprune.mask("scores.safetensors", "2:4", "masks.safetensors")
    uniprune.apply(model, "masks.safetensors", "applied")
    uniprune.sweep(model, "scores.safetensors", "sweep.json", [0.5], windows=2, length=32)
    uniprune.compare(
        model, "table", methods="magnitude", sparsities="0.5", eval_windows=2, eval_length=32, windows=8, length=32
    )
    uniprune.report(["pruned", "sweep.json"], "report.md", format="md")
    mask_tools.verify("masks.safetensors", model)
    mask_tools.diff("masks.safetensors", "half.safetensors")
    mask_tools.stats("masks.safetensors")
    mask_tools.union(["masks.safetensors", "half.safetensors"], "union.safetensors")
    mask_tools.intersect(["masks.safetensors", "half.safetensors"], "intersection.safetensors")
    mask_conversion.export_masks("masks.safetensors", "foreign.safetensors")
    mask_conversion.from_foreign("foreign.safetensors", model, "back.safetensors")
    mask_conversion.from_checkpoint("pruned", model, "found.safetensors")
    archive.pack("pruned", "pruned.upz")
    archive.unpack("pruned.upz", "again")
    assert (tmp_path / "again" / "config.json").is_file()
    assert (tmp_path / "back.safetensors").is_file()
    assert (tmp_path / "report.md").is_file()
