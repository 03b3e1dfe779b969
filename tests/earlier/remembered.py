"""All that a server shows of what it keeps, and what of it a later one has lost: `snapshot`, `lost`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.server import ENGINE_PYTHON, Server

TRAINER_PYTHON = ENGINE_PYTHON.with_name("trainer_python")
SETTINGS = {
    "MODELYARD_ENGINE_PYTHON": str(ENGINE_PYTHON),
    "MODELYARD_TRAINER_PYTHON": str(TRAINER_PYTHON),
    "MODELYARD_ENGINE_STOP_TIMEOUT_S": "1",
    "MODELYARD_ENGINE_RESTART_DELAY_S": "0.2",
    "MODELYARD_ENGINE_CPU_KV_CACHE_GIB": "0.1",
    "MODELYARD_DISK_RESERVE_GIB": "0",
    # Those of the fixture are meant to last.
    "MODELYARD_CONTINUATION_TTL_S": "31536000",
}
MODEL, OTHER, BROKEN, ADAPTER = "local:tiny", "local:other", "local:broken", "local:poems"
#: Trainings: one that ended, one that was interrupted, one in the middle. Their steps take a while.
ENDED, INTERRUPTED, RUNNING = "Ended", "Interrupted pace=0.1", "Running pace=0.1"
STEPS = 24
#: A text that stops in the middle of what the engine recites.
RECITAL = " Soft paws at dawn, naïve 🙂 eyes; the house is theirs."
POEM: dict[str, Any] = {"request_id": "poem", "generation_config": {"do_sample": False, "max_new_tokens": 12}}

#: Elements of lists that have one of these are told apart by it, and may come in another order or among more.
KEYS = ("number", "id", "job_id", "model_id", "name", "step", "at")
Json = Any


def snapshot(server: Server) -> dict[str, Json]:
    """Return every thing that is kept, by the path under which the server shows it."""
    shown: dict[str, Json] = {}

    def look(path: str) -> Json:
        answer = server.get(path)
        assert answer.status == 200, (path, answer.text)
        shown[path] = answer.json()
        return shown[path]

    for model in look("/api/v1/models/"):
        look(f"/api/v1/models/{model['model_id']}")
    for dataset in look("/api/v1/datasets/"):
        path = f"/api/v1/datasets/{dataset['id']}"
        look(f"{path}/rows?limit=100")
        look(f"{path}/report?model_id={MODEL}")
    for job in look("/api/v1/jobs/?limit=1000"):
        look(f"/api/v1/jobs/{job['id']}/events/?follow=false")
    for deployment in look("/api/v1/deployments/?all=true&limit=1000"):
        look(f"/api/v1/deployments/{deployment['id']}/attempts/")
    for alias in look("/api/v1/aliases/"):
        look(f"/api/v1/aliases/{alias['name']}/history")
    for training in look("/api/v1/finetune/"):
        look(f"/api/v1/finetune/{training['id']}")
    return shown


def lost(before: Json, now: Json, at: str = "") -> Iterator[str]:
    """Yield, in words, each value of before that is not the same now. More fields and more elements are no loss."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name, value in before.items():
            if name in now:
                yield from lost(value, now[name], f"{at}.{name}")
            else:
                yield f"{at}.{name} is gone: it was {value!r}"
    elif isinstance(before, list) and isinstance(now, list) and (key := _key(before)) is not None:
        found = {element[key]: element for element in now if isinstance(element, dict) and key in element}
        for element in before:
            if element[key] in found:
                yield from lost(element, found[element[key]], f"{at}[{element[key]}]")
            else:
                yield f"{at}[{element[key]}] is gone: it was {element!r}"
    elif before != now:
        yield f"{at} is {now!r}: it was {before!r}"


def _key(elements: list[Json]) -> str | None:
    for key in KEYS:
        has_it = bool(elements) and all(isinstance(one, dict) and key in one for one in elements)
        if has_it and len({one[key] for one in elements}) == len(elements):
            return key
    return None
