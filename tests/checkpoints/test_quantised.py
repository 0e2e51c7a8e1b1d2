"""Quantised checkpoints pruned where they lie: zero's code is written, and no other bit."""

import json

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import quantised
import uniprune
from families import same_files, tensors
from quantised import FORMATS
from small_models import VOCABULARY
from uniprune import Recipe
from uniprune.artefacts import mask_conversion, mask_tools
from uniprune.artefacts.masks import MasksFile
from uniprune.checkpoints.origin import resolve
from uniprune.checkpoints.quantised import codes
from uniprune.data.windows import Windows, save_windows
from uniprune.errors import MismatchError
from uniprune.models.loading import load_weights
from uniprune.models.matrices import find_matrices

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FORMATS)
def source(request, tmp_path_factory):
    """A quantised checkpoint."""
    folder = tmp_path_factory.mktemp("quantised") / "model"
    quantised.save(request.param, folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    ids = torch.randint(0, VOCABULARY, (9, 32), generator=torch.Generator().manual_seed(0))
    file = tmp_path_factory.mktemp("text") / "tokens.safetensors"
    save_windows(Windows(ids, "random", 9, "none"), file)
    return str(file)


@pytest.fixture(scope="module")
def pruned(source, text):
    """It pruned to 2:4."""
    output = source.parent / "pruned"
    uniprune.prune(source, Recipe(sparsity="2:4", controller="none", text=text, dtype="bfloat16"), output)
    return output


def reference(folder, dtype=torch.bfloat16):
    """The model as transformers loads it, dequantised."""
    options = {}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if config["quant_method"] == "compressed-tensors":
        pytest.importorskip("compressed_tensors")  # transformers asks for it, uniprune does not
        if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
            pytest.skip("older versions leave some weights as they are stored")
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def masked(model, masks):
    """A model whose matrices are masked as a masks file says."""
    for name, matrix in find_matrices(model).items():
        matrix.weight.mul_(masks[name])
    return model


def logits(model):
    ids = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def test_weights_are_those_that_transformers_dequantises(source):
    ours, theirs = load_weights(resolve(source), None, CPU), reference(source)
    assert not any(hasattr(part, "quantization_config") for part in (ours.config, ours.config.get_text_config()))
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def test_in_float32_a_weight_is_its_code_times_its_scale(source):
    """Not rounded to the type of the others in between."""
    exact, rounded = (load_weights(resolve(source), dtype, CPU).state_dict() for dtype in (torch.float32, torch.bfloat16))
    assert all(tensor.dtype == torch.float32 for tensor in exact.values())
    assert all(torch.equal(exact[key].to(torch.bfloat16), tensor.to(torch.bfloat16)) for key, tensor in rounded.items())


def test_pruned_weights_have_the_code_of_zero_and_nothing_else_changed(source, pruned):
    files, before, after = resolve(source).files, resolve(source).files.tensors, resolve(pruned).files.tensors
    masks = MasksFile(pruned / "pruning" / "masks.safetensors")
    seen = 0
    for name, mask in masks.items():
        keep = (mask.T if name in masks.transposed else mask).numpy().reshape(-1)
        one, other = files.words(name), resolve(pruned).files.words(name)
        entry = before[files.region(name).pieces[0].key]
        zero = entry.code.zero if isinstance(entry, codes.Coded) else 0
        seen += isinstance(entry, codes.Coded)
        assert np.array_equal(other, np.where(keep, one, zero)), name
        assert mask.reshape(len(mask), -1, 4).sum(-1).eq(2).all()
    assert seen == len(masks) or resolve(source).quantised.method == "mxfp4"  # experts alone are quantised there
    changed = {piece.key for name in masks for piece in files.region(name).pieces}
    codes_of = {part for key in changed for part in stored(before, key)}
    raw, now = tensors(source), tensors(pruned)
    assert raw.keys() == now.keys()
    for key in raw.keys() - codes_of:  # scales among them
        assert same_bytes(raw[key], now[key]), key
    assert (source / "config.json").read_bytes() == (pruned / "config.json").read_bytes()
    assert after.keys() == before.keys()


def stored(found, key):
    """The stored tensor that holds a matrix's codes, of the names that are in use."""
    return [key, f"{key}_blocks", f"{key}_packed"]


def same_bytes(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


def test_transformers_loads_the_dequantised_model_under_the_masks(source, pruned):
    masks = MasksFile(pruned / "pruning" / "masks.safetensors")
    reloaded, expected = reference(pruned), masked(reference(source), masks)
    for name, matrix in find_matrices(reloaded).items():
        assert bool((matrix.weight[~masks[name]] == 0).all()), name
        assert torch.equal(matrix.weight, find_matrices(expected)[name].weight), name
    assert torch.equal(logits(reloaded), logits(expected))


def test_perplexity_is_that_of_the_dequantised_model_under_the_masks(source, pruned, text):
    masks = MasksFile(pruned / "pruning" / "masks.safetensors")
    expected = masked(load_weights(resolve(source), torch.float32, CPU), masks)
    settings = {"text_source": text, "dtype": "float32", "windows": 2}
    found = uniprune.evaluate(pruned, **settings, against=source, new_tokens=0)
    assert found.perplexity == uniprune.evaluate(uniprune.Loaded(expected), **settings | {"dtype": None}).perplexity
    assert found.sparsity == pytest.approx(0.5, abs=0.15)  # some codes are zero anyway
    assert found.closeness.kl != 0


def test_streamed_is_resident_and_applied_masks_give_the_same_bytes(source, pruned, text, tmp_path):
    recipe = Recipe(sparsity="2:4", controller="none", text=text, dtype="bfloat16")
    uniprune.prune(source, recipe, tmp_path / "streamed", execution="streamed")
    assert same_files(tmp_path / "streamed", pruned)
    uniprune.calibrate(source, recipe, tmp_path / "scores.safetensors", execution="streamed")
    uniprune.mask(tmp_path / "scores.safetensors", "2:4", tmp_path / "masks.safetensors")
    report = uniprune.apply(source, tmp_path / "masks.safetensors", tmp_path / "applied")
    assert same_files(tmp_path / "applied", pruned)
    assert report.differs == []
    assert report.model.quantised == str(resolve(source).quantised)
    with pytest.raises(MismatchError, match="other weights in"):
        uniprune.apply(pruned, tmp_path / "masks.safetensors", tmp_path / "again")


def test_masks_are_read_and_verified(source, pruned, tmp_path):
    masks = pruned / "pruning" / "masks.safetensors"
    assert mask_tools.verify(masks, source, pruned)["checked"] == ["file", "pattern", "model", "pruned"]
    with pytest.raises(MismatchError, match="are not 0"):
        mask_tools.verify(masks, pruned=source)
    mask_conversion.from_checkpoint(pruned, source, tmp_path / "read.safetensors")
    ours, read = MasksFile(masks), MasksFile(tmp_path / "read.safetensors")
    files = resolve(source).files
    for name in ours:
        nonzero = torch.from_numpy(files.nonzero(name)).reshape(files.region(name).shape)
        assert torch.equal(read[name], ours[name] & (nonzero.T if name in ours.transposed else nonzero)), name


@pytest.mark.parametrize("source", ["fp8", "mxfp4", "compressed-tensors INT4"], indirect=True, scope="module")
def test_the_controller_runs_on_them(source, text, tmp_path):
    report = uniprune.prune(source, Recipe(sparsity=0.5, text=text, tuning={"batch_tokens": 128}), tmp_path / "out")
    assert report.controller.steps > 0
    assert report.model.quantised == str(resolve(source).quantised)
    assert report.model.dtype in ("float32", "bfloat16")
    assert mask_tools.verify(tmp_path / "out" / "pruning" / "masks.safetensors", source, tmp_path / "out")["sparsity"] == 0.5


def test_plan_says_what_is_loaded(source):
    plan = uniprune.plan(source, Recipe(sparsity="2:4", dtype="bfloat16"))
    assert plan.quantised == str(resolve(source).quantised)
    assert plan.dtype == "bfloat16"
    assert plan.fits


def test_a_model_that_transformers_dequantised_is_written_as_plain_weights(source, text, tmp_path):
    """transformers itself would save it as codes, and a configuration that says nothing of them."""
    model = reference(source)
    uniprune.prune(uniprune.Loaded(model), Recipe(sparsity="2:4", controller="none", text=text), tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    masks = MasksFile(tmp_path / "out" / "pruning" / "masks.safetensors")
    dense = find_matrices(reference(source))
    for name, matrix in find_matrices(again).items():
        assert torch.equal(matrix.weight, torch.where(masks[name], dense[name].weight, 0)), name


def test_hardware_is_asked_about_the_type_of_each_matrix(tmp_path, text):
    """gpt-oss: attention in bfloat16, for which there are kernels, and experts in FP4, for which there are none."""
    folder = tmp_path / "model"
    quantised.save("mxfp4", folder, hidden_size=64, intermediate_size=64, head_dim=32, num_attention_heads=2)
    recipe = {"controller": "none", "text": text, "dtype": "bfloat16"}
    target = {"sparsity": "2:4", "hardware": "nvidia-semi-structured", "unsupported": "dense"}
    report = uniprune.prune(folder, Recipe(**recipe, **target), tmp_path / "out")
    assert report.unsupported
    assert all(".experts." in name for name in report.unsupported)
    assert {one.sparsity for name, one in report.matrices.items() if ".experts." in name} == {0.0}
    uniprune.calibrate(folder, Recipe(**recipe), tmp_path / "scores.safetensors")
    cut = uniprune.mask(tmp_path / "scores.safetensors", output=tmp_path / "masks.safetensors", **target)
    assert cut.unsupported == report.unsupported
