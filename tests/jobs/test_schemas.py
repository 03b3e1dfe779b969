"""A job as the source API shows it, with ours after it."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime

from modelyard.jobs.schemas import EventOut, JobOut
from modelyard.jobs.tables import Job, JobEvent

AT = datetime(2024, 3, 21, 9, 58, 29, 846708, UTC)


def job(**values: object) -> Job:
    plain = {"kind": "DOWNLOAD", "name": "DOWNLOAD_test", "status": "CREATED", "created_at": AT}
    return Job(id=uuid.UUID(int=1), interrupt_requested=False, **(plain | values))


def shown(**values: object) -> dict[str, object]:
    found: dict[str, object] = json.loads(JobOut.of(job(**values)).model_dump_json())
    return found


def test_a_job_begins_with_the_source_documents_fields_and_continues_with_ours() -> None:
    out = shown(status="FINISHED", started_at=AT, finished_at=AT.replace(microsecond=0))
    assert list(out) == [
        "id", "name", "status", "started_at",
        "kind", "created_at", "finished_at", "interrupt_requested", "progress", "failure",
    ]  # fmt: skip
    assert {name: out[name] for name in ("id", "name", "status", "started_at")} == {
        "id": "00000000-0000-0000-0000-000000000001",
        "name": "DOWNLOAD_test",
        "status": "FINISHED",
        "started_at": "2024-03-21T09:58:29.846708",
    }
    assert out["created_at"] == "2024-03-21T09:58:29.846708Z"


def test_times_keep_six_digits_where_the_microseconds_happen_to_be_zero() -> None:
    out = shown(started_at=AT.replace(microsecond=0), finished_at=AT.replace(microsecond=0))
    assert out["started_at"] == "2024-03-21T09:58:29.000000"
    assert out["finished_at"] == "2024-03-21T09:58:29.000000Z"


def test_a_waiting_job_shows_its_creation_as_its_start_because_clients_expect_a_time_there() -> None:
    out = shown()
    assert out["started_at"] == "2024-03-21T09:58:29.846708"
    assert out["finished_at"] is None
    assert out["progress"] is None
    assert out["failure"] is None


def test_progress_and_failure_show_once_they_are_there() -> None:
    out = shown(
        progress_done=3, progress_total=4, progress_unit="bytes", failure_code="no_disk", failure_message="Full."
    )
    assert out["progress"] == {"done": 3, "total": 4, "unit": "bytes"}
    assert out["failure"] == {"code": "no_disk", "message": "Full.", "hint": "", "evidence": []}
    shown_failure = shown(failure_code="x", failure_evidence=["a", "b"])["failure"]
    assert shown_failure == {"code": "x", "message": "", "hint": "", "evidence": ["a", "b"]}


def test_an_event_shows_its_number_time_level_message_and_data() -> None:
    event = JobEvent(number=17, at=AT, level="info", message="Ready.", data={"seconds": 1.5})
    assert json.loads(EventOut.of(event).model_dump_json()) == {
        "number": 17,
        "at": "2024-03-21T09:58:29.846708Z",
        "level": "info",
        "message": "Ready.",
        "data": {"seconds": 1.5},
    }
