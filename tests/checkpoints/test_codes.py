"""What codes stand for, and which quantised checkpoints are refused, with the reason."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import uniprune
from command import run
from conftest import tiny_model
from families import same_files
from quantised import FP8, LINEAR, amax, e2m1, fp8, integers, packed, quantise, scheme
from uniprune import Recipe
from uniprune.artefacts.masks import MasksFile
from uniprune.checkpoints.checkpoint import Files
from uniprune.checkpoints.origin import resolve
from uniprune.checkpoints.quantised import codes
from uniprune.data.windows import Windows, save_windows
from uniprune.errors import InputError
from uniprune.models.loading import load_weights
from uniprune.models.matrices import find_matrices
from uniprune.sparsity.bits import apply_to_codes, pack

CPU = torch.device("cpu")
LOCAL = Recipe(sparsity="2:4", controller="none", windows=4, length=32, dtype="bfloat16")


def llama(folder, write, config, family="llama", chosen=LINEAR):
    tiny_model(family).to(torch.bfloat16).save_pretrained(folder)
    quantise(folder, chosen, write, config, shard="10MB")
    return folder


def edit(folder, change):
    """Changes the tensors of a checkpoint of one file."""
    (file,) = folder.glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (codes.E4M3, None),
        (codes.INT8, [i - 256 * (i > 127) for i in range(256)]),
        (codes.OFFSET8, [i - 128 for i in range(256)]),
        (codes.OFFSET4, [i - 8 for i in range(16)]),
        (codes.E2M1, [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]),
    ],
    ids=lambda value: value.name if isinstance(value, codes.Code) else "",
)
def test_every_code_stands_for_its_value_and_one_for_zero(code, expected):
    if code is codes.E4M3:
        expected = [_e4m3(byte) for byte in range(256)]
    assert np.array_equal(code.values.numpy(), np.array(expected, np.float32), equal_nan=True)
    assert str(code.values[code.zero].item()) == "0.0"  # not -0.0
    assert code.nonzero.tolist() == [value != 0 for value in expected]
    raw = torch.arange(256, dtype=torch.uint8)
    slow = [code.values[byte >> shift & (2**code.bits - 1)] for byte in range(256) for shift in range(0, 8, code.bits)]
    assert torch.equal(code.decode(raw).nan_to_num(999), torch.stack(slow).nan_to_num(999))
    assert [expected[one] for one in code.unpack(raw.numpy())[:32]] == pytest.approx([float(v) for v in slow[:32]])


def _e4m3(byte):
    """By its definition (OCP OFP8): a sign, four bits of exponent with bias 7, three of mantissa; no infinity."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return float("nan")
    value = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if byte & 128 else value


@pytest.mark.parametrize("count", [2, 8, 14, 400])
@pytest.mark.parametrize(("width", "zero"), [(4, 0), (4, 8), (8, 0), (8, 128)])
def test_zero_is_written_for_pruned_codes_and_no_others(count, width, zero):
    generator = torch.Generator().manual_seed(count)
    given = torch.randint(0, 2**width, (count,), generator=generator).tolist()
    keep = torch.randint(0, 2, (count,), generator=generator).bool()
    expected = [code if kept else zero for code, kept in zip(given, keep.tolist(), strict=True)]

    def stored(values):
        values = values if width == 8 else [a | b << 4 for a, b in zip(values[::2], values[1::2], strict=True)]
        return np.array(values, np.uint8)

    raw = stored(given)
    apply_to_codes(raw, pack(keep).numpy(), width, zero)
    assert np.array_equal(raw, stored(expected))


