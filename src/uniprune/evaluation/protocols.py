"""Published protocols of perplexity: with which of them a result compares, and the dense numbers that were published.

A perplexity says nothing without its text, windows, stride and BOS. The protocols that papers share are few; a result is
matched with them by what it records. docs/evaluation.md shows the numbers, with the commands that should give them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from uniprune.evaluation.results import Evaluation, FollowedProtocol, PerplexityFacts

ROWS = "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"  # sha256 of WikiText-2's test rows, joined
PAGES = "a96f5837dbb9ba3bd042b550ae6490e82183acbc5d02376efd878b30692f11a7"  # of its pages


@dataclass(frozen=True)
class PublishedProtocol:
    """``dense``: published values of models, by their hub names. ``metric``: which perplexity it is."""

    name: str
    metric: str
    length: int
    stride: int
    dense: Mapping[str, float]
    sources: str

    @property
    def flags(self) -> str:
        """What ``uniprune evaluate MODEL`` needs to follow it."""
        stride = f" --stride {self.stride}" if self.stride != self.length else ""
        return f"--text wikitext2 --length {self.length}{stride}"

    def differences(self, result: PerplexityFacts) -> Iterator[str]:
        """What of a result on WikiText-2 is not as the protocol has it."""
        text = result.text
        assert text is not None
        if text.rolling:
            yield "pages read one by one"
            return
        for name in ("length", "stride"):
            if getattr(result, name) != getattr(self, name):
                yield f"{name} {getattr(result, name)}"
        if text.windows != text.available_windows:
            yield f"{text.windows} of {text.available_windows} samples"
        if text.bos == "each":
            yield "BOS in each sample"


@dataclass(frozen=True)
class Rolling(PublishedProtocol):
    """Pages read one by one, in pieces of the model's context. ``second_bos``: whether a tokenizer may add one more BOS."""

    second_bos: bool = False

    @property
    def flags(self) -> str:
        return "--text wikitext2 --rolling" + ("" if self.second_bos else " --bos each")

    def differences(self, result: PerplexityFacts) -> Iterator[str]:
        text = result.text
        assert text is not None
        if not text.rolling:
            yield "samples of the joined text"
            return
        if not text.in_context:
            yield f"length {result.length}, not the model's context"
        if text.second_bos != self.second_bos:
            yield "two BOS" if text.second_bos else "one BOS"


PROTOCOLS: tuple[PublishedProtocol, ...] = (
    PublishedProtocol(
        "WikiText-2, sequence length 2048",
        "perplexity",
        2048,
        2048,
        {
            "facebook/opt-125m": 27.66,
            "facebook/opt-6.7b": 10.86,
            "bigscience/bloom-560m": 22.42,
            "huggyllama/llama-7b": 5.68,
            "huggyllama/llama-13b": 5.09,
            "meta-llama/Llama-2-7b-hf": 5.47,
            "meta-llama/Llama-2-13b-hf": 4.88,
            "meta-llama/Meta-Llama-3-8B": 6.14,
            "meta-llama/Meta-Llama-3-70B": 2.85,
            "meta-llama/Llama-3.1-8B": 6.24,
            "Qwen/Qwen2.5-7B": 7.74,
        },
        "SparseGPT, Wanda (LLaMA, issue 7), AWQ, RIA, PermLLM",
    ),
    PublishedProtocol(
        "WikiText-2, sequence length 4096",
        "perplexity",
        4096,
        4096,
        {
            "meta-llama/Llama-2-7b-hf": 5.12,
            "meta-llama/Llama-2-13b-hf": 4.57,
            "meta-llama/Llama-2-70b-hf": 3.12,
            "meta-llama/Llama-3.1-8B": 5.84,
            "meta-llama/Llama-3.2-1B": 9.06,
            "Qwen/Qwen2.5-0.5B": 12.08,
        },
        "Wanda (LLaMA-2), MaskLLM, PATCH",
    ),
    PublishedProtocol(
        "WikiText-2, sequence length 8192",
        "perplexity",
        8192,
        8192,
        {"meta-llama/Meta-Llama-3-8B": 5.54},
        "AQLM, KVQuant",
    ),
    PublishedProtocol(
        "WikiText-2, sequence length 1024",
        "perplexity",
        1024,
        1024,
        {"openai-community/gpt2-large": 19.44},
        "documentation of transformers",
    ),
    PublishedProtocol(
        "WikiText-2, sequence length 1024, stride 512",
        "perplexity",
        1024,
        512,
        {"openai-community/gpt2-large": 16.45},
        "documentation of transformers",
    ),
    Rolling(
        "lm-evaluation-harness, task wikitext",
        "word_perplexity",
        0,
        0,
        {"meta-llama/Llama-2-7b-hf": 8.71},
        "lm-evaluation-harness issue 2301, MaskPro",
    ),
    Rolling("lm-evaluation-harness 0.4.13, task wikitext, two BOS", "word_perplexity", 0, 0, {}, "", second_bos=True),
)


def followed_protocols(model: str, result: PerplexityFacts) -> list[FollowedProtocol]:
    """The published protocols that a result follows, each with the dense value of the model if there is one."""
    found = [one for one in PROTOCOLS if _on_wikitext2(result) and not list(one.differences(result))]
    return [FollowedProtocol(protocol=one.name, metric=one.metric, dense=one.dense.get(model)) for one in found]


def sentence(result: Evaluation) -> str:
    """With what a perplexity compares, or why with nothing that was published."""
    if matching := result.comparable:
        names = " and ".join(f"{one.protocol} ({one.metric.replace('_', ' ')})" for one in matching)
        dense = next((f"; the dense model's published value is {one.dense}" for one in matching if one.dense), "")
        return f"Compares with published numbers of: {names}{dense}."
    if not _on_wikitext2(result):
        return "Compares with no published protocol: the text is not the whole test split of WikiText-2."
    assert result.text is not None
    alike = [one for one in PROTOCOLS if isinstance(one, Rolling) == result.text.rolling]
    nearest = min((list(one.differences(result)) for one in alike), key=len)
    return f"Compares with no published protocol: {', '.join(nearest)}."


def _on_wikitext2(result: PerplexityFacts) -> bool:
    text = result.text
    if text is None:
        return False
    return (text.text_sha256 if text.rolling else text.sample and text.sample.text_sha256) in (ROWS, PAGES)
