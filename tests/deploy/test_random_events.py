"""Random wishes, questions and deaths in any order leave one consistent state, and nothing that runs unknown.

Hypothesis' stateful testing draws the events. The seed is printed when it fails: MODELYARD_TEST_SEED=<seed> draws the
same events again, and MODELYARD_TEST_SEQUENCES=<count> as many sequences of 100 as one has time for. Races need not
happen twice, so a failure tells all that was seen of it: the events, the rows and what the yard logged.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import psycopg
import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.deploy.yard_process import Json, Refused, YardProcess

EVENTS = 100
#: Everything must have come to rest so long after the last event.
REST_S = 40.0
#: How long a request may still be sent to an engine that was killed: until its keeper's word is written down.
KILLED_UNSEEN_S = 3.0
POEMS, PROSE, BROKEN, MUTE = "org/poems", "org/prose", "org/broken", "org/mute"
BAD = {BROKEN, MUTE}
MODELS: dict[str, Json] = {
    "org/a": {"chunk_ms": 50, "slow_load": 0.05, "fail_load": {BROKEN: "no"}, "fail_adapters": {MUTE: "no"}},
    "org/b": {"chunk_ms": 50},
    "org/slow": {"chunk_ms": 50, "start_delay_s": 0.8},
    "org/flaky": {"chunk_ms": 50, "die_after_s": 0.6, "starts": [1, 2, 4, 7]},
    "org/dead": {"die_at_start": {"stderr": "ValueError: no"}},
    "org/embed": {},
}
TASKS = {"org/embed": "embed"}
NAMES = (None, "default", "Compressa-LLM", "Compressa-Embedding", "mine", "org/a", "org/b", "org/slow", "org/flaky",
         "org/embed", POEMS, PROSE, MUTE)  # fmt: skip
SETTINGS: Json = {
    "engine_stop_timeout_s": 2.0,
    # A question for one at rest, whose memory others have taken, waits as long: less than `REST_S`.
    "engine_wake_timeout_s": 5.0,
    # Nobody's question takes as long: none may be cut off.
    "engine_drain_timeout_s": 30.0,
    "engine_max_restarts": 3,
}
ANY_OF_THEM = st.integers(0, 11)


def _event(name: str, times: int, **arguments: st.SearchStrategy[Any]) -> list[st.SearchStrategy[tuple[str, Json]]]:
    # One object each: of equal ones hypothesis would keep the first.
    return [st.tuples(st.just(name), st.fixed_dictionaries(arguments)) for _ in range(times)]


BOOLEANS, PAUSES = st.booleans(), st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.2, 0.3])
ADAPTER_IDS = st.lists(st.sampled_from([POEMS, POEMS, PROSE, PROSE, BROKEN, MUTE]), unique=True, max_size=3)
ALIASES = st.sampled_from(["mine", "default"])
TOKENS = st.sampled_from([1, 5, 20])
#: What may happen: the method's name, how often among the others, and with what.
EVENT = st.one_of(
    *_event("deploy", 4, model_id=st.sampled_from([*MODELS, "org/b", "org/slow"]), keep_others=BOOLEANS,
            strategy=st.sampled_from(["auto", "auto", "side_by_side", "replace"]),
            idle_timeout_s=st.sampled_from([None, None, 0.3])),
    *_event("deploy_with_adapters", 4, adapter_ids=ADAPTER_IDS, strategy=st.sampled_from(["auto", "replace"]),
            keep_others=BOOLEANS),
    *_event("interrupt", 1, which=ANY_OF_THEM),
    *_event("take_down", 1, which=ANY_OF_THEM, wanted=st.sampled_from(["DRAINED", "DOWN"])),
    *_event("move_alias", 1, alias=ALIASES, to=st.sampled_from(["org/a", "org/b", "org/embed", POEMS])),
    *_event("remove_alias", 1, alias=ALIASES),
    *_event("ask", 7, names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4),
            tokens=TOKENS),
    *_event("ask_what_serves", 4, which=ANY_OF_THEM, tokens=TOKENS),
    *_event("kill", 2, which=ANY_OF_THEM, kind=st.sampled_from(["engine", "engine", "keeper"])),
    *_event("end_the_server", 1, how=st.sampled_from(["stop", "kill"])),
    *_event("wait", 3, wait_s=PAUSES),
    *_event("wait_until_started", 4),
)  # fmt: skip


@dataclass
class Wish:
    """A deploy that was taken. `served` are the jobs of its task that served at that moment."""

    number: int
    at: float
    job: str
    adapter_ids: list[str]
    task: str
    keep_others: bool
    served: list[str] = field(default_factory=list)


class Events(RuleBasedStateMachine):
    """One yard, what was wanted of it, and what happened to it."""

    database_url = ""
    counted = 0
    answered = 0

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="yard-"))
        (self.home / "tmp").mkdir()
        self.data_dir = self.home / "data"
        self.log = self.home / "log.txt"
        self.story: list[str] = []
        self.wishes: list[Wish] = []
        #: Jobs that were wanted out of service, and whether at once; and when.
        self.left: dict[str, float] = {}
        self.cut: dict[str, float] = {}
        self.killed: list[tuple[str, float]] = []
        self.yard: YardProcess

    # What may happen

    @initialize(budget_gib=st.sampled_from([None, None, 4.0]))
    def open(self, budget_gib: float | None) -> None:
        self._tell(f"budget {budget_gib}")
        self.budget_gib = budget_gib
        url = self.database_url or f"sqlite:///{self.home / 'test.db'}"
        settings = {**SETTINGS, "engine_memory_gib": budget_gib}
        self.yard = YardProcess(self.data_dir, self.home / "tmp", self.log, url, settings)
        self.yard.start()
        for model_id, misbehave in MODELS.items():
            self.yard.ask("add_model", model_id=model_id, misbehave=misbehave, task=TASKS.get(model_id, "generate"))
        for adapter_id in (POEMS, PROSE, BROKEN, MUTE):
            self.yard.ask("add_adapter", adapter_id=adapter_id, base_model_id="org/a")

    def deploy(self, model_id: str, strategy: str, keep_others: bool, idle_timeout_s: float | None) -> None:
        self._deploy(model_id, [], strategy=strategy, keep_others=keep_others, idle_timeout_s=idle_timeout_s)

    def deploy_with_adapters(self, adapter_ids: list[str], strategy: str, keep_others: bool) -> None:
        self._deploy("org/a", adapter_ids, strategy=strategy, keep_others=keep_others)

    def _deploy(self, model_id: str, adapter_ids: list[str], **wish: Any) -> None:
        task = TASKS.get(model_id, "generate")
        up = [row for row in self._live() if row["task"] == task and row["wanted"] == "UP"]
        served = [row["job"] for row in up if row["state"] == "READY"]
        job = self.yard.ask("deploy", model_id=model_id, adapter_ids=adapter_ids, **wish)
        assert not isinstance(job, Refused), job
        self._tell(f"deploy {model_id} {adapter_ids} {wish} -> {job[:8]}")
        self.wishes.append(
            Wish(len(self.wishes), time.monotonic(), job, adapter_ids, task, wish["keep_others"], served)
        )

    def interrupt(self, which: int) -> None:
        if row := self._one(which):
            self._leave(row, "interrupt")
            self.yard.ask("interrupt", job_id=row["job"])

    def take_down(self, which: int, wanted: str) -> None:
        if row := self._one(which):
            self._leave(row, wanted)
            self.yard.ask("take_down", job_id=row["job"], wanted=wanted)

    def move_alias(self, to: str, alias: str) -> None:
        self._tell(f"alias {alias} -> {to}")
        self.yard.ask("put_alias", name=alias, target=to)

    def remove_alias(self, alias: str) -> None:
        self._tell(f"no alias {alias}")
        self.yard.ask("remove_alias", name=alias)

    def ask(self, names: list[str | None], tokens: int) -> None:
        for name in names:
            task = "embed" if name in ("org/embed", "Compressa-Embedding") else "generate"
            self.yard.ask("query", name=name, task=task, tokens=tokens)
        self._tell(f"ask {names} for {tokens}")

    def ask_what_serves(self, which: int, tokens: int) -> None:
        self._wait_until_started()
        # Of names drawn from all, most are not in service.
        ready = [row for row in self._live() if row["state"] == "READY"]
        names = [name for row in ready for name in (row["model_id"], *(one["adapter_id"] for one in row["loaded"]))]
        self.ask([names[which % len(names)]] if names else [], tokens)

    def kill(self, which: int, kind: str) -> None:
        keepers = self._keepers()
        if not keepers:
            return
        keeper, job = keepers[which % len(keepers)]
        self._tell(f"kill the {kind} of {job[:8]}")
        # Noted before it happens, and then again: its requests fail between.
        self.killed.append((job, time.monotonic()))
        for pid in [keeper] if kind == "keeper" else _children_of(keeper):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.killed.append((job, time.monotonic()))

    def end_the_server(self, how: str) -> None:
        self._tell(f"{how} the server")
        getattr(self.yard, how)()
        self.yard.start()

    def wait(self, wait_s: float) -> None:
        self._tell(f"{wait_s:.2f} s")
        time.sleep(wait_s)

    @rule(event=EVENT)
    def happens(self, event: tuple[str, Json]) -> None:
        # One rule of all: of several, hypothesis leaves most out of a sequence.
        name, arguments = event
        getattr(self, name)(**arguments)

    def wait_until_started(self) -> None:
        self._tell("until all is started")
        self._wait_until_started()

    def _wait_until_started(self) -> None:
        deadline = time.monotonic() + 3.0
        while any(row["state"] == "STARTING" for row in self._live()) and time.monotonic() < deadline:
            time.sleep(0.02)

    # What must hold

    @invariant()
    def every_answer_is_whole(self) -> None:
        self._open_questions()

    def _open_questions(self) -> int:
        """Look at the answers that came since, and return how many questions have none yet."""
        rows = self._rows()
        up = [row["model_id"] for row in rows if row["is_live"] and row["wanted"] == "UP" and not row["interrupted"]]
        self._expect(len(up) == len(set(up)), f"two deployments of one model are wanted: {up}")
        answers, open_questions = self.yard.ask("answers")
        by_id = {row["id"]: row for row in rows}
        for answer in answers:
            if "refused" in answer:
                known = answer["refused"] in ("model_not_found", "engine_starting")
                self._expect(known, f"a question was refused: {answer}")
                continue
            row = by_id[answer["id"]]
            self._expect(row["was_ready"], f"{answer} was answered before it was ready")
            Events.answered += not answer["wrong"]
            self._expect(not answer["wrong"] or self._may_fail(row, answer), f"{answer} failed, of {row}")
        return int(open_questions)

    def _may_fail(self, row: Json, answer: Json) -> bool:
        if row["model_id"] == "org/flaky" or row["job"] in self.cut:
            return True
        since, until = answer["from"] - KILLED_UNSEEN_S, answer["until"] + 0.1
        return any(job == row["job"] and since <= at <= until for job, at in self.killed)

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self._comes_to(self._unrest, "rest")
                self._wishes_were_kept()
                self._everything_is_taken_down()
                self._a_new_model_serves()
                self._everything_is_taken_down()
                self.yard.stop()
                self._expect("Traceback" not in self.log.read_text("utf-8"), "something failed inside the yard")
                self._expect(not (left := self._traces(set())), f"left after the stop: {left}")
        finally:
            with suppress(AttributeError, OSError):
                self.yard.kill()
            for pid, _ in self._processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self.home, ignore_errors=True)

    def _comes_to(self, complaints: Callable[[], Sequence[str]], what: str) -> None:
        deadline = time.monotonic() + REST_S
        while found := complaints():
            self._expect(time.monotonic() < deadline, f"it did not come to {what}: {found}")
            time.sleep(0.05)

    def _everything_is_taken_down(self) -> None:
        for row in self._live():
            self._leave(row, "DOWN")
            self.yard.ask("take_down", job_id=row["job"], wanted="DOWN")
        self._comes_to(self._unrest, "rest when everything was taken down")
        self._expect(not self._live(), "something is left")

    def _a_new_model_serves(self) -> None:
        # Whatever happened before; and it gives each sequence an answer, which events drawn by chance need not.
        self.deploy("org/b", "auto", keep_others=False, idle_timeout_s=None)
        self._comes_to(self._unrest, "rest with a new model")
        answered = Events.answered
        self.ask(["org/b"], 5)
        self._comes_to(self._unrest, "rest after a question")
        self._expect(Events.answered == answered + 1, "the new model gave no answer")

    def _unrest(self) -> list[str]:
        """Return what is not as it must be once nothing happens any more."""
        found = ["questions are open"] if self._open_questions() else []
        rows = self._rows()
        for row in rows:
            # One whose engine died waits in BACKOFF.
            if row["state"] in ("STARTING", "BACKOFF") and self._waits_for_memory(row, rows):
                continue
            found += [f"{row['job'][:8]} {row['model_id']} {row['state']}: {each}" for each in _complaints(row)]
        found += self._traces({row["job"] for row in rows if row["state"] == "READY"})
        return found or list(self.yard.ask("unserved"))

    def _waits_for_memory(self, row: Json, rows: Sequence[Json]) -> bool:
        """Whether others have the memory of one that has served: that is how it stays until they leave."""
        # Those that it replaces leave before it starts, unless that was not wanted.
        leaving = [] if row["strategy"] == "side_by_side" else row["replaces"]
        taken = any(one["memory_bytes"] for one in rows if one is not row and one["id"] not in leaving)
        return bool(
            self.budget_gib and row["has_served"] and taken and row["wanted"] == "UP" and not row["memory_bytes"]
        )

    def _traces(self, serving: set[str]) -> list[str]:
        """Return what lives beside one keeper with one engine for each of these jobs, and what is missing of them."""
        keepers = self._keepers()
        found = [] if sorted(job for _, job in keepers) == sorted(serving) else [f"keepers {keepers} for {serving}"]
        engines = [pid for pid, argv in self._processes() if "--uds" in argv]
        others = [pid for pid, argv in self._processes() if pid not in engines and pid not in dict(keepers)]
        if len(engines) != len(serving) or others:
            found.append(f"engines {engines} and others {others} for {len(serving)} that serve")
        for folder, what in ((self.home / "tmp", "private folders"), (self.data_dir / "run", "run entries")):
            names = [path.name for path in folder.iterdir() if not path.name.startswith("pymp-")]
            if len(names) != len(serving):
                found.append(f"{what} {names} for {len(serving)} that serve")
        return found

    def _wishes_were_kept(self) -> None:
        rows = self._rows()
        by_job = {row["job"]: row for row in rows}
        last = {wish.job: wish for wish in self.wishes}
        for row in rows:
            later = [
                wish
                for wish in self.wishes
                if wish.task == row["task"] and not wish.keep_others and wish.job != row["job"]
                and wish.number > (last[row["job"]].number if row["job"] in last else -1)
            ]  # fmt: skip
            if row["state"] == "STOPPED":
                self._expect(row["job"] in self.left or later, f"nobody wanted it out of service: {row}")
            elif row["state"] == "FAILED":
                self._expect(self._may_end(row), f"it failed for no reason: {row}")
            else:
                self._expect(row["job"] not in self.left, f"it was to leave: {row}")
                # A later wish for the same deployment may have asked to keep it after all.
                final = [wish for wish in later if not last[wish.job].keep_others and row["job"] in last]
                # Nobody leaves for one that waits for memory.
                ready = [wish.job for wish in final if by_job[wish.job]["state"] in ("READY", "IDLE")]
                self._expect(not ready, f"it was to leave for {ready}: {row}")
                if row["job"] in last and row["adapter_ids"] != (wanted := last[row["job"]].adapter_ids):
                    why = row["adapter_failure"]
                    self._expect(why and why["adapter_id"] in wanted, f"{wanted} were wanted: {row}")
        for task in ("generate", "embed"):
            wish = next((one for one in reversed(self.wishes) if one.task == task), None)
            if wish is None or wish.job in self.left:
                continue
            row = by_job[wish.job]
            if row["state"] == "FAILED" and not row["was_ready"]:
                if wish.keep_others:
                    continue  # nobody left for it
                stood = [job for job in wish.served if job not in self.left and by_job[job]["state"] != "FAILED"]
                after = [one for one in rows if one["task"] == task and one["number"] > row["number"]]
                back = after or any(by_job[job]["is_live"] for job in stood)
                self._expect(back or not stood, f"{stood} did not come back after {row}")
            else:
                self._expect(row["is_live"] or row["state"] == "FAILED", f"it is not in service: {row}")

    def _may_end(self, row: Json) -> bool:
        wanted = {one for wish in self.wishes if wish.job == row["job"] for one in wish.adapter_ids}
        return (
            bool(
                row["model_id"] in ("org/dead", "org/flaky")
                or (wanted & BAD and str(row["failure"]).startswith("adapter"))
                or row["failure"] == "not_enough_memory"
                or any(job == row["job"] for job, _ in self.killed)
            )
            and row["failure"] != "internal_error"
        )

    # What is there

    def _rows(self) -> list[Json]:
        found: list[Json] = self.yard.ask("rows")
        return found

    def _live(self) -> list[Json]:
        return [row for row in self._rows() if row["is_live"]]

    def _one(self, which: int) -> Json | None:
        live = [row for row in self._live() if row["status"] in ("CREATED", "RUNNING")]
        return live[which % len(live)] if live else None

    def _leave(self, row: Json, how: str) -> None:
        self._tell(f"{how} {row['job'][:8]} {row['model_id']} {row['state']}")
        self.left.setdefault(row["job"], time.monotonic())
        if how != "DRAINED":
            self.cut.setdefault(row["job"], time.monotonic())

    def _processes(self) -> list[tuple[int, list[str]]]:
        found = []
        for proc in Path("/proc").iterdir():
            with suppress(OSError):
                if proc.name.isdigit() and str(self.home) in (line := (proc / "cmdline").read_bytes().decode()):
                    found.append((int(proc.name), line.split("\0")))
        return found

    def _keepers(self) -> list[tuple[int, str]]:
        """Return each keeper's pid with its job."""
        return sorted(
            (pid, Path(argv[-2]).parent.name)
            for pid, argv in self._processes()
            if any(word.endswith("keeper.py") for word in argv)
        )

    def _tell(self, what: str) -> None:
        self.story.append(what)
        Events.counted += 1

    def _expect(self, holds: object, what: str) -> None:
        if holds:
            return
        log = self.log.read_text("utf-8")[-4000:] if self.log.exists() else ""
        try:
            rows = [f"{row}\n    {self.yard.ask('events', job_id=row['job'])}" for row in self._rows()]
        except (OSError, AssertionError) as error:  # what failed before is the news
            rows = [repr(error)]
        story = "\n".join(f"{number}. {each}" for number, each in enumerate(self.story))
        raise AssertionError(f"{what}\n\nEvents:\n{story}\n\nRows:\n" + "\n".join(rows) + f"\n\nLog:\n{log}")


