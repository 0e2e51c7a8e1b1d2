# %% [markdown]
# # One calibration, every sparsity
#
# A walk through uniprune, cell by cell: open it as a notebook (Jupyter, VS Code: "Run cell"), or run it as a script:
# `python examples/walkthrough.py [MODEL] [FOLDER]`. Every cell shows the Python call; the comment above it is the same thing on
# the command line.

# %%
import sys
from pathlib import Path

import uniprune

model = sys.argv[1] if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "HuggingFaceTB/SmolLM2-135M"
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "walkthrough")
folder.mkdir(parents=True, exist_ok=True)
small = {"windows": 4, "length": 128}  # so that it takes a minute; leave these out for real work

# %% [markdown]
# ## What would be pruned?
#
# Matrices are found by structure, whatever the family is called. No weight is read for this.

# %%
# uniprune plan MODEL --sparsity 2:4
plan = uniprune.plan(model, uniprune.Recipe(sparsity="2:4"))
print(f"{plan.prunable:,} of {plan.parameters:,} weights are prunable; {plan.memory / 1e9:.1f} GB of memory ({plan.execution})")
for group in plan.groups:
    print(f"  {group.count:4} x {group.name}: {group.shape[0]} x {group.shape[1]}, {group.pattern}")

# %% [markdown]
# ## Calibrate once
#
# A local metric (Wanda) scores every weight in one pass. Then the controller corrects the scores: it cuts masks from them, has
# the pruned model read the text, and moves the scores by what that does to its predictions. No weight changes.

# %%
# uniprune calibrate MODEL --text builtin -o scores.safetensors
scores = folder / "scores.safetensors"
facts = uniprune.calibrate(model, uniprune.Recipe(text="builtin", windows=16, length=128), scores, overwrite=True)
print("held-out KL of the best state:", round(facts.controller.best_held_out_loss, 4))

# %% [markdown]
# ## Masks of any sparsity, in seconds
#
# The scores serve every sparsity and every N:M. N of every M consecutive inputs are *kept*; a sparsity is what is *removed*.

# %%
# uniprune mask scores.safetensors --sparsity 2:4 -o masks-2of4.safetensors
for sparsity, name in (("0.5", "50"), ("2:4", "2of4")):
    cut = uniprune.mask(scores, sparsity, folder / f"masks-{name}.safetensors", overwrite=True)
    print(f"{cut.pattern}: {cut.sparsity:.1%} removed")

# %% [markdown]
# ## Which sparsity?
#
# A sweep measures many of them; the file is written after every row, and `resume=True` goes on with it.

# %%
# uniprune sweep MODEL scores.safetensors -s 0.3,0.5,2:4 -o sweep.json
sweep = uniprune.sweep(model, scores, folder / "sweep.json", ["0.3", "0.5", "2:4"], overwrite=True, **small)
print(f"dense: perplexity {sweep.dense.perplexity:.2f}")
for row in sweep.rows:
    size = "" if row.bytes is None else f", packed {row.bytes / 1e6:.2f} MB"
    print(f"{row.pattern}: perplexity {row.perplexity:.2f}{size}{' (nothing beats it)' if row.pareto else ''}")

# %% [markdown]
# ## A checkpoint that plain transformers loads
#
# It is the source's own files with zeros: dense, of the same size and speed until a runtime with sparse kernels loads it.

# %%
# uniprune apply MODEL masks-2of4.safetensors -o pruned
uniprune.apply(model, folder / "masks-2of4.safetensors", folder / "pruned", overwrite=True)
print(sorted(path.name for path in (folder / "pruned").iterdir()))

# %% [markdown]
# ## How good is it?
#
# Perplexity can hide damage, so look at the divergence from the dense model and at what it writes, too. The result says how it
# was had; `check` has it again.

# %%
# uniprune evaluate pruned --against MODEL --text builtin -o result.json
# uniprune evaluate --check result.json
result = uniprune.evaluate(folder / "pruned", against=model, text_source="builtin", new_tokens=16, **small)
result.write(folder / "result.json")
print(f"perplexity {result.perplexity:.2f}, KL {result.closeness.kl:.3f} nats per token")
print("reproduced:", uniprune.check(folder / "result.json").reproduced)
