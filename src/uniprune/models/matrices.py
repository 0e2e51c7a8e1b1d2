"""Which weights are prunable: every matrix inside the decoder blocks, found by structure and never by family.

The decoder blocks are the outermost ``ModuleList`` that holds most of the model. Its members may differ (hybrids), and may
share weights. Embeddings, norms, biases and the output head lie outside or are not matrices, and stay dense; so do the routers
of experts. Anything unclear is an error that lists what was seen: a matrix that is skipped without a word would leave the model
unpruned without a word.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from uniprune.checkpoints.checkpoint import Files, checkpoint_of
from uniprune.checkpoints.configuration import reads_images, text_config
from uniprune.errors import InputError
from uniprune.models.experts import FusedExperts, Slice, expert_groups, fused_experts, is_fused, routers
from uniprune.models.linear import Probe, is_linear, is_transposed

# Classes of sparse attention (DeepSeek-V3.2 and V4) that choose which tokens it sees, or compress the others. They stay dense:
# the choice is not differentiable, so no gradient tells what their weights are worth.
SELECTORS = re.compile("Indexer|Compressor")
# Classes of models, as config.json names them, whose head is no language model's.
OTHER_HEADS = r"For(Sequence|Token|Image|Audio)\w*Classification$|ForQuestionAnswering$|ForMultipleChoice$|RewardModel$"
COVERAGE = 0.9  # least fraction of the blocks' parameters that must lie in matrices that we know how to prune


@dataclass(frozen=True)
class Matrix:
    """One prunable weight. ``shape`` is (out, in), also where the module stores it transposed (GPT-2's Conv1D).

    name: as the checkpoint has it. block: the index of its decoder block. transposed: whether the module stores it as
    ``[in, out]``. flipped: whether the checkpoint stores it transposed, compared with the module. read: reads it from the
    checkpoint, by name and in the checkpoint's orientation, while the module's parameter is not in memory as a whole: on the
    meta device (``streaming``), or a DTensor that is divided among processes (``sharding``). others: further modules that use
    the same weight; spans: whether one of those is in another block. group: for an expert's matrix, a name that it shares with
    the matrices at the same place in the other experts of its layer.
    """

    name: str
    module: nn.Module
    block: int
    transposed: bool
    flipped: bool = False
    read: Callable[[str], Tensor] | None = None
    others: tuple[nn.Module, ...] = ()
    spans: bool = False
    group: str | None = None

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules that multiply by the weight."""
        return (self.module, *self.others)

    @property
    def parameter(self) -> Tensor:
        """The parameter as the module stores it; of an expert, its part of the parameter."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def whole(self) -> Tensor:
        """The parameter that the weight is, or is a slice of: fused experts have one for all experts."""
        return self.module.whole if isinstance(self.module, Slice) else self.parameter

    @property
    def device(self) -> torch.device:
        return self.whole.device

    @property
    def stored(self) -> Tensor:
        """The weight in the module's orientation; read from the checkpoint if it is not in memory as a whole."""
        whole = self.whole.detach()
        if self.read and (whole.is_meta or hasattr(whole, "to_local")):  # to_local: it is a DTensor
            read = self.read(self.name)
            return read.T if self.flipped else read
        return self.parameter.detach()

    @property
    def weight(self) -> Tensor:
        """The weight as ``[out, in]``: a view of the parameter where that is in memory."""
        return self.stored.T if self.transposed else self.stored

    def part(self, whole: Tensor) -> Tensor:
        """The weight's slice, as ``[out, in]``, of a tensor that has the shape of :attr:`whole`."""
        part = self.module.part(whole) if isinstance(self.module, Slice) else whole
        return part.T if self.transposed else part

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.module.shape if isinstance(self.module, Slice) else self.parameter.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def stored_transposed(self) -> bool:
        """Whether the checkpoint has it as ``[in, out]``."""
        return self.transposed != self.flipped

    @property
    def size(self) -> int:
        rows, columns = self.shape
        return rows * columns


Matrices = dict[str, Matrix]
LeftDense = dict[str, tuple[tuple[int, ...], str]]
"""By name, the shapes of matrices that are not pruned, and why."""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks of a model, by name: the outermost list of modules that holds most parameters, of its text decoder.

    Raises InputError if there is none, or if two lists compete (an encoder-decoder model).
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    text, others = _text_decoder(model), _other_modalities(model)
    outer = {n: m for n, m in outer.items() if n.startswith(text)} or outer
    outer = {n: m for n, m in outer.items() if not n.startswith(others)} or outer
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in outer.items()}
    ranked = sorted(sizes, key=lambda name: sizes[name], reverse=True)
    if not ranked or sizes[ranked[0]] == 0:
        children = ", ".join(f"{n} ({type(m).__name__})" for n, m in model.named_children())
        raise InputError(f"{type(model).__name__} has no list of decoder blocks; its parts are: {children}")
    if len(ranked) > 1 and sizes[ranked[1]] > 0.5 * sizes[ranked[0]]:
        seen = ", ".join(f"{n} ({len(outer[n])} x {type(outer[n][0]).__name__})" for n in ranked)
        raise InputError(f"{type(model).__name__} has several lists of blocks, only decoders are supported: {seen}")
    return ranked[0], outer[ranked[0]]


