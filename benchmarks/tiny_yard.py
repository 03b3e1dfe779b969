"""A whole Modelyard with tiny models on real vLLM, for the benchmarks of deployments and of raw prompts.

The models are Llamas of random numbers (`modelyard.demo.tiny_llama`), each of another seed; the adapters are made by
PEFT, of rank 16 on every linear layer, with random numbers large enough to change every answer. All of it is made
anew in a scratch folder, and gone with it.

Run by itself (`python benchmarks/tiny_yard.py BASE FOLDER NAME...`) it makes adapters: PEFT needs torch, which the
process that measures does not load.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __package__ in {None, ""}:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.server import Server, serving

START_S = 600.0
POLL_S = 0.1
RANK = 16
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODULE = "vllm.entrypoints.openai.api_server"


def until(condition: Callable[[], Any], what: str, within_s: float = START_S) -> Any:
    """Return the condition's first true value.

    Raises:
        SystemExit: there was none in time.
    """
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {within_s:g} s: {what}")
        time.sleep(POLL_S)
    return value


@contextmanager
def yard(scratch: Path, models: Sequence[str], adapters: Sequence[str] = (), **settings: str) -> Iterator[Server]:
    """Run the server with models of these names in its store, the ids being `local:<name>`; adapters fit the first."""
    imports = scratch / "imports"
    for seed, name in enumerate(models):
        make = [sys.executable, "-m", "modelyard.demo.tiny_llama", str(imports / name), "--seed", str(seed)]
        subprocess.run(make, check=True)
    if adapters:
        make = [sys.executable, __file__, str(imports / models[0]), str(imports), *adapters]
        subprocess.run(make, check=True, env={**os.environ, "TQDM_DISABLE": "1"})
    # Enough for every request here, and as much for each engine, whatever the machine has free.
    settings = {"MODELYARD_ENGINE_CPU_KV_CACHE_GIB": "0.5", "MODELYARD_DISK_RESERVE_GIB": "0", **settings}
    with serving(scratch / "data", MODELYARD_IMPORT_DIR=str(imports), **settings) as server:
        for name in (*models, *adapters):
            assert server.post(f"/api/v1/models/add/?model_id=local:{name}").status == 200
        expected = len(models) + len(adapters)
        until(lambda: len(server.get("/api/v1/models/").json()) == expected, "the store has them all", 60.0)
        yield server


def deploy(server: Server, model_id: str, adapter_ids: Sequence[str] = ()) -> str:
    """Put a model into service and wait until it is; return the deployment's id.

    Raises:
        SystemExit: it failed, with its cause.
    """
    answer = server.post("/api/v1/deploy/", {"model_id": model_id, "adapter_ids": list(adapter_ids)})
    assert answer.status == 200, answer.text
    job_id = answer.json()["id"]

    def ready() -> str | None:
        if failure := server.get(f"/api/v1/jobs/{job_id}/status/").json()["failure"]:
            raise SystemExit(f"{model_id} was not deployed: {failure['message']}")
        for one in server.get("/api/v1/deployments/").json():
            if one["job_id"] == job_id and one["state"] == "READY" and one["served_adapter_ids"] == list(adapter_ids):
                found: str = one["id"]
                return found
        return None

    found: str = until(ready, f"{model_id} is in service")
    return found


def engine(server: Server) -> tuple[list[str], dict[str, str]]:
    """Return the arguments and the variables of the one engine that runs, as its process has them."""
    for pid in server.processes():
        argv = Path(f"/proc/{pid}/cmdline").read_text("utf-8").split("\0")[:-1]
        if MODULE in argv:
            items = Path(f"/proc/{pid}/environ").read_text("utf-8").split("\0")
            variables = dict(item.split("=", 1) for item in items if "=" in item)
            return argv[argv.index(MODULE) + 1 :], variables
    raise SystemExit("no engine runs")


def make_adapters(base: Path, folder: Path, names: Sequence[str]) -> None:
    """Make adapters of random numbers for a base, a folder each, no two alike."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEAR, task_type="CAUSAL_LM")
        tuned = get_peft_model(model, config)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.3)
        tuned.save_pretrained(str(folder / name))
        written = folder / name / "adapter_config.json"
        config_of_file = json.loads(written.read_text("utf-8"))
        # PEFT writes the folder; the store knows the base by its id.
        written.write_text(json.dumps({**config_of_file, "base_model_name_or_path": f"local:{base.name}"}), "utf-8")


if __name__ == "__main__":
    make_adapters(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
