"""Real databases and a real S3 server for whichever test asks for them.

Each worker of a parallel run starts its own servers, when its first test wants one: PostgreSQL is ready in about
a second and Swift in less, and nobody has to know who uses a shared one last. A test gets a database of its own, and
a prefix of its own in a bucket. A part that is not installed skips its tests, unless MODELYARD_TEST_REQUIRE names it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import pytest

from modelyard.storage import FolderStorage, S3Storage, Storage
from tests.servers import postgres, programs, swift_s3
from tests.servers.lifetime import ServerMissing
from tests.servers.programs import Programs

ACCESS_KEY, SECRET_KEY = "modelyard:tests", "not-a-secret"


def missing(part: str, why: str) -> NoReturn:
    """Skip the test for want of `part`; fail it if MODELYARD_TEST_REQUIRE (comma-separated) names the part."""
    if part in os.environ.get("MODELYARD_TEST_REQUIRE", "").split(","):
        pytest.fail(f"{part} is required here: {why}", pytrace=False)
    pytest.skip(f"no {part}: {why}")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL server's database `postgres`, for a superuser."""
    try:
        with postgres.running() as url:
            yield url
    except ServerMissing as error:
        missing("postgres", str(error))


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a fresh, empty database, as a user would configure it: the test runs once on each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'test.db'}"
        return
    server: str = request.getfixturevalue("postgres_server")
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
        yield server.replace("/postgres?", f"/{name}?")
        # FORCE: a test that failed may have left connections.
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@dataclass(frozen=True)
class S3Server:
    """A running S3 server with one bucket; `client()` looks at it as its operator would."""

    endpoint_url: str
    bucket: str
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY

    def client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.Session(self.access_key, self.secret_key).client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint_url,
            config=Config(connect_timeout=5, read_timeout=30, s3={"addressing_style": "path"}),
        )


@pytest.fixture(scope="session")
def running_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    try:
        with swift_s3.running(tmp_path_factory.mktemp("swift"), ACCESS_KEY, SECRET_KEY) as address:
            server = S3Server(address, "modelyard-tests")
            client = server.client()
            client.create_bucket(Bucket=server.bucket)
            client.close()
            yield server
    except ServerMissing as error:
        missing("s3", str(error))


@pytest.fixture
def s3_server(running_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """A real S3 server, with boto3's own settings in the environment as a user would have them."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.upper() in _PROXIES]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", running_s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", running_s3.secret_key)
    return running_s3


@pytest.fixture(scope="session")
def vllm_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """A process with vLLM imported, which forks for each program that a test has it run."""
    if importlib.util.find_spec("vllm") is None:
        missing("engine", "vLLM is not installed: make test installs it")
    with programs.forking(tmp_path_factory.mktemp("programs") / "log") as found:
        yield found


_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """An empty storage: the test runs once on each kind."""
    opened: Storage
    if request.param == "folder":
        opened = FolderStorage(tmp_path / "objects", tmp_path / "upload.key")
    else:
        server: S3Server = request.getfixturevalue("s3_server")
        opened = S3Storage(server.bucket, f"test-{uuid.uuid4().hex}", server.endpoint_url)
    yield opened
    asyncio.run(opened.close())


@pytest.fixture(scope="session")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a library with NVML's interface, compiled here: the real package nvidia-ml-py talks to it."""
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("nvml.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"), str(source)], check=True)
    return folder