@pytest.mark.parametrize("block", [(24, 20), (16, 16), (128, 128)])
def test_blocks_need_not_divide_the_shape(block, tmp_path):
    """As in DeepSeek-V3, where blocks of 128 rows lie in matrices of 576."""
    folder = llama(tmp_path, fp8(block), {**FP8, "weight_block_size": list(block)})
    tensors = load_file(folder / "model.safetensors")
    loaded = load_weights(resolve(folder), torch.float32, CPU).state_dict()
    for key, scales in tensors.items():
        if key.endswith("_scale_inv"):
            weight = tensors[key.removesuffix("_scale_inv")].float()
            rows, columns = weight.shape
            _, full = amax(weight, block)
            assert scales.shape == (-(-rows // block[0]), -(-columns // block[1]))
            assert torch.equal(loaded[key.removesuffix("_scale_inv")], weight * full(scales)), key


def test_a_part_of_a_matrix_has_its_own_scales(tmp_path):
    folder = llama(tmp_path, fp8((8, 16)), {**FP8, "weight_block_size": [8, 16]})
    entry = Files(folder).tensors["model.layers.0.mlp.up_proj.weight"]
    whole = entry.values(torch.float32, CPU)
    for start, rows in ((0, 64), (4, 9), (13, 3), (63, 1)):
        assert torch.equal(entry.part(start * 32, (rows, 32)).values(torch.float32, CPU), whole[start : start + rows])


# ---------------------------------------------------------------------------------------------------------- other writers


def modelopt_nvfp4(key, tensor):
    whole = tensor.abs().max().float() / (6 * 448)
    largest, full = amax(tensor, (1, 16))
    scale = (largest / 6 / whole).to(torch.float8_e4m3fn)
    layer = key.removesuffix("weight")
    return {
        key: packed(e2m1(tensor.float() / full(scale.float() * whole).clamp(min=1e-12))),
        f"{layer}weight_scale": scale,
        f"{layer}weight_scale_2": whole,
        f"{layer}input_scale": torch.ones(()),
    }


def modelopt_fp8(key, tensor):
    found, layer = fp8((None, None), "_scale")(key, tensor), key.removesuffix("weight")
    return {key: found[key], f"{layer}weight_scale": found[f"{key}_scale"].view(()), f"{layer}input_scale": torch.ones(())}


@pytest.mark.parametrize("write", [modelopt_nvfp4, modelopt_fp8], ids=lambda write: write.__name__)
@pytest.mark.parametrize("beside", [False, True], ids=["in config.json", "in a file of its own"])
def test_modelopts_files_are_pruned_in_place(write, beside, tmp_path, tokenizer):
    folder = llama(tmp_path / "model", write, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    if beside:
        config = json.loads((folder / "config.json").read_text())
        config.pop("quantization_config")
        (folder / "config.json").write_text(json.dumps(config))
        own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
        (folder / "hf_quant_config.json").write_text(json.dumps(own))
    tokenizer.save_pretrained(folder)
    report = uniprune.prune(folder, LOCAL, tmp_path / "out")
    assert report.model.quantised.startswith("modelopt: 21 tensors")
    masks, files, pruned = MasksFile(tmp_path / "out/pruning/masks.safetensors"), Files(folder), Files(tmp_path / "out")
    (one,), (other,) = files.shards, pruned.shards
    before, after = load_file(one), load_file(other)
    for name, mask in masks.items():
        assert np.array_equal(pruned.words(name), np.where(mask.numpy().ravel(), files.words(name), 0))
        before.pop(f"{name}.weight")
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    values = load_weights(resolve(folder), torch.float32, CPU).state_dict()
    for key, scale in before.items():
        if key.endswith("weight_scale_2"):
            layer = key.removesuffix("weight_scale_2")
            raw = load_file(one)[f"{layer}weight"]
            table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
            unpacked = table[torch.stack([raw & 15, raw >> 4], -1).flatten(-2).int()]
            scales = before[f"{layer}weight_scale"].float() * scale
            assert torch.equal(values[f"{layer}weight"], unpacked * scales.repeat_interleave(16, 1))


def test_llm_compressors_dense_output_is_a_plain_model(tmp_path, tokenizer):
    """It names no layers that are quantised, only that their zeros were made: its weights are as they are."""
    folder = tmp_path / "model"
    tiny_model().to(torch.bfloat16).save_pretrained(folder)
    plain = load_file(folder / "model.safetensors")
    sparse = {"format": "dense", "global_sparsity": 0.5, "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": []}
    config = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "sparsity_config": sparse,
        "quantization_status": "frozen",
    }
    quantise(folder, re.compile("^$"), None, config, shard="10MB")
    tokenizer.save_pretrained(folder)
    assert resolve(folder).quantised is None
    report = uniprune.prune(folder, LOCAL, tmp_path / "out")
    assert report.model.quantised is None
    masks, found = MasksFile(tmp_path / "out/pruning/masks.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for key, tensor in plain.items():
        name = key.removesuffix(".weight")
        assert torch.equal(found[key], torch.where(masks[name], tensor, 0) if name in masks.shapes else tensor)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == config
    again = uniprune.evaluate(tmp_path / "out", windows=2, length=32)
    assert again.sparsity == pytest.approx(report.sparsity, abs=0.01)


# ----------------------------------------------------------------------------------------------------------------- refused


def asymmetric(tensors):
    layer = "model.layers.1.mlp.up_proj.weight"
    return tensors | {f"{layer}_zero_point": torch.full_like(tensors[f"{layer}_packed"], 3)[:, :1].contiguous()}


def reordered(tensors):
    return tensors | {"model.layers.1.mlp.up_proj.weight_g_idx": torch.arange(32, dtype=torch.int32)}


def narrower(tensors):
    key = "model.layers.1.mlp.up_proj.weight_shape"
    return tensors | {key: torch.tensor([64, 40])}


def without_shape(tensors):
    return {key: tensor for key, tensor in tensors.items() if key != "model.layers.1.mlp.up_proj.weight_shape"}


def scales_of_others(tensors):
    key = "model.layers.1.mlp.up_proj.weight_scale"
    return tensors | {key: torch.ones(7, 5, dtype=torch.bfloat16)}


def plain(tensors):
    return {key: tensor for key, tensor in tensors.items() if "_packed" not in key and "_scale" not in key}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (asymmetric, r"asymmetric: each group of weights has a code of its own for 0 \(model\.layers\.1\.mlp\.up_proj\."),
        (reordered, r"inputs in an order of their own \(model\.layers\.1\.mlp\.up_proj\.weight_g_idx\)"),
        (narrower, r"up_proj\.weight has rows of 40 weights in 4 words, which is not 4 or 8 bits each"),
        (without_shape, r"up_proj\.weight is packed, and has no weight_shape"),
        (scales_of_others, r"up_proj\.weight is \[64, 32\] and its scales \[7, 5\], which do not go together"),
        (plain, "its files have no codes with scales"),
    ],
)
def test_where_zero_has_no_code_the_reason_is_said(change, reason, tmp_path):
    folder = llama(tmp_path / "model", integers(4, 8), scheme("pack-quantized", 4, strategy="group", group_size=8))
    edit(folder, change)
    with pytest.raises(
        InputError, match=rf"is quantised \(compressed-tensors\): .*{reason}.*give the model that it was made from"
    ):
        uniprune.plan(folder, LOCAL)


def rotated(*locations):
    """As llm-compressor says that a model has transforms."""
    apply = [{"targets": ["re:.*down_proj$"], "location": place, "inverse": False, "ignore": []} for place in locations]
    return {"transform_config": {"config_groups": {"R4": {"type": "hadamard", "apply": apply, "randomize": False}}}}


@pytest.mark.parametrize("groups", [True, False])
def test_weights_that_need_a_transform_of_their_inputs_are_refused(groups, tmp_path):
    """Scores would be of other inputs, and the model without it computes nonsense."""
    config = scheme("pack-quantized", 4, strategy="group", group_size=8) | rotated("input", "weight_input")
    config |= {} if groups else {"config_groups": {}, "format": "dense"}
    folder = llama(tmp_path / "model", integers(4, 8) if groups else lambda key, tensor: {key: tensor}, config)
    with pytest.raises(InputError, match=r"layers transform their input as it runs \(transform_config\).*give the model"):
        uniprune.plan(folder, LOCAL)


def test_transforms_that_are_in_the_weights_or_cancel_are_none(tmp_path):
    config = scheme("pack-quantized", 4, strategy="group", group_size=8)
    for name, more in {"a": {"transform_config": {}}, "b": rotated("weight_output", "k_cache", "q_attn")}.items():
        folder = llama(tmp_path / name, integers(4, 8), config | more)
        assert Files(folder).quantised.understood


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (lambda found: found | {UP: found[UP][0, 0].clone()}, {}),
        (lambda found: found | {f"{UP}_scale_inv": torch.ones(8, 4, dtype=torch.int64)}, {}),
        (lambda found: found | {f"{UP}_scale_inv": torch.ones(0, 4)}, {}),
        (lambda found: found | {f"{UP}_scale_inv": torch.ones(8, 4, 1, 1)}, {}),
        (lambda found: {key: tensor for key, tensor in found.items() if "_scale_inv" not in key}, {}),
        (lambda found: found, {"quant_method": "compressed-tensors", "config_groups": [1]}),
        (lambda found: found, {"quant_method": "compressed-tensors", "config_groups": {"a": 1}, "sparsity_config": "2:4"}),
        (lambda found: found, {"quant_method": {"a": 1}}),
    ],
)
def test_checkpoints_that_make_no_sense_are_refused(change, settings, tmp_path):
    folder = llama(tmp_path / "model", fp8((8, 8)), {**FP8, "weight_block_size": [8, 8], **settings})
    edit(folder, change)
    with pytest.raises(InputError, match=r"is quantised \(.*give the model that it was made from"):
        uniprune.plan(folder, LOCAL)


