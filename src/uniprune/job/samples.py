"""Calibration samples: of one text, of several with their shares, of images with text, and the model's own (text ``self``).

Self-generated samples need no data set and are close to what the model does in use (Williams et al., arXiv 2410.17170). The
model is prompted with a few tokens of the other texts, or with BOS alone if there is no other. Prompts are left out of the
samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from uniprune.checkpoints.configuration import check_context, check_vocabulary, context, reads_images
from uniprune.checkpoints.origin import Origin
from uniprune.checkpoints.tokenizer import load_processor
from uniprune.common import distributed
from uniprune.common.progress import Progress, silent
from uniprune.controller import controllers
from uniprune.data import sources
from uniprune.data.bos import Encoder, bos_of, tokenizer_of
from uniprune.data.images import windows as images
from uniprune.data.images.rows import has_images
from uniprune.data.sources import SELF, TextSource
from uniprune.data.text import Text, check_there
from uniprune.data.windows import Windows, load_windows
from uniprune.errors import InputError
from uniprune.job.recipe import Recipe
from uniprune.job.settings import LENGTH, WINDOWS
from uniprune.models.blocks import device_of, resident, text_alone
from uniprune.models.generation import greedy
from uniprune.models.loading import Loaded
from uniprune.models.matrices import check_decoder

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]  # (tokens so far, logits of the next [windows, vocabulary]) -> logits
PROMPT = 32  # tokens of another text that prompt the model
TEXT_ALONE = "or take the text alone: --field text"
BATCH = 16  # samples that are generated together


def windows_of(recipe: Recipe, model: nn.Module, origin: Origin | None, tokenizer: Any) -> Windows:
    """The calibration samples of a recipe, of images with text or of text alone.

    model: may be a skeleton. Raises InputError if they are too few for the processes and for those that a controller holds out.
    """
    windows = _image_windows(recipe, model, origin, tokenizer) or calibration_windows(recipe, tokenizer, model)
    controller = recipe.parsed_controller()
    distributed.check_windows(len(windows.tokens), held_out=int(controller is not None and controller.holds_out))
    return windows


def calibration_windows(recipe: Recipe, tokenizer: Any, model: nn.Module) -> Windows:
    """The windows that a recipe asks for; those that the model is to generate are zeros, with prompts for :func:`generated`."""
    asked, tokenizer = sources.parse(recipe.text), tokenizer_of(tokenizer)
    config = model.config
    _, length = shape_of_windows(recipe, config)
    alone = len(asked) == 1
    own = self_generated(recipe)

    def load(source: TextSource, count: int | None) -> Windows:
        bos = recipe.bos if alone else None
        if not source.tokens:
            bos = bos_of(recipe.bos, config, tokenizer)
        if source.text == SELF:
            encoder = Encoder(tokenizer, bos, SELF)
            zeros = torch.zeros(count or WINDOWS, length, dtype=torch.int64)
            return Windows(zeros, SELF, len(zeros), encoder.bos, encoder.token, tokenizer=encoder.fingerprint())
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


def check_takes_images(recipe: Recipe) -> None:
    """Raises InputError for a recipe whose way to masks reads text alone."""
    controller = recipe.parsed_controller()
    if recipe.sequential:
        raise InputError(f"--sequential and --refine read text alone; leave them out, {TEXT_ALONE}")
    if controller is not None and not controller.images:
        raise InputError(f"--controller {controllers.name_of(controller)} reads text alone; leave it out, {TEXT_ALONE}")


def _image_windows(recipe: Recipe, model: nn.Module, origin: Origin | None, tokenizer: Any) -> Windows | None:
    """The windows of a data set of images and text, for a model of both; None if the recipe has text alone.

    tokenizer: the processor, of a model in memory. Raises InputError for a recipe that cannot show images.
    """
    asked = sources.parse(recipe.text)
    if len(asked) > 1 or asked[0].text == sources.SELF or not reads_images(model.config):
        return None
    source = Text(asked[0].text, recipe.field, recipe.split)
    if not has_images(source, "calibration"):
        return None
    check_takes_images(recipe)
    if recipe.bos is not None:
        raise InputError(f"--bos is for text alone; leave it out, {TEXT_ALONE}")
    if recipe.length is not None:
        check_context(model.config, recipe.length)
    processing = images.ImageProcessing(load_processor(origin, tokenizer), model.config)
    count = recipe.windows or WINDOWS
    return images.load(source, processing, "calibration", recipe.length, count, recipe.seed, context(model.config))


def shape_of_windows(recipe: Recipe, config: Any) -> tuple[int, int]:
    """How many windows there will be, and their length in tokens, before any text is read.

    Raises InputError if it is more than the model takes, and for texts that cannot be there.
    """
    asked = sources.parse(recipe.text)
    for source in asked:
        if source.text != SELF and not source.tokens:
            check_there(source.text)
    count, length = sources.common_shape(asked, recipe.windows, recipe.length, (WINDOWS, min(LENGTH, context(config))))
    check_context(config, length)
    return count, length


def self_generated(recipe: Recipe) -> bool:
    """Whether the model is to generate samples itself."""
    return any(source.text == SELF for source in sources.parse(recipe.text))


def check_can_generate(own: bool, in_memory: bool) -> None:
    """Raises InputError if a model that is read block by block is to generate samples: each token would read all of it."""
    if own and not in_memory:
        raise InputError(
            f"text {SELF} is written by the whole model in memory; raise --max-memory, or keep what it writes on a larger "
            "machine (--save-tokens FILE), and give that file"
        )


def generated(windows: Windows, loaded: Loaded, seed: int, progress: Progress = silent) -> Windows:
    """The windows with those filled in that the model is to generate: sampled at temperature 1, by the seed.

    An EOS does not end a sample: the model continues behind it. Of several processes, the first one generates all samples.
    """
    assert windows.prompts is not None
    check_can_generate(True, loaded.residency is resident)
    tokens = windows.tokens.clone()
    begins = windows.bos == "each"
    own = list(windows.prompts)
    prompts = torch.stack(list(windows.prompts.values()))
    written = torch.zeros(len(own), tokens.shape[1] - begins, dtype=torch.int64, device=device_of(loaded.model))
    if not distributed.rank():
        sampler = _gumbel_max(torch.Generator(written.device).manual_seed(seed))
        todo = list(range(0, len(own), BATCH))
        for start in progress(todo, "writing samples", len(todo)):
            some = slice(start, start + BATCH)
            written[some] = _continuations(loaded.model, prompts[some].to(written.device), written.shape[1], sampler)
    distributed.barrier()
    tokens[own, begins:] = distributed.total(written).cpu()
    if begins and windows.bos_token is not None:
        tokens[own, 0] = windows.bos_token
    return replace(windows, tokens=tokens, prompts=None)


def _check_own(recipe: Recipe, model: nn.Module, alone: bool) -> None:
    """Raises InputError if the model cannot generate text, or if settings of a data set are given for its own text."""
    check_decoder(model, f"so it writes no text; leave {SELF} out")
    if alone and (recipe.field is not None or recipe.split is not None):
        raise InputError(f"text {SELF} is written by the model, and has no fields and splits; leave --field and --split out")


def _prompts(windows: Windows, own: Tensor, tokenizer: Any, context: int, seed: int) -> dict[int, Tensor]:
    """The prompts of the windows ``own`` (their indices): a few tokens of the other windows, after BOS if those begin with it;
    if there are no others, BOS, or EOS where there is no BOS. Raises InputError for a tokenizer that has neither."""
    begins = windows.bos == "each"
    others = windows.tokens[~torch.isin(torch.arange(len(windows.tokens)), own)][:, begins:]
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    head = [] if windows.bos == "none" and len(others) else [first]
    if head == [None]:
        raise InputError(
            f"text {SELF} alone begins with BOS or EOS, and the tokenizer has neither; give another text beside it"
        )
    begun = torch.tensor(head, dtype=torch.int64).expand(len(own), -1)
    # The last token that is generated is not read by the model, so that one more fits into the context.
    size = min(PROMPT, context - others.shape[1] - len(head) + 1, others.shape[1]) if len(others) else 0
    if size > 0:
        pieces = others.unfold(1, size, size).reshape(-1, size)
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
        begun = torch.cat([begun, pieces[order[torch.arange(len(own)) % len(pieces)]]], 1)
    return dict(zip(own.tolist(), begun, strict=True))


def _gumbel_max(generator: torch.Generator) -> LogitsProcessor:
    """Adds Gumbel noise to the logits: greedy decoding then samples from the model's distribution (the Gumbel-max trick), by
    this generator and whatever the model's generation config says of sampling."""

    def perturb(tokens: Tensor, logits: Tensor) -> Tensor:
        exponential = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
        return logits.float() - exponential.clamp_min(torch.finfo(torch.float32).tiny).log()

    return perturb


@torch.no_grad()
def _continuations(model: nn.Module, prompts: Tensor, count: int, sampler: LogitsProcessor) -> Tensor:
    """The next ``count`` tokens of each prompt ``[n, tokens]``."""
    with text_alone(model), greedy(model):
        continued: Tensor = model.generate(  # type: ignore[operator]
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([sampler]),
        )
    return continued[:, prompts.shape[1] :]
