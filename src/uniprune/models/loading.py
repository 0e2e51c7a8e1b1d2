"""Models in memory: a checkpoint -> config, tokenizer, weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from uniprune.checkpoints import gguf_files
from uniprune.checkpoints.checkpoint import Files, bind, checkpoint_of
from uniprune.checkpoints.configuration import setting, text_config
from uniprune.checkpoints.origin import Origin, resolve
from uniprune.checkpoints.protocol import Checkpoint
from uniprune.checkpoints.quantised.formats import plain
from uniprune.checkpoints.shards import lacking
from uniprune.checkpoints.tokenizer import load_tokenizer
from uniprune.errors import InputError, UniPruneError, first_line
from uniprune.models.blocks import Residency, resident
from uniprune.models.residency.filling import fill, loaded_dtypes
from uniprune.storage.dtypes import BY_NAME, PLAIN
from uniprune.storage.outline import Outline

logger = logging.getLogger(__name__)

KINDS = ("cpu", "cuda")  # of devices


@dataclass
class Loaded:
    """A model in memory. ``origin`` is None for one that the caller built himself.

    residency: what brings a block's weights in, where not all of them are in memory (``streaming``).
    """

    model: nn.Module
    tokenizer: Any = None
    origin: Origin | None = None
    residency: Residency = resident

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise InputError(f"Loaded({self.model!r:.60}, ...) is no model; give one in memory, or uniprune.load its folder")
        inner = getattr(self.model, "_orig_mod", None)
        if isinstance(inner, nn.Module):  # torch.compile(model), which has the same weights by other names
            self.model = inner
        if self.origin:
            bind(self.model, self.origin.files)

    def __str__(self) -> str:
        return str(self.origin) if self.origin else type(self.model).__name__

    def check(self, dtype: str | None, device: str | None) -> None:
        """Raises InputError if it is to compute in another type, or elsewhere, than the caller has put it."""
        here, wanted = next(self.model.parameters()), parse_dtype(dtype)
        place = here.device if device in (None, "auto") else parse_device(device)
        same = place.type == here.device.type and (place.type == "cpu" or place.index in (None, here.device.index))
        if wanted not in (None, here.dtype) or not same:
            raise InputError(f"the model is in memory, {here.dtype} on {here.device}: convert it there, or give its folder")

    @property
    def quantised(self) -> str | None:
        """How its files store weights as codes, if they do; in memory they are dequantised."""
        return str(self.origin.quantised) if self.origin and self.origin.quantised else None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The files that it is made from, or those that it would be saved as."""
        return checkpoint_of(self.model)


Source = str | Path | Loaded
"""A model as public functions take it."""


def resolved(source: Source | Origin) -> Loaded | Origin:
    """A model in memory as it is, and of any other its files; raises as ``resolve``."""
    return source if isinstance(source, Loaded) else resolve(source)


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


def native_dtype(origin: Origin) -> torch.dtype:
    """The type that transformers loads a model in unless it is told another: its config's, else the first tensor's."""
    if origin.gguf:
        return torch.float32
    configured = getattr(_config(origin), "dtype", None)
    if isinstance(configured, torch.dtype):
        return configured
    entries = origin.files.entries.values() if origin.files else ()
    return next((PLAIN[entry.dtype] for entry in entries if entry.dtype in PLAIN), torch.float32)


def warn_of_emulation(model: nn.Module) -> None:
    """Says so if a model that somebody else loaded has a type that its CPU only emulates."""
    first = next(model.parameters())
    if fast_dtype(first.dtype, first.device) != first.dtype:
        advice = "tens of times slower than float32; load the model with dtype='float32'"
        logger.warning("this CPU only emulates %s, %s", dtype_name(first.dtype), advice)


def is_sharded(model: nn.Module) -> bool:
    """Whether this process has parts of weights alone (FSDP)."""
    wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    return wrapped or any(hasattr(parameter, "to_local") for parameter in model.parameters())


