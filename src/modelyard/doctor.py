"""`modelyard doctor`: one line per thing that the server needs, OK, WARN or FAIL, and what to do about the last two.

Looks, and changes nothing that stays: what the server would make at its first start is not made here. Safe beside a
running server. WARN is for what some use of Modelyard does without; only FAIL makes the exit status 1. What takes
longest, importing the engine, is done in a child with the Python that would run it.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rich.console import Console
from rich.text import Text
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from modelyard.engine.plugins import cures
from modelyard.errors import ModelyardError, StartRefused
from modelyard.foundation import configured_database, shown
from modelyard.hardware import GIB, this_machine
from modelyard.server_lock import ServerLock
from modelyard.settings import Settings, load_settings, unread_names
from modelyard.storage import Storage, open_storage

HUB_TIMEOUT_S = 10.0
ENGINE_TIMEOUT_S = 180.0
#: What vLLM and its three processes take before a model's first weight.
ENGINE_MEMORY_GIB = 4
ROOM_FOR_A_MODEL_GIB = 20

_ASK_ENGINE = """
import importlib.metadata, json, torch, vllm
cuda = torch.version.cuda
plugins = [one.name for one in importlib.metadata.entry_points(group="vllm.general_plugins")]
print(json.dumps([vllm.__version__, torch.__version__, cuda, torch.cuda.device_count() if cuda else 0, plugins]))
"""

# By name alone: to import them takes seconds, and what they are built on the engine's check has imported.
_ASK_TRAINER = """
import importlib.metadata, importlib.util, json
names = ["torch", "transformers", "peft", "accelerate", "rouge_score", "tensorboardX", "modelyard"]
missing = [name for name in names if importlib.util.find_spec(name) is None]
print(json.dumps([missing, {name: importlib.metadata.version(name) for name in names[:4] if name not in missing}]))
"""


class Verdict(StrEnum):
    """The outcome of a check."""

    #: It works.
    OK = "OK"
    #: Some uses will not work.
    WARN = "WARN"
    #: The server, or every model, will not work.
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """The line of one check. `todo` says what to do, for WARN and FAIL."""

    verdict: Verdict
    what: str
    found: str
    todo: str = ""


def run_doctor() -> int:
    """Check this machine and the settings in force, print a line each, and return 0, or 1 if something must be mended.

    Blocks for up to some minutes where the engine's first import is slow.
    """
    console = Console(highlight=False, soft_wrap=True)
    try:
        settings = load_settings()
    except StartRefused as refusal:
        findings = [
            *check_python(),
            Finding(Verdict.FAIL, "settings", str(refusal), "Correct the environment or .env."),
        ]
        for finding in findings:
            _print(console, finding)
        return 1
    failed = False
    for check in CHECKS:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        if not console.is_terminal and check is check_engine:
            console.print(f"...   {name}: importing vLLM takes some seconds")
        with console.status(f"Checking: {name}"):
            found = list(check(settings))
        for finding in found:
            _print(console, finding)
            failed = failed or finding.verdict is Verdict.FAIL
    return 1 if failed else 0


def _print(console: Console, finding: Finding) -> None:
    style = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}[finding.verdict]
    line = Text(f"{finding.verdict:<5} ", style=style)
    line.append(f"{finding.what}: {finding.found}", style="")
    console.print(line)
    if finding.todo:
        console.print(Text(f"      {finding.todo}", style="dim"))


def check_python(_settings: Settings | None = None) -> Iterator[Finding]:
    """Python and the platform."""
    yield Finding(Verdict.OK, "Python", f"{platform.python_version()} ({sys.executable})")
    system, machine = platform.system(), platform.machine()
    if system != "Linux":
        yield Finding(Verdict.FAIL, "platform", f"{system} {machine}", "Modelyard runs on Linux.")
    elif machine != "x86_64":
        todo = "The pinned engine packages are for x86_64: install vLLM for this machine yourself."
        yield Finding(Verdict.WARN, "platform", f"{system} {machine}", todo)
    else:
        yield Finding(Verdict.OK, "platform", f"{system} {platform.release()}, {machine}")


def check_settings(settings: Settings) -> Iterator[Finding]:
    """Check the settings, and show them without their secrets."""
    names = sorted(name for name in os.environ if name.startswith("MODELYARD_"))
    sources = [f"{len(names)} from the environment"] if names else []
    sources += [str(Path(".env").absolute())] if Path(".env").is_file() else []
    yield Finding(Verdict.OK, "settings", " and ".join(sources) or "all are the defaults")
    for line in unread_names():
        yield Finding(Verdict.WARN, "settings", line, "Correct .env, or take it out.")
    key = "with a key" if settings.admin_key is not None else "no key: for this machine alone"
    yield Finding(Verdict.OK, "address", f"{settings.host}:{settings.port}, {key}")


def check_data_folder(settings: Settings) -> Iterator[Finding]:
    """The data folder: writable, whose, and with how much room."""
    folder = settings.data_dir
    there = _nearest(folder)
    found = f"{folder}" + ("" if there == folder else " (made at the first start)")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        todo = "Make it writable for this user, or name another one with MODELYARD_DATA_DIR."
        yield Finding(Verdict.FAIL, "data folder", f"{there} cannot be written to: {error.strerror}", todo)
        return
    yield Finding(Verdict.OK, "data folder", found)
    if (folder / "server.lock").exists():
        lock = ServerLock(folder / "server.lock")
        if lock.take():
            lock.release()
            yield Finding(Verdict.OK, "server", "none runs on this data folder")
        else:
            yield Finding(Verdict.OK, "server", f"process {lock.holder()} runs on this data folder")
    free_gib = shutil.disk_usage(there).free / GIB
    if free_gib <= settings.disk_reserve_gib:
        todo = f"MODELYARD_DISK_RESERVE_GIB={settings.disk_reserve_gib:g} stay free: no model can be added."
        yield Finding(Verdict.FAIL, "disk", f"{free_gib:.1f} GiB free", todo)
    elif free_gib < ROOM_FOR_A_MODEL_GIB:
        todo = "A model of 8 billion weights takes 16 GiB."
        yield Finding(Verdict.WARN, "disk", f"{free_gib:.1f} GiB free", todo)
    else:
        yield Finding(Verdict.OK, "disk", f"{free_gib:.0f} GiB free")


def check_memory(_settings: Settings) -> Iterator[Finding]:
    """Free memory and processors."""
    machine = this_machine()
    gib = machine.memory_available_bytes / GIB
    found = f"{gib:.1f} GiB free, {len(machine.cpus)} processors"
    if gib < ENGINE_MEMORY_GIB:
        todo = f"An engine takes about {ENGINE_MEMORY_GIB} GiB before its model: end other programs."
        yield Finding(Verdict.WARN, "memory", found, todo)
    else:
        yield Finding(Verdict.OK, "memory", found)


def check_gpu(_settings: Settings) -> Iterator[Finding]:
    """GPUs and their driver."""
    has_driver = this_machine().has_gpu
    tool = shutil.which("nvidia-smi")
    if tool is None:
        if has_driver:
            yield Finding(
                Verdict.WARN, "GPU", "a driver is loaded, but there is no nvidia-smi", "Install the driver's tools."
            )
        else:
            yield Finding(Verdict.OK, "GPU", "none: engines run on the CPU")
        return
    query = [tool, "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding(
            Verdict.WARN, "GPU", f"nvidia-smi does not run: {error}", "Reinstall the driver, or restart the machine."
        )
        return
    if done.returncode != 0:
        reason = (done.stdout + done.stderr).strip().splitlines()[:1]
        yield Finding(
            Verdict.WARN, "GPU", f"nvidia-smi failed: {''.join(reason)}", "Mend the driver; until then, the CPU."
        )
        return
    for line in done.stdout.strip().splitlines():
        yield Finding(Verdict.OK, "GPU", line.strip())


def check_engine(settings: Settings) -> Iterator[Finding]:
    """vLLM, imported by the Python that would run it."""
    python = str(settings.engine_python or sys.executable)
    todo = "Install it: make demo does, or python3 requirements/install.py engine."
    try:
        asked = subprocess.run(
            [python, "-c", _ASK_ENGINE], capture_output=True, text=True, timeout=ENGINE_TIMEOUT_S, check=False
        )
    except OSError as error:
        todo = "Correct MODELYARD_ENGINE_PYTHON." if settings.engine_python else ""
        yield Finding(Verdict.FAIL, "engine", f"{python} does not run: {error.strerror}", todo)
        return
    except subprocess.TimeoutExpired:
        yield Finding(
            Verdict.FAIL, "engine", f"importing vLLM took longer than {ENGINE_TIMEOUT_S:.0f} s", "Is the disk slow?"
        )
        return
    if asked.returncode != 0:
        reason = (asked.stderr.strip().splitlines() or [f"exit status {asked.returncode}"])[-1]
        yield Finding(Verdict.FAIL, "engine", f"vLLM cannot be imported: {reason}", todo)
        return
    version, torch, cuda, gpus, plugins = json.loads(asked.stdout.splitlines()[-1])
    found = f"vLLM {version}, torch {torch}"
    if lacking := sorted(set(cures.WITHOUT) - set(plugins)):
        todo = f"Install this Modelyard in it as well, else {cures.WITHOUT[lacking[0]]}."
        yield Finding(Verdict.WARN, "cures for vLLM", f"{python} lacks {', '.join(lacking)}", todo)
    if this_machine().has_gpu and not cuda:
        todo = "It is built for the CPU though there is a GPU: ENGINE=gpu python3 requirements/install.py engine."
        yield Finding(Verdict.WARN, "engine", found, todo)
    elif cuda and gpus == 0:
        yield Finding(
            Verdict.FAIL, "engine", f"{found}, which sees no GPU", "Mend the driver, or install with ENGINE=cpu."
        )
    else:
        yield Finding(Verdict.OK, "engine", found)


def check_training(settings: Settings) -> Iterator[Finding]:
    """Check the packages that trainings need, looked up by the Python that would run them."""
    python = str(settings.trainer_python or sys.executable)
    todo = "Fine-tuning needs it: make demo installs it, or python3 requirements/install.py train."
    try:
        asked = subprocess.run(
            [python, "-c", _ASK_TRAINER], capture_output=True, text=True, timeout=ENGINE_TIMEOUT_S, check=False
        )
        missing, versions = json.loads(asked.stdout.splitlines()[-1])
    except OSError as error:
        todo = "Correct MODELYARD_TRAINER_PYTHON." if settings.trainer_python else ""
        yield Finding(Verdict.WARN, "training", f"{python} does not run: {error.strerror}", todo)
        return
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        yield Finding(Verdict.WARN, "training", f"{python} does not tell what it has", todo)
        return
    if missing:
        yield Finding(Verdict.WARN, "training", f"not installed: {', '.join(missing)}", todo)
        return
    yield Finding(Verdict.OK, "training", ", ".join(f"{name} {version}" for name, version in versions.items()))


def check_hub(settings: Settings) -> Iterator[Finding]:
    """The Hugging Face hub."""
    token = "with a token" if settings.hf_token is not None else "no token: public models only"
    try:
        request = urllib.request.Request(settings.hf_endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            todo = "It is down, or HF_ENDPOINT is wrong."
            yield Finding(Verdict.WARN, "hub", f"{settings.hf_endpoint} answers {error.code}", todo)
            return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        todo = "Models can still come from MODELYARD_IMPORT_DIR; HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy."
        yield Finding(Verdict.WARN, "hub", f"{settings.hf_endpoint} cannot be reached: {reason}", todo)
        return
    yield Finding(Verdict.OK, "hub", f"{settings.hf_endpoint} answers, {token}")


def check_database(settings: Settings) -> Iterator[Finding]:
    """The database."""
    try:
        url = configured_database(settings)
    except StartRefused as refusal:
        yield Finding(Verdict.FAIL, "database", str(refusal))
        return
    address = shown(url)
    is_sqlite = url.get_backend_name() == "sqlite"
    if is_sqlite and not Path(url.database or "").exists():
        yield Finding(Verdict.OK, "database", f"{address} (made at the first start)")
        return
    options: dict[str, object] = {} if is_sqlite else {"connect_timeout": 5}
    engine = create_engine(url.set(drivername="sqlite" if is_sqlite else "postgresql+psycopg"), connect_args=options)
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        yield Finding(
            Verdict.FAIL, "database", f"{address}: {reason}", "Check MODELYARD_DATABASE_URL and the server it names."
        )
    else:
        yield Finding(Verdict.OK, "database", address)
    finally:
        engine.dispose()


def check_storage(settings: Settings) -> Iterator[Finding]:
    """Where objects are kept."""
    place = settings.storage_url or str(settings.data_dir / "objects")
    if not settings.storage_url.startswith("s3:") and not settings.data_dir.exists():
        yield Finding(Verdict.OK, "storage", f"{place} (made at the first start)")
        return
    try:
        asyncio.run(_look_at(open_storage(settings)))
    except (ModelyardError, StartRefused) as error:
        todo = "Check MODELYARD_STORAGE_URL, MODELYARD_S3_ENDPOINT_URL and AWS_*."
        yield Finding(Verdict.FAIL, "storage", f"{place}: {error}", todo)
    else:
        yield Finding(Verdict.OK, "storage", place)


async def _look_at(storage: Storage) -> None:
    try:
        await storage.check()
    finally:
        await storage.close()


def check_imports(settings: Settings) -> Iterator[Finding]:
    """The folder that local models come from, where one is set."""
    folder = settings.import_dir
    if folder is None:
        return
    if folder.is_dir():
        yield Finding(Verdict.OK, "imports", str(folder))
    else:
        todo = "Make it, or correct MODELYARD_IMPORT_DIR."
        yield Finding(Verdict.WARN, "imports", f"there is no folder {folder}", todo)


CHECKS: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
    check_python, check_settings, check_data_folder, check_memory, check_gpu, check_database, check_storage,
    check_imports, check_hub, check_engine, check_training,
)  # fmt: skip


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())
