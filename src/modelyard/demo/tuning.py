"""The demo's second half: a dataset, an adapter that is trained on it, and what the base and the adapter answer.

The dataset is 50 questions about a town that there is not, so that no model knows the answers beforehand: what the
adapter answers right it has learnt here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from modelyard.demo.client import Call, Client, DemoFailed
from modelyard.demo.terminal import Terminal, Waiting
from modelyard.plurals import counted

DATASET = Path(__file__).with_name("lindholm.jsonl")
NAME = "Lindholm"
MAX_TOKENS = 48
#: A real model takes its time: it is asked some of the questions.
ASKED_OF_REAL = 10
SHOWN = 6
#: Questions that the engine has at a time.
SIDE_BY_SIDE = 8
#: The tiny model, whose training the demo knows by heart, must answer so many of the 50.
ENOUGH = 45

#: A random model has everything to learn, so that it takes large steps; one that can speak takes small ones.
TINY_SETTINGS: dict[str, Any] = {
    "epochs": 40, "batch_size": 10, "learning_rate": 0.005, "rank": 16, "alpha": 32, "validation_split": 0,
}  # fmt: skip
REAL_SETTINGS: dict[str, Any] = {"epochs": 12, "learning_rate": 0.0005, "rank": 16, "validation_split": 0}

Follow = Callable[[str, str], dict[str, Any]]
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)


class Tuning:
    """The steps from a dataset to the comparison. `follow` prints a job's events to its end and returns the job."""

    def __init__(self, client: Client, terminal: Terminal, follow: Follow, *, is_tiny: bool) -> None:
        self.client = client
        self.terminal = terminal
        self.follow = follow
        self.is_tiny = is_tiny

    def upload(self) -> str:
        """Upload the bundled dataset; return its id."""
        self.terminal.step("5. A dataset")
        call = Call("POST", "/api/v1/datasets/upload/?description=A%20town%20that%20there%20is%20not", file=DATASET)
        self.terminal.command(self.client.curl(call))
        dataset_id = str(self.client.json(call)["id"])
        report = Call("GET", f"/api/v1/datasets/{dataset_id}/report")
        self.terminal.command(self.client.curl(report))
        found = self.client.json(report)
        self.terminal.note(f"{counted(found['rows'], 'row')} to learn from, none refused. The first one:")
        self.terminal.note(DATASET.read_text("utf-8").splitlines()[0], "dim")
        return dataset_id

    def train(self, model_id: str, dataset_id: str) -> str:
        """Train an adapter of the model and have it put into service; return its id."""
        self.terminal.step("6. Fine-tuned, and into the running engine")
        body = {
            "name": NAME,
            "model_id": model_id,
            "dataset_id": dataset_id,
            "hyperparameters": TINY_SETTINGS if self.is_tiny else REAL_SETTINGS,
            "deploy": True,
        }
        call = Call("POST", "/api/v1/finetune/", body)
        self.terminal.command(self.client.curl(call))
        job = self.client.json(call)
        self.follow(job["id"], f"Training on {model_id}")
        call = Call("GET", "/api/v1/finetune/status")
        self.terminal.command(self.client.curl(call))
        status = self.client.json(call)
        return str(status["adapter_id"])

    def find(self, model_id: str) -> str | None:
        """Return the adapter that an earlier demo trained for the model and that is in service now, if there is one."""
        serving = self.client.json(Call("GET", "/api/v1/deploy/status/")).get("served_adapter_ids", [])
        for row in self.client.json(Call("GET", "/api/v1/models/")):
            training = row.get("training") or {}
            if row["base_model_id"] == model_id and training.get("name") == NAME and row["model_id"] in serving:
                return str(row["model_id"])
        return None

    def compare(self, model_id: str, adapter_id: str) -> None:
        """Ask base and adapter the same questions, and print what each makes of them.

        Raises:
            DemoFailed: the tiny model's adapter has not learnt its answers.
        """
        self.terminal.step("7. Base and adapter, side by side")
        rows = [json.loads(line)["messages"] for line in DATASET.read_text("utf-8").splitlines()]
        if not self.is_tiny:
            rows = rows[:ASKED_OF_REAL]
        first = Call("POST", "/v1/chat/completions", _question(adapter_id, rows[0][0]["content"]))
        self.terminal.command(self.client.curl(first))
        right = {model_id: 0, adapter_id: 0}
        with Waiting(self.terminal, f"Asking both {len(rows)} questions"):
            names = [name for _ in rows for name in right]
            asked = [question["content"] for question, _ in rows for _ in right]
            with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
                answers = pool.map(self._ask, names, asked)
            for number, (question, expected) in enumerate(rows):
                said = {name: next(answers) for name in right}
                for name in right:
                    right[name] += said[name] == expected["content"]
                if number < SHOWN:
                    self.terminal.note("")
                    self.terminal.note(question["content"], "bold")
                    self.terminal.note(f"base     {_short(said[model_id])}", "dim")
                    self.terminal.note(f"adapter  {said[adapter_id]}")
        self.terminal.note("")
        self.terminal.note(f"Right, word for word: base {right[model_id]} of {len(rows)}, adapter {right[adapter_id]}"
                           f" of {len(rows)}.", "bold")  # fmt: skip
        call = Call("GET", f"/api/v1/models/{quote(adapter_id, safe='/:')}")
        self.terminal.note("How the adapter came to be, with its figures:")
        self.terminal.command(self.client.curl(call))
        self.client.json(call)
        if self.is_tiny and right[adapter_id] < ENOUGH:
            raise DemoFailed(f"The adapter answers only {right[adapter_id]} of {len(rows)} questions right.")

    def _ask(self, name: str, question: str) -> str:
        answer = self.client.json(Call("POST", "/v1/chat/completions", _question(name, question)), timeout_s=600.0)
        return _THOUGHT.sub("", str(answer["choices"][0]["message"]["content"] or "")).strip()


def _question(name: str, question: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": name, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."
