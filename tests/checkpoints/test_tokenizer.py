"""What a folder has of a tokenizer."""

import pytest

from small_models import save
from uniprune.checkpoints.origin import resolve
from uniprune.checkpoints.tokenizer import load_tokenizer
from uniprune.errors import InputError

FAMILIES = ["llama", "qwen2", "qwen3_moe", "gemma3_text", "gpt2", "gpt_neox", "opt", "mamba", "bloom"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_without_a_tokenizer_has_none(tmp_path, family):
    """Though transformers makes one of many configurations alone, which knows special tokens at most."""
    save(family, tmp_path)
    assert load_tokenizer(resolve(tmp_path)) is None


def test_half_of_one_is_none_that_can_be_read(tmp_path):
    save("qwen2", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(InputError, match=r"knows no token but special ones.*fetch it again"):
        load_tokenizer(resolve(tmp_path))


def test_a_folder_with_a_small_one_has_it(folder):
    assert load_tokenizer(resolve(folder)) is not None
