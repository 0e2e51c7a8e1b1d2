"""Prune a model to 2:4 and see what that did.

    python examples/quickstart.py [MODEL] [FOLDER]

MODEL: a Hugging Face folder, a hub name or a GGUF file. FOLDER: where to write.
"""

import sys
from pathlib import Path

import uniprune

model = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "quickstart")

# Text that every Python carries; for real work give text like the text that the model will see ("c4", "corpus.jsonl").
recipe = uniprune.Recipe(sparsity="2:4", text="builtin", windows=16, length=128)
report = uniprune.prune(model, recipe, folder / "pruned", overwrite=True)
print(f"{report.sparsity:.1%} of {len(report.matrices)} matrices is zero; every other weight has its old bits.")

found = uniprune.evaluate(folder / "pruned", against=model, text_source="builtin", windows=4, length=128)
close = found.closeness
print(f"perplexity: {close.reference_perplexity:.2f} dense, {found.perplexity:.2f} pruned")
print(f"KL to the dense model: {close.kl:.3f} nats per token; the same likeliest token at {close.agreement:.0%} of them")
for row in found.generations:
    print(f"\n{row.prompt!r}\n  dense:  {row.against!r}\n  pruned: {row.model!r}")
