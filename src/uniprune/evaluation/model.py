"""A model that is to be evaluated: asked first, loaded when everything that is asked was checked, then measured."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from uniprune.artefacts.mask_tools import CheckedMasks
from uniprune.checkpoints.configuration import UNBOUNDED, check_context, check_vocabulary, context, reads_images
from uniprune.checkpoints.tokenizer import load_processor, load_tokenizer
from uniprune.common.pictures import showing
from uniprune.common.progress import Progress
from uniprune.data import sources
from uniprune.data.bos import bos_of, tokenizer_of
from uniprune.data.images import windows as images
from uniprune.data.images.rows import has_images
from uniprune.data.text import Text
from uniprune.data.windows import Windows, load_windows
from uniprune.errors import InputError
from uniprune.evaluation.answers import Answers, answer, cut_of, tokenise
from uniprune.evaluation.divergence import Recording
from uniprune.evaluation.generation import check_prompts, generate
from uniprune.evaluation.perplexity import Documents, Perplexity, load_documents, perplexity, rolling
from uniprune.evaluation.request import Reading
from uniprune.models import masking
from uniprune.models.loading import (
    Loaded,
    Source,
    check_one_device,
    fast_dtype,
    load_weights,
    native_dtype,
    parse_device,
    parse_dtype,
    resolved,
    skeleton,
    warn_of_emulation,
)
from uniprune.models.matrices import check_decoder, find_matrices
from uniprune.storage.files import path_of
from uniprune.tasks.question import Task
from uniprune.tasks.scoring import Tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Questions:
    """What models are measured on. new_tokens: how long their continuations of the prompts are."""

    windows: Windows | Documents | None = None
    tasks: Sequence[Task] = ()
    prompts: Sequence[str] = ()
    new_tokens: int = 0


class AskedQuestions(NamedTuple):
    """Questions, and those of each task as tokens, as one model reads them."""

    questions: Questions
    tokens: list[list[list[Tokens]]]


@dataclass
class Measured:
    """What one model did with everything that was asked of it."""

    perplexity: Perplexity | None = None
    recording: Recording | None = None
    answers: list[Answers] = field(default_factory=list)
    written: list[list[int]] = field(default_factory=list)


class EvaluatedModel:
    """A model whose weights are loaded when everything that is asked of it was checked."""

    def __init__(self, source: Source, masks: str | None = None) -> None:
        self._masks = file = None if masks is None else CheckedMasks(path_of(masks))
        self._source = resolved(source)
        if isinstance(self._source, Loaded):
            model, self.tokenizer = self._source.model, self._source.tokenizer
        else:
            model, self.tokenizer = skeleton(self._source), load_tokenizer(self._source)
        self._config = model.config
        check_decoder(model, "what it does with text is measured on the tasks that it was made for")
        if file is not None:
            file.facts.check_matrices(file.shapes, find_matrices(model), file.path, self)

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

    def windows(self, text: str | Sequence[str], asked: Reading) -> Windows:
        """The windows of a text's evaluation part that are asked for, see :func:`uniprune.data.windows.load_windows`.

        Of several texts those of one after the other.
        """
        several = sources.parse(text)
        if any(source.text == sources.SELF for source in several):
            raise InputError(
                f"text {sources.SELF} is what the dense model writes when it is calibrated; keep it then (--save-tokens FILE), "
                "and give that file"
            )
        if len(several) == 1:
            return self._windows(several[0], asked)
        if asked.stride is not None:
            raise InputError("--stride is for one text; give one --text at a time")
        sources.check_asked(several, asked.field, asked.split)
        _, length = sources.common_shape(several, None, asked.length, (0, min(2048, self.context)))

        def load(source: sources.TextSource) -> Windows:
            text = source.reading(asked.field, asked.split, alone=False)
            own = {"bos": None} if source.tokens else {}
            given = {"field": text.field, "split": text.split, "length": length, **own}
            return self._windows(source, asked.model_copy(update=given))

        return sources.side_by_side(several, load)

    def _windows(self, source: sources.TextSource, asked: Reading) -> Windows:
        text = source.text
        if reads_images(self._config) and has_images(Text(text, asked.field, asked.split), "evaluation"):
            return self._images(text, asked)
        _, length = sources.common_shape([source], None, asked.length, (0, min(2048, self.context)))
        check_context(self._config, length)
        options = {"count": asked.windows, "bos": asked.bos, "stride": asked.stride}
        if not source.tokens:
            options["bos"] = bos_of(asked.bos, self._config, tokenizer_of(self.tokenizer))
        found = load_windows(Text(text, asked.field, asked.split), self.tokenizer, use="evaluation", length=length, **options)  # type: ignore[arg-type]
        check_vocabulary(self._config, int(found.tokens.max()), text)
        return found

    def _images(self, text: str, asked: Reading) -> Windows:
        """Windows of a data set of images and text."""
        if asked.stride is not None or asked.bos is not None:
            raise InputError("--stride and --bos are for text alone; leave them out, or take the text alone: --field text")
        if asked.length is not None:
            check_context(self._config, asked.length)
        processing = images.ImageProcessing(load_processor(self._source.origin, self.tokenizer), self._config)
        source = Text(text, asked.field, asked.split)
        return images.load(source, processing, "evaluation", asked.length, asked.windows, most=self.context)

    def documents(self, text: str | Sequence[str], asked: Reading) -> Documents:
        """Documents that are read one by one, pieces of ``length`` tokens: by default the context, as lm-evaluation-harness."""
        most = self.context if self.context < UNBOUNDED else 2048
        length = asked.length or most
        check_context(self._config, length)
        (source,) = sources.parse(text)
        found = load_documents(Text(source.text, asked.field, asked.split), self.tokenizer, length, asked.windows, asked.bos)
        check_vocabulary(self._config, max(max(piece.tokens) for piece in found.pieces), source.text)
        return replace(found, in_context=length == most)

    def ask(self, asked: Questions) -> AskedQuestions:
        """What :meth:`measure` takes. Raises InputError if a question cannot be scored, or a prompt not be continued."""
        if asked.tasks or asked.prompts:
            self.check_tokenizer()
        check_prompts(asked.prompts, self.tokenizer, asked.new_tokens, self._config)
        tokens = [tokenise(task, self.tokenizer, self.context) for task in asked.tasks]
        for task, questions in zip(asked.tasks, tokens, strict=True):
            highest = max(max(choice.ids) for question in questions for choice in question)
            check_vocabulary(self._config, highest, f"task {task.name}")
            if cut := cut_of(questions):
                what = f"task {task.name}: {cut} of {len(questions)} questions"
                logger.warning("%s are cut at their beginning to the model's context of %d tokens", what, self.context)
        return AskedQuestions(asked, tokens)

    def load(self, dtype: str | None, device: str | None) -> Loaded:
        if isinstance(self._source, Loaded):
            self._source.check(dtype, device)
            if any(parameter.is_meta for parameter in self._source.model.parameters()):
                check_one_device(self._source.model)  # what is on the meta device has no bits to say what was measured
            warn_of_emulation(self._source.model)
            return self._source
        chosen, target = parse_dtype(dtype), parse_device(device)
        # Loaded in the type that it computes in, never cast afterwards: that would cast its buffers, too.
        dtype_here = chosen or fast_dtype(native_dtype(self._source), target)
        return Loaded(load_weights(self._source, dtype_here, target), self.tokenizer, self._source)

    @contextmanager
    def pruned(self, loaded: Loaded) -> Iterator[None]:
        """Inside ``with``, the model is pruned by the masks, if any; a caller's own gets its weights back afterwards.

        Raises MismatchError if they were made for other weights.
        """
        if self._masks is None:
            yield
            return
        remedy = "give that model, or what uniprune apply --force makes of this one"
        self._masks.facts.check_digests(loaded.checkpoint.digests(self._masks), self._masks.path, loaded, remedy)
        matrices, own = find_matrices(loaded.model), loaded is self._source
        with masking.preserved(matrices, self._masks if own else ()):
            masking.apply(matrices, self._masks.items())
            yield

    def measure(self, loaded: Loaded, questions: AskedQuestions, progress: Progress, record: bool) -> Measured:
        """questions: as this model was asked them. record: whether predictions are to be compared with another model's."""
        found, model, asked = Measured(), loaded.model, questions.questions
        if isinstance(asked.windows, Documents):
            found.perplexity = rolling(model, asked.windows, progress)
        elif asked.windows is not None:
            with showing(model, asked.windows.pictures):
                found.recording = Recording(model, asked.windows) if record else None
                with found.recording or nullcontext():
                    found.perplexity = perplexity(model, asked.windows, progress)
        if asked.tasks:
            found.answers = answer(model, asked.tasks, questions.tokens, progress, self.tokenizer)
        if asked.prompts:
            found.written = generate(model, self.tokenizer, asked.prompts, asked.new_tokens, progress)
        return found
