"""Calibration samples: of one text, of several with their shares, and those that the model writes itself (``self``).

What a model writes needs no data set and is close to what it does in use (Williams et al., arXiv 2410.17170). It goes on with
a few tokens of the other texts, or begins with BOS if there is no other. Those tokens are left out of the samples, so that all
that are read are its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from uniprune.checkpoints.configuration import check_context, check_vocabulary, context
from uniprune.common import distributed
from uniprune.common.progress import Progress, silent
from uniprune.data import sources
from uniprune.data.bos import Encoder, bos_of
from uniprune.data.sources import SELF, Source
from uniprune.data.text import check_there
from uniprune.data.windows import Windows, load_windows
from uniprune.errors import InputError
from uniprune.job.recipe import LENGTH, WINDOWS, Recipe
from uniprune.models.blocks import device_of, resident, text_alone
from uniprune.models.loading import Loaded
from uniprune.models.matrices import check_decoder

Draw = Callable[[Tensor, Tensor], Tensor]  # tokens so far, and the next one's scores [windows, vocabulary] -> other scores
PROMPT = 32  # tokens of another text that the model goes on with
BATCH = 16  # samples that are written together
PLAIN = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1, "repetition_penalty": None}


def calibration_windows(recipe: Recipe, tokenizer: Any, model: nn.Module) -> Windows:
    """The windows that a recipe asks for; those that the model is to write itself are zeros until :func:`written`."""
    asked, config = sources.parse(recipe.text), model.config
    length = window_length(recipe, config)
    alone, own = len(asked) == 1, writes(recipe)

    def load(source: Source, count: int | None) -> Windows:
        bos = recipe.bos if alone else None
        if not source.tokens:
            bos = bos_of(recipe.bos, config, tokenizer)
        if source.text == SELF:
            encoder = Encoder(tokenizer, bos, SELF)
            return Windows(
                torch.zeros(count or WINDOWS, length, dtype=torch.int64), SELF, count or WINDOWS, encoder.bos, encoder.token
            )
        text = source.reading(recipe.field, recipe.split, alone)
        return load_windows(text, tokenizer, use="calibration", length=length, count=count, seed=recipe.seed, bos=bos)

    if own:
        _check_own(recipe, model, alone)
    if not alone:
        sources.check_asked(asked, recipe.field, recipe.split)
    if alone and not own:
        windows = load(asked[0], recipe.windows or (None if asked[0].tokens else WINDOWS))
    else:
        windows = sources.mixed(asked, recipe.windows or WINDOWS, load)
    check_vocabulary(config, int(windows.tokens.max()), windows.source)
    if not own:
        return windows
    rows = torch.cat([windows.by_source[source.name] for source in asked if source.text == SELF])
    return replace(windows, prompts=_prompts(windows, rows, tokenizer, context(config), recipe.seed))


def window_length(recipe: Recipe, config: Any) -> int:
    """Tokens of a window, before any text is read.

    Raises InputError if it is more than the model takes, and for texts that cannot be there.
    """
    asked = sources.parse(recipe.text)
    for source in asked:
        if source.text != SELF and not source.tokens:
            check_there(source.text)
    length = sources.common_length(asked, recipe.length, min(LENGTH, context(config)))
    check_context(config, length)
    return length


def writes(recipe: Recipe) -> bool:
    """Whether the model is to write samples itself."""
    return any(source.text == SELF for source in sources.parse(recipe.text))


def check_written(own: bool, in_memory: bool) -> None:
    """Raises InputError if a model that is read block by block is to write samples: it would be read once for each token."""
    if own and not in_memory:
        raise InputError(
            f"text {SELF} is written by the whole model in memory; raise --max-memory, or keep what it writes on a larger "
            "machine (--save-tokens FILE), and give that file"
        )


def written(windows: Windows, loaded: Loaded, seed: int, progress: Progress = silent) -> Windows:
    """The windows with those that the model writes itself: sampled from its own distribution (temperature 1) by the seed.

    What it ends early goes on with what it would write next. Of several processes the first one writes.
    """
    assert windows.prompts is not None
    check_written(True, loaded.residency is resident)
    tokens, begins = windows.tokens.clone(), windows.bos == "each"
    own, prompts = list(windows.prompts), torch.stack(list(windows.prompts.values()))
    found = torch.zeros(len(own), tokens.shape[1] - begins, dtype=torch.int64, device=device_of(loaded.model))
    if not distributed.rank():
        draw = _drawing(torch.Generator(found.device).manual_seed(seed))
        todo = list(range(0, len(own), BATCH))
        for start in progress(todo, "writing samples", len(todo)):
            some = slice(start, start + BATCH)
            found[some] = _continued(loaded.model, prompts[some].to(found.device), found.shape[1], draw)
    distributed.barrier()
    tokens[own, begins:] = distributed.total(found).cpu()
    if begins and windows.bos_token is not None:
        tokens[own, 0] = windows.bos_token
    return replace(windows, tokens=tokens, prompts=None)


def _check_own(recipe: Recipe, model: nn.Module, alone: bool) -> None:
    check_decoder(model, f"so it writes no text; leave {SELF} out")
    if alone and (recipe.field is not None or recipe.split is not None):
        raise InputError(f"text {SELF} is written by the model, and has no fields and splits; leave --field and --split out")


def _prompts(windows: Windows, own: Tensor, tokenizer: Any, context: int, seed: int) -> dict[int, Tensor]:
    """What the model is to go on from in each of the windows ``own``: a few tokens of the other windows, after BOS if those
    begin with it; if there are no others, BOS, or EOS where there is no BOS."""
    begins = windows.bos == "each"
    others = windows.tokens[~torch.isin(torch.arange(len(windows.tokens)), own)][:, begins:]
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    head = [] if windows.bos == "none" and len(others) else [first]
    if head == [None]:
        raise InputError(
            f"text {SELF} alone begins with BOS or EOS, and the tokenizer has neither; give another text beside it"
        )
    begun = torch.tensor(head, dtype=torch.int64).expand(len(own), -1)
    # The last token that is written is not read, so that one more has room.
    size = min(PROMPT, context - others.shape[1] - len(head) + 1, others.shape[1]) if len(others) else 0
    if size > 0:
        pieces = others.unfold(1, size, size).reshape(-1, size)
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
        begun = torch.cat([begun, pieces[order[torch.arange(len(own)) % len(pieces)]]], 1)
    return dict(zip(own.tolist(), begun, strict=True))


def _drawing(generator: torch.Generator) -> Draw:
    """Makes of the likeliest token one that is drawn with its probability, by the noise of Gumbel's distribution: whatever else
    a model's generation config says of sampling."""

    def draw(written: Tensor, scores: Tensor) -> Tensor:
        waiting = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=generator)
        return scores.float() - waiting.clamp_min(torch.finfo(torch.float32).tiny).log()

    return draw


@torch.no_grad()
def _continued(model: nn.Module, prompts: Tensor, count: int, draw: Draw) -> Tensor:
    """The next ``count`` tokens of each prompt ``[n, tokens]``."""
    with text_alone(model):
        found: Tensor = model.generate(  # type: ignore[operator]
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([draw]),
            **PLAIN,
        )
    return found[:, prompts.shape[1] :]
