"""Settings come from where they are said to, and a mistake in them stops the start with one clear line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from modelyard.errors import StartRefused
from modelyard.settings import FOR_COMPOSE, Settings, load_settings, unread_names


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing configured: an empty working folder, and none of our names in the environment."""
    for name in [name for name in os.environ if name.upper().startswith(("MODELYARD_", "HF_", "AWS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused() -> str:
    with pytest.raises(StartRefused) as refusal:
        load_settings()
    message = str(refusal.value)
    assert "\n" not in message
    return message


def test_nothing_needs_to_be_configured() -> None:
    settings = load_settings()
    assert (settings.host, settings.port, settings.admin_key) == ("127.0.0.1", 8080, None)
    assert settings.data_dir == Path.home() / ".modelyard"
    assert settings.models_dir == settings.data_dir / "models"
    assert settings.jobs_dir == settings.data_dir / "jobs"


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "MODELYARD_PORT": "9000",
        "MODELYARD_DATA_DIR": "data",
        "MODELYARD_CORS_ORIGINS": " https://one.example.org/, https://two.example.org ,",
        "MODELYARD_ENGINE_MAX_LORA_RANK": "128",
        "MODELYARD_STORE_QUOTA_GIB": "0.5",
        "HF_ENDPOINT": "https://mirror.example.org/",
        "HF_TOKEN": "hf_1234",
    }.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert settings.port == 9000
    assert settings.data_dir == tmp_path / "data"
    assert settings.cors_origins == ("https://one.example.org", "https://two.example.org")
    assert (settings.engine_max_lora_rank, settings.store_quota_gib) == (128, 0.5)
    assert (settings.hf_endpoint, settings.hf_token) == ("https://mirror.example.org", "hf_1234")


def test_the_command_line_comes_before_the_environment_and_that_before_the_file(
    monkeypatch: pytest.MonkeyPatch, bare: Path
) -> None:
    (bare / ".env").write_text(
        "# a comment with MODELYARD_NONSENSE=1\n"
        "MODELYARD_PORT=1\nMODELYARD_MAX_BODY_MIB=1\nMODELYARD_MAX_DOWNLOADS='1'\n"
        'export HF_TOKEN="hf_file"\nSOMETHING_ELSE=1\n'
    )
    monkeypatch.setenv("MODELYARD_PORT", "2")
    monkeypatch.setenv("MODELYARD_MAX_BODY_MIB", "2")
    settings = load_settings(port=3)
    assert (settings.port, settings.max_body_mib, settings.max_downloads) == (3, 2, 1)
    assert settings.hf_token == "hf_file"


@pytest.mark.parametrize("name", ["PORT", "STORE_QUOTA_GIB", "ADMIN_KEY", "IMPORT_DIR", "CORS_ORIGINS", "LOG_LEVEL"])
def test_an_empty_value_means_unset(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"MODELYARD_{name}", "")
    assert load_settings() == Settings(_env_file=None)


@pytest.mark.parametrize(
    ("name", "meant"), [("MODELYARD_PROT", "MODELYARD_PORT"), ("MODELYARD_DATADIR", "MODELYARD_DATA_DIR")]
)
def test_a_misspelt_name_is_refused_with_the_one_that_was_meant(
    monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    monkeypatch.setenv(name, "value-that-may-be-secret")
    assert refused() == f"There is no setting {name}. Did you mean {meant}?"


def test_an_unknown_name_that_resembles_nothing_is_refused_without_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_XYZZY", "1")
    assert refused() == "There is no setting MODELYARD_XYZZY."


@pytest.mark.parametrize("line", ["MODELYARD_PROT=1", "  export MODELYARD_PROT=1", "modelyard_prot = 1"])
def test_a_misspelt_name_in_the_file_is_refused_and_the_file_is_named(bare: Path, line: str) -> None:
    (bare / ".env").write_text(f"MODELYARD_PORT=1\n{line}\n")
    assert refused() == "There is no setting MODELYARD_PROT (in .env). Did you mean MODELYARD_PORT?"


def test_the_names_of_the_s3_stores_key_are_read_from_the_file_too(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION")
    (bare / ".env").write_text("".join(f"{name}=hunter2-{name}\n" for name in names))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    found = load_settings()
    assert (found.aws_access_key_id, found.aws_secret_access_key) == tuple(f"hunter2-{name}" for name in names[:2])
    assert (found.aws_session_token, found.aws_default_region) == ("hunter2-AWS_SESSION_TOKEN", "eu-north-1")
    assert "hunter2" not in repr(found)
    assert unread_names() == []


def test_a_name_in_the_file_that_nothing_reads_is_said(bare: Path) -> None:
    (bare / ".env").write_text(
        "MODELYARD_PORT=1\nhf_token=x\nPORT=9000\nADMIN_KEY=hunter2\nAWS_REGION=x\nAWS_PROFILE=x\nHTTPS_PROXY=x\n"
        + "".join(f"{name}=x\n" for name in FOR_COMPOSE)
    )
    elsewhere = "If a library is to see it, set it in the environment."
    assert unread_names() == [
        "Nothing reads ADMIN_KEY from .env. Did you mean MODELYARD_ADMIN_KEY?",
        f"Nothing reads AWS_PROFILE from .env. {elsewhere}",
        "Nothing reads AWS_REGION from .env. Did you mean AWS_DEFAULT_REGION?",
        f"Nothing reads HTTPS_PROXY from .env. {elsewhere}",
        "Nothing reads PORT from .env. Did you mean MODELYARD_PORT?",
    ]


@pytest.mark.parametrize("line", ["MODELYARD_PORT 81", "MODELYARD_ADMIN_KEY: hunter22", "MODELYARD_DATA_DIR='/data"])
def test_a_line_of_the_file_that_sets_nothing_is_refused_by_its_number_alone(bare: Path, line: str) -> None:
    (bare / ".env").write_text(f"# first\nMODELYARD_GRACE_S=7\n{line}\n")
    assert refused() == f"{bare / '.env'}, line 3: write NAME=VALUE."


def test_a_file_that_is_not_text_is_refused(bare: Path) -> None:
    (bare / ".env").write_bytes("MODELYARD_PORT=1\n".encode("utf-16"))
    assert refused() == f"{bare / '.env'} is not text in UTF-8. Save it as such."


def test_a_byte_order_mark_at_the_start_of_the_file_is_no_part_of_the_first_name(bare: Path) -> None:
    (bare / ".env").write_bytes(b"\xef\xbb\xbfMODELYARD_PORT=81\n")
    assert load_settings().port == 81


@pytest.mark.parametrize(("name", "value", "message"), [
    ("PORT", "web", "MODELYARD_PORT=web: input should be a valid integer"),
    ("PORT", "65536", "MODELYARD_PORT=65536: input should be less than or equal to 65535."),
    ("ENGINE_DTYPE", "int4", "MODELYARD_ENGINE_DTYPE=int4: input should be 'auto', 'float32', 'bfloat16' or"),
    ("ENGINE_MAX_LORA_RANK", "9", "MODELYARD_ENGINE_MAX_LORA_RANK=9: input should be 8, 16, 32,"),
    ("ENGINE_MAX_LORA_RANK", "high", "MODELYARD_ENGINE_MAX_LORA_RANK=high: input should be 8, 16, 32,"),
    ("STORAGE_URL", "/objects", "MODELYARD_STORAGE_URL=/objects: must start with file:/// or s3://."),
    ("S3_ENDPOINT_URL", "store:9000", "MODELYARD_S3_ENDPOINT_URL=store:9000: must be the address of a store, such as"),
    ("S3_ENDPOINT_URL", "http://[x", "MODELYARD_S3_ENDPOINT_URL=http://[x: must be the address of a store"),
    ("S3_ENDPOINT_URL", "http://store/bucket", "MODELYARD_S3_ENDPOINT_URL=http://store/bucket: must be the address"),
    ("DATABASE_URL", "mysql://h/n", "MODELYARD_DATABASE_URL=mysql://h/n: must start with sqlite:/// or postgresql://."),
    ("DATABASE_URL", "sqlite:///:memory:", "MODELYARD_DATABASE_URL=sqlite:///:memory:: must name a file"),
    ("DATABASE_URL", "sqlite:///", "MODELYARD_DATABASE_URL=sqlite:///: must name a file"),
    ("GRACE_S", "0", "MODELYARD_GRACE_S=0: input should be greater than or equal to 1."),
    ("GRACE_S", "one\ntwo", "MODELYARD_GRACE_S=one two: input should be a valid number"),
])  # fmt: skip
def test_a_bad_value_is_refused_in_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(f"MODELYARD_{name}", value)
    assert refused().startswith(message)


@pytest.mark.parametrize(("name", "value"), [
    ("MODELYARD_ADMIN_KEY", "hunter2"),
    ("MODELYARD_DATABASE_URL", "mysql://someone:hunter2@db.example.org/name"),
    ("MODELYARD_DATABASE_URL", "mysql://someone:a/hunter2@x@db.example.org/name"),
    ("MODELYARD_STORAGE_URL", "https://someone:hunter2@store.example.org/bucket"),
    ("MODELYARD_S3_ENDPOINT_URL", "https://someone:hunter2@store.example.org"),
])  # fmt: skip
def test_a_secret_is_never_in_the_message(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    message = refused()
    assert message.startswith(name)
    assert "hunter2" not in message
    assert "someone" not in message


def test_secrets_are_not_shown_with_the_settings() -> None:
    settings = Settings(admin_key="hunter2-hunter2", HF_TOKEN="hf_hunter2")
    assert (settings.admin_key, settings.hf_token) == ("hunter2-hunter2", "hf_hunter2")
    assert "hunter2" not in repr(settings) + str(settings)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "modelyard.example.org"])
def test_an_address_that_others_reach_needs_a_key(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("MODELYARD_HOST", host)
    assert refused().startswith(f"MODELYARD_HOST={host} is reachable from other machines: set MODELYARD_ADMIN_KEY")
    monkeypatch.setenv("MODELYARD_ADMIN_KEY", "")
    assert "MODELYARD_ADMIN_KEY" in refused()
    monkeypatch.setenv("MODELYARD_ADMIN_KEY", "long enough")
    assert load_settings().host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_key(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("MODELYARD_HOST", host)
    assert load_settings().host == host


def test_a_python_that_is_a_link_stays_one(monkeypatch: pytest.MonkeyPatch, bare: Path) -> None:
    (bare / "python").symlink_to("/usr/bin/env")
    monkeypatch.setenv("MODELYARD_ENGINE_PYTHON", "python")
    assert load_settings().engine_python == bare / "python"


def test_settings_do_not_change_after_the_start() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]  # it is the point
