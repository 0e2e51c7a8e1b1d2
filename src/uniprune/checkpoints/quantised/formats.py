"""Quantised checkpoints whose matrices are pruned where they lie: one line a format, by the method that config.json names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uniprune.checkpoints.configuration import text_config
from uniprune.checkpoints.layout import Located
from uniprune.checkpoints.quantised import compressed_tensors, fp8, modelopt, mxfp4
from uniprune.checkpoints.quantised.codes import Coded, Found, Refused
from uniprune.errors import first_line
from uniprune.storage import strict_json
from uniprune.storage.outline import Outline
from uniprune.storage.safetensors_index import Entry

Config = dict[str, Any]
Format = Callable[[Config, Mapping[str, Entry]], Iterator[Found]]
CONFIGS = "quantization_config", "compression_config", "quantization"
FORMATS: dict[str, Format] = {
    "fp8": fp8.find,
    "fbgemm_fp8": fp8.find,
    "mxfp4": mxfp4.find,
    "compressed-tensors": compressed_tensors.find,
    "modelopt": modelopt.find,
}


@dataclass(frozen=True)
class Quantised:
    """Which tensors of a checkpoint are stored as codes.

    method: as config.json has it; None of a model that is not quantised. tensors: by the key that each has as weights; none
    where the method quantises no layer. parts: of each the keys that it is stored under. refused: why they are not understood.
    """

    method: str | None = None
    tensors: dict[str, Coded] = field(default_factory=dict)
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refused: str | None = None

    @property
    def understood(self) -> bool:
        """Whether config.json says that it is quantised, and it is known what its weights are."""
        return self.method is not None and self.refused is None

    def turned(self, located: Located) -> Located:
        """Where parameters lie, those that the model has transposed as it has them."""
        flipped = {key for key, tensor in self.tensors.items() if tensor.flipped}

        def turn(place: Any) -> Any:
            inside = isinstance(place, Outline) and any(piece.key in flipped for piece in place.pieces)
            return place.transpose(-2, -1) if inside else place

        return {name: turn(place) for name, place in located.items()} if flipped else located

    def __str__(self) -> str:
        kinds = sorted({tensor.dtype for tensor in self.tensors.values()})
        return f"{self.method}: {len(self.tensors)} tensors of {', '.join(kinds)} with scales"


def quantised(folder: Path, entries: Mapping[str, Entry]) -> Quantised:
    """What is stored as codes in the files of a folder."""
    config = _read(folder)
    if config is None:
        return Quantised()
    method = str(config.get("quant_method", "by an unnamed method"))
    if method not in FORMATS:
        return Quantised(method, refused="its weights are no plain matrices, and what its codes stand for is not known")
    try:
        found = list(FORMATS[method](config, entries))
        if not found and not (method == "compressed-tensors" and compressed_tensors.is_dense(config)):
            raise Refused("but its files have no codes with scales")
    except Refused as error:
        return Quantised(method, refused=str(error))
    except (AttributeError, TypeError, ValueError, LookupError, ArithmeticError) as error:  # others than what is expected there
        return Quantised(method, refused=f"what its configuration says of it makes no sense ({first_line(error)})")
    parts = {one.key: tuple(sorted(part for part in one.parts if part in entries)) for one in found}
    return Quantised(method, {one.key: one.tensor for one in found}, parts)


def packed_by(entries: Mapping[str, Entry]) -> str | None:
    """What shows that matrices are packed into integers though config.json does not say so; None if nothing does.

    GPTQ and AWQ once kept their settings in a file of their own; MLX has its weights as unsigned integers beside scales.
    """
    for key, entry in entries.items():
        if key.endswith((".qweight", ".qzeros")):
            return f"it has {key}, as GPTQ and AWQ store weights"
        if key.endswith(".weight") and entry.dtype == "U32" and f"{key.removesuffix('weight')}scales" in entries:
            return f"{key} is packed into integers of 32 bits, as MLX stores weights"
    return None


def _read(folder: Path) -> Config | None:
    """What the configuration of a model, or of its text part, says about quantisation; or a file of ModelOpt's own."""
    for name in ("config.json", "hf_quant_config.json"):
        try:
            content: Any = strict_json.parse((folder / name).read_bytes())
            for part in (content, content.get("text_config")):
                for place in CONFIGS if isinstance(part, dict) else ():
                    if isinstance(found := part.get(place), dict) and found:
                        return {"quant_method": _unnamed(found)} | found if place == "quantization" else found
        except (OSError, ValueError, AttributeError):
            continue  # whoever needs the configuration says what is wrong with it
    return None


def _unnamed(config: Config) -> str:
    """The method of settings that do not name it, ``quantization``: MLX's have bits and a group's size, ModelOpt's others."""
    return "mlx" if "bits" in config and "group_size" in config else "modelopt"


def plain(config: Any) -> Any:
    """transformers' configuration of a model whose weights are dequantised, in memory."""
    for part in (config, text_config(config)):
        for name in CONFIGS:
            if hasattr(part, name):
                delattr(part, name)
    return config
