"""Quantised checkpoints whose matrices are pruned where they lie: one line a format, by the method that config.json names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uniprune.checkpoints.layout import Located
from uniprune.checkpoints.quantised import fp8, mxfp4
from uniprune.checkpoints.quantised.codes import Coded, Found, Refused
from uniprune.storage import strict_json
from uniprune.storage.outline import Outline
from uniprune.storage.safetensors_index import Entry

Config = dict[str, Any]
Format = Callable[[Config, Mapping[str, Entry]], Iterator[Found]]
CONFIGS = "quantization_config", "compression_config"  # in config.json
FORMATS: dict[str, Format] = {"fp8": fp8.find, "fbgemm_fp8": fp8.find, "mxfp4": mxfp4.find}


@dataclass(frozen=True)
class Quantised:
    """Which tensors of a checkpoint are stored as codes; of one that is not quantised, none.

    method: as config.json has it. tensors: by the key that each has as weights. parts: keys of what they are made of. refused:
    why the format is not understood; there are no tensors then, and the checkpoint is not pruned.
    """

    method: str | None = None
    tensors: dict[str, Coded] = field(default_factory=dict)
    parts: frozenset[str] = frozenset()
    refused: str | None = None

    @property
    def understood(self) -> bool:
        """Whether it is quantised, and what its codes stand for is known."""
        return self.method is not None and self.refused is None

    def turned(self, located: Located) -> Located:
        """Where parameters lie, those that the model has transposed as it has them."""

        def turn(place: Any) -> Any:
            flipped = isinstance(place, Outline) and any(self._flipped(piece.key) for piece in place.pieces)
            return place.transpose(-2, -1) if flipped else place

        return {name: turn(place) for name, place in located.items()} if any(map(self._flipped, self.tensors)) else located

    def _flipped(self, key: str) -> bool:
        return key in self.tensors and self.tensors[key].flipped

    def __str__(self) -> str:
        kinds = sorted({tensor.dtype for tensor in self.tensors.values()})
        return f"{self.method}: {len(self.tensors)} tensors of {', '.join(kinds)} with scales" if kinds else str(self.method)


def quantised(folder: Path, entries: Mapping[str, Entry]) -> Quantised:
    """The codes in the files of a folder. Raises InputError where codes and scales do not go together."""
    config = config_of(_read(folder / "config.json"))
    if config is None:
        return Quantised()
    method = str(config.get("quant_method", "by an unnamed method"))
    if method not in FORMATS:
        return Quantised(method, refused="its codes are not understood")
    try:
        found = list(FORMATS[method](config, entries))
        if not found:
            raise Refused("its files have no codes with scales")
    except Refused as error:
        return Quantised(method, refused=str(error))
    parts = frozenset(part for one in found for part in one.parts)
    return Quantised(method, {one.key: one.tensor for one in found}, parts)


def config_of(config: Any) -> Config | None:
    """What a configuration says about its quantisation: of the model, or of its text part."""
    if not isinstance(config, dict):
        return None
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            for name in CONFIGS:
                if isinstance(found := part.get(name), dict) and found:
                    return found
    return None


def plain(config: Any) -> Any:
    """transformers' configuration of a model whose weights are dequantised, in memory."""
    for part in (config, config.get_text_config()):
        for name in CONFIGS:
            if hasattr(part, name):
                delattr(part, name)
    return config


def _read(path: Path) -> Any:
    try:
        return strict_json.parse(path.read_bytes())
    except (OSError, ValueError):
        return None  # whoever needs the configuration says what is wrong with it