@pytest.mark.parametrize("block", [None, [0, 8], [8], "8x8", "eight", [8.0, 8.0], {"a": 1}])
def test_the_size_of_blocks_follows_from_the_scales_unless_it_is_told(block, tmp_path):
    folder = llama(tmp_path / "model", fp8((8, 8)), {**FP8, "weight_block_size": block})
    assert {tensor.block for tensor in Files(folder).quantised.tensors.values()} == {(8, 8)}


def test_a_model_that_is_refused_can_be_given_in_memory_dequantised(tmp_path):
    """As the refusal says."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = scheme("int-quantized", 8, strategy="channel", symmetric=False)
    folder = llama(tmp_path / "model", integers(8, None), config)

    def with_offsets(tensors):
        scales = {key: scale for key, scale in tensors.items() if key.endswith("_scale")}
        return tensors | {
            key.replace("scale", "zero_point"): torch.full(s.shape, 3, dtype=torch.int8) for key, s in scales.items()
        }

    edit(folder, with_offsets)
    with pytest.raises(InputError, match="asymmetric"):
        uniprune.plan(folder, LOCAL)
    plain = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", quantization_config=plain)
    text = Windows(torch.arange(64).view(2, 32), "numbers", 2, "none")
    save_windows(text, tmp_path / "tokens.safetensors")
    recipe = Recipe(sparsity="2:4", controller="none", text=str(tmp_path / "tokens.safetensors"))
    before = list(model._weight_conversions)
    uniprune.prune(uniprune.Loaded(model), recipe, tmp_path / "out")
    assert model._weight_conversions == before
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    masks = MasksFile(tmp_path / "out/pruning/masks.safetensors")
    for name, matrix in find_matrices(again).items():
        assert torch.equal(matrix.weight, torch.where(masks[name], model.get_parameter(f"{name}.weight"), 0))


def test_zero_points_that_are_all_zero_are_symmetric(tmp_path):
    folder = llama(tmp_path / "model", integers(8, None), scheme("int-quantized", 8, strategy="channel"))
    key = "model.layers.1.mlp.up_proj.weight"
    edit(folder, lambda tensors: tensors | {f"{key}_zero_point": torch.zeros(64, 1, dtype=torch.int8)})
    assert uniprune.plan(folder, LOCAL).quantised == "compressed-tensors: 21 tensors of I8 with scales"


@pytest.mark.parametrize(
    "damage",
    [
        lambda key, tensors: tensors[key].view(torch.uint8).view(-1)[7:8].fill_(127),
        lambda key, tensors: tensors[f"{key}_scale_inv"].view(-1)[1:2].fill_(torch.nan),
        lambda key, tensors: tensors[f"{key}_scale_inv"].view(-1)[1:2].fill_(torch.inf),
    ],
    ids=["code", "scale", "infinite scale"],
)
def test_codes_and_scales_that_are_not_finite_are_named(damage, tmp_path):
    folder, key = (
        llama(tmp_path / "model", fp8((8, 8)), {**FP8, "weight_block_size": [8, 8]}),
        "model.layers.1.mlp.up_proj.weight",
    )

    def change(tensors):
        damage(key, tensors)
        return tensors

    edit(folder, change)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj: the weights contain NaN or infinity"):
        Files(folder).digests(["model.layers.1.mlp.up_proj"])


def test_what_does_not_go_with_codes_says_so(tmp_path, tokenizer):
    folder = llama(tmp_path / "model", fp8((8, 8)), {**FP8, "weight_block_size": [8, 8]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"give --sparsity in place of --size"):
        uniprune.plan(folder, Recipe(size="1MB", controller="none"))
    with pytest.raises(InputError, match=r"quantised \(fp8.*permute the model that it was made from"):
        uniprune.permute(folder, Recipe(sparsity="2:4"), tmp_path / "out")
    with pytest.raises(InputError, match=r"nvidia-semi-structured.*weights of type F8_E4M3"):
        uniprune.prune(folder, Recipe(sparsity="2:4", hardware="nvidia-semi-structured"), tmp_path / "out")


def test_the_command_line_works_on_them(tmp_path, tokenizer, capsys, monkeypatch):
    """Every step says what is loaded, and records it."""
    folder, text = llama(tmp_path / "model", fp8((8, 8)), {**FP8, "weight_block_size": [8, 8]}), "--windows 4 --length 32"
    tokenizer.save_pretrained(folder)
    what = "fp8: 21 tensors of F8_E4M3 with scales"

    def command(line):
        code, printed, failed = run(capsys, monkeypatch, *line.format(m=folder, t=tmp_path, s=text).split())
        assert code == 0, failed
        return " ".join(printed.split())

    assert f"Quantised ({what}): dequantised to float32 to be scored" in command("plan {m} -s 2:4 --dtype float32")
    pruned = command("prune {m} -s 2:4 --controller none --metric wanda {s} --dtype float32 -o {t}/pruned")
    assert f"Its codes are the source's ({what})" in pruned
    command("calibrate {m} --controller none {s} --dtype float32 -o {t}/scores.safetensors")
    command("mask {t}/scores.safetensors -s 2:4 -o {t}/masks.safetensors")
    assert f"Its codes are the source's ({what})" in command("apply {m} {t}/masks.safetensors -o {t}/applied")
    assert same_files(tmp_path / "applied", tmp_path / "pruned")
    command("masks verify {t}/masks.safetensors --model {m} --pruned {t}/applied")
    assert f"Quantised ({what}): dequantised to float32." in command("evaluate {t}/applied {s} --dtype float32 --against {m}")
    recorded = json.loads((tmp_path / "pruned" / "pruning.json").read_text())["model"]
    assert (recorded["quantised"], recorded["dtype"]) == (what, "float32")
    assert what in (tmp_path / "pruned" / "README.md").read_text()
    sweep = command("sweep {m} {t}/scores.safetensors -s 0.5 {s} --dtype float32 -o {t}/sweep.json --json")
    assert json.loads(sweep)["rows"][0]["bytes"] is None
    command("pack {t}/pruned -o {t}/pruned.upz")
    command("unpack {t}/pruned.upz -o {t}/again")
    assert same_files(tmp_path / "again", tmp_path / "pruned")
    code, _, failed = run(capsys, monkeypatch, "pack", tmp_path / "pruned", "--runtime", "-o", tmp_path / "packed")
    assert (code, "which the kernel cannot multiply by" in failed) == (2, True)
