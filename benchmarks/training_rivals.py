"""Environments for other people's trainers: .venv-trl and .venv-llamafactory at the repository's top, made on demand.

Each is apart from .venv, whose packages it sees nonetheless, after its own: torch is the very same build, and the
packages that TRL trains with are pinned to the versions that Modelyard trains with. They can't be in .venv itself:
TRL brings `datasets` and pandas, which transformers imports wherever it finds them, and LLaMA-Factory 0.9.5 wants
transformers 5.6.0, PEFT 0.18.1, accelerate 1.11.0 and TRL 0.24.0 at most, where an engine needs newer ones. It also
names torchaudio and torchvision, of which no build for the CPU is on the default index; text needs neither.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

if __package__ in {None, ""}:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 600.0
#: Versions by which the environment was made, so that another one is made when they change.
PINS = {"trl": ["trl==1.16.0"], "llamafactory": ["llamafactory==0.9.5"]}
SHARED = {"trl": ["transformers", "peft", "accelerate", "tokenizers", "numpy"], "llamafactory": []}
#: Comes with .venv, or is not needed.
LEFT_OUT = ("torch", "torchaudio", "torchcodec", "torchvision")


def python_of(name: str) -> Path | None:
    """Return the interpreter of an environment, making it where that works; None, with a word, where it doesn't."""
    folder = ROOT / f".venv-{name}"
    python, stamp = folder / "bin" / "python", folder / "made-of.txt"
    pins = "\n".join([*PINS[name], *(f"{one}=={version(one)}" for one in SHARED[name])])
    if stamp.exists() and stamp.read_text("utf-8") == pins and python.exists():
        return python
    print(f"setting up {folder.name} ...", flush=True)
    sys.path.insert(0, str(ROOT / "requirements"))
    from install import UV, package_sources

    with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
        overrides.write("".join(f'{one}; sys_platform == "never"\n' for one in LEFT_OUT))
        overrides.flush()
        fill = [str(UV), "pip", "install", "-q", "--compile-bytecode", f"--override={overrides.name}"]
        try:
            subprocess.run([str(UV), "venv", "-q", "--clear", "--python", sys.executable, str(folder)], check=True)
            subprocess.run(
                [*fill, "--python", str(python), *pins.split("\n")],
                check=True, timeout=PATIENCE_S, env=package_sources(),
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            print(f"left out: {name} can't be installed ({error})")
            return None
    [site] = folder.glob("lib/python*/site-packages")
    (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    stamp.write_text(pins, "utf-8")
    return python


if __name__ == "__main__":
    for each in sys.argv[1:] or PINS:
        print(each, python_of(each))
