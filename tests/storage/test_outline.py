"""Outlines against tensors of distinct numbers that go through the same operations."""

import numpy as np
import pytest
import torch

from uniprune.errors import InputError
from uniprune.storage.outline import Outline, Piece

SHAPES = {"a": (4, 6, 8), "b": (4, 6, 8), "c": (12, 8), "d": (12, 8)}


def numbers():
    """Distinct numbers for every element of every stored tensor."""
    found, start = {}, 0
    for key, shape in SHAPES.items():
        size = int(np.prod(shape))
        found[key] = torch.arange(start, start + size).reshape(shape)
        start += size
    return found


def assembled(outline, tensors):
    whole = torch.full(outline.shape, -1)
    for piece in outline.pieces:
        assert torch.all(whole[piece.box] == -1)  # no piece lies on top of another
        whole[piece.box] = torch.from_numpy(piece.of(tensors[piece.key].numpy().reshape(-1)).copy())
    return whole


OPERATIONS = {
    "cat": lambda a, b, c, d: torch.cat([a, b], dim=1),
    "cat of the last axis": lambda a, b, c, d: torch.cat([c, d], dim=-1),
    "stack": lambda a, b, c, d: torch.stack([c, d], dim=0),
    "stack inside": lambda a, b, c, d: torch.stack([c, d], dim=1),
    "chunk": lambda a, b, c, d: torch.chunk(c, 3, dim=0)[1],
    "an uneven chunk": lambda a, b, c, d: torch.chunk(c, 5, dim=0)[-1],
    "split": lambda a, b, c, d: torch.split(c, [2, 7, 3], dim=0)[1],
    "split evenly": lambda a, b, c, d: torch.split(c, 5, dim=0)[2],
    "transpose": lambda a, b, c, d: torch.transpose(a, dim0=1, dim1=2),
    "one expert": lambda a, b, c, d: torch.chunk(a, 4, dim=0)[2].squeeze(0),
    "nothing to squeeze": lambda a, b, c, d: a.squeeze(0),
    "all axes of one squeezed": lambda a, b, c, d: torch.chunk(a, 4, dim=0)[2].transpose(0, 1).squeeze(),
    "two axes of one squeezed": lambda a, b, c, d: c.reshape(1, 12, 1, 8).squeeze(),
    "experts fused": lambda a, b, c, d: torch.cat([torch.stack([c, d]), torch.stack([d, c])], dim=1),
    "fused, then split again": lambda a, b, c, d: torch.chunk(
        torch.cat([torch.stack([c, d]), torch.stack([d, c])], 1), 4, dim=1
    )[2],
    "fused, then transposed": lambda a, b, c, d: torch.stack([c, d]).transpose(1, 2).contiguous(),
    "rows of two interleaved": lambda a, b, c, d: c.reshape(6, 2, 8).transpose(0, 1).reshape(12, 8),
    "and back": lambda a, b, c, d: c.reshape([2, 6, 8]).transpose(0, 1).reshape([12, 8]),
    "heads in another order": lambda a, b, c, d: c.view(2, 3, 2, 8).transpose(1, 2).reshape(12, 8),
    "axes merged": lambda a, b, c, d: a.reshape(24, 8),
    "the last axis split": lambda a, b, c, d: c.reshape(12, 2, 4),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_outline_says_where_every_element_came_from(name):
    tensors = numbers()
    expected = OPERATIONS[name](*tensors.values())
    found = OPERATIONS[name](*(Outline.of(key, shape) for key, shape in SHAPES.items()))
    assert found.shape == tuple(expected.shape)
    assert torch.equal(assembled(found, tensors), expected)


@pytest.mark.parametrize("step", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("name", OPERATIONS)
def test_one_in_so_many_rows(name, step):
    tensors = numbers()
    found = OPERATIONS[name](*(Outline.of(key, shape) for key, shape in SHAPES.items())).thinned(step)
    expected = OPERATIONS[name](*tensors.values())[::step]
    assert found.shape == tuple(expected.shape)
    assert torch.equal(assembled(found, tensors), expected)


def test_interleaved_rows_are_two_views():
    found = OPERATIONS["rows of two interleaved"](*(Outline.of(key, shape) for key, shape in SHAPES.items()))
    assert [(p.offset, p.shape, p.strides, p.start) for p in found.pieces] == [
        (0, (6, 8), (16, 1), (0, 0)),
        (8, (6, 8), (16, 1), (6, 0)),
    ]


def test_what_does_more_than_move_elements_is_refused():
    outline = Outline.of("c", SHAPES["c"])
    with pytest.raises(TypeError, match="more than move"):
        torch.add(outline, outline)
    with pytest.raises(TypeError):
        outline[0]
    with pytest.raises(TypeError, match="no reshaped"):
        outline.reshape(5, 5)
    with pytest.raises(TypeError, match="at once"):
        outline.transpose(0, 1).reshape(6, 16)
    with pytest.raises(ValueError, match="values"):  # several pieces
        torch.cat([outline, outline]).reshape(12, 16)


def test_a_view_beyond_its_tensor_is_refused_not_read():
    array = np.arange(96, dtype=np.uint16)
    assert Piece("c", 0, (12, 8), (8, 1), (0, 0)).of(array).shape == (12, 8)
    for piece in (
        Piece("c", 8, (12, 8), (8, 1), (0, 0)),
        Piece("c", 0, (12, 8), (9, 1), (0, 0)),
        Piece("c", -1, (1, 1), (1, 1), (0, 0)),
    ):
        with pytest.raises(InputError, match="smaller than"):
            piece.of(array)
