#!/usr/bin/env bash
# transformers 5.23.0: of a GGUF model that is split over several files (model-00001-of-00003.gguf) it loads the first alone.
# Guess: the first file names the others, and all are read, as llama.cpp does; or it is refused.
# Seen 2026-11-28: what lies in the other files is drawn at random (reported as missing), and an output head that does is tied to the
#   embeddings, which is not reported.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.4.6
check <<'PY'
import tiny_gguf
import torch
from transformers import AutoModelForCausalLM

tiny_gguf.write("model.gguf", split_max_tensors=8)
first, again = (AutoModelForCausalLM.from_pretrained(".", gguf_file="model-00001-of-00003.gguf") for _ in range(2))
drawn = [name for name, one in first.named_parameters() if not torch.equal(one, again.get_parameter(name))]
print(len(drawn), "parameters differ from one load to the next, e.g.", drawn[0])
print("output head tied:", first.lm_head.weight is first.model.embed_tokens.weight)
assert len(drawn) >= 7 and first.lm_head.weight is first.model.embed_tokens.weight
PY
