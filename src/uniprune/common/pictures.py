"""Images that go with windows of tokens, and the models that are given them.

Everything works on token ids ``[windows, length]``. What else a model needs for a window, pixels and where they stand, is
found by the window's ids when the model is called: so nothing between the data and that call knows of images. The price is that
two windows of the same ids cannot have different images: whoever makes windows leaves the second out, and says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Given = dict[str, Tensor]


def key(ids: Tensor) -> bytes:
    """What a window is found by: its token ids ``[length]``."""
    return ids.to("cpu", torch.int64).contiguous().numpy().tobytes()


@dataclass(frozen=True)
class Pictures:
    """given: by :func:`key`, what the model is called with beside a window's ids. tokens: ids that stand for an image there."""

    given: Mapping[bytes, Given]
    tokens: tuple[int, ...]

    def add_to(self, digest: hashlib._Hash, windows: Tensor) -> None:
        """Adds what windows ``[windows, length]`` are given to a hash of them."""
        for ids in windows:
            for name, value in sorted(self.given.get(key(ids), {}).items()):
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
                digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)


_SHOWN: WeakKeyDictionary[nn.Module, Pictures] = WeakKeyDictionary()


def show(model: nn.Module, pictures: Pictures | None) -> None:
    """From now on the model is given the images of these windows, or none."""
    _SHOWN.pop(model, None)
    if pictures is not None:
        _SHOWN[model] = pictures


@contextmanager
def showing(model: nn.Module, pictures: Pictures | None) -> Iterator[None]:
    """As :func:`show`, inside ``with``."""
    before = shown(model)
    show(model, pictures)
    try:
        yield
    finally:
        show(model, before)


def shown(model: nn.Module) -> Pictures | None:
    """The images that a model is given; None for one that reads text alone."""
    return _SHOWN.get(model)


def inputs_of(model: nn.Module, ids: Tensor) -> Given:
    """What a model is given with a window ``[length]``, where it computes; nothing with one that has no image."""
    given = _SHOWN[model].given.get(key(ids), {})
    dtype = next(parameter.dtype for parameter in model.parameters())
    return {name: value.to(ids.device, dtype if value.is_floating_point() else value.dtype) for name, value in given.items()}


def counted(pictures: Pictures | None, ids: Tensor) -> Tensor:
    """Which predictions of the next token count ``[windows, length]``: not those of place holders of an image's tokens."""
    tokens = torch.tensor(pictures.tokens if pictures else (), dtype=ids.dtype, device=ids.device)
    return ~torch.nn.functional.pad(torch.isin(ids[:, 1:], tokens), (0, 1))
