"""Tiny quantised checkpoints in the formats that are published, written out here slowly. Nothing here needs uniprune."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from small_models import tiny

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
LINEAR = re.compile(r"layers\.\d+\.(?!.*(norm|mlp\.gate\.|mlp\.router))[\w.]+_proj(_with_mqa)?\.weight$")


def amax(tensor, block):
    """The largest magnitude in each block of [rows, columns], and a matrix of it that has the tensor's shape."""
    rows, columns = tensor.shape
    height, width = block[0] or rows, block[1] or columns
    padded = torch.zeros(-(-rows // height) * height, -(-columns // width) * width)
    padded[:rows, :columns] = tensor.abs().float()
    largest = padded.view(len(padded) // height, height, -1, width).amax((1, 3))
    return largest, lambda scale: scale.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]


def e2m1(values):
    """The nearest FP4 codes; some zeros are negative."""
    codes = (values.abs()[..., None] - E2M1).abs().argmin(-1)
    return (codes + 8 * torch.signbit(values)).to(torch.uint8)


def packed(codes):
    """Two codes a byte, the first in its lower half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def power_of_two(largest, top):
    """E8M0 exponents that bring the largest of a block near the top of a type."""
    return (127 + torch.log2(largest / top).ceil()).to(torch.uint8)


def fp8(block, scale="_scale_inv", dtype=torch.float32):
    """E4M3 with a scale for each block; a size of None: as large as the matrix."""

    def write(key, tensor):
        largest, full = amax(tensor, block)
        if dtype is torch.float8_e8m0fnu:
            exponents = power_of_two(largest, 448)
            stored, scales = exponents.view(dtype), torch.exp2(exponents.float() - 127)
        else:
            stored = scales = (largest / 448).to(dtype)
        codes = (tensor.float() / full(scales.float())).to(torch.float8_e4m3fn)
        return {key: codes, f"{key}{scale}": stored}

    return write


def per_tensor(key, tensor):
    """As Ministral 3 has it: a scale of no dimensions, and one of the inputs."""
    found = fp8((None, None))(key, tensor)
    return found | {
        f"{key}_scale_inv": found[f"{key}_scale_inv"].view(()),
        key.replace("weight", "activation_scale"): torch.ones(()),
    }


def fp4_experts(key, tensor):
    """As DeepSeek-V4 has it: experts of packed FP4, two a byte, beside FP8; other names of scales."""
    name = key.replace("weight", "scale")
    if ".experts." not in key:
        found = fp8((8, 8), dtype=torch.float8_e8m0fnu)(key, tensor)
        return {key: found[key], name: found[f"{key}_scale_inv"]}
    largest, full = amax(tensor, (1, 16))
    exponents = power_of_two(largest, 6)
    codes = e2m1(tensor.float() / full(torch.exp2(exponents.float() - 127)))
    return {key: packed(codes).view(torch.int8), name: exponents.view(torch.float8_e8m0fnu)}


def mxfp4(key, tensor):
    """As gpt-oss has it: experts [experts, inputs, outputs], stored by output, 32 inputs a block."""
    stored = tensor.transpose(1, 2).float().unflatten(-1, (-1, 32))
    exponents = power_of_two(stored.abs().amax(-1), 6)
    codes = e2m1(stored / torch.exp2(exponents.float() - 127)[..., None])
    return {f"{key}_blocks": packed(codes), f"{key}_scales": exponents}


def scheme(fmt, bits, kind="int", **more):
    """compressed-tensors' configuration of all Linear layers, as llm-compressor writes it."""
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, **more}
    inputs = None
    if fmt in ("int-quantized", "float-quantized"):
        inputs = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
    }


def integers(bits, group):
    """Codes from -2^(bits-1), packed into words with that added; or bytes of eight bits."""

    def write(key, tensor):
        largest, full = amax(tensor, (1, group))
        scale = (largest / (2 ** (bits - 1) - 0.5)).to(torch.bfloat16)
        codes = (tensor.float() / full(scale.float())).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int64)
        if bits == 8:
            return {key: codes.to(torch.int8), f"{key}_scale": scale}
        words = (codes + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
        return {
            f"{key}_packed": words.sum(-1).to(torch.uint32).view(torch.int32),
            f"{key}_scale": scale,
            f"{key}_shape": torch.tensor(tensor.shape),
        }

    return write


def nvfp4(key, tensor):
    """A scale in FP8 for 16 weights, on the scale of one number for the whole matrix, by which it is divided."""
    whole = 448 * 6 / tensor.abs().max().float().view(1)
    largest, full = amax(tensor, (1, 16))
    scale = (largest / 6 * whole).to(torch.float8_e4m3fn)
    codes = e2m1(tensor.float() / full(scale.float() / whole).clamp(min=1e-12))
    return {f"{key}_packed": packed(codes), f"{key}_scale": scale, f"{key}_global_scale": whole}


def mx_packed(key, tensor):
    largest, full = amax(tensor, (1, 32))
    exponents = power_of_two(largest, 6)
    return {
        f"{key}_packed": packed(e2m1(tensor.float() / full(torch.exp2(exponents.float() - 127)))),
        f"{key}_scale": exponents,
    }


# name: (family, which tensors, how one is written, quantization_config)
EXPERTS = re.compile(r"experts\.(gate_up|down)_proj$")
FORMATS = {
    "fp8": ("deepseek_v3", LINEAR, fp8((8, 8)), {**FP8, "weight_block_size": [8, 8]}),
    "fp8 per tensor": ("mistral", LINEAR, per_tensor, {**FP8, "activation_scheme": "static", "weight_block_size": None}),
    "fp8, fp4 experts": (
        "qwen3_moe",
        LINEAR,
        fp4_experts,
        {**FP8, "weight_block_size": [8, 8], "scale_fmt": "ue8m0", "expert_dtype": "fp4"},
    ),
    "compressed-tensors INT4": (
        "deepseek_v3",
        LINEAR,
        integers(4, 8),
        scheme("pack-quantized", 4, strategy="group", group_size=8),
    ),
    "compressed-tensors INT8": ("llama", LINEAR, integers(8, None), scheme("int-quantized", 8, strategy="channel")),
    "compressed-tensors FP8": (
        "llama",
        LINEAR,
        fp8((1, None), "_scale", torch.bfloat16),
        scheme("float-quantized", 8, "float", strategy="channel"),
    ),
    "compressed-tensors NVFP4": (
        "llama",
        LINEAR,
        nvfp4,
        scheme("nvfp4-pack-quantized", 4, "float", strategy="tensor_group", group_size=16),
    ),
    "compressed-tensors MXFP4": (
        "llama",
        LINEAR,
        mx_packed,
        scheme("mxfp4-pack-quantized", 4, "float", strategy="group", group_size=32),
    ),
    "mxfp4": ("gpt_oss", EXPERTS, mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
}


def save(name: str, folder: Path, shard: str = "40KB", **changes: object) -> None:
    """Writes a tiny quantised model as it is published: bfloat16 where it is not quantised, in shards."""
    family, chosen, write, config = FORMATS[name]
    tiny(family, **changes).to(torch.bfloat16).save_pretrained(folder)
    quantise(folder, chosen, write, config, shard)


def quantise(folder: Path, chosen: re.Pattern, write, config: dict, shard: str = "40KB") -> None:
    """Quantises the chosen tensors of a checkpoint of one file, and puts them all into shards."""
    whole = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(whole).items():
        tensors |= write(key, tensor) if chosen.search(key) else {key: tensor}
    whole.unlink()
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard)
    for file, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key].contiguous() for key in keys}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