def _text_decoder(model: nn.Module) -> str:
    """The prefix of names in a multimodal model's text decoder, as the model tells it; empty for models of text alone."""
    config = getattr(model, "config", None)
    if config is None or text_config(config) is config or config.is_encoder_decoder:
        return ""
    decoder = model.get_decoder()  # type: ignore[operator]
    return next((f"{name}." for name, part in model.named_modules() if part is decoder and name), "")


def _other_modalities(model: nn.Module) -> tuple[str, ...]:
    """The prefixes of names in the parts of a model that take images or sound, which may be larger than its text decoder."""
    from transformers import PreTrainedModel  # see models.linear.conv1d

    text = {"input_ids", "decoder_input_ids"}
    parts = ((name, part) for name, part in model.named_modules() if name and isinstance(part, PreTrainedModel))
    return tuple(f"{name}." for name, part in parts if part.main_input_name not in text or "text" not in part.input_modalities)


def check_decoder(model: nn.Module, instead: str) -> None:
    """Raises InputError for an encoder, by what its blocks and its configuration say, and for a model whose files are of a
    class that predicts no tokens: with tied embeddings no head is missing in them. instead: what the user can do."""
    config = getattr(model, "config", None)
    from_files = isinstance(checkpoint_of(model), Files)  # else the configuration may be of the model that it was made from
    named = list(getattr(config, "architectures", None) or ()) if from_files else [type(model).__name__]
    tied = getattr(config, "tie_word_embeddings", False)  # else tensors are missing, which is refused for any run
    if tied and named and all(re.search(OTHER_HEADS, str(name)) for name in named):
        raise InputError(f"the model is a {named[0]}, whose head predicts no tokens; {instead}")
    embeds = "gemma" in (getattr(config, "model_type", None) or "")  # others do not heed the setting
    both_ways = embeds and getattr(config, "use_bidirectional_attention", None) is True
    if not reads_images(config) and (both_ways or getattr(config, "is_causal", None) is False):  # PaliGemma: images and prompts
        raise InputError(
            f"{type(model).__name__} is an encoder: its configuration lets each token see those that follow, so it does not "
            f"predict the next; {instead}"
        )
    try:
        _, blocks = find_blocks(model)
    except InputError:
        return
    if any(getattr(module, "is_decoder", None) is False for module in blocks.modules()):
        raise InputError(
            f"{type(model).__name__} is an encoder: without a causal mask (is_decoder in config.json is false) each token sees "
            f"those that follow, so it does not predict the next; {instead}"
        )


