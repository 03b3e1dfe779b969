"""Make the fixture of this version, for the versions that come: `python -m tests.earlier.make`.

Run it where the tables are about to change, before they do. It has the server of this checkout, with imitations of
engine and trainer, do some of everything, once on SQLite, where it is then stopped in good order, and once on
PostgreSQL, where all of it is killed, and writes `sqlite.tar.xz` and `postgres.tar.xz` beside itself. In each:

    data/           the data folder that is left, SQLite's database in it
    database.sql    PostgreSQL's database, by its own pg_dump
    shown.json      what the server showed of all that before it ended (`remembered.snapshot`)

The weights are zeros. Paths of the machine are replaced, and texts that can be continued are made to last.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from tests.datasets.forms import FORM_HEADERS, chat, jsonl, upload
from tests.earlier.remembered import (
    ADAPTER,
    BROKEN,
    ENDED,
    INTERRUPTED,
    MODEL,
    OTHER,
    POEM,
    RECITAL,
    RUNNING,
    SETTINGS,
    STEPS,
    snapshot,
)
from tests.finetune.yard import add_model, ended, finished, shown, start, until
from tests.reciter import tokenizer_json
from tests.server import Server, serving
from tests.servers import postgres

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: Where a user might have had the checkout. The data folder keeps its path: there are offsets into files that name it.
NEW_ROOT = "/opt/modelyard"
FOR_EVER = "2126-01-01 00:00:00"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 270,
    "max_position_embeddings": 2048, "eos_token_id": 257, "dtype": "float32", "tie_word_embeddings": True,
}  # fmt: skip
TEMPLATE = "{% for message in messages %}{{ message['content'] + '</s>' }}{% endfor %}"
QUICK = {"max_steps": STEPS, "checkpoint_steps": 2, "rank": 2, "batch_size": 2, "learning_rate": 0.005}


def zeros(shapes: dict[str, list[int]]) -> bytes:
    """Return a safetensors file of zeros."""
    header: dict[str, Any] = {}
    end = 0
    for name, (rows, columns) in shapes.items():
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [end, end + 4 * rows * columns]}
        end += 4 * rows * columns
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(end)


def write_imports(folder: Path) -> None:
    """Write two models and an adapter of the first."""
    plans: dict[str, Any] = {"tiny": {"recites": {"": RECITAL}}, "other": {}}
    plans["broken"] = {"die_at_start": {"stderr": "ValueError: There is no layer 7."}}
    for name, plan in plans.items():
        (folder / name).mkdir(parents=True)
        generation = {"eos_token_id": 257, "misbehave": plan}
        tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, "eos_token": "</s>",
                     "bos_token": "<s>", "unk_token": "<unk>", "chat_template": TEMPLATE}  # fmt: skip
        (folder / name / "config.json").write_text(json.dumps(CONFIG), "utf-8")
        (folder / name / "generation_config.json").write_text(json.dumps(generation), "utf-8")
        (folder / name / "tokenizer_config.json").write_text(json.dumps(tokenizer), "utf-8")
        (folder / name / "tokenizer.json").write_text(tokenizer_json(), "utf-8")
        weights = {"model.embed_tokens.weight": [270, 16], "model.layers.0.self_attn.q_proj.weight": [16, 16]}
        (folder / name / "model.safetensors").write_bytes(zeros(weights))
    (folder / "poems").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none",
              "task_type": "CAUSAL_LM", "base_model_name_or_path": MODEL}  # fmt: skip
    (folder / "poems" / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    matrices = {f"{name}_A.weight": [2, 16], f"{name}_B.weight": [16, 2]}
    (folder / "poems" / "adapter_model.safetensors").write_bytes(zeros(matrices))


def ready(server: Server, body: dict[str, Any]) -> str:
    """Deploy, wait until it serves, and return the deployment's id."""
    answer = server.post("/api/v1/deploy/", body)
    assert answer.status == 200, answer.text
    job_id = answer.json()["id"]

    def serves() -> str | None:
        [one] = [each for each in server.get("/api/v1/deployments/").json() if each["job_id"] == job_id]
        found: str = one["id"]
        return found if one["state"] == "READY" and len(one["served_adapter_ids"]) == len(body["adapter_ids"]) else None

    found: str = until(serves, "it serves", server=server)
    return found


def fails(server: Server, job_id: str) -> bool:
    """Wait until a job has failed."""
    path = f"/api/v1/jobs/{job_id}/status/"
    return bool(until(lambda: server.get(path).json()["status"] == "FAILED", "it fails", server=server))


def is_under_way(server: Server, training: dict[str, Any]) -> bool:
    """Return whether a training has a checkpoint to go on from."""
    return (shown(server, training)["checkpoint_step"] or 0) >= 4


