#!/usr/bin/env bash
# lm-eval 0.4.13: perplexity of a whole text (loglikelihood_rolling) scores the begin token itself if the tokenizer adds one, as
#   Llama's does.
# Guess: the begin token is what the first word is conditioned on, once; an empty text has a log-likelihood of 0.
# Seen 2026-11-28: "a b c d" is scored as <s> a b c d after <s>; the empty text costs 1.8 nats; add_bos_token=False makes both
#   right.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 lm-eval==0.4.13 numpy==2.4.6
check <<'PY'
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

plain = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *"abcd"])}, unk_token="<unk>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=7, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)).eval()

def scored(text, **settings):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", **settings)
    return lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)[0]

def loglikelihood(tokens):
    with torch.no_grad():
        likely = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return float(sum(likely[i, token] for i, token in enumerate(tokens[1:])))

text, words = "a b c d", [3, 4, 5, 6]
seen = {"default": scored(text), "add_bos_token=False": scored(text, add_bos_token=False), "empty": scored("")}
right, doubled = loglikelihood([0, *words]), loglikelihood([0, 0, *words])
print(seen, f"by hand: {right:.4f} given one begin token, {doubled:.4f} with a second one scored")
assert abs(seen["default"] - doubled) < 1e-3 < abs(seen["default"] - right)
assert abs(seen["add_bos_token=False"] - right) < 1e-3 and seen["empty"] < -1
PY
