"""One frozen `Settings`, read from `MODELYARD_*` in the environment and in `.env`.

Every field's docstring is what `.env.example` and the manual's table say of it; a test holds them together.
An unknown `MODELYARD_*` name or a bad value stops the start with one clear line (`load_settings`).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from modelyard.errors import StartRefused

PREFIX = "MODELYARD_"
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

#: A page's, an app's or an extension's origin. A sandboxed page or one from a file has null; in Electron, file://.
ORIGIN = re.compile(
    r"^(?:[a-z][a-z0-9+.-]{0,63}://([a-z0-9._~-]{1,253}|\[[0-9a-f:.]{2,45}\])(:[0-9]{1,5})?|null|file://)",
    re.IGNORECASE,
)
#: No credentials, which belong elsewhere, and no path, which boto3 would put before every bucket.
ENDPOINT = re.compile(r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?/?")
#: Settings that others named.
FOREIGN = ("hf_", "aws_")
#: What `.env` may hold for docker-compose.yml alone.
FOR_COMPOSE = frozenset({"POSTGRES_PASSWORD", "GARAGE_RPC_SECRET"})

DType = Literal["auto", "float32", "bfloat16", "float16"]


class Settings(BaseSettings):
    """The server's configuration. Sizes are in GiB or MiB, times in seconds, as each name says."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        # Some editors begin a file with a mark that would become a part of the first name.
        env_file_encoding="utf-8-sig",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
    )

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs MODELYARD_ADMIN_KEY."""
    port: int = Field(default=8080, ge=0, le=65535)
    """TCP port to listen on; 0 picks a free one and prints it."""
    data_dir: Path = Path("~/.modelyard")
    """Folder for everything that the embedded default keeps: database, objects, models, jobs and their logs."""
    database_url: str = ""
    """sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME. Empty: a SQLite file in the data folder."""
    storage_url: str = ""
    """file:///PATH or s3://BUCKET/PREFIX. Empty: the folder `objects` in the data folder."""
    s3_endpoint_url: str | None = None
    """Address of an S3-compatible store. Empty: Amazon's. Its credentials are AWS_ACCESS_KEY_ID and the next ones."""
    storage_timeout_s: float = Field(default=30.0, ge=1.0, le=3600.0)
    """Seconds without an answer after which a request to the storage, of either kind, is given up (503)."""
    import_dir: Path | None = None
    """Folder whose sub-folders may be added as models by name (local:NAME). Empty: no imports."""
    admin_key: str | None = Field(default=None, min_length=8, repr=False)
    """Key that every request must carry (Authorization: Bearer KEY or X-API-KEY: KEY), /health aside."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Origins that may call, comma-separated: https://chat.example.org, app://notes, null (pages from files)."""
    wrong_key_delay_s: float = Field(default=1.0, ge=0.0, le=60.0)
    """Longest that the answer to a wrong key is held back, after some from the same address, in seconds. 0: never."""
    max_connections: int = Field(default=4096, ge=1, le=1_000_000)
    """Client connections at the same time; more get 503. Fewer where open files are limited (256 kept, 2 for each)."""
    max_header_kib: int = Field(default=64, ge=1, le=1024)
    """Largest address and headers of a request together, in KiB; more is 431, as are more than 256 headers."""
    header_timeout_s: float = Field(default=10.0, ge=0.1, le=3600.0)
    """Seconds in which the headers of a request must have come; otherwise 408."""
    body_timeout_s: float = Field(default=60.0, ge=0.1, le=86400.0)
    """Seconds in which a request's body must grow by a KiB or end; otherwise 408, uploads included."""
    keep_alive_s: float = Field(default=5.0, ge=0.1, le=3600.0)
    """Seconds after which a connection without a request is closed."""
    max_body_mib: int = Field(default=32, ge=1, le=4096)
    """Largest body of a request to an engine, in MiB."""
    request_max_n: int = Field(default=128, ge=1, le=16384)
    """Most answers that a request may ask for (n)."""
    request_max_prompts: int = Field(default=2048, ge=1, le=1000000)
    """Most texts in a request (prompt, input), and most answers to all of them together."""
    request_max_stops: int = Field(default=64, ge=1, le=100000)
    """Most stop strings in a request, and most bad_words."""
    request_max_tools: int = Field(default=512, ge=1, le=100000)
    """Most tools in a request."""
    request_max_logit_biases: int = Field(default=1024, ge=1, le=10000000)
    """Most tokens in a request's logit_bias."""
    request_max_choices: int = Field(default=4096, ge=1, le=1000000)
    """Most choices and values of enums that a request's answer may be held to."""
    request_max_schema_kib: int = Field(default=512, ge=1, le=65536)
    """Largest schemas, grammars and tools of a request, together, in KiB."""
    request_max_schema_depth: int = Field(default=64, ge=4, le=1000)
    """Most levels of a request's schemas, one within the other."""
    request_max_schema_properties: int = Field(default=5000, ge=1, le=1000000)
    """Most properties in a request's schemas; one object may have 1,000 of them."""
    request_max_schema_ms: int = Field(default=5000, ge=1, le=10000000)
    """Most work in a request's schemas, patterns and grammars, by estimate, in ms of a processor."""
    request_max_pattern_length: int = Field(default=8192, ge=1, le=1000000)
    """Longest pattern in a request's schemas, in characters."""
    tokenize_chars_per_token: int = Field(default=32, ge=1, le=100000)
    """Characters that /tokenize takes for each token of the model's length; it always takes 65,536."""
    max_dataset_gib: float = Field(default=10.0, gt=0.0, le=150.0)
    """Largest dataset, in GiB."""
    max_followers: int = Field(default=1024, ge=1, le=1_000_000)
    """Clients that follow the events of jobs at the same time; more get 503."""
    max_job_followers: int = Field(default=256, ge=1, le=1_000_000)
    """Clients that follow the events of one job at the same time; more get 503."""
    max_uploads: int = Field(default=8, ge=1, le=256)
    """Uploads of datasets that go on at the same time; more get 503."""
    dataset_line_mib: int = Field(default=16, ge=1, le=256)
    """Longest line of a dataset, in MiB."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Level from which the server writes to its log."""
    grace_s: float = Field(default=120.0, ge=1.0, le=86400.0)
    """Seconds for which engines and downloads outlive a killed server, waiting for it to come back."""

    max_downloads: int = Field(default=2, ge=1, le=32)
    """Downloads that run at the same time; more of them wait."""
    download_stall_s: float = Field(default=60.0, ge=0.5, le=86400.0)
    """Seconds without a new byte after which a download is restarted (without the xet protocol)."""
    download_attempts: int = Field(default=5, ge=1, le=100)
    """Attempts without progress after which a download is given up."""
    disk_reserve_gib: float = Field(default=1.0, ge=0.0)
    """Disk space, in GiB, that a download must leave free."""
    store_quota_gib: float | None = Field(default=None, gt=0.0)
    """Most that all models together may take on disk, in GiB. Empty: as much as the disk holds."""

    engine_python: Path | None = None
    """Python that runs `-m vllm.entrypoints.openai.api_server`. Empty: the server's own."""
    engine_dtype: DType = "auto"
    """Number format of the weights in service. auto: the model's own."""
    engine_max_model_len: int | None = Field(default=None, ge=16)
    """Longest prompt plus answer, in tokens. Empty: the model's own, lowered to what memory allows."""
    engine_max_num_seqs: int | None = Field(default=None, ge=1, le=4096)
    """Requests that an engine works on at the same time. Empty: vLLM's default on a GPU, 64 on a CPU."""
    engine_gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    """Part of a GPU's memory that an engine may take."""
    engine_cpu_kv_cache_gib: float | None = Field(default=None, gt=0.0)
    """Memory for the KV cache of an engine on a CPU, in GiB. Empty: worked out from what is free."""
    engine_memory_gib: float | None = Field(default=None, gt=0.0)
    """Most memory that engines and trainings together may take, in GiB; with GPUs, of each GPU. Empty: what is free."""
    engine_tensor_parallel_size: int = Field(default=1, ge=1, le=64)
    """GPUs that share one model."""
    engine_max_loras: int = Field(default=4, ge=0, le=64)
    """LoRA adapters that an engine works with at the same time; more of them take turns. 0: no room for adapters."""
    engine_max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 64
    """Highest rank of a LoRA adapter."""
    engine_enforce_eager: bool = False
    """Run models without compilation: a faster start, slower answers on a GPU."""
    engine_start_timeout_s: float = Field(default=900.0, ge=1.0)
    """Seconds in which an engine must have generated its first token."""
    engine_stop_timeout_s: float = Field(default=10.0, ge=0.1)
    """Seconds between asking an engine to end and killing it."""
    engine_max_restarts: int = Field(default=3, ge=0, le=100)
    """Times that an engine which died is started again before its deployment is given up."""
    engine_restart_delay_s: float = Field(default=1.0, ge=0.0)
    """Seconds before the first restart; each further one waits twice as long."""
    engine_idle_timeout_s: float | None = Field(default=None, ge=1.0)
    """Seconds without a request after which an engine is ended until the next request. Empty: never."""
    engine_wake_timeout_s: float = Field(default=300.0, ge=0.1)
    """Longest that a request waits for the engine of an idle deployment, in seconds."""
    engine_busy_timeout_s: float = Field(default=600.0, ge=0.0)
    """Longest that an engine which works but does not answer is left alone, in seconds; an idle one gets a minute."""
    engine_drain_timeout_s: float = Field(default=120.0, ge=0.0)
    """Longest that an engine which leaves is kept for the requests that it still has, in seconds."""

    max_finetunes: int = Field(default=1, ge=1, le=32)
    """Trainings that run at the same time; more of them wait."""
    trainer_python: Path | None = None
    """Python that runs trainings; it has torch, transformers, peft and this package. Empty: the server's own."""
    trainer_processes: int = Field(default=1, ge=1, le=64)
    """Processes that share one training, each with a GPU of its own, if there are as many."""
    trainer_stop_timeout_s: float = Field(default=60.0, ge=0.1)
    """Seconds in which a training that is to stop writes a checkpoint before it is killed."""
    tensorboard_dir: Path | None = None
    """Folder for the curves of trainings in TensorBoard's format, one folder per training. Empty: none are written."""

    generate_num_beams: int = Field(default=1, ge=1, le=32)
    """Raw prompts: beams of a beam search; 1 is none. This and the next seven are what a request may leave out."""
    generate_do_sample: bool = True
    """Raw prompts: draw each token by its probability. false: always the likeliest."""
    generate_temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    """Raw prompts: how much chance there is in the drawing; 0 is none."""
    generate_top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Raw prompts: draw among the likeliest tokens that have this probability together."""
    generate_top_k: int = Field(default=50, ge=-1, le=1_000_000_000)
    """Raw prompts: draw among so many of the likeliest tokens; 0 or -1: among all."""
    generate_max_new_tokens: int = Field(default=2048, ge=1, le=1_000_000_000)
    """Raw prompts: tokens after which a text stops, or fewer where the model takes fewer."""
    generate_repetition_penalty: float = Field(default=1.0, ge=0.01, le=100.0)
    """Raw prompts: above 1 makes tokens that were there already less likely."""
    generate_length_penalty: float = Field(default=1.0, ge=-10.0, le=10.0)
    """Raw prompts: above 1 has a beam search prefer long texts, below 1 short ones."""
    generate_seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Raw prompts: the seed of every drawing: the same prompt then gets the same text. Empty: each drawing is new."""
    continuation_ttl_s: float = Field(default=3600.0, ge=1.0, le=31_536_000.0)
    """Seconds from its last use for which a raw-prompt text that stopped can be continued."""
    continuation_entries: int = Field(default=16384, ge=1, le=1_000_000_000)
    """Raw-prompt texts (a batch counts as one) that are kept to be continued; the oldest go first."""

    hf_endpoint: str = Field(default="https://huggingface.co", validation_alias="HF_ENDPOINT")
    """Address of the Hugging Face hub or of a mirror."""
    hf_token: str | None = Field(default=None, validation_alias="HF_TOKEN", repr=False)
    """Token for gated and private repositories; only downloads see it."""
    aws_access_key_id: str | None = Field(default=None, validation_alias="AWS_ACCESS_KEY_ID", repr=False)
    """Access key of the S3 store. Empty: whatever else boto3 finds in the environment (profiles, roles)."""
    aws_secret_access_key: str | None = Field(default=None, validation_alias="AWS_SECRET_ACCESS_KEY", repr=False)
    """Secret of that access key."""
    aws_session_token: str | None = Field(default=None, validation_alias="AWS_SESSION_TOKEN", repr=False)
    """Token of an access key that is for a time only."""
    aws_default_region: str | None = Field(default=None, validation_alias="AWS_DEFAULT_REGION")
    """Region of the S3 store. Empty: boto3's own, else us-east-1."""

    @field_validator("engine_max_lora_rank", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        # A Literal takes no conversion, and the environment has only text.
        return int(value) if isinstance(value, str) and value.isdecimal() else value

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: object) -> object:
        if isinstance(value, str):
            # Nothing but a scheme's own slashes may end an origin: `app://` alone is none.
            return tuple(re.sub(r"(?<!/)/$", "", part.strip()) for part in value.split(",") if part.strip())
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"'{origin[:200]}' is not the origin of a page or an app; write it like "
                    "https://chat.example.org:8443, app://notes or chrome-extension://ID. Pages opened from a file "
                    "have the origin null in browsers, and file:// in Electron"
                )
        # Browsers send it in lower case, and without the port that its scheme has anyway.
        return tuple(re.sub(r"^(http://.*):80$|^(https://.*):443$", r"\1\2", origin.lower()) for origin in value)

    @field_validator(
        "s3_endpoint_url", "import_dir", "admin_key", "store_quota_gib", "engine_python", "engine_max_model_len",
        "engine_max_num_seqs", "engine_cpu_kv_cache_gib", "engine_memory_gib", "engine_idle_timeout_s",
        "trainer_python", "tensorboard_dir", "generate_seed", "hf_token", "aws_access_key_id",
        "aws_secret_access_key", "aws_session_token", "aws_default_region", mode="before",
    )  # fmt: skip
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("data_dir", "import_dir", "engine_python", "trainer_python", "tensorboard_dir")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        # absolute(), not resolve(): a virtual environment's python is a link that must stay one.
        return value.expanduser().absolute() if value is not None else None

    @field_validator("hf_endpoint", mode="before")
    @classmethod
    def _default_endpoint(cls, value: object) -> object:
        return (value.rstrip("/") if isinstance(value, str) else value) or "https://huggingface.co"

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: str) -> str:
        if value and not value.startswith(("sqlite:///", "postgresql://", "postgresql+psycopg://", "postgres://")):
            raise ValueError("must start with sqlite:/// or postgresql://")
        if value in ("sqlite:///", "sqlite:///:memory:"):
            # Each connection would have a database of its own.
            raise ValueError("must name a file, such as sqlite:////var/lib/modelyard/modelyard.db")
        return value

    @field_validator("storage_url")
    @classmethod
    def _known_storage(cls, value: str) -> str:
        if value and not value.startswith(("file:///", "s3://")):
            raise ValueError("must start with file:/// or s3://")
        return value

    @field_validator("s3_endpoint_url")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        # boto3 says so only at its first request, and with a traceback.
        if value is not None and not ENDPOINT.fullmatch(value):
            raise ValueError("must be the address of a store, such as http://store.example.org:9000")
        return value

    @model_validator(mode="after")
    def _key_beyond_loopback(self) -> Settings:
        if self.host not in LOOPBACK and self.admin_key is None:
            raise ValueError(
                f"MODELYARD_HOST={self.host} is reachable from other machines: set MODELYARD_ADMIN_KEY as well, "
                "or listen on 127.0.0.1"
            )
        return self

    @property
    def models_dir(self) -> Path:
        """Where models lie, a folder per model and commit."""
        return self.data_dir / "models"

    @property
    def jobs_dir(self) -> Path:
        """Where jobs keep their logs and their children's files, a folder per job."""
        return self.data_dir / "jobs"

    @property
    def finetunes_dir(self) -> Path:
        """Where trainings keep their checkpoints while they run or can go on, a folder per training."""
        return self.data_dir / "finetunes"