def fill(server: Server) -> None:
    """Do some of everything: what is kept of it is the fixture."""
    for model_id in (MODEL, OTHER, BROKEN, ADAPTER):
        add_model(server, model_id)
    assert fails(server, server.post("/api/v1/models/add/?model_id=local:nothing").json()["id"])
    assert fails(server, server.post("/api/v1/deploy/", {"model_id": BROKEN}).json()["id"])
    ready(server, {"model_id": OTHER, "adapter_ids": []})
    ready(server, {"model_id": MODEL, "adapter_ids": [ADAPTER]})
    for target in (OTHER, MODEL, ADAPTER):
        assert server.request("PUT", "/api/v1/aliases/support", json_body={"target": target}).status == 200
    datasets = []
    rows = [chat(f"What is the number {number}?", f"It is {number * 7}.") for number in range(12)]
    for content, name in ((jsonl(*rows), "train.jsonl"), (b"prompt,completion\nWhy?,So.\nWho?,She.\n", "people.csv")):
        answer = server.request("POST", "/api/v1/datasets/upload/", body=upload(content, name), headers=FORM_HEADERS)
        assert answer.status == 200, answer.text
        datasets.append(answer.json()["id"])
        # Counted once, and kept.
        report = f"/api/v1/datasets/{datasets[-1]}/report?model_id={MODEL}"
        assert server.request("GET", report, timeout_s=300).json()["tokens"]["total"] > 0
    answer = server.post("/api/generate-one", POEM | {"prompt": "cats?"})
    assert answer.status == 200, answer.text
    for name in (ENDED, INTERRUPTED, RUNNING):
        more = {"deploy": True, "promote": {"alias": "trained", "if": "always"}} if name == ENDED else {}
        training = start(server, datasets[0], name, hyperparameters=QUICK, model_id=MODEL, **more)
        if name == ENDED:
            finished(server, training)
            continue
        until(partial(is_under_way, server, training), "it has a checkpoint", server=server)
        if name == INTERRUPTED:
            assert server.post("/api/v1/finetune/interrupt/").status == 200
            assert ended(server, training)["job"]["status"] == "KILLED"


def make(kind: str, folder: Path, database_url: str) -> None:
    """Make the fixture of one kind of database."""
    imports, data = folder / "imports", folder / "data"
    write_imports(imports)
    settings = SETTINGS | {"MODELYARD_IMPORT_DIR": str(imports), "MODELYARD_DATABASE_URL": database_url}
    with serving(data, **settings) as server:
        fill(server)
        before = snapshot(server)
        assert [one["name"] for one in before["/api/v1/finetune/"] if one["job"]["status"] == "RUNNING"] == [RUNNING]
        more = {}
        if kind == "sqlite":
            assert server.stop() == 0
            last_for_ever(data / "modelyard.db")
        else:
            server.kill()
            for pid in server.processes():
                os.kill(pid, signal.SIGKILL)
            until(lambda: not server.processes(), "nothing of it runs")
            more = {"database.sql": dump(database_url)}
        pack(HERE / f"{kind}.tar.xz", data, {"shown.json": json.dumps(before, indent=1, ensure_ascii=False)} | more)


def pack(archive: Path, data: Path, more: dict[str, str]) -> None:
    """Write an archive of the data folder and of more files, with nothing in it of this machine and of who made it."""

    def add(name: str, mode: int, content: bytes | None) -> None:
        entry = tarfile.TarInfo(name)
        entry.mode = mode
        if content is None:
            entry.type = tarfile.DIRTYPE
            return opened.addfile(entry)
        if b"\0" not in content:
            content = replaced(content.decode()).encode()
        entry.size = len(content)
        opened.addfile(entry, io.BytesIO(content))

    with tarfile.open(archive, "w:xz") as opened:
        for path in sorted(data.rglob("*")):
            # Locks are of a process, and the key is random: each server makes its own.
            if not path.is_symlink() and path.suffix not in (".lock", ".key") and (path.is_file() or path.is_dir()):
                name, mode = f"data/{path.relative_to(data)}", path.stat().st_mode & 0o777
                add(name, mode, path.read_bytes() if path.is_file() else None)
        for name, text in more.items():
            add(name, 0o600, text.encode())


def replaced(text: str) -> str:
    """Return a text with another checkout than this one."""
    return text.replace(sys.prefix, f"{NEW_ROOT}/.venv").replace(str(ROOT), NEW_ROOT)


def last_for_ever(database: Path) -> None:
    """Have the texts of an SQLite database last, and name another checkout."""
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE continuations SET expires_at = ?", [FOR_EVER])
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for _, column, *_ in connection.execute(f"PRAGMA table_info({table})").fetchall():
                for old, new in ((sys.prefix, f"{NEW_ROOT}/.venv"), (str(ROOT), NEW_ROOT)):
                    has_it = f"""typeof("{column}") = 'text' AND instr("{column}", ?)"""
                    connection.execute(
                        f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) WHERE {has_it}', [old, new, old]
                    )
    connection.execute("VACUUM")
    connection.close()


def dump(database_url: str) -> str:
    """Return PostgreSQL's database as SQL that any client can run."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"UPDATE continuations SET expires_at = '{FOR_EVER}'")
    found = postgres.binaries("any")
    assert found is not None
    command = [str(found / "pg_dump"), "--inserts", "--no-owner", "--no-privileges", f"--dbname={database_url}"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # What begins with a backslash is for psql alone.
    return "".join(line for line in said.splitlines(keepends=True) if not line.startswith(("\\", "--", "\n")))


def main() -> None:
    """Make both."""
    with tempfile.TemporaryDirectory() as scratch, postgres.running() as url:
        for kind, database_url in (("sqlite", ""), ("postgres", url)):
            folder = Path(scratch, kind)
            folder.mkdir()
            make(kind, folder, database_url)
            sys.stdout.write(f"{kind}: {(HERE / f'{kind}.tar.xz').stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