def check_one_device(model: nn.Module) -> None:
    """Raises InputError for a model that somebody else has divided among processes, spread over devices or offloaded."""
    if is_sharded(model):
        raise InputError(
            "the model is divided among processes (FSDP); give its folder instead: uniprune, started with torchrun, divides a "
            "model that does not fit by itself"
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        raise InputError(
            f"the model's parameters lie on {', '.join(devices)}; load it onto one device, without device_map, or give its "
            "folder instead: a model that does not fit is then run block by block"
        )


def dtype_name(dtype: torch.dtype | str) -> str:
    """A dtype as people spell it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


DTYPES = {dtype_name(BY_NAME[name].dtype): BY_NAME[name].dtype for name in ("F32", "BF16", "F16")}


def parse_device(name: str | None) -> torch.device:
    """A device by its name; by default CUDA where there is one."""
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is unknown; use cpu, cuda or cuda:N") from None
    if device.type not in KINDS:  # Apple's mps has no float64, which sums are in; others were never tried
        raise InputError(f"device {name!r} is not supported, only cpu and cuda are; use --device cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r}: this PyTorch sees no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise InputError(f"device {name!r}: this PyTorch sees {count} CUDA devices; use cuda:0 to cuda:{count - 1}")
    return device


def skeleton(origin: Origin) -> nn.Module:
    """The model without its weights (on the meta device): enough to see its matrices, and free of cost."""
    config = _config(origin)
    if config.is_encoder_decoder:
        raise InputError(
            f"model {origin} is an encoder-decoder ({config.model_type}); only decoders (causal models) are supported"
        )
    model: nn.Module = _guarded(origin, lambda: on_meta(config, origin.files))
    if origin.gguf:
        gguf_files.check(origin.path, model)
    bind(model, origin.files)
    return model


def model_of(source: Loaded | Origin) -> nn.Module:
    """The model in memory, or the skeleton of one that is yet to be loaded; raises as :func:`skeleton`."""
    return source.model if isinstance(source, Loaded) else skeleton(source)


def on_meta(config: Any, files: Files | None = None) -> nn.Module:
    """A model as its configuration says, and of two classes that it may have the one of its files, on the meta device."""
    kind = _kind(config, files)
    with torch.device("meta"):
        model: nn.Module = kind.from_config(config, trust_remote_code=False)
    return model


def find_names(origin: Origin, names: Collection[str]) -> list[str]:
    """Those of the names that no matrix in the files has. A few are not keys: for them the model's structure is looked at."""
    assert origin.files is not None
    if any(name not in origin.files for name in names):
        origin.files.layout(skeleton(origin))
    return [name for name in names if name not in origin.files]


def without_weights(origin: Origin, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters on the meta device, but real buffers (rotary frequencies, say): ready to be filled."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers.initialization import no_init_weights

    config = _config(origin)
    kind = _guarded(origin, lambda: _kind(config, origin.files))
    with init_empty_weights(include_buffers=False), no_init_weights():
        model: nn.Module = _guarded(origin, lambda: kind.from_config(config, dtype=dtype, trust_remote_code=False))
    for module in model.modules():  # to draw numbers for parameters on meta takes as long as all else
        module._is_hf_initialized = not module._buffers  # type: ignore[assignment]
    model.init_weights()  # type: ignore[operator]
    model.tie_weights()  # type: ignore[operator]  # what was tied while parameters went to meta is not
    bind(model, origin.files)
    if origin.files:
        _untie(model, origin.files, dtype)
    return model.eval().requires_grad_(False)


def _untie(model: nn.Module, files: Files, dtype: torch.dtype) -> None:
    """Takes apart what is tied by the configuration, but has two values in the files: transformers does not tie it, either."""
    located = files.layout(model).located
    tied: dict[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    for target, source in list(tied.items()):
        places = located.get(target), located.get(source)
        if places[0] is places[1] or not all(isinstance(place, Outline) for place in places):
            continue  # stored once
        one, other = (place.pieces[0].key for place in places if isinstance(place, Outline))
        if not files.same(one, other, dtype):
            owner, _, leaf = target.rpartition(".")
            placeholder = torch.empty_like(model.get_parameter(target), device="meta")
            model.get_submodule(owner)._parameters[leaf] = nn.Parameter(placeholder, requires_grad=False)
            del tied[target]


def _config(origin: Origin) -> Any:
    """The model's configuration. Raises InputError for one that could not be of its files."""
    from transformers import AutoConfig

    config = _guarded(origin, lambda: AutoConfig.from_pretrained(origin.folder, **origin.options()))
    layers = setting(config, "num_hidden_layers")
    entries = origin.files.entries if origin.files else {}
    if isinstance(layers, int) and entries and layers > len(entries):  # they would all be built
        raise InputError(f"model {origin}: config.json says {layers} layers, its files have fewer tensors; fetch it again")
    if origin.gguf:
        config = _guarded(origin, lambda: gguf_files.with_scaling(origin.path, config))
    return _set_aside(plain(config) if origin.files and origin.files.quantised.understood else config)


def _kind(config: Any, files: Files | None) -> Any:
    """transformers' class of models for a configuration: causal models, or, of types without one, models of images and text.

    Of a few types with both, the causal one cannot be loaded from a checkpoint of the other (Emu3): there it is the one that
    the configuration names.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kinds = [kind for kind in (AutoModelForCausalLM, AutoModelForImageTextToText) if type(config) in kind._model_mapping]
    if len(kinds) == 2 and files is not None and files.shards:
        causal, other = (kind._model_mapping[type(config)] for kind in kinds)
        if causal is not other and other.__name__ in (config.architectures or ()):
            if files not in _CAUSAL:
                _CAUSAL[files] = _has_all(files, kinds[0], config)
            return kinds[0] if _CAUSAL[files] else kinds[1]
    return kinds[0] if kinds else AutoModelForCausalLM


_CAUSAL: WeakKeyDictionary[Files, bool] = WeakKeyDictionary()  # whether a causal class can be loaded from another's files


def _has_all(files: Files, kind: Any, config: Any) -> bool:
    """Whether files have every tensor that a class of models needs."""
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=False)
    try:
        files.layout(model)
    except InputError:
        return False
    return True


def _set_aside(config: Any) -> Any:
    """A configuration, for as long as the model is in memory, without what changes no logits but what a forward pass returns.

    A model whose blocks run one by one has no router logits of all layers to add a loss from, and nobody here asks for one.
    """
    for part in (config, text_config(config)):
        for flag in ("output_router_logits", "output_hidden_states", "output_attentions"):
            if getattr(part, flag, False):
                setattr(part, flag, False)
        if not getattr(part, "return_dict", True):
            part.return_dict = True
        if getattr(part, "_attn_implementation", None) not in (None, "eager", "sdpa"):
            part._attn_implementation = None  # a package, or code from the Hub, that need not be here
    return config


def load(source: str | Path | Origin, dtype: str | None = None, device: str | None = None) -> Loaded:
    """Loads a model for inference, with its tokenizer.

    dtype: ``float32``, ``bfloat16``, ``float16``, or the checkpoint's own by default. Quantised weights are dequantised to it;
    those of a GGUF file by default to float32.
    device: ``cpu``, ``cuda``, ...; CUDA by default where there is one.
    Raises InputError if the model cannot be found, read or understood.
    """
    chosen, target = parse_dtype(dtype), parse_device(device)
    origin = resolve(source)
    return Loaded(load_weights(origin, chosen, target), load_tokenizer(origin), origin)


def load_weights(origin: Origin, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """The model in evaluation mode, without gradients. A GPU is given tensor after tensor: the host never has them all."""
    if origin.files and (origin.files.quantised.understood or device.type != "cpu"):
        return _filled(origin, dtype or native_dtype(origin), device)
    options, config = origin.options(), _config(origin)
    if origin.gguf:
        from transformers import GgufConfig

        # Without this the model keeps quantised layers, which are no matrices and cannot be saved.
        options |= {"quantization_config": GgufConfig(dequantize=True), "dtype": dtype or torch.float32, "config": config}
    else:
        options |= {"dtype": dtype or "auto", "use_safetensors": True, "config": config}
    model: nn.Module
    model, about = _guarded(
        origin,
        lambda: _kind(config, origin.files).from_pretrained(origin.folder, output_loading_info=True, **options),
    )
    if missing := sorted(about["missing_keys"]):  # they were drawn at random
        raise lacking(str(origin), model.config, missing)
    if origin.gguf:
        gguf_files.check(origin.path, model)
        # The file's free-form title would travel into every saved config as if it were a path.
        model.config.name_or_path = ""  # type: ignore[union-attr]
    model.requires_grad_(False)
    bind(model, origin.files)
    return model.eval().to(device)


def _filled(origin: Origin, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model with plain weights in any type, whatever packages and devices its own format needs."""
    from transformers import GenerationConfig

    assert origin.files is not None
    if origin.quantised:
        logger.info("model %s is quantised (%s); it is dequantised to %s", origin, origin.quantised, dtype_name(dtype))
    model = without_weights(origin, dtype)
    fill(model, origin.files, loaded_dtypes(model, dtype), device)
    if (origin.folder / "generation_config.json").is_file():
        model.generation_config = _guarded(origin, lambda: GenerationConfig.from_pretrained(origin.folder))
    return model


def _guarded(origin: Origin, load: Callable[[], Any]) -> Any:
    """Turns the many ways in which transformers refuses a checkpoint into one error that names the model."""
    try:
        return load()
    except ImportError as error:
        if origin.gguf:
            raise InputError(f"model {origin}: reading GGUF needs the gguf package; pip install gguf") from error
        why = " ".join(str(error).split())[:300]  # its last lines say what to install
        raise InputError(f"model {origin} needs a package that is not installed: {why}") from error
    except UniPruneError:
        raise
    except Exception as error:  # a configuration or a file that makes no sense fails in many ways, far from where it is read
        if "trust_remote_code" in str(error):
            raise InputError(
                f"model {origin} needs its own code (auto_map), which is never run; give one that transformers has a class for"
            ) from error
        if "ignore_mismatched_sizes" in str(error) and origin.files:
            origin.files.layout(skeleton(origin))  # whose error says which sizes
        raise InputError(f"model {origin} cannot be loaded: {type(error).__name__}: {first_line(error)}"[:500]) from error
