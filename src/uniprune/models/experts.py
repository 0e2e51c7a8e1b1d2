"""Experts whose weights are fused into 3-D parameters: each expert's matrices as if they were Linear layers of their own.

transformers' modules of fused experts share one shape, whatever the family: parameters ``gate_up_proj`` (or ``up_proj``) and
``down_proj`` of ``[experts, out, in]``, or transposed, and a forward from hidden states, the experts of each token and their
weights. Here that forward is taken apart into one call per expert and matrix, so that whoever hooks or reroutes a Linear layer
can do the same to an expert's, and sees the tokens that were routed to it, and no others.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from uniprune.checkpoints.layout import MatrixPart
from uniprune.errors import InputError, UniPruneError
from uniprune.models.blocks import OVERFLOW, rerouted

Call = Callable[["Slice", Tensor], Tensor]


class Slice(nn.Module):
    """Some rows of one expert's matrix. Its weight is a view, whatever the parameter is at the time; it owns nothing."""

    fused: FusedExperts
    flipped: bool
    shape: tuple[int, int]
    _parameter: str
    _expert: int
    _rows: slice

    def __init__(self, fused: FusedExperts, parameter: str, part: MatrixPart) -> None:
        # Past Module.__setattr__: the fused module is no part of this one.
        vars(self).update(fused=fused, _parameter=parameter, _expert=part.expert, _rows=part.rows, flipped=part.flipped)
        rows, columns = part.region.shape
        # Of the weight, which may lie in parts in several processes.
        vars(self)["shape"] = (columns, rows) if part.flipped else (rows, columns)

    def __getattr__(self, name: str) -> Any:
        """Initialises this as an nn.Module when it is first used as one: a model can have 40,000 slices, most never run."""
        if "_parameters" not in vars(self):
            super().__init__()
            return getattr(self, name)
        return super().__getattr__(name)

    @property
    def whole(self) -> Tensor:
        """The parameter that the weight is a view of."""
        parameter: Tensor = self.fused.module._parameters[self._parameter]
        return parameter

    @property
    def expert(self) -> int:
        """The number of its expert."""
        return self._expert

    @property
    def place(self) -> str:
        """Where its weight lies in the parameter, but for the expert's number."""
        return f"{self._parameter}[{self._rows.start}:{self._rows.stop}]"

    @property
    def weight(self) -> Tensor:
        """``[rows, in]``, or ``[in, rows]`` where the module stores it transposed."""
        return self.part(self.whole)

    def part(self, whole: Tensor) -> Tensor:
        """The part of a tensor of the parameter's shape that lies where the weight does."""
        matrix = whole[self._expert]
        return matrix[:, self._rows] if self.fused.transposed else matrix[self._rows]

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.fused.module._parameters.get(f"{self._parameter}_bias")
        return None if bias is None else bias[self._expert][self._rows]

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.T if self.fused.transposed else self.weight, self.bias)