def load_settings(**overrides: object) -> Settings:
    """Read the settings; `overrides` (of the command line) come before the environment, and that before `.env`.

    Raises:
        StartRefused: with one line that names the setting, its value and what it should be.
    """
    # A container platform may add MODELYARD_PORT_8080_TCP and the like; a misspelt setting is likelier.
    _refuse_unknown(os.environ, "")
    _refuse_unknown(_names_in_env_file(Path(".env")), " (in .env)")
    try:
        return Settings(**overrides)  # type: ignore[arg-type]  # checked by pydantic, name by name
    except ValidationError as error:
        raise StartRefused(_one_line(error)) from None


def _refuse_unknown(names: Iterable[str], where: str) -> None:
    known = [name.upper() for name in Settings.model_fields if not name.startswith(FOREIGN)]
    for name in sorted(names):
        ours = name.removeprefix(PREFIX)
        if ours != name and ours not in known:
            # Compared without the prefix, which would make every name resemble every other.
            near = difflib.get_close_matches(ours, known, n=1)
            raise StartRefused(
                f"There is no setting {name}{where}." + (f" Did you mean {PREFIX}{near[0]}?" if near else "")
            )


def unread_names(path: Path = Path(".env")) -> list[str]:
    """Return a line for each name in `.env` that nothing reads, which its author believes in.

    Raises:
        StartRefused: the file cannot be read.
    """
    known = {name.upper() if name.startswith(FOREIGN) else PREFIX + name.upper() for name in Settings.model_fields}
    # Compared without the prefix, which would make every name resemble every other.
    bare = {name.removeprefix(PREFIX): name for name in sorted(known)}
    lines = []
    for name in sorted(_names_in_env_file(path) - known - FOR_COMPOSE):
        near = difflib.get_close_matches(name, bare, n=1, cutoff=0.7)
        lines.append(
            f"Nothing reads {name} from .env. "
            + (f"Did you mean {bare[near[0]]}?" if near else "If a library is to see it, set it in the environment.")
        )
    return lines


def _names_in_env_file(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    # Imported here: only a start with such a file pays for it.
    from dotenv.parser import parse_stream

    try:
        with path.open(encoding="utf-8-sig") as file:
            entries = list(parse_stream(file))
    except UnicodeDecodeError:
        raise StartRefused(f"{path.absolute()} is not text in UTF-8. Save it as such.") from None
    except OSError as error:
        raise StartRefused(f"{path.absolute()} cannot be read: {error.strerror}.") from None
    for entry in entries:
        if entry.error:
            # The line itself may hold a secret.
            raise StartRefused(f"{path.absolute()}, line {entry.original.line}: write NAME=VALUE.")
    return {entry.key.upper() for entry in entries if entry.key is not None}


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return reason
    field = str(first["loc"][0])
    name = field if field.startswith(("HF_", "AWS_")) else PREFIX + field.upper()
    shown = "" if field in {"admin_key", "HF_TOKEN"} or field.startswith("AWS_") else f"={_presentable(first['input'])}"
    return f"{name}{shown}: {reason[0].lower()}{reason[1:]}."


def _presentable(value: object) -> str:
    """Return a value on one line, without the user and password that an address may hold."""
    return re.sub(r"(?<!/)//.*@", "//***@", " ".join(str(value).split()))[:200]