def _complaints(row: Json) -> list[str]:
    """Return what is wrong with a row when nothing happens any more."""
    held = sorted({row["model_id"], *row["adapter_ids"]}) if row["is_live"] else []
    served = [one["adapter_id"] for one in row["loaded"]]
    expected: Json = {"held": held}
    if row["state"] == "READY":
        expected |= {"wanted": "UP", "status": "RUNNING", "interrupted": False, "replaces": [], "has_ended": False}
        expected |= {"wake_requested": False}
    elif row["state"] == "IDLE":
        expected |= {"wanted": "UP", "status": "RUNNING", "interrupted": False, "replaces": [], "has_ended": False}
        expected |= {"wake_requested": False, "engine_url": None, "memory_bytes": None}
    elif row["state"] in ("STOPPED", "FAILED"):
        status = "KILLED" if row["state"] == "STOPPED" or row["status"] == "KILLED" else "FAILED"
        expected |= {"wanted": row["wanted"] if row["wanted"] != "UP" else "DOWN", "status": status, "loaded": []}
        expected |= {"engine_url": None, "memory_bytes": None, "has_ended": True}
    else:
        return [f"it is {row['state']}"]
    found = [f"{name} is {row[name]!r}, not {value!r}" for name, value in expected.items() if row[name] != value]
    if row["state"] == "READY" and (served != row["adapter_ids"] or not row["engine_url"] or not row["memory_bytes"]):
        found.append(f"it serves {served} at {row['engine_url']} with {row['memory_bytes']}")
    return found