class Output(Slice):
    """An identity on an expert's output times the router's weight: a place for hooks that observe it."""

    def __init__(self, fused: FusedExperts, expert: int) -> None:
        width = fused.width
        vars(self).update(fused=fused, _parameter="down_proj", _expert=expert, flipped=False, shape=(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x


class FusedExperts:
    """A module of fused experts, taken apart.

    parts: the stored matrices of a parameter, as ``Layout.parts`` has them. slices: by the name of the matrix.
    """

    def __init__(self, name: str, module: Any, parts: Callable[[str], Iterable[MatrixPart]]) -> None:
        self.name, self.module = name, module
        self.transposed = has_inputs_first(module)
        self.first = "gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj"
        self.experts = len(module._parameters["down_proj"])
        self.slices: dict[str, Slice] = {}
        self.outputs: dict[int, Output] = {}  # of experts whose outputs are observed
        self._up: list[list[Slice]] = [[] for _ in range(self.experts)]
        self._down: list[list[Slice]] = [[] for _ in range(self.experts)]
        for parameter, into in ((self.first, self._up), ("down_proj", self._down)):
            for part in parts(f"{name}.{parameter}"):
                assert part.expert is not None
                if part.expert >= self.experts:  # of one that passes its tokens on (LongCat), and is never read
                    continue
                one = self.slices[part.region.name] = Slice(self, parameter, part)
                into[part.expert].append(one)

    @property
    def width(self) -> int:
        """Of what goes in and comes out."""
        rows, columns = self.module._parameters["down_proj"].shape[1:]
        return int(columns if self.transposed else rows)

    @property
    def complete(self) -> bool:
        """Whether it is known how the checkpoint stores them."""
        return all(self._up) and all(self._down)

    def first_of(self, module: Any) -> FusedExperts:
        """The first expert, for :meth:`run_first`, of a copy of the module."""
        twin = copy.copy(self)
        twin.module, twin._up, twin._down = module, [[]], [[]]
        for ours, theirs in ((self._up, twin._up), (self._down, twin._down)):
            for one in ours[0]:
                theirs[0].append(part := Slice.__new__(Slice))
                vars(part).update({name: vars(one)[name] for name in Slice.__annotations__} | {"fused": twin})
        return twin

    def run(self, call: Call, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the module computes, for tokens ``[tokens, width]``, through one ``call`` per expert and matrix."""
        module = self.module
        output = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            passes_on = expert >= self.experts and hasattr(module, "identity_expert")
            if expert >= self.experts and not passes_on:  # a placeholder for an expert that is computed elsewhere
                continue
            token, position = torch.where(top_k_index == expert)
            mine = hidden_states[token]
            y = mine if passes_on else self._expert(call, expert, mine, self._gated)
            if getattr(module, "has_post_expert_norm", False):
                y = module.post_expert_norm(y)
            weighted = y * top_k_weights[token, position, None]
            if expert in self.outputs:
                weighted = call(self.outputs[expert], weighted)
            output.index_add_(0, token, weighted.to(output.dtype))
        return output

    def run_first(self, call: Call, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As :meth:`run`, if each token had chosen the first expert every time: it asks for no token's choice."""
        mine = hidden_states.repeat_interleave(top_k_index.shape[-1], 0)
        y = self._expert(call, 0, mine, self._gated) * top_k_weights.reshape(-1, 1)
        return y.view(len(hidden_states), -1, y.shape[-1]).sum(1).to(hidden_states.dtype)

    def _gated(self, y: Tensor) -> Tensor:
        module = self.module
        if not getattr(module, "has_gate", self.first == "gate_up_proj"):
            gated: Tensor = module.act_fn(y)
        elif hasattr(module, "_apply_gate"):
            gated = module._apply_gate(y)
        else:
            gate, up = y.chunk(2, -1)
            gated = module.act_fn(gate) * up
        return gated

    def _expert(self, call: Call, expert: int, x: Tensor, between: Callable[[Tensor], Tensor]) -> Tensor:
        y = between(torch.cat([call(part, x) for part in self._up[expert]], -1))
        return torch.cat([call(part, y) for part in self._down[expert]], -1)


class Batched(FusedExperts):
    """Experts that are each given all tokens, ``[experts * tokens, width]``, zeros where they are not chosen (Llama 4)."""

    def run(self, call: Call, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """As :meth:`FusedExperts.run`; an expert sees the tokens that are not zeros."""
        tokens = hidden_states.view(self.experts, -1, hidden_states.shape[-1])
        output = torch.zeros_like(tokens)
        for expert, mine in enumerate(tokens):
            if len(chosen := mine.any(-1).nonzero()[:, 0]):
                output[expert, chosen] = self._expert(call, expert, mine[chosen], self._halves)
        return output.view(hidden_states.shape)

    def run_first(self, call: Call, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        return self._expert(call, 0, hidden_states, self._halves)

    def _halves(self, y: Tensor) -> Tensor:
        gate, up = y.chunk(2, -1)
        gated: Tensor = up * self.module.act_fn(gate)
        return gated


def fused_experts(name: str, module: Any, parts: Callable[[str], Iterable[MatrixPart]]) -> FusedExperts:
    """A module of fused experts, taken apart."""
    return (Batched if _arguments(module) == 1 else FusedExperts)(name, module, parts)


def is_fused(module: nn.Module) -> bool:
    """Whether a module has fused experts, and is given what transformers' are (three arguments), or Llama 4's (one).

    What they compute is compared with the module's own code when they are first run.
    """
    first = module._parameters.get("gate_up_proj", module._parameters.get("up_proj"))
    second = module._parameters.get("down_proj")
    if first is None or second is None or first.dim() != 3 or second.dim() != 3 or len(first) < len(second):
        return False
    conventional = all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "_apply_gate"))
    return conventional or (hasattr(module, "act_fn") and _arguments(module) in (1, 3))


def _arguments(module: nn.Module) -> int:
    """How many arguments a module's own forward takes; three for transformers' experts, whose forward is wrapped in another."""
    if hasattr(module, "has_gate"):
        return 3
    return len(inspect.signature(type(module).forward).parameters) - 1


def has_inputs_first(module: Any) -> bool:
    """Whether fused experts have their matrices as ``[in, out]``."""
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    gate_up, down = module._parameters.get("gate_up_proj"), module._parameters["down_proj"]
    return gate_up is not None and gate_up.shape[1:] == (down.shape[2], 2 * down.shape[1])


def expert_groups(name: str, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules inside the experts of a list of experts, each with its group: a name that is the same in all experts.

    name: of the list. Nothing is yielded for a module that is no list of experts.
    """
    if _experts_in(module):
        for expert in module.children():
            for inner, one in expert.named_modules():
                yield one, f"{name}: {inner}"


def _experts_in(module: nn.Module) -> int:
    """How many experts a module holds, if it may be one of experts; a list of equal modules may."""
    if is_fused(module):
        return len(next(p for p in module.parameters(recurse=False) if p.dim() == 3))
    return len(module) if isinstance(module, nn.ModuleList) and len(module) > 1 and len(set(map(type, module))) == 1 else 0


def routers(block: nn.Module) -> Iterator[nn.Module]:
    """The routers of a block: modules next to experts whose only matrix has an output for each expert, or a single output (the
    gate of a shared expert)."""
    for parent in block.modules():
        children = list(parent.children())
        counts = {count for child in children if (count := _experts_in(child))}
        for child in children if counts else ():
            holders = [module for module in child.modules() if getattr(module._parameters.get("weight"), "ndim", 0) == 2]
            others = [p for m in child.modules() for name, p in m._parameters.items() if p is not None and name != "weight"]
            if len(holders) != 1 or any(p.ndim > 1 and len(p) > 1 for p in others):  # a row is a bias for each expert
                continue
            if len(holders[0]._parameters["weight"]) in counts | {1}:  # type: ignore[arg-type]
                yield holders[0]


@contextmanager
def unfused(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside ``with``, the fused experts that these modules are slices of run slice by slice, as if each were a Linear.

    Modules that are no slices are left alone. Raises UniPruneError, at the first tokens, if the result is not what the fused
    module itself computes.
    """
    slices = {id(module.fused): module.fused for module in modules if isinstance(module, Slice)}
    fused = [one for one in slices.values() if not isinstance(one.module.forward, _Unfused)]  # else it is apart already
    with rerouted((one.module for one in fused), lambda index, forward: _Unfused(fused[index], forward)):
        yield


class _Unfused:
    """The forward of a module of experts that runs them one by one; at the first tokens compared with its own."""

    def __init__(self, fused: FusedExperts, own: Callable[..., Tensor]) -> None:
        self._fused, self._own, self._checked = fused, own, False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self._checked:
            self._checked = True
            self._check(*args, **kwargs)
        return self._fused.run(nn.Module.__call__, *args, **kwargs)

    @torch.no_grad()
    def _check(self, *args: Any, **kwargs: Any) -> None:
        expected = self._own(*args, **kwargs)
        if not bool(expected.isfinite().all()):
            raise InputError(f"{self._fused.name} {OVERFLOW}")
        # A part's own forward: who observes or masks the experts may have put another on the instance.
        found = self._fused.run(lambda part, x: type(part).forward(part, x), *args, **kwargs)
        if not torch.allclose(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max())):
            kind = type(self._fused.module).__name__
            raise UniPruneError(
                f"{self._fused.name}: {kind} computes something else than its experts one by one; they cannot be pruned"
            )
