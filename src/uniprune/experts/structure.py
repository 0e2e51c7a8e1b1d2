"""A model with fewer experts: how many each layer keeps, and whether transformers then computes what it did without the others.

Nothing here knows a family. transformers is asked: the model is built once more with the smaller number in its configuration,
and where its parameters are smaller is where experts are taken out. Its routers are tried on a few numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from uniprune.checkpoints.checkpoint import Files, checkpoint_of
from uniprune.checkpoints.configuration import text_config
from uniprune.checkpoints.layout import Located, keys_of, on_load
from uniprune.common.matrix_names import kind_of, split_at_block
from uniprune.errors import InputError, first_line
from uniprune.experts.criteria import best, layers_of
from uniprune.experts.files import Selection, selected, stored
from uniprune.models.experts import Batched
from uniprune.models.loading import on_meta
from uniprune.models.matrices import Matrices
from uniprune.storage import strict_json
from uniprune.storage.outline import Outline

NUMBER = re.compile(r"(?!.*(per_tok|top|shared|group|layer|capacity|freq|offset)).*experts.*")  # a setting: how many there are
HEADS = re.compile(r"num_nextn_predict_layers|(num_mtp|mtp_num)(_hidden)?_layers")  # a setting: heads for further tokens
APART = re.compile(r"(.*?\.)?(mtp|nextn)\w*\.")  # the part of a checkpoint that has such heads
BY_NUMBER = re.compile(r"experts\.\d")  # the name of an expert
TOKENS = 64  # that a router is tried on
FAR = -1e4  # weights of a router for experts that are never chosen, of inputs that are positive


@dataclass(frozen=True)
class ExpertReduction:
    """What is kept of each layer's experts. settings: of the configuration, that say how many there are; by name all names that
    config.json may have them under (Qwen3-MoE's has ``num_experts``, which transformers calls ``num_local_experts``).

    groups: experts next to each other that a token's are first narrowed down to (DeepSeek); each keeps as many. axes: of the
    parameters that have a part for each expert, by name. left_out: stored tensors of layers of experts that the model does not
    load (heads that predict several tokens): nothing scores them, and they would have another number of experts.
    """

    layers: tuple[str, ...]
    experts: int
    kept: int
    groups: int
    settings: Mapping[str, Sequence[str]]
    axes: Mapping[str, int]
    left_out: frozenset[str]

    def tensors(self, files: Files, located: Located, kept: Mapping[str, Sequence[int]]) -> dict[str, Selection]:
        """The stored tensors that remain. kept: the numbers of the experts, by layer."""
        return stored(files, self.loaded(files, located, kept))

    def loaded(self, files: Files, located: Located, kept: Mapping[str, Sequence[int]]) -> dict[str, Selection]:
        """The same as transformers loads them: codes and their scales are one tensor."""
        shapes = {key: entry.shape for key, entry in files.tensors.items() if key not in self.left_out}
        by_name = {name: next(kept[layer] for layer in kept if _is_of(layer, name)) for name in self.axes}
        return selected(shapes, located, self.axes, by_name)

    def configure(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The content of config.json for so many experts."""
        found = deepcopy(dict(config))
        text = found["text_config"] if isinstance(found.get("text_config"), dict) else found
        for name, spellings in self.settings.items():
            there = [(part, spelled) for part in (text, found) for spelled in spellings if spelled in part]
            for part, spelled in there or [(text, name)]:
                part[spelled] = self.kept
        if self.left_out:
            for part in (text, found):
                part.update((name, 0) for name, value in part.items() if HEADS.fullmatch(name) and value)
        return found


def reduction_of(fraction: float, model: nn.Module, matrices: Matrices) -> ExpertReduction:
    """What to keep of a model's experts if a fraction of them is removed: as many in each layer; floor(fraction * experts) go.

    Raises InputError if the model has none that can be removed, with the reason.
    """
    name, files, layers = type(model).__name__, checkpoint_of(model), layers_of(matrices)
    if not isinstance(files, Files):
        raise InputError(f"--experts: {name} is not in safetensors files; save it (save_pretrained) and give the folder")
    if BY_NUMBER.search(str(strict_json.parse((files.folder / "config.json").read_bytes()).get("quantization_config"))):
        raise InputError(f"--experts: config.json of {name} names single experts to be quantised, whose numbers would change")
    if not layers:
        raise InputError(f"--experts: {name} has no experts that transformers holds together; leave --experts out")
    counts = {fused.experts for fused in layers.values()}
    if len(counts) > 1:
        raise InputError(f"--experts: the layers of {name} have {sorted(counts)} experts; all must have as many")
    if any(isinstance(fused, Batched) for fused in layers.values()):
        raise InputError(f"--experts: {name} gives every expert all tokens, so its router cannot choose among fewer")
    if any(hasattr(fused.module, "identity_expert") for fused in layers.values()):
        raise InputError(f"--experts: the router of {name} also sends tokens to experts that pass them on; none can be removed")
    (experts,) = counts
    text = text_config(model.config)
    groups = getattr(text, "n_group", None) or 1
    kept = experts - groups * int(Fraction(str(fraction)) * (experts // groups))
    _check_enough(name, fraction, text, (experts, kept, groups))
    counted = [key for key, value in text.to_dict().items() if NUMBER.fullmatch(key) and value == experts]
    settings = {key: [key, *(other for other, its in text.attribute_map.items() if its == key)] for key in counted}
    small = _smaller(model, settings, kept)
    axes = _axes(name, model, small, layers)
    located = files.layout(model).located
    found = ExpertReduction(tuple(layers), experts, kept, groups, settings, axes, _left_out(files, located, axes))
    numbers = dict.fromkeys(layers, best(torch.zeros(experts), kept, groups))
    selections = found.loaded(files, located, numbers)
    shapes = {key: one.shape(files.tensors[one.key].shape) for key, one in selections.items()}
    _check_loads(name, small, files.quantised.turned(on_load(small, shapes)), axes)
    _check_routers(name, model, small, axes, numbers)
    return found


def _check_enough(name: str, fraction: float, text: Any, counts: tuple[int, int, int]) -> None:
    """Raises InputError unless something goes, and enough is left for what a token is sent to."""
    experts, kept, groups = counts
    of = f"{experts} experts in a layer of {name}" + (f", in {groups} groups" if groups > 1 else "")
    if kept == experts:
        raise InputError(f"--experts {fraction} removes none of the {of}; give at least {groups / experts:g}")
    wanted = getattr(text, "num_experts_per_tok", None) or 1
    chosen = getattr(text, "topk_group", None) or 1 if groups > 1 else 1
    least = max(-(-wanted // chosen), 2) if groups > 1 else wanted  # a group counts by its best two
    if kept // groups < least:
        each = experts // groups
        remedy = f"give at most {float(Fraction(each - least, each)):g}" if each > least else "none can go"
        raise InputError(
            f"--experts {fraction} leaves {kept} of the {of}, too few for tokens that go to {wanted} each; {remedy}"
        )


def _smaller(model: nn.Module, settings: Iterable[str], kept: int) -> nn.Module:
    """The model with fewer experts, on the meta device."""
    config: Any = deepcopy(model.config)
    for name in settings:
        setattr(text_config(config), name, kept)
    try:
        return on_meta(config)
    except Exception as error:  # a configuration that its model does not take
        raise InputError(f"--experts: {type(model).__name__} cannot have {kept} experts: {first_line(error)}") from error


def _axes(name: str, model: nn.Module, small: nn.Module, layers: Mapping[str, Any]) -> dict[str, int]:
    """Of the parameters and buffers that have a part for each expert, the axis."""
    whole, fewer = model.state_dict(), small.state_dict()
    found: dict[str, int] = {}
    for key in whole.keys() | fewer.keys():
        one, other = (tuple(state[key].shape) if key in state else () for state in (whole, fewer))
        axes = [axis for axis, (a, b) in enumerate(zip(one, other, strict=False)) if a != b]
        if one == other:
            continue
        if len(one) != len(other) or len(axes) != 1 or not any(_is_of(layer, key) for layer in layers):
            raise InputError(f"--experts: {name} with fewer experts has {key} {list(other)}, not {list(one)}: no part for each")
        found[key] = axes[0]
    missing = [layer for layer in layers if not any(key.startswith(f"{layer}.") for key in found)]
    if missing:
        raise InputError(f"--experts: no setting of {name} says how many experts {missing[0]} has")
    return found


def _is_of(layer: str, key: str) -> bool:
    """Whether a parameter is of a layer of experts, or of what stands beside it: the router."""
    return key.startswith(layer.rpartition(".")[0] + ".")


def _left_out(files: Files, located: Located, axes: Mapping[str, int]) -> frozenset[str]:
    """Stored tensors of heads that the model loads nothing of and that have experts like its own layers: DeepSeek's are layers
    after the last one (``model.layers.61.``), Qwen's lie apart (``mtp.layers.0.``, ``mtp.fc``)."""
    used = {key for place in located.values() for key in keys_of(place)}
    own = {key for name in axes if name in located for key in keys_of(located[name])}
    alike, within = {kind_of(key) for key in own}, {kind_of(key.removeprefix(_layer(key))) for key in own}
    heads = set[str]()
    for key in files.tensors.keys() - used:
        if kind_of(key) in alike:
            heads.add(_layer(key))
        elif (apart := APART.match(key)) and (kind_of(key.removeprefix(_layer(key))) in within or ".experts." in key):
            heads.add(apart[0])
    unused = tuple(head for head in heads if head and not any(key.startswith(head) for key in used))
    return frozenset(key for key in files.tensors.keys() - used if key.startswith(unused))


def _layer(key: str) -> str:
    """How the keys of a layer begin that this one is of; empty if it is of none."""
    layer, _ = split_at_block(key)
    return f"{layer}." if layer else ""


def _check_loads(name: str, small: nn.Module, located: Located, axes: Mapping[str, int]) -> None:
    """Raises InputError unless transformers finds the parameters of the smaller model where these lie."""
    state = small.state_dict()
    for key in axes:
        place = located.get(key)
        if not isinstance(place, Outline) or place.shape != tuple(state[key].shape):
            raise InputError(f"--experts: {name} would not find {key} in a checkpoint with fewer experts")


# -------------------------------------------------------------------------------------------------------------- routers


def _check_routers(
    name: str, model: nn.Module, small: nn.Module, axes: Mapping[str, int], found: Mapping[str, Sequence[int]]
) -> None:
    """Raises InputError unless routers with fewer rows do what they do with all, where the others are never chosen.

    found: by layer, the numbers of experts to try it with. One router of each class is tried.
    """
    seen: set[type] = set()
    for layer, numbers in found.items():
        beside = {key.rpartition(".")[0] for key in axes if _is_of(layer, key) and not key.startswith(f"{layer}.")}
        if not beside:
            raise InputError(f"--experts: {name} does not choose among the experts of {layer} by weights of a router")
        for path in sorted(beside):
            router, own = (
                model.get_submodule(path),
                {k.removeprefix(f"{path}."): v for k, v in axes.items() if k.startswith(f"{path}.")},
            )
            if type(router) in seen:
                continue
            seen.add(type(router))
            try:
                same = _tried(router, small.get_submodule(path), own, list(numbers))
            except Exception as error:  # it is not called with hidden states alone, or returns something else
                try:
                    same = _tried_inside(layer, (model, small), axes, list(numbers))
                except Exception:
                    raise InputError(f"--experts: the router {path} of {name} cannot be tried: {first_line(error)}") from error
            if not same:
                raise InputError(f"--experts: the router {path} of {name} chooses otherwise among fewer experts")


def _tried(router: nn.Module, small: nn.Module, axes: Mapping[str, int], numbers: list[int]) -> bool:
    def run(module: nn.Module, values: Mapping[str, Tensor], x: Tensor) -> Any:
        return _twin(module, values)(x)

    return _chooses_alike(run, router, small, axes, numbers)


def _tried_inside(layer: str, models: tuple[nn.Module, nn.Module], axes: Mapping[str, int], numbers: list[int]) -> bool:
    """The same of a router that has a part in the module around it: its bias (MiniMax-M2), or the choice itself (Hunyuan).

    That is run as a whole, but for what is beside the router.
    """
    path, _, experts = layer.rpartition(".")
    own = {k.removeprefix(f"{path}."): v for k, v in axes.items() if _is_of(layer, k) and not k.startswith(f"{layer}.")}
    parts = {name.partition(".")[0] for name in own}

    def run(module: nn.Module, values: Mapping[str, Tensor], x: Tensor) -> Any:
        seen = _Seen()
        stand_ins = {id(part): _Silent() for name, part in module.named_children() if name not in parts}
        _twin(module, values, stand_ins | {id(module.get_submodule(experts)): seen})(x[None])
        return seen.given

    one, other = (model.get_submodule(path) for model in models)
    return _chooses_alike(run, one, other, own, numbers)


class _Seen(nn.Module):
    """In the place of experts: keeps what it is given, as routers return it."""

    given: tuple[None, Tensor, Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.given = None, top_k_weights, top_k_index
        return torch.zeros_like(hidden_states)


class _Silent(nn.Module):
    """In the place of what is beside a router: nothing that it chooses by."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@torch.no_grad()
def _chooses_alike(
    run: Callable[[nn.Module, Mapping[str, Tensor], Tensor], Any],
    whole: nn.Module,
    small: nn.Module,
    axes: Mapping[str, int],
    numbers: list[int],
) -> bool:
    """Whether twins of two routers, with random numbers for parameters, choose alike for a few random tokens."""
    generator = torch.Generator().manual_seed(0)
    parts = {name.partition(".")[0] for name in axes}
    state = {name: t for name, t in whole.state_dict(keep_vars=True).items() if name.partition(".")[0] in parts}
    values = {name: torch.rand(t.shape, generator=generator) - 0.5 for name, t in state.items()}
    width = max(values[name].numel() // values[name].shape[axis] for name, axis in axes.items())
    kept, fewer = torch.tensor(numbers), dict(values)
    for name, axis in axes.items():
        fewer[name] = values[name].index_select(axis, kept)
        values[name] = torch.full_like(values[name], FAR).index_copy(axis, kept, fewer[name])
    x = torch.rand(TOKENS, width, generator=generator)
    experts = next(values[name].shape[axis] for name, axis in axes.items())
    found = _weights(run(whole, values, x), experts)
    alone = _weights(run(small, fewer, x), len(numbers))
    expected = torch.zeros_like(found).index_copy(1, kept, alone)
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def _twin(module: nn.Module, values: Mapping[str, Tensor], stand_ins: Mapping[int, nn.Module] | None = None) -> nn.Module:
    """A module with other values, also of one that has none. stand_ins: for parts of it, by their id."""
    memo: dict[int, Any] = dict(stand_ins or {})
    state = module.state_dict(keep_vars=True)
    for name in state.keys() & values.keys():
        tensor = state[name]
        memo[id(tensor)] = nn.Parameter(values[name], requires_grad=False) if isinstance(tensor, nn.Parameter) else values[name]
    twin = deepcopy(module, memo).eval()
    vars(twin).pop("forward", None)  # what reroutes it for a while is not its own
    return twin


def _weights(output: tuple[Any, Tensor, Tensor], experts: int) -> Tensor:
    """The weight of each expert for each token ``[tokens, experts]``, from what routers of transformers return."""
    _, weights, chosen = output
    return torch.zeros(TOKENS, experts).scatter(1, chosen.view(TOKENS, -1), weights.view(TOKENS, -1).float())
