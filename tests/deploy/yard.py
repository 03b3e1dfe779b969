"""Deployments with everything real but vLLM: database, runner, keeper, sockets, the imitation engine as child."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pydantic_settings

from modelyard import tasks
from modelyard.db import Sessions
from modelyard.deploy import actions, succession
from modelyard.deploy.supervisor import Supervisor
from modelyard.deploy.tables import Deployment, Wanted
from modelyard.foundation import Foundation
from modelyard.jobs import actions as jobs
from modelyard.jobs.runner import JobContext, JobFunction, JobInterrupted, JobRunner
from modelyard.jobs.schemas import EventOut, JobOut
from modelyard.jobs.tables import ACTIVE
from modelyard.models.tables import Model
from modelyard.models.tokenizer_child import TokenizerChildren
from modelyard.processes import Children
from modelyard.routing.router import Routing
from modelyard.settings import Settings
from tests.eventually import eventually
from tests.servers.engine import read_record

#: The database of the yards that are opened next; empty: SQLite in the data folder. See `conftest`.
DATABASE_URL = ""
ENGINE = Path(__file__).parents[1] / "servers" / "engine_python"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "dtype": "float32",
}


def make_settings(data_dir: Path, **values: Any) -> Settings:
    """Return settings for the imitation engine that look neither at the environment nor at a file."""

    class Only(Settings):
        model_config = pydantic_settings.SettingsConfigDict(env_prefix="MODELYARD_TESTS_ONLY_", env_file=None)

    defaults: dict[str, Any] = {
        "database_url": DATABASE_URL,
        "engine_python": ENGINE,
        "engine_restart_delay_s": 0.05,
        "engine_stop_timeout_s": 1.0,
        "engine_start_timeout_s": 20.0,
    }
    return Only(data_dir=data_dir, **{**defaults, **values})


def write_adapter(folder: Path, rank: int) -> None:
    """Write a LoRA adapter of the query layers of a model with CONFIG, all zeros."""
    size = CONFIG["hidden_size"]
    assert isinstance(size, int)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"], "bias": "none",
              "task_type": "CAUSAL_LM", "base_model_name_or_path": "base"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    header, end = {}, 0
    for layer in range(2):
        for matrix, shape in (("A", [rank, size]), ("B", [size, rank])):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{matrix}.weight"
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * rank * size]}
            end += 4 * rank * size
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


@dataclass
class DeployYard:
    """What the deploy room does, as its routes would ask it to."""

    settings: Settings
    sessions: Sessions
    routing: Routing
    runner: JobRunner
    supervisor: Supervisor
    record_dirs: dict[str, Path] = field(default_factory=dict)

    async def add_model(
        self,
        model_id: str,
        *,
        misbehave: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        has_template: bool = True,
        **row: Any,
    ) -> Path:
        """Put a model into the store whose engine behaves as told; return the model's folder."""
        name = model_id.replace("/", "--")
        folder = self.settings.models_dir / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config), "utf-8")
        if has_template:
            (folder / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
        record_dir = self.settings.data_dir / "records" / name
        record_dir.mkdir(parents=True)
        self.record_dirs[model_id] = record_dir
        self.misbehave(model_id, misbehave or {})
        values = {
            "adapter": False,
            "base_model_id": None,
            "task": "generate",
            "revision": "main",
            "commit": "0" * 40,
            "size_bytes": 1_000_000,
            "path": name,
            "source": "hub",
        }
        async with self.sessions.begin() as session:
            session.add(Model(model_id=model_id, **{**values, **row}))
        return folder

    def misbehave(self, model_id: str, how: dict[str, Any]) -> None:
        """Tell the model's next engine how to behave."""
        folder = self.settings.models_dir / model_id.replace("/", "--")
        how = {"record_dir": str(self.record_dirs[model_id]), **how}
        (folder / "misbehave.json").write_text(json.dumps(how), "utf-8")

    def record(self, model_id: str, kind: str | None = None) -> list[dict[str, Any]]:
        """Return what the model's engines have recorded."""
        return read_record(self.record_dirs[model_id], kind)

    async def add_adapter(self, adapter_id: str, base_model_id: str | None, rank: int = 8, **row: Any) -> Path:
        """Put an adapter into the store that its base can serve, by its files; return its folder."""
        name = str(row.pop("path", adapter_id.replace("/", "--")))
        folder = self.settings.models_dir / name
        folder.mkdir(parents=True)
        write_adapter(folder, rank)
        values = {"adapter": True, "base_model_id": base_model_id, "task": "generate", "revision": "main",
                  "commit": "0" * 40, "size_bytes": 1_000, "path": name, "source": "hub"}  # fmt: skip
        async with self.sessions.begin() as session:
            session.add(Model(model_id=adapter_id, **{**values, **row}))
        return folder

    async def deploy(
        self, model_id: str, adapter_ids: Sequence[str] = (), options: dict[str, Any] | None = None, **wish: Any
    ) -> UUID:
        async with self.sessions.begin() as session:
            job, _ = await actions.deploy(session, actions.Wish(model_id, adapter_ids, options or {}, **wish))
        return job.id

    async def take_down(self, job_id: UUID | None = None, wanted: Wanted = Wanted.DOWN) -> UUID:
        async with self.sessions.begin() as session:
            row = await (actions.current(session) if job_id is None else actions.of_job(session, job_id))
            job_id = await succession.take_down(session, row, wanted)
        return job_id

    async def interrupt(self, job_id: UUID) -> None:
        async with self.sessions.begin() as session:
            await jobs.interrupt(session, job_id)

    async def job(self, job_id: UUID) -> JobOut:
        async with self.sessions.read() as session:
            return JobOut.of(await jobs.get(session, job_id))

    async def deployment(self, job_id: UUID) -> Deployment:
        async with self.sessions.read() as session:
            return await actions.of_job(session, job_id)

    async def becomes(self, job_id: UUID, *states: str) -> Deployment:
        """Wait until the job's deployment is in one of the states."""

        passed: list[str] = []

        async def so() -> Deployment | None:
            deployment = await self.deployment(job_id)
            if [deployment.state] != passed[-1:]:
                passed.append(deployment.state)
            return deployment if deployment.state in states else None

        try:
            found: Deployment = await eventually(so, f"the deployment is {' or '.join(states)}")
        except AssertionError as error:
            said = [event.message for event in await self.events(job_id)]
            raise AssertionError(f"{error}; it was {passed}; {said}; {self.log(job_id)[-1500:]}") from None
        return found

    async def ended(self, job_id: UUID) -> JobOut:
        """Wait until the job has ended."""

        async def so() -> JobOut | None:
            job = await self.job(job_id)
            return job if job.status not in ACTIVE else None

        found: JobOut = await eventually(so, f"the end of the job; {self.log(job_id)[-1500:]}")
        return found

    async def events(self, job_id: UUID) -> list[EventOut]:
        async with self.sessions.read() as session:
            return [EventOut.of(event) for event in await jobs.events_after(session, job_id, 0, 1000)]

    def log(self, job_id: UUID) -> str:
        path = self.runner.log_of(job_id)
        return path.read_text("utf-8") if path.exists() else ""


@asynccontextmanager
async def deploy_yard(
    data_dir: Path, functions: Mapping[str, JobFunction] | None = None, **values: Any
) -> AsyncIterator[DeployYard]:
    """Run the parts, started as the server starts them, for as long as the block lasts; end them in good order.

    `functions` are those of further kinds of job.
    """
    settings = make_settings(data_dir, **values)
    foundation = Foundation(settings)
    foundation.lay()
    sessions = Sessions(foundation.url)
    routing = Routing(sessions, settings.engine_wake_timeout_s)
    children = Children(foundation.owner_lock, settings.grace_s)
    supervisor = Supervisor(settings, sessions, children, routing.requests, TokenizerChildren())
    runner = JobRunner(
        sessions, {actions.KIND: supervisor.serve, **(functions or {})}, {}, settings.jobs_dir,
        {actions.KIND: actions.ended},
    )  # fmt: skip
    async with sessions.begin() as session:
        await actions.reconcile(session)
    await children.end_strays(await runner.folders_in_use())
    await supervisor.check_before_serving()
    running = tasks.spawn("runner", runner.run(), eternal=True)
    follower = tasks.spawn("routing", routing.follow())
    try:
        yield DeployYard(settings, sessions, routing, runner, supervisor)
    finally:
        await tasks.end(running, follower)
        await routing.close()
        await sessions.close()
        foundation.close()


async def until_interrupted(context: JobContext) -> None:
    """Be the function of a job whose work the test does itself."""
    await context.interrupted.wait()
    raise JobInterrupted


def traces_of(settings: Settings) -> list[str]:
    """Return what of a data folder's children still lives: processes, entries of live children, sockets."""
    found = [f"entry {entry.name}" for entry in (settings.data_dir / "run").iterdir()]
    for proc in Path("/proc").iterdir():
        if not proc.name.isdigit():
            continue
        try:
            command = (proc / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(settings.data_dir) in command:
            found.append(f"process {proc.name}: {command[:120]}")
    return found


def sockets_of(job_log: str) -> list[Path]:
    """Return the private folders that a job's engines were given, by its log."""
    paths = [Path(line.split(" --uds ")[1].split()[0]).parent for line in job_log.splitlines() if " --uds " in line]
    return [path for path in paths if path.exists()]
