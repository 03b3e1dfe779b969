"""`modelyard demo`: from nothing to a better answer, each step with the curl command that does the same.

Starts a server (or takes the one that runs), puts a model into its store, deploys it, asks it, streams the answer;
then uploads a dataset, fine-tunes the model on it, and asks base and adapter the same questions (`tuning`).
The default model is made on the spot (`tiny_llama`) and added from the import directory, so that no network is
needed. Leaves the server running until Ctrl-C; with `once` it ends everything itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from types import FrameType
from typing import Any
from urllib.parse import quote

from modelyard.demo import server
from modelyard.demo.client import Call, Client, DemoFailed
from modelyard.demo.terminal import Terminal, Waiting
from modelyard.demo.tuning import Tuning
from modelyard.settings import Settings, load_settings

TINY = "tiny-llama"
QUESTION = "Hello! Who are you, and what can you do?"
MAX_TOKENS = 64
FAILED, INTERRUPTED = 1, 130


def run_demo(model: str | None, once: bool, tune: bool = True) -> int:
    """Run the demo with `model` (a Hugging Face id or local:NAME; None: a tiny one made here); return an exit status.

    Without `tune` it ends with the model's first answer.

    0: all of it worked; 1: it did not, and the cause was printed; 130: it was interrupted before the end.

    Raises:
        StartRefused: the settings are wrong.
    """
    settings = load_settings()
    terminal = Terminal()
    # Whoever ends the demo, and be it by closing its window, ends what it started.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    demo = Demo(settings, terminal)
    status = FAILED
    try:
        demo.start_server()
        model_id = demo.add_model(model)
        demo.deploy(model_id)
        demo.ask(model_id)
        if tune:
            demo.tune(model_id)
        status = 0
        demo.say_what_next(once)
        if not once:
            demo.wait_for_the_end()
    except DemoFailed as failure:
        terminal.failure(str(failure))
        if demo.child is not None and "Its log:" not in str(failure):
            terminal.note(f"The server's log: {demo.child.log}")
        status = FAILED
    except KeyboardInterrupt:
        status = 0 if status == 0 else INTERRUPTED
    try:
        if not demo.stop():
            return status or FAILED
    except KeyboardInterrupt:
        # A second Ctrl-C: the engines' keepers end them by themselves once the server is gone for long.
        return INTERRUPTED
    return status


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class Demo:
    """The steps, in the order in which `run_demo` takes them."""

    def __init__(self, settings: Settings, terminal: Terminal) -> None:
        self.settings = settings
        self.terminal = terminal
        self.import_dir = settings.import_dir or settings.data_dir / "import"
        self.child: server.ServerChild | None = None
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """The server's client, from `start_server` on."""
        assert self._client is not None
        return self._client

    def start_server(self) -> None:
        """Find or start the server, and wait until it answers."""
        self.terminal.step("1. A server")
        self._client = server.find(self.settings)
        if self._client is not None:
            self.terminal.note(f"One runs already at {self.client.base_url}; it is asked, and left running.")
        else:
            with Waiting(self.terminal, "Starting the server") as waiting:
                self.child = server.ServerChild(self.settings, self.import_dir)
                self._client = self.child.wait_until_healthy(waiting)
            self.terminal.note(f"{self.client.base_url} answers; its log: {self.child.log}")
        self.terminal.command(self.client.curl(Call("GET", "/health")))

    def add_model(self, model: str | None) -> str:
        """Put the model into the store, unless it is there; return its id."""
        self.terminal.step("2. A model in its store")
        model_id = model or f"local:{TINY}"
        if any(row["model_id"] == model_id for row in self.client.json(Call("GET", "/api/v1/models/"))):
            self.terminal.note(f"{model_id} is there already.")
            self.terminal.command(self.client.curl(Call("GET", "/api/v1/models/")))
            return model_id
        if model is None:
            self._make_tiny()
        call = Call("POST", f"/api/v1/models/add/?model_id={quote(model_id, safe='/:')}")
        self.terminal.command(self.client.curl(call))
        self._finish(self.client.json(call)["id"], f"Fetching {model_id}")
        return model_id

    def deploy(self, model_id: str) -> None:
        """Put the model into service, and wait until it has generated a token."""
        self.terminal.step("3. In service, on vLLM")
        call = Call("POST", "/api/v1/deploy/", {"model_id": model_id, "adapter_ids": []})
        self.terminal.command(self.client.curl(call))
        wanted = self.client.json(call)
        if wanted["status"] == "RUNNING":
            how = (
                "is in service already"
                if self.child is None
                else "was in service when the server ended, and comes back"
            )
            self.terminal.note(f"It {how}. What happened so far:")
        job = self._follow(wanted["id"], f"Starting vLLM with {model_id}", until_ready=True)
        if job["status"] != "RUNNING":
            raise self._job_failed(job)
        self.terminal.command(self.client.curl(Call("GET", "/api/v1/deploy/status/")))

    def ask(self, model_id: str) -> None:
        """Ask the model something, and print its answer as it comes."""
        self.terminal.step("4. An answer")
        messages = [{"role": "user", "content": QUESTION}]
        body = {"model": model_id, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True}
        call = Call("POST", "/v1/chat/completions", body, streams=True)
        self.terminal.command(self.client.curl(call))
        self.terminal.note("")
        finish = None
        for _, data in self.client.events(call):
            if data == "[DONE]":
                break
            chunk = json.loads(data)
            if "error" in chunk:
                raise DemoFailed(f"The engine broke off: {chunk['error']}")
            for choice in chunk["choices"]:
                self.terminal.piece(choice["delta"].get("content") or "")
                finish = choice.get("finish_reason") or finish
        self.terminal.note("")
        if finish is None:
            raise DemoFailed("The answer ended in the middle.")
        self.terminal.note(f"(finished: {finish})", style="dim")
        if model_id == f"local:{TINY}":
            self.terminal.note(
                "Nonsense, as it should be: this model is random numbers. MODEL=<Hugging Face id>", "dim"
            )
            self.terminal.note("makes the same demo with a real one, such as MODEL=Qwen/Qwen3-0.6B.", "dim")

    def tune(self, model_id: str) -> None:
        """Fine-tune the model on the bundled dataset, and show what that changed."""
        tuning = Tuning(self.client, self.terminal, self._finish, is_tiny=model_id == f"local:{TINY}")
        adapter_id = tuning.find(model_id)
        if adapter_id is None:
            adapter_id = tuning.train(model_id, tuning.upload())
        else:
            self.terminal.step("5. and 6. A dataset and an adapter that learnt from it")
            self.terminal.note(f"{adapter_id} is there and in service already.")
        tuning.compare(model_id, adapter_id)

    def say_what_next(self, once: bool) -> None:
        """Print where to go from here."""
        self.terminal.step("All of it worked.")
        if once and self.child is not None:
            self.terminal.note("Without ONCE=1 (--once) the server stays, to be tried out at /api/docs.")
        else:
            self.terminal.note(f"Documentation, to be tried out: {self.client.base_url}/api/docs")
        if not once:
            self.terminal.note("Out of service again:")
            self.terminal.command(self.client.curl(Call("POST", "/api/v1/deploy/interrupt/")))

    def wait_for_the_end(self) -> None:
        """Block until Ctrl-C. A server that was there before is not waited for."""
        if self.child is None:
            return
        self.terminal.step("The server runs until Ctrl-C.")
        status = self.child.wait()
        raise DemoFailed(f"the server ended by itself (exit status {status}).\n{self.child.tail()}")

    def stop(self) -> bool:
        """End what the demo started; return whether it ended in good order."""
        if self.child is None:
            return True
        ended_well = self.child.stop(self.terminal)
        if not ended_well:
            self.terminal.failure(f"the server did not end in good order.\n{self.child.tail()}")
        return ended_well

    def _make_tiny(self) -> None:
        folder = self.import_dir / TINY
        if folder.exists():
            return
        self.terminal.note(f"A tiny random Llama, made in {folder}")
        command = [sys.executable, "-m", "modelyard.demo.tiny_llama", str(folder)]
        with Waiting(self.terminal, "Making it"):
            made = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
        if made.returncode != 0:
            raise DemoFailed(f"The tiny model could not be made: {made.stderr.strip().splitlines()[-1:]}")

    def _follow(self, job_id: str, what: str, *, until_ready: bool) -> dict[str, Any]:
        """Print a job's events until it has ended or, if asked to, its model is in service; return the job."""
        call = Call("GET", f"/api/v1/jobs/{job_id}/events/", streams=True)
        self.terminal.command(self.client.curl(call))
        with Waiting(self.terminal, what) as waiting:
            for name, data in self.client.events(call):
                event: dict[str, Any] = json.loads(data)
                if name == "end":
                    return event
                if name == "progress":
                    # What has to be done is not known yet where it is nothing.
                    waiting.say(f"{what}: {_amount(event)}" if event["total"] else what)
                elif "points" in event["data"]:
                    # Each step of a training: of use where it is, not one below the other.
                    waiting.say(f"{what}: {str(event['message'])[:-1].lower()}")
                elif event["level"] != "debug":
                    self.terminal.note(str(event["message"]))
                    # An earlier engine of the same deployment may have been ready, and gone: the status tells.
                    if until_ready and event["data"].get("state") == "READY" and self._is_in_service(job_id):
                        return self._status(job_id)
        return self._status(job_id)

    def _finish(self, job_id: str, what: str) -> dict[str, Any]:
        """Follow a job to its end; it must be a good one."""
        job = self._follow(job_id, what, until_ready=False)
        if job["status"] != "FINISHED":
            raise self._job_failed(job)
        return job

    def _status(self, job_id: str) -> dict[str, Any]:
        job: dict[str, Any] = self.client.json(Call("GET", f"/api/v1/jobs/{job_id}/status/"))
        return job

    def _is_in_service(self, job_id: str) -> bool:
        deployment = self.client.json(Call("GET", "/api/v1/deploy/status/"))
        return bool(deployment["state"] == "READY" and deployment["job"]["id"] == job_id)

    def _job_failed(self, job: dict[str, Any]) -> DemoFailed:
        failure = job.get("failure") or {"message": f"it is {job['status']}.", "hint": ""}
        if self.child is None:
            log = "\n  $ " + self.client.curl(Call("GET", f"/api/v1/jobs/{job['id']}/log/?tail=50"))
        else:  # The server ends with the demo: there will be nobody to ask.
            log = f" {self.settings.jobs_dir / job['id'] / 'log.txt'}"
        return DemoFailed(f"{job['name']}: {failure['message']} {failure['hint']}\n  What its process wrote:{log}")


def _amount(progress: dict[str, Any]) -> str:
    done, total, unit = int(progress["done"]), int(progress["total"]), progress["unit"]
    share = f"{100 * done / total:.0f} %" if total else "0 %"
    if unit == "bytes":
        return f"{done / 1e6:.1f} of {total / 1e6:.1f} MB ({share})"
    return f"{done} of {total} {unit} ({share})"
