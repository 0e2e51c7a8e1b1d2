"""Where a model's parameters lie in a checkpoint, found by transformers' own conversions run on outlines.

transformers renames tensors when it loads a checkpoint, and merges, splits or transposes some: experts with a key each become
one 3-D parameter. These conversions are data and operations of its own (``conversion_mapping``, ``core_model_loading``). Here
they are run on outlines (``storage.outline``) instead of weights: what comes out says where a parameter's values lie in the
files. A matrix has the name that it is stored by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn

from uniprune.errors import InputError
from uniprune.storage.outline import Outline, Piece, Shape


class Region(NamedTuple):
    """A matrix as it is stored: ``[rows, columns]``, made of views of stored tensors, almost always of one."""

    name: str
    shape: tuple[int, int]
    pieces: tuple[Piece, ...]


class MatrixPart(NamedTuple):
    """A stored matrix, and the part of a parameter that it becomes: ``rows`` (outputs) of all of it, or of one expert's matrix.

    along: the axis of the parameter's matrix that its outputs lie along. flipped: whether the parameter has it transposed.
    """

    region: Region
    parameter: str
    expert: int | None
    rows: slice
    along: int
    flipped: bool


class Layout:
    """Where the parameters of a model lie in a checkpoint whose tensors have some shapes."""

    def __init__(self, model: nn.Module, shapes: Mapping[str, Shape], located: Located) -> None:
        self.located = located
        self._shapes = shapes
        self._turned = {name for name, module in model.named_modules() if getattr(module, "is_transposed", False)}

    def parts(self, parameter: str) -> list[MatrixPart]:
        """The stored matrices of a parameter of two axes, or of three, the first the expert; none if they are unknown."""
        place = self.located.get(parameter)
        if not isinstance(place, Outline) or place.ndim not in (2, 3):
            return []
        if place.ndim == 2:
            return self._matrix(parameter, None, place.shape, place.pieces)
        experts: list[list[Piece]] = [[] for _ in range(place.shape[0])]
        for key, offset, shape, strides, start in place.pieces:
            for number in range(shape[0]):
                piece = Piece(key, offset + number * strides[0], shape[1:], strides[1:], start[1:])
                experts[start[0] + number].append(piece)
        return [
            part
            for number, pieces in enumerate(experts)
            for part in self._matrix(parameter, number, place.shape[1:], sorted(pieces, key=lambda piece: piece.start))
        ]

    def key(self, parameter: str) -> str:
        """The tensor that a parameter is stored as. Raises InputError for one that is stored in another form."""
        place = self.located.get(parameter)
        if isinstance(place, Outline) and len(place.pieces) == 1:
            key = place.pieces[0].key
            if place.pieces == Outline.of(key, self._shapes[key]).pieces:
                return key
        raise InputError(f"{parameter} is not stored as a tensor of its own, so it cannot be put in another order")

    @cached_property
    def named(self) -> dict[str, MatrixPart]:
        """All parts, by the name of the matrix."""
        return {part.region.name: part for parameter in self.located for part in self.parts(parameter)}

    def _matrix(self, parameter: str, expert: int | None, shape: Shape, pieces: list[Piece]) -> list[MatrixPart]:
        """The stored matrices that one matrix of a parameter is made of: each by its own name if each is stored as one."""
        out = int(expert is not None and parameter.rpartition(".")[0] in self._turned)
        whole = [self._whole(parameter, piece) for piece in pieces]
        alone = len(pieces) == 1
        if all(whole) and (alone or (expert is not None and all(p.shape[1 - out] == shape[1 - out] for p in pieces))):
            rows = [slice(None) if alone else slice(p.start[out], p.start[out] + p.shape[out]) for p in pieces]
            return [
                MatrixPart(stored[0], parameter, expert, part, out, stored[1])
                for stored, part in zip(whole, rows, strict=True)
                if stored
            ]
        name = parameter.removesuffix(".weight") + ("" if expert is None else f".{expert}")
        flipped = all(piece.strides[0] == 1 != piece.strides[1] for piece in pieces)
        if flipped:
            pieces = [Piece(p.key, p.offset, p.shape[::-1], p.strides[::-1], p.start[::-1]) for p in pieces]
        first, second = shape[::-1] if flipped else shape
        return [MatrixPart(Region(name, (first, second), tuple(pieces)), parameter, expert, slice(None), out, flipped)]

    def _whole(self, parameter: str, piece: Piece) -> tuple[Region, bool] | None:
        """The stored matrix that a piece is all of, and whether the parameter has it transposed; None if it is none."""
        shape = self._shapes[piece.key]
        if len(shape) not in (2, 3):
            return None
        *_, rows, columns = shape
        number, rest = divmod(piece.offset, rows * columns)
        straight = piece.shape == (rows, columns) and piece.strides == (columns, 1)
        if rest or not (straight or (piece.shape == (columns, rows) and piece.strides == (1, columns))):
            return None
        name = piece.key.removesuffix(".weight") + (f".{number}" if len(shape) == 3 else "")
        outer, _, inner = parameter.partition(".")
        first = piece.key.split(".", 2)[:2]
        if first[0] != outer and first == inner.split(".", 2)[:2]:  # stored without the outermost prefix
            name = f"{outer}.{name}"
        return Region(name, (rows, columns), (matrix_at(piece.key, number, rows, columns),)), not straight


def matrix_at(key: str, number: int, rows: int, columns: int) -> Piece:
    """The matrix of a number in a stored stack of them, or the only one."""
    return Piece(key, number * rows * columns, (rows, columns), (columns, 1), (0, 0))


# ------------------------------------------------------------------------------------------------------- transformers


class Computed:
    """A parameter that a conversion computes from stored tensors, by more than moving their elements."""

    def __init__(self, convert: Callable[[Mapping[str, Any]], dict[str, Any]], name: str, keys: list[str]) -> None:
        self._convert, self._name, self.keys = convert, name, keys

    def read(self, get: Callable[[str], Tensor]) -> Tensor:
        """The values; ``get`` reads a stored tensor."""
        parameter: Tensor = self._convert({key: get(key) for key in self.keys})[self._name]
        return parameter


Located = dict[str, "Outline | Computed"]


def keys_of(place: Outline | Computed) -> set[str]:
    """The stored tensors that a parameter is made of."""
    return set(place.keys) if isinstance(place, Computed) else {piece.key for piece in place.pieces}


def on_load(model: nn.Module, shapes: Mapping[str, Shape]) -> Located:
    """Where the values of each parameter and persistent buffer lie, when transformers loads tensors of these keys and shapes.

    What is in no tensor is missing; tensors that the model has no place for are passed over, as transformers does.
    """
    from transformers.core_model_loading import dot_natural_key

    ordered = {key: shapes[key] for key in sorted(shapes, key=dot_natural_key)}
    located = _located(model, ordered, _conversions(model, add_legacy=True))
    for shared in names_of(model).values():  # a tied parameter is stored once, by any of its names
        place = next((located[name] for name in shared if name in located), None)
        located |= {name: place for name in shared if place and name not in located}
    return located


def names_of(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its ``id``: several of a tied one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def as_saved(model: nn.Module) -> tuple[dict[str, Shape], Located]:
    """The tensors that ``save_pretrained`` would write, by key, and where each parameter and persistent buffer lies in them.

    A parameter whose conversion cannot be reversed on its own counts as saved under its own name.
    """
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    conversions = _saving(model)
    if not conversions:
        return state, {name: Outline.of(name, shape) for name, shape in state.items()}
    written = _written(model, state, conversions)
    shapes = {key: outline.shape for key, outline in written.items()}
    located = _located(model, shapes, conversions)
    for key, outline in written.items():  # renamed in a way that transformers itself does not undo
        first = outline.pieces[0].key
        if len(outline.pieces) == 1 and outline.shape == state[first]:
            located.setdefault(first, Outline.of(key, outline.shape))
    for name in state.keys() - located.keys():
        located[name] = Outline.of(name, state[name])
        shapes.setdefault(name, state[name])
    return shapes, located


def _conversions(model: nn.Module, add_legacy: bool) -> list[Any]:
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not isinstance(model, PreTrainedModel):
        return []
    conversions: list[Any] = get_model_conversion_mapping(model, add_legacy=add_legacy)
    return conversions


def _saving(model: nn.Module) -> list[Any]:
    """The conversions that ``save_pretrained`` reverses: those that loading the model needed, else those of its family.

    Of a family no prefix is put back: none but the checkpoint that has it needs it. A model that was dequantised when it was
    loaded counts as one that was not loaded.
    """
    from transformers.core_model_loading import PrefixChange

    used: list[Any] | None = getattr(model, "_weight_conversions", None)
    if used is not None and not dequantised(model):
        return used
    return [conversion for conversion in _conversions(model, add_legacy=False) if not isinstance(conversion, PrefixChange)]


def dequantised(model: nn.Module) -> bool:
    """Whether transformers dequantised a model when it loaded it; it would save it as codes, with a configuration of none."""
    operations = [
        step
        for conversion in getattr(model, "_weight_conversions", None) or ()
        for step in getattr(conversion, "operations", ())
    ]
    return any(hasattr(step, "hf_quantizer") for step in operations)


@contextmanager
def as_dequantised(model: nn.Module) -> Iterator[None]:
    """Inside ``with``, ``save_pretrained`` writes a model that was dequantised as its weights are now."""
    conversions = vars(model).pop("_weight_conversions") if dequantised(model) else None
    try:
        yield
    finally:
        if conversions is not None:
            model._weight_conversions = conversions


def _sorted(conversions: list[Any]) -> tuple[list[Any], list[Any]]:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    return renamings, [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]


def _located(model: nn.Module, shapes: Mapping[str, Shape], conversions: list[Any]) -> Located:
    """As ``convert_and_load_state_dict_in_model`` goes through the tensors of a checkpoint, in their natural order."""
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _sorted(conversions)
    state = model.state_dict()
    prefix = getattr(model, "base_model_prefix", None)
    located: Located = {}
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in shapes:
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:  # not to be renamed, but perhaps without its prefix
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name in state and pattern is not None:
            groups.setdefault(name, []).append((pattern, key))
        elif name in state:
            located.setdefault(name, Outline.of(key, shapes[key]))
    for name, members in groups.items():
        located |= {target: place for target, place in _converted(model, converters, name, members, shapes) if target in state}
    return located


def _converted(
    model: nn.Module, converters: list[Any], name: str, members: list[tuple[str, str]], shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, Outline | Computed]]:
    """The parameters that one converter makes of stored tensors."""
    converter = next(candidate for candidate in converters if members[0][0] in candidate.source_patterns)

    def convert(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return _run(model, converter, name, [(pattern, tensors[key]) for pattern, key in members])

    keys = [key for _, key in members]
    try:
        yield from convert({key: Outline.of(key, shapes[key]) for key in keys}).items()
    except Exception:  # an operation that needs the values, or fails on them too: then so does transformers
        first = converter.target_patterns[0]
        for target in converter.target_patterns:
            full = name.replace(first, target)
            yield full, Computed(convert, full, keys)


def _run(model: nn.Module, converter: Any, name: str, tensors: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """What a converter makes of tensors, each given with the pattern that its key matched."""
    own = deepcopy(converter)
    for pattern, tensor in tensors:
        own.collected_tensors[pattern].append(tensor)
    made = own.convert(name, model=model, config=getattr(model, "config", None))
    return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}


def _written(model: nn.Module, state: Mapping[str, Shape], conversions: list[Any]) -> dict[str, Outline]:
    """As ``revert_weight_conversion`` goes through a model's tensors, but for those that it fails on."""
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    renamings, converters = _sorted([conversion.reverse_transform() for conversion in conversions[::-1]])
    written: dict[str, Outline] = {}
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(state, key=dot_natural_key):
        first, pattern = rename_source_key(name, [], converters)
        if pattern is not None:
            groups.setdefault(first, []).append((pattern, name))
        else:
            written[rename_source_key(name, renamings, [])[0]] = Outline.of(name, state[name])
    for first, members in groups.items():
        converter = next(conversion for conversion in converters if members[0][0] in conversion.source_patterns)
        tensors = [(pattern, Outline.of(name, state[name])) for pattern, name in members]
        try:
            made = _run(model, converter, first, tensors)
        except Exception:  # it needs the values, or parameters that this model lacks
            made = {name: Outline.of(name, state[name]) for _, name in members}
        written |= {rename_source_key(key, renamings, [])[0]: outline for key, outline in made.items()}
    return written
