"""Models by name: a Hugging Face folder, a hub name or a GGUF file -> config, tokenizer, weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uniprune.errors import InputError, first_line
from uniprune.executor import Residency, resident

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_FILES = ["README.md", "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Origin:
    """Where a model lies on this machine. ``gguf`` is the file's name inside ``folder``, or None for a Hugging Face folder."""

    name: str
    folder: Path
    gguf: str | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def shards(self) -> list[Path]:
        """The safetensors files that transformers loads the weights from; empty for other formats.

        Some repositories carry the weights a second time in another layout; those files are not part of the model.
        """
        if self.gguf:
            return []
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            return sorted({self.folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        single = self.folder / "model.safetensors"
        return [single] if single.is_file() else sorted(self.folder.glob("*.safetensors"))

    def options(self) -> dict[str, Any]:
        """Keyword arguments for every ``from_pretrained`` of this model."""
        return {"gguf_file": self.gguf} if self.gguf else {}


@dataclass
class Loaded:
    """A model in memory. ``origin`` is None for one that the caller built himself.

    residency: what brings a block's weights in, where not all of them are in memory (``streaming``).
    """

    model: nn.Module
    tokenizer: Any = None
    origin: Origin | None = None
    residency: Residency = resident

    def __str__(self) -> str:
        return str(self.origin) if self.origin else type(self.model).__name__


def resolve(source: str | Path) -> Origin:
    """Finds a model: a folder, a .gguf file, or a hub name (from the cache if it is there, else downloaded).

    Raises InputError that says what was tried.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"model {source} is a file, but not a .gguf one; give the folder it is in")
        return Origin(str(source), path.parent, path.name)
    folder = path if path.is_dir() else _from_hub(str(source))
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"model {source} is an adapter (PEFT), or has one; merge it (merge_and_unload, save_pretrained) first")
    if not (folder / "config.json").is_file():
        raise InputError(f"model folder {source} has no config.json; give the folder of a Hugging Face checkpoint")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise InputError(f"model folder {source} has no weights (.safetensors or .bin)")
    return Origin(str(source), folder)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        # Not a hub name ("owner/model"), so it was meant as a path.
        raise InputError(f"model {name!r} does not exist here, and is not a hub name of the form owner/model")
    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, "*.bin"]))
    except Exception as error:  # the hub client's errors have no base class short of this
        reason = first_line(error)
        raise InputError(f"model {name!r} is no folder here and cannot be had from the hub: {reason}") from error
    return folder


def parse_dtype(name: str | None) -> torch.dtype | None:
    """A dtype by its name, or None for the checkpoint's own."""
    if name is None or name == "auto":
        return None
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is unknown; use one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def fast_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type to compute in unless another is asked for: the stored one, but float32 on a CPU that only emulates it.

    On such a one (AVX2, no AVX-512) a product in bfloat16 took 30 times as long. float32 holds the same weights exactly.
    """
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if device.type != "cpu" or stored not in supported:
        return stored
    try:
        return stored if getattr(torch.ops.mkldnn, supported[stored])() else torch.float32
    except (AttributeError, RuntimeError):  # PyTorch was built without these kernels
        return torch.float32


def dtype_name(dtype: torch.dtype | str) -> str:
    """A dtype as people spell it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def parse_device(name: str | None) -> torch.device:
    """A device by its name; by default CUDA where there is one."""
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is unknown; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r}: this PyTorch sees no CUDA device; use --device cpu")
    return device


def skeleton(origin: Origin) -> nn.Module:
    """The model without its weights (on the meta device): enough to see its matrices, and free of cost."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _guarded(origin, lambda: AutoConfig.from_pretrained(origin.folder, **origin.options()))
    if config.is_encoder_decoder:
        raise InputError(
            f"model {origin} is an encoder-decoder ({config.model_type}); only decoders (causal models) are supported"
        )
    with torch.device("meta"):
        model: nn.Module = _guarded(origin, lambda: AutoModelForCausalLM.from_config(config))
    return model


def hollow(origin: Origin, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters on the meta device, but real buffers (rotary frequencies, say): ready to be filled."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _guarded(origin, lambda: AutoConfig.from_pretrained(origin.folder))
    with init_empty_weights(include_buffers=False):
        model: nn.Module = _guarded(origin, lambda: AutoModelForCausalLM.from_config(config, dtype=dtype))
    model.tie_weights()  # type: ignore[operator]  # what was tied while parameters were being swapped for hollow ones is not
    return model.eval().requires_grad_(False)


def load_tokenizer(origin: Origin) -> Any:
    """The model's tokenizer, or None if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(origin.folder, **origin.options())
    except (OSError, ValueError, KeyError, ImportError) as error:
        logger.warning("model %s has no usable tokenizer (%s)", origin, first_line(error))
        return None


def load(source: str | Path | Origin, dtype: str | None = None, device: str | None = None) -> Loaded:
    """Loads a model for inference, with its tokenizer.

    dtype: ``float32``, ``bfloat16``, ``float16``, or the checkpoint's own by default. The quantised weights of a GGUF file
    are dequantised, to float32 by default.
    device: ``cpu``, ``cuda``, ...; CUDA by default where there is one.
    Raises InputError if the model cannot be found, read or understood.
    """
    chosen, place = parse_dtype(dtype), parse_device(device)
    origin = source if isinstance(source, Origin) else resolve(source)
    return Loaded(load_weights(origin, chosen, place), load_tokenizer(origin), origin)


def load_weights(origin: Origin, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """The model in evaluation mode, without gradients."""
    from transformers import AutoModelForCausalLM

    options = origin.options()
    if origin.gguf:
        from transformers import GgufConfig

        # Without this the model keeps quantised layers, which are no matrices and cannot be saved.
        options |= {"quantization_config": GgufConfig(dequantize=True), "dtype": dtype or torch.float32}
    else:
        options["dtype"] = dtype or "auto"
    model: nn.Module = _guarded(origin, lambda: AutoModelForCausalLM.from_pretrained(origin.folder, **options))
    if origin.gguf:
        # The file's free-form title would travel into every saved config as if it were a path.
        model.config.name_or_path = ""  # type: ignore[union-attr]
    model.requires_grad_(False)
    return model.eval().to(device)


def _guarded(origin: Origin, load: Callable[[], Any]) -> Any:
    """Turns the many ways in which transformers refuses a checkpoint into one error that names the model."""
    try:
        return load()
    except ImportError as error:
        if origin.gguf:
            raise InputError(f"model {origin}: reading GGUF needs the gguf package; pip install 'uniprune[gguf]'") from error
        raise InputError(f"model {origin} needs a package that is not installed: {first_line(error)}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"model {origin} cannot be loaded: {first_line(error)}") from error