def find_matrices(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Matrices:
    """The prunable matrices in the order of the model, by module name; a weight that modules share is listed once.

    Where the checkpoint has another name than the module, as of each fused expert, it is that one. include, exclude: regular
    expressions, searched in the names; ``exclude`` wins. Raises InputError if an expression matches none, or for a model with
    adapters.
    """
    discovered = _discover(model)
    return _select(discovered.matrices, discovered.left, include, exclude)


def choose_matrices(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Matrices:
    """As :func:`find_matrices`, for a run that is to prune them.

    Raises InputError if under 90 % of the blocks' parameters lie in matrices, unless ``include`` says which are wanted.
    """
    discovered = _discover(model)
    if discovered.too_few and not include:
        raise InputError(f"{discovered.too_few}; to prune what is in matrices and leave the rest dense, say so: --include .")
    return _select(discovered.matrices, discovered.left, include, exclude)


def left_dense(model: nn.Module) -> LeftDense:
    """The matrices in the blocks that are never pruned, with their shapes and the reasons."""
    return _discover(model).left


class Discovery(NamedTuple):
    """What the blocks of a model hold. too_few: an error message if too many of their parameters are in no known matrix."""

    matrices: Matrices
    left: LeftDense
    too_few: str | None


@contextmanager
def _without_gc() -> Iterator[None]:
    """Switches Python's garbage collector off: for a model with 40,000 matrices, it would search a million objects that all
    stay alive, and double the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_gc()
def _discover(model: nn.Module) -> Discovery:
    _check_unquantised(model)
    _check_not_accelerated(model)
    prefix, blocks = find_blocks(model)
    inside = [(f"{prefix}.{i}.{name}", i, module) for i, block in enumerate(blocks) for name, module in block.named_modules()]
    parameters = model.named_parameters(remove_duplicate=False)
    outside = {id(p): f"shared with {name}" for name, p in parameters if not name.startswith(f"{prefix}.")}
    not_linear = _not_linear(module for *_, module in inside)
    kept = {id(module): "a router" for block in blocks for module in routers(block)}
    kept |= {id(module): f"in a selector of sparse attention ({kind})" for module, kind in _in_selectors(blocks)}
    groups = {id(module): group for name, _, module in inside for module, group in expert_groups(name, module)}
    layout = checkpoint_of(model).layout(model)
    matrices: Matrices = {}
    left: LeftDense = {}
    names: dict[int, str] = {}  # id of a weight -> name of its matrix
    covered: set[int] = set()  # ids of the parameters that count as known
    for name, index, module in inside:
        if hasattr(module, "base_layer"):
            raise InputError(f"{name} has an adapter (PEFT); merge it first: model = model.merge_and_unload()")
        if is_fused(module):
            matrices |= _of_experts(fused_experts(name, module, layout.parts), index)
            covered |= {id(parameter) for parameter in module.parameters(recurse=False)}
            continue
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or not (id(module) in kept or is_linear(module)):
            continue
        if id(module) in kept or id(weight) not in not_linear:
            covered.add(id(weight))
        if id(weight) in names:
            matrices[names[id(weight)]] = _with_user(matrices[names[id(weight)]], module, index)
            continue
        part = next(iter(layout.parts(f"{name}.weight")), None)
        name = part.region.name if part else name
        why = kept.get(id(module)) or not_linear.get(id(weight)) or outside.get(id(weight))
        if why:
            left[name] = tuple(weight.shape), why
        elif part is None:
            raise InputError(f"{name}: it is not known how a checkpoint stores its weight")
        else:
            names[id(weight)] = name
            group = groups.get(id(module))
            matrices[name] = Matrix(name, module, index, is_transposed(module), part.flipped, group=group)
    return Discovery(matrices, left, _too_few(prefix, blocks, covered, not_linear))


def _not_linear(modules: Iterable[nn.Module]) -> dict[int, str]:
    """The weights (by id) of layers that are subclasses of Linear or Conv1D, but compute something else; with the reasons."""
    computes_linear = Probe()
    layers = [module for module in modules if is_linear(module) and not computes_linear(module)]
    return {id(layer.weight): f"{type(layer).__name__} does not compute x @ W.T + b" for layer in layers}


def _check_unquantised(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    for part in (config, text_config(config)) if config is not None else ():
        settings = getattr(part, "quantization_config", None) or getattr(part, "compression_config", None)
        facts = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
        if settings and not facts.get("dequantize"):
            method = facts.get("quant_method", "by an unnamed method")
            why, instead, files = "its weights are no plain matrices", "", checkpoint_of(model)
            if isinstance(files, Files):
                why = files.quantised.refused or why
                instead = ", or its folder (to be pruned as it is)," if files.quantised.understood else instead
            raise InputError(
                f"{type(model).__name__} is quantised ({getattr(method, 'value', method)}): {why}; "
                f"give the model that it was made from{instead}, or dequantise it with transformers and give it in memory: "
                "uniprune.Loaded(model, tokenizer)"
            )


def _check_not_accelerated(model: nn.Module) -> None:
    """Raises InputError for a model with layers of ``uniprune.runtime``, which this module may not import: they are marked."""
    for name, module in model.named_modules():
        if getattr(type(module), "accelerated", False):
            raise InputError(
                f"{type(model).__name__} is accelerated (uniprune.accelerate), for inference alone: {name} is a "
                f"{type(module).__name__}; give the pruned checkpoint, or a model loaded from it"
            )


def _with_user(matrix: Matrix, module: nn.Module, block: int) -> Matrix:
    """The matrix with one more module that uses its weight, in this block."""
    known = any(module is user for user in matrix.modules)
    others = matrix.others if known else (*matrix.others, module)
    return replace(matrix, others=others, spans=matrix.spans or block != matrix.block)


def _of_experts(fused: FusedExperts, block: int) -> Iterator[tuple[str, Matrix]]:
    if not fused.complete:
        raise InputError(f"{fused.name}: it is not known how a checkpoint stores the weights of {type(fused.module).__name__}")
    for name, expert in fused.slices.items():
        group = f"{fused.name}: {expert.place}"
        yield name, Matrix(name, expert, block, fused.transposed, expert.flipped, group=group)


def _in_selectors(blocks: nn.ModuleList) -> Iterator[tuple[nn.Module, str]]:
    """The linear layers inside selectors of sparse attention, with the class of the selector."""
    for selector in blocks.modules():
        if SELECTORS.search(kind := type(selector).__name__):
            yield from ((module, kind) for module in selector.modules() if is_linear(module))


def _too_few(prefix: str, blocks: nn.ModuleList, covered: set[int], not_linear: Mapping[int, str]) -> str | None:
    parameters = {id(p): (n, p) for n, p in blocks.named_parameters()}
    total = sum(p.numel() for _, p in parameters.values())
    missed = [(n, p) for key, (n, p) in parameters.items() if key not in covered]
    if sum(p.numel() for _, p in missed) <= (1 - COVERAGE) * total:
        return None
    largest = sorted(missed, key=lambda item: -item[1].numel())[:5]
    reasons = {id(p): f" ({not_linear[id(p)]})" if id(p) in not_linear else "" for _, p in largest}
    names = ", ".join(f"{prefix}.{n} {tuple(p.shape)}{reasons[id(p)]}" for n, p in largest)
    return f"under {COVERAGE:.0%} of the blocks' parameters are in matrices (Linear, Conv1D, experts); not: {names}"


def _select(matrices: Matrices, left: LeftDense, include: Sequence[str], exclude: Sequence[str]) -> Matrices:
    def matches(pattern: str, option: str) -> set[str]:
        try:
            names = {name for name in matrices if re.search(pattern, name)}
        except re.error as error:
            raise InputError(f"--{option} {pattern!r} is not a regular expression: {error}") from None
        dense = [f"{name} ({why})" for name, (_, why) in left.items() if re.search(pattern, name)]
        if not names and dense and option == "include":
            raise InputError(f"--include {pattern!r} matches only what stays dense, e.g. {dense[0]}")
        if not names and not dense:
            example = next(iter(matrices))
            raise InputError(f"--{option} {pattern!r} matches none of the {len(matrices)} matrices, e.g. {example}")
        return names

    if not matrices:
        dense = f"; what stays dense: {', '.join(f'{name} ({why})' for name, (_, why) in [*left.items()][:5])}" if left else ""
        raise InputError(f"the model's blocks have no matrix that can be pruned (Linear, Conv1D, experts){dense}")
    kept = set.union(*(matches(p, "include") for p in include)) if include else set(matrices)
    for pattern in exclude:
        kept -= matches(pattern, "exclude")
    if not kept:
        raise InputError("--include and --exclude leave no matrix to prune")
    return {name: matrix for name, matrix in matrices.items() if name in kept}
