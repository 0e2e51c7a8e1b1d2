"""Channel permutation: the dense function stays, N:M keeps more, and what cannot be proved is left alone."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from small_models import random_model
from uniprune.errors import InputError
from uniprune.models import masking
from uniprune.models.channels.folding import fold, folding, reorder
from uniprune.models.channels.hidden import candidates_of, find_hidden
from uniprune.models.channels.trial import harmless_alone
from uniprune.models.matrices import find_matrices
from uniprune.sparsity import channel_order
from uniprune.sparsity.channel_order import kept, search
from uniprune.sparsity.patterns.nm import NM
from uniprune.storage.safetensors_index import entries

FAMILIES = {  # family: consumer, how many parameters have the channels, parts
    "llama": ("mlp.down_proj", 3, 1),
    "gpt2": ("mlp.c_proj", 3, 1),
    "opt": ("fc2", 3, 1),
    "gpt_neox": ("mlp.dense_4h_to_h", 3, 1),
    "phi3": ("mlp.down_proj", 2, 2),
    "gemma2": ("mlp.down_proj", 3, 1),
    "bloom": ("mlp.dense_4h_to_h", 3, 1),
}
TOKENS = torch.arange(40).reshape(2, 20)


def shuffles(found):
    generator = torch.Generator().manual_seed(1)
    return [(channels, torch.randperm(channels.size, generator=generator)) for channels in found]


def logits(model):
    return model(input_ids=TOKENS).logits


def meets(mask, n, m):
    return bool((mask.reshape(-1, m).sum(1) == n).all())


# ------------------------------------------------------------------------------------------------------------- channels


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_leaves_the_dense_function_as_it_is(family):
    model = random_model(family)
    found = find_hidden(model, find_matrices(model))
    consumer, parameters, parts = FAMILIES[family]
    assert [channels.consumers[0].split(f".{index}.")[1] for index, channels in enumerate(found)] == [consumer] * 2
    assert all(len(channels.axes) == parameters and channels.axes[0].repeats == parts for channels in found)
    before, weights = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    fold(model, shuffles(found))
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    assert moved == {name for channels in found for name, *_ in channels.axes}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weights_are_needed_to_find_hidden(family):
    model = random_model(family)
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(model.config)
    assert find_hidden(hollow, find_matrices(hollow)) == find_hidden(model, find_matrices(model))


def test_excluded_consumers_are_left_and_excluded_producers_go_along():
    model = random_model("llama")
    assert find_hidden(model, find_matrices(model, exclude=["down_proj"])) == []
    found = find_hidden(model, find_matrices(model, exclude=["up_proj", r"layers\.1"]))
    assert [channels.consumers for channels in found] == [("model.layers.0.mlp.down_proj",)]
    assert [axis.parameter for axis in found[0].axes] == [
        f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    ]


def test_a_weight_that_two_modules_share_is_left():
    model = random_model("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    assert find_hidden(model, find_matrices(model)) == []


class Gated(nn.Module):
    """What is done between the producers and the consumer is the test's matter."""

    def __init__(self, between, hidden=24, width=16, fused=1):
        super().__init__()
        self.left = nn.Linear(width, fused * hidden)
        self.right = nn.Linear(width, fused * hidden)
        self.out = nn.Linear(hidden, width)
        self.between = between

    def forward(self, x):
        return self.out(self.between(self.left(x), self.right(x)))


class ConsumerFirst(nn.Module):
    """Its matrices are declared in another order than they are called in."""

    def __init__(self):
        super().__init__()
        self.out, self.left, self.right = nn.Linear(24, 16), nn.Linear(16, 24), nn.Linear(16, 24)

    def forward(self, x):
        return self.out(functional.silu(self.left(x)) * self.right(x))


