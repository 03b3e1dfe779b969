"""Pin every `*.in` here, with all that it pulls in, into the `*.txt` beside it (`make lock`).

Pins are names, versions and the hashes of their files, so that any index will do and none can give another file.
Hashes are kept of the files that 3.11 to 3.13 take on x86-64 Linux, and of the source. torch's CPU build has none: it
is not on the default index, and comes from a folder or from PyTorch's own index, a file for each Python.

Everything that may share an environment is resolved together once; each file is then its own part of that one answer,
so that no two disagree. gpu.txt may differ only in what vLLM's CUDA build pins for itself (`CUDA_OWN`). A version that
is pinned already stays, unless `--upgrade` is given. Only the default index is asked, so that no mirror's gaps are
pinned; torch's CPU build is looked for in pip's find-links first, then on PyTorch's own index.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from install import HERE, TORCH_INDEX, UV, bare, package_sources, read_pins

#: vLLM's two builds pin these each for itself.
CUDA_OWN = frozenset({"apache-tvm-ffi", "setuptools", "torch", "triton"})

TITLES = {
    "build": "What installs the rest: uv, and modelyard's own build backend",
    "server": "The server",
    "cpu": "The engine where there is no GPU",
    "parquet": "Datasets in Parquet, beside the server's file",
    "train": "Fine-tuning, beside an engine's file, which brings torch",
    "dev": "The server with its tests and checks",
    "clients": "Other people's clients for the tests with real vLLM, beside an engine's file",
    "gpu": "The engine on NVIDIA GPUs",
}
HEADER = """\
# {title}: pinned from {name}.in by `make lock` (uv pip compile), for Python 3.11 to 3.13 on x86-64 Linux.
# Nothing is missing: `pip install --no-deps -r` or `uv pip install --no-deps -r` takes it from any index.
"""
PYTHONS = ("cp311", "cp312", "cp313")


def resolve(sources: list[Path], output: Path, env: dict[str, str], *options: str) -> None:
    """Pin `sources` into `output`; pins that lie there already are kept where they still fit."""
    command = [str(UV), "pip", "compile", "--quiet", "--no-header", "--no-annotate", *options]
    # Nothing here needs another version, or one package more, on 3.12 and 3.13.
    command += ["--python-version=3.11", "--python-platform=x86_64-manylinux_2_28"]
    command += [f"--output-file={output}", *map(str, sources)]
    subprocess.run(command, check=True, cwd=HERE, env=env, stdout=subprocess.DEVNULL)


def hashes_of(pins: list[str], folder: Path, env: dict[str, str]) -> dict[str, list[str]]:
    """Return the hashes of the files of each pin, by its project's name; none of a local build."""
    known = [pin for pin in pins if "+" not in pin]
    asked, found = folder / "asked.in", folder / "pylock.asked.toml"
    asked.write_text("\n".join(known) + "\n", "utf-8")
    found.unlink(missing_ok=True)
    command = [str(UV), "pip", "compile", "--quiet", "--no-deps", "--no-header", "--universal", "--python-version=3.11"]
    command += ["--format=pylock.toml", f"--output-file={found}", str(asked)]
    default = {key: value for key, value in env.items() if key not in {"UV_FIND_LINKS", "UV_INDEX"}}
    subprocess.run(command, check=True, cwd=HERE, env=default, stdout=subprocess.DEVNULL)
    hashes: dict[str, list[str]] = {}
    for package in tomllib.loads(found.read_text("utf-8"))["packages"]:
        files = [file for file in package.get("wheels", []) if is_taken(file["url"].rpartition("/")[2])]
        files += [package["sdist"]] if "sdist" in package else []
        hashes[package["name"]] = sorted(file["hashes"]["sha256"] for file in files)
    return hashes


def is_taken(wheel: str) -> bool:
    """Return whether a wheel is for one of `PYTHONS` on x86-64 Linux."""
    python, abi, platform = wheel.partition("#")[0].removesuffix(".whl").split("-")[-3:]
    pythons = python.split(".")
    # Extensions for all later versions name the first one, such as cp38.
    is_stable = abi == "abi3" and any(int(tag[3:] or 0) <= 13 for tag in pythons if re.fullmatch(r"cp3\d+", tag))
    fits = is_stable or "py3" in pythons or bool(set(PYTHONS) & {*pythons} and not abi.endswith("t"))
    return fits and any(
        tag == "any" or (tag.endswith("x86_64") and "linux" in tag and "musl" not in tag) for tag in platform.split(".")
    )


def project_name(pin: str) -> str:
    return re.split(r"[\s=;\[]", pin, maxsplit=1)[0].lower()


def main(options: list[str]) -> None:
    env = {key: value for key, value in package_sources().items() if key not in {"UV_INDEX", "UV_INDEX_STRATEGY"}}
    folders = [Path(folder) for folder in env.get("UV_FIND_LINKS", "").split(",") if folder]
    if not any(any(folder.glob("torch-*cpu*.whl")) for folder in folders):
        env["UV_INDEX"] = os.environ.get("TORCH_INDEX") or TORCH_INDEX
    old = [file for file in HERE.glob("*.txt") if file.name not in {"gpu.txt", "overrides.txt"}]
    with tempfile.TemporaryDirectory() as folder:
        together, without_own = Path(folder) / "together.txt", Path(folder) / "without_own.txt"
        together.write_text("\n".join(map(bare, read_pins(old))), "utf-8")
        parts = [HERE / f"{name}.in" for name in TITLES if name != "gpu"]
        resolve(parts, together, env, "--override=overrides.txt", *options)
        without_own.write_text("\n".join(p for p in read_pins([together]) if project_name(p) not in CUDA_OWN), "utf-8")
        for name in TITLES:
            output = Path(folder) / f"{name}.txt"
            if name == "gpu":
                if (HERE / "gpu.txt").exists():
                    output.write_text("\n".join(map(bare, read_pins([HERE / "gpu.txt"]))), "utf-8")
                # A folder of wheels that has torch's CPU build would win over the CUDA one.
                cuda = {key: value for key, value in env.items() if key not in {"UV_FIND_LINKS", "UV_INDEX"}}
                resolve([HERE / "gpu.in"], output, cuda, f"--constraint={without_own}", *options)
            else:
                resolve([HERE / f"{name}.in"], output, env, f"--constraint={together}", "--override=overrides.txt")
            # Each engine's file brings its own versions of these.
            left_out = CUDA_OWN if name in {"train", "clients"} else frozenset()
            pins = [pin for pin in read_pins([output]) if project_name(pin) not in left_out]
            hashes = hashes_of(pins, Path(folder), env)
            pins = [
                " ".join([pin, *(f"--hash=sha256:{one}" for one in hashes.get(project_name(pin), []))]) for pin in pins
            ]
            header = HEADER.format(title=TITLES[name], name=name)
            (HERE / f"{name}.txt").write_text(header + "\n".join(pins) + "\n", "utf-8")
            print(f"{name}.txt: {len(pins)} packages", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
