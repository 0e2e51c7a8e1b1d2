"""What a folder has of a tokenizer."""

import pytest

from small_models import save
from uniprune.checkpoints.origin import resolve
from uniprune.checkpoints.tokenizer import load_tokenizer


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "gemma3_text", "gpt2", "gpt_neox", "opt", "mamba", "bloom"])
def test_a_folder_without_a_tokenizer_has_none(tmp_path, family):
    """Though transformers makes one of many configurations alone, which knows special tokens at most."""
    save(family, tmp_path)
    assert load_tokenizer(resolve(tmp_path)) is None


def test_a_folder_with_a_small_one_has_it(folder):
    assert load_tokenizer(resolve(folder)) is not None