class Attention(nn.Module):
    """Grouped-query attention whose inner width is not the model's, callable without further arguments."""

    def __init__(self, heads, groups, size, width=16):
        super().__init__()
        self.heads, self.groups = heads, groups
        self.q, self.o = nn.Linear(width, heads * size), nn.Linear(heads * size, width)
        self.k, self.v = nn.Linear(width, groups * size), nn.Linear(width, groups * size)

    def forward(self, x):
        def split(y, heads):
            return y.unflatten(-1, (heads, -1)).transpose(1, 2)

        q, k, v = split(self.q(x), self.heads), split(self.k(x), self.groups), split(self.v(x), self.groups)
        return self.o(functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


class Normed(nn.Module):
    """A norm across the hidden channels, whose weights are all 1 as in every fresh model."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)
        self.norm = nn.RMSNorm(24)

    def forward(self, x):
        return self.down(self.norm(self.up(x).relu()))


def channels_of(module):
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleDict({"part": module})])
    return find_hidden(model, find_matrices(model))


def test_only_what_is_proved_is_taken():
    def product(a, b):
        return functional.silu(a) * b

    assert [channels.consumers for channels in channels_of(Gated(product))] == [("blocks.0.part.out",)]
    stacked = channels_of(Gated(lambda a, b: product(*a.chunk(2, -1)) + b.chunk(2, -1)[0], fused=2))
    assert [channels.axes[0].repeats for channels in stacked] == [2]
    assert not channels_of(Gated(lambda a, b: a[..., ::2] * a[..., 1::2] + b[..., ::2], fused=2))  # gate and up in turns
    assert not channels_of(Gated(lambda a, b: a * b.roll(1, -1)))
    assert not channels_of(Gated(lambda a, b: a.softmax(-1) * torch.linspace(0, 1, 24)))
    assert not channels_of(Gated(lambda a, b: 0 * a))  # runs, but says nothing about the channels
    assert not channels_of(Gated(product, hidden=16))  # which is the consumer?
    assert not channels_of(Normed())
    assert [channels.consumers for channels in channels_of(ConsumerFirst())] == [("blocks.0.part.out",)]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (2, 1)])
def test_attention_is_not_taken(heads, groups):
    assert not channels_of(Attention(heads, groups, 12))
    model = random_model("qwen3")
    assert all(".mlp." in channels.consumers[0] for channels in find_hidden(model, find_matrices(model)))


def test_heads_that_share_a_shape_with_an_mlp_are_refuted_by_running_them():
    attention = Attention(4, 4, 12)
    members = list(find_matrices(nn.ModuleDict({"blocks": nn.ModuleList([attention])})).values())
    (candidate,) = candidates_of(members)
    assert candidate.consumers == ("o",)
    assert not harmless_alone(attention, candidate)


# --------------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (4, 4)])
def test_search_is_never_worse_than_the_identity(n, m):
    for seed in range(5):
        scores = torch.randn(10, 48, generator=torch.Generator().manual_seed(seed))  # duals have any sign
        order = search(scores, n, m)
        assert torch.equal(order.sort().values, torch.arange(48))
        assert torch.equal(order, search(scores, n, m))
        assert kept(scores, n, m, order) > kept(scores, n, m) or torch.equal(order, torch.arange(48))


def test_search_spreads_columns_that_are_large_together():
    scores = torch.rand(32, 64) + 10 * (torch.arange(64) // 4 % 2)
    order = search(scores, 2, 4)
    assert kept(scores, 2, 4, order) > 0.999 * scores[:, scores[0] > 5].sum()
    assert torch.equal(search(scores[:, order], 2, 4), torch.arange(64))  # nothing is better than this


def test_search_finds_most_of_what_there_is_to_gain():
    """Against all 35 ways to make two groups of eight columns."""
    gained = best = 0.0
    for seed in range(20):
        scores = torch.rand(6, 8, generator=torch.Generator().manual_seed(seed))
        every = [torch.tensor([0, *p, *(set(range(1, 8)) - set(p))]) for p in permutations(range(1, 8), 3) if [*p] == sorted(p)]
        assert len(every) == 35
        gained += kept(scores, 2, 4, search(scores, 2, 4, sweeps=8)) - kept(scores, 2, 4)
        best += max(kept(scores, 2, 4, order) for order in every) - kept(scores, 2, 4)
    assert gained > 0.95 * best


def test_columns_are_dealt_back_and_forth():
    scores = torch.tensor([5.0, 8.0, 1.0, 7.0, 6.0, 2.0, 4.0, 3.0]).repeat(3, 1)
    assert [sorted(scores[0, group].tolist()) for group in channel_order._dealt(scores, 4).reshape(2, 4)] == [
        [1, 4, 5, 8],
        [2, 3, 6, 7],
    ]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_an_exchange_is_the_best_of_all(n):
    for seed in range(5):
        scores = torch.randn(5, 20, generator=torch.Generator().manual_seed(seed))
        groups = torch.arange(20).reshape(5, 4)
        groups[:, 2] = channel_order._exchanged(scores, groups, 2, n)
        others = []
        for order in permutations(range(5)):
            other = torch.arange(20).reshape(5, 4)
            other[:, 2] = other[list(order), 2]
            others.append(kept(scores, n, 4, other.flatten()))
        assert kept(scores, n, 4, groups.flatten()) == pytest.approx(max(others), rel=0.005)


def test_the_auction_ends_near_the_optimum_and_ends_at_ties():
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        value = torch.rand(6, 6, generator=generator).double()
        best = max(float(value[list(order), range(6)].sum()) for order in permutations(range(6)))
        rows = channel_order._assignment(value)
        assert torch.equal(rows.sort().values, torch.arange(6))
        assert float(value[rows, torch.arange(6)].sum()) == pytest.approx(best)
    for value in (torch.zeros(5, 5), torch.eye(7)[:, :1].expand(7, 7), torch.ones(1, 1)):
        assert len(set(channel_order._assignment(value.double()).tolist())) == len(value)


def test_search_in_small_batches_and_pieces(monkeypatch):
    scores = torch.rand(16, 64).square()
    monkeypatch.setattr(channel_order, "PIECE", 100)
    order = search(scores, 2, 4, batch=5)
    assert kept(scores, 2, 4, order) > 1.02 * kept(scores, 2, 4)
    assert kept(scores, 2, 4, order) == pytest.approx(float(scores[:, order].reshape(-1, 4).topk(2).values.sum()))


def test_search_refuses_what_it_cannot_group():
    with pytest.raises(InputError, match="10 inputs are not divisible by 4"):
        search(torch.rand(3, 10), 2, 4)
    with pytest.raises(InputError, match="NaN or infinity"):
        search(torch.full((3, 8), torch.nan), 2, 4)


# -------------------------------------------------------------------------------------------------------------- folding


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_masks_mean_the_same_before_and_after_and_groups_are_met_after(family):
    model = random_model(family)
    matrices = find_matrices(model)
    found = find_hidden(model, matrices)
    scores = {name: matrix.weight.abs() for name, matrix in matrices.items()}
    orders = [(channels, search(scores[channels.consumers[0]], 2, 4)) for channels in found]
    by_name = {channels.consumers[0]: order for channels, order in orders}
    for name, order in by_name.items():
        scores[name] = scores[name][:, order]
    masks = {name: mask[:, by_name[name].argsort()] if name in by_name else mask for name, mask in NM(2, 4)(scores)}
    masking.apply(matrices, masks.items())
    before = logits(model)
    fold(model, orders)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    for matrix in matrices.values():
        assert meets(matrix.weight != 0, 2, 4), matrix.name


def test_a_checkpoint_is_folded_where_it_lies(tmp_path, monkeypatch):
    """From names and axes alone, on bits mapped from the files, in pieces: the same bits as in memory."""
    model = random_model("phi3").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    found = find_hidden(model, find_matrices(model))
    orders = shuffles(found)
    keys = entries(sorted(tmp_path.glob("*.safetensors")))
    monkeypatch.setattr(channel_order, "PIECE", 1000)
    for channels, order in orders:
        for name, move in folding(channels, order):
            entry = keys[name]
            reorder(np.memmap(entry.file, np.uint16, "r+", entry.start, entry.shape), *move)
    fold(model, orders)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for (name, here), there in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(here, there), name


@pytest.mark.parametrize("shape", [(12,), (12, 7), (7, 12)])
def test_reorder_is_indexing(shape, monkeypatch):
    monkeypatch.setattr(channel_order, "PIECE", 30)
    axis, order = shape.index(12), torch.randperm(12)
    tensor = torch.rand(shape)
    bits = (tensor.numpy() * 1000).astype(np.uint16)
    expected = bits.take(order.numpy(), axis)
    wanted = tensor.index_select(axis, order)
    reorder(tensor, axis, order)
    reorder(bits, axis, order)
    assert torch.equal(tensor, wanted)
    assert np.array_equal(bits, expected)
