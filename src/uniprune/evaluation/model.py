"""A model that is to be evaluated: asked first, loaded when everything that is asked was checked, then measured."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from uniprune.common.progress import Progress
from uniprune.data.tasks import Task
from uniprune.data.text import Windows, load_windows, window_length
from uniprune.errors import InputError
from uniprune.evaluation.divergence import Recording
from uniprune.evaluation.generation import check_prompts, generate
from uniprune.evaluation.perplexity import Perplexity, perplexity
from uniprune.evaluation.scoring import Tokens
from uniprune.evaluation.zero_shot import Answers, answer, tokenise
from uniprune.models.loading import (
    Loaded,
    Source,
    check_context,
    check_vocabulary,
    context,
    fast_dtype,
    load_tokenizer,
    load_weights,
    native_dtype,
    parse_device,
    parse_dtype,
    resolve,
    skeleton,
    warn_of_emulation,
)


@dataclass(frozen=True)
class Questions:
    """What models are measured on. new_tokens: how long their continuations of the prompts are."""

    windows: Windows | None = None
    tasks: Sequence[Task] = ()
    prompts: Sequence[str] = ()
    new_tokens: int = 0


@dataclass
class Measured:
    """What one model did with everything that was asked of it."""

    perplexity: Perplexity | None = None
    recording: Recording | None = None
    answers: list[Answers] = field(default_factory=list)
    written: list[list[int]] = field(default_factory=list)


class Subject:
    """A model whose weights are loaded when everything that is asked of it was checked."""

    def __init__(self, source: Source) -> None:
        self._source = source if isinstance(source, Loaded) else resolve(source)
        if isinstance(self._source, Loaded):
            self._config, self.tokenizer = self._source.model.config, self._source.tokenizer
        else:
            self._config, self.tokenizer = skeleton(self._source).config, load_tokenizer(self._source)

    def __str__(self) -> str:
        return str(self._source)

    @property
    def context(self) -> int:
        return context(self._config)

    def check_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise InputError(
                f"model {self} has no tokenizer, so tasks cannot be asked; put its tokenizer's files into the folder"
            )

    def windows(self, text: str | Path, count: int | None, length: int | None) -> Windows:
        length = window_length(text, length, min(2048, self.context))
        check_context(self._config, length)
        found = load_windows(text, self.tokenizer, use="evaluation", length=length, count=count)
        check_vocabulary(self._config, int(found.tokens.max()), text)
        return found

    def ask(self, asked: Questions) -> None:
        """Says what to measure. Raises InputError if a question cannot be scored, or a prompt not be continued."""
        if asked.tasks or asked.prompts:
            self.check_tokenizer()
        check_prompts(asked.prompts, self.tokenizer, asked.new_tokens, self.context)
        self._asked = asked
        self._tokens: list[list[list[Tokens]]] = [tokenise(task, self.tokenizer, self.context) for task in asked.tasks]
        for task, questions in zip(asked.tasks, self._tokens, strict=True):
            highest = max(max(choice.ids) for question in questions for choice in question)
            check_vocabulary(self._config, highest, f"task {task.name}")

    def load(self, dtype: str | None, device: str | None) -> Loaded:
        if isinstance(self._source, Loaded):
            warn_of_emulation(self._source.model)
            return self._source
        chosen, target = parse_dtype(dtype), parse_device(device)
        # Loaded in the type that it computes in, never cast afterwards: that would cast its buffers, too.
        dtype_here = chosen or fast_dtype(native_dtype(self._source), target)
        return Loaded(load_weights(self._source, dtype_here, target), self.tokenizer, self._source)

    def measure(self, loaded: Loaded, progress: Progress, record: bool) -> Measured:
        """record: whether predictions are to be compared with another model's."""
        found, model, asked = Measured(), loaded.model, self._asked
        if asked.windows is not None:
            found.recording = Recording(model, asked.windows) if record else None
            with found.recording or nullcontext():
                found.perplexity = perplexity(model, asked.windows, progress)
        if asked.tasks:
            found.answers = answer(model, asked.tasks, self._tokens, progress)
        if asked.prompts:
            found.written = generate(model, self.tokenizer, asked.prompts, asked.new_tokens, progress)
        return found