def _children_of(pid: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]
    except OSError:
        return []


def _run(machine: type[Events], sequences: int) -> None:
    seed = int(os.environ.get("MODELYARD_TEST_SEED") or random.SystemRandom().randrange(2**32))
    sequences = int(os.environ.get("MODELYARD_TEST_SEQUENCES") or sequences)
    settings = hypothesis.settings(
        max_examples=sequences,
        stateful_step_count=EVENTS,
        deadline=None,
        derandomize=False,
        database=None,
        print_blob=True,
        report_multiple_bugs=False,
        # A race is not made smaller by trying again.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    sys.stderr.write(f"MODELYARD_TEST_SEED={seed}\n")
    Events.counted = Events.answered = 0
    # Without a least number every third sequence ends before its first event.
    run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=settings, _min_steps=EVENTS - 1)
    sys.stderr.write(f"{Events.counted} events, {Events.answered} whole answers\n")
    # An interrupt or a kill with nothing there is none.
    assert Events.counted >= sequences * EVENTS * 0.8
    assert Events.answered >= sequences


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_events_leave_one_consistent_state_and_nothing_behind() -> None:
    _run(Events, 7)


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.timeout(600)
def test_random_events_on_postgresql_do_so_too(postgres_server: str) -> None:
    class OnPostgres(Events):
        def __init__(self) -> None:
            super().__init__()
            self.name = f"test_{uuid.uuid4().hex}"
            with psycopg.connect(postgres_server, autocommit=True) as connection:
                connection.execute(f'CREATE DATABASE "{self.name}"')
            self.database_url = postgres_server.replace("/postgres?", f"/{self.name}?")

        def teardown(self) -> None:
            try:
                super().teardown()
            finally:
                with psycopg.connect(postgres_server, autocommit=True) as connection:
                    connection.execute(f'DROP DATABASE "{self.name}" WITH (FORCE)')

    _run(OnPostgres, 3)
