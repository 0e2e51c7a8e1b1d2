#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3: AutoTokenizer, asked for a folder that has a model and no file of a tokenizer.
# Guess: OSError or ValueError, as of version 4 ("Can't load tokenizer ...").
# Seen 2026-12-01: of Qwen 2, Qwen 3, GPT-2, OPT, GPT-NeoX, Mamba and Gemma 3 it makes a tokenizer that knows special tokens alone, says
#   nothing, and reads any text as no token at all, Gemma 3 as one <unk>; of Llama, Mistral and Phi-3 it raises.
source "$(dirname "$0")/environment"
packages transformers==5.23.0 tokenizers==0.23.3 torch==2.13.0
check <<'PY'
import tempfile

from transformers import AutoConfig, AutoTokenizer

TEXT = "The cat sat on the mat, and nobody knew why."
found = {}
for kind in ("qwen2", "qwen3", "gpt2", "opt", "gpt_neox", "mamba", "gemma3_text", "llama", "mistral", "phi3"):
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(kind).save_pretrained(folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            found[kind] = type(error).__name__
        else:
            assert not tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens}
            found[kind] = tokenizer.convert_ids_to_tokens(tokenizer.encode(TEXT, add_special_tokens=False))
print(found)
assert all(isinstance(found[kind], str) for kind in ("llama", "mistral", "phi3"))
assert all(found[kind] == [] for kind in ("qwen2", "qwen3", "gpt2", "opt", "gpt_neox", "mamba"))
assert found["gemma3_text"] == ["<unk>"]
PY
