"""A dry run: what a training would take, from all of its rows and a few of its steps; nothing is kept of it.

Every row is prepared as the training would. Then, unless a training before this one tells, the model is loaded and
takes a few real steps (`trial`). Where memory does not suffice for that, the plan says so, with the numbers, instead of
an estimate.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from modelyard.errors import JobFailure
from modelyard.trainer import choices, forecast, measurements, memory
from modelyard.trainer.examples import Prepared
from modelyard.trainer.forecast import Basis
from modelyard.trainer.preparation import prepare_all
from modelyard.trainer.reports import Reports
from modelyard.trainer.spec import Spec
from modelyard.trainer.stall_watch import StallWatch


def plan(spec: Spec, report: Reports) -> dict[str, Any]:
    """Return what the training of a spec would take. May be repeated; leaves the machine as it was.

    Returns:
        `{"prepared", "estimate", "seconds", "batch_size", "device", "dtype", "memory_available_bytes", "fits",
        "failure"}`. `seconds` has `loading`, `tokenizing`, `training`, `validation`, `evaluation` and their `total`.
        `estimate`, `seconds` and `batch_size` are None where `failure` (`{"code", "message", "hint"}`) says why, and
        where the spec does not want anything measured and there is no history.

    Raises:
        JobFailure: it could not be trained at all: whatever the training itself would say of the model or the rows.
    """
    report.phase("loading")
    from modelyard.trainer.batches import Course, Rows

    available = memory.budget(spec.memory_bytes).total_bytes
    ready = prepare_all(spec, report)
    config, tokenizer, prepared, watch = ready.config, ready.tokenizer, ready.rows, ready.watch
    rows = Rows(prepared.train)
    chosen = choices.choose(spec.hyperparameters, len(rows), config)
    spec = replace(spec, hyperparameters=choices.filled(spec.hyperparameters, chosen))
    course = Course.of(spec.hyperparameters, len(rows))
    facts = {
        **prepared.facts,
        "steps": course.total_steps,
        "steps_per_epoch": course.steps_per_epoch,
        "rows_per_step": course.rows_per_step,
        "chosen": choices.told(chosen),
    }
    if (why := measurements.why_never_early(spec.hyperparameters, course)) is not None:
        facts["notes"] = [*facts["notes"], why]
    report.prepared(facts)
    device, dtype = _here()
    found: dict[str, Any] = {
        "prepared": facts,
        "estimate": None,
        "seconds": None,
        "batch_size": None,
        "device": device,
        "dtype": dtype,
        "memory_available_bytes": available,
        "fits": None,
        "failure": None,
    }
    history = spec.history
    longest = int(rows.lengths.max())
    is_known = forecast.holds(
        history, device=device, dtype=dtype, rows_per_step=course.rows_per_step, longest=longest
    )  # fmt: skip
    if is_known and history is not None:
        found |= _remembered(history, forecast.tokens_of(rows, course), len(prepared.held_out), report)
    elif spec.measure:
        try:
            found |= _measured(spec, tokenizer, prepared, rows, report, watch)
        except JobFailure as failure:
            if failure.code != "out_of_memory":
                raise
            found["failure"] = {"code": failure.code, "message": failure.message, "hint": failure.hint}
            found["fits"] = False
            return found
    if found["estimate"] is not None:
        report.estimate(found["estimate"])
        found["fits"] = found["estimate"]["memory_bytes"] <= available
    return found


def _here() -> tuple[str, str]:
    """Return the device and the number format that a training would have."""
    import torch

    from modelyard.trainer.model import bf16_is_quick, device_name

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return device_name(device), "bfloat16" if on_gpu or bf16_is_quick() else "float32"


def _remembered(history: dict[str, Any], total_tokens: int, held_out: int, report: Reports) -> dict[str, Any]:
    estimate = forecast.estimate(
        seconds=1.0,
        tokens=history["tokens_per_s"],
        total_tokens=total_tokens,
        memory_bytes=int(history["memory_bytes"]),
        basis=Basis.HISTORY,
    )
    took = history["seconds"]
    rows_then = max(1, int(history["held_out_rows"]))
    parts = {
        "loading": float(took.get("loading", 0.0)),
        "tokenizing": report.seconds.get("tokenizing", 0.0),
        "training": estimate["seconds"],
        "validation": float(history.get("validation_share", 0.0)) * estimate["seconds"],
        "evaluation": float(took.get("evaluating", 0.0)) * held_out / rows_then,
    }
    return {"estimate": estimate, "seconds": _with_total(parts), "batch_size": history["batch_size"]}


def _measured(
    spec: Spec, tokenizer: Any, prepared: Prepared, rows: Any, report: Reports, watch: StallWatch
) -> dict[str, Any]:
    from modelyard.trainer.evaluation import expected_seconds
    from modelyard.trainer.model import load_base, with_adapter
    from modelyard.trainer.trial import Trial

    report.phase("loading")
    model = with_adapter(load_base(spec, report), spec)
    report.phase("training")
    trial = Trial.of(spec, model, rows, prepared, tokenizer, report)
    seconds, tokens = trial.measure()
    estimate = forecast.estimate(
        seconds=seconds,
        tokens=tokens,
        total_tokens=forecast.tokens_of(rows, trial.course),
        memory_bytes=trial.expected_peak_bytes(),
        basis=Basis.MEASURED,
    )
    took = report.seconds
    parts = {
        "loading": took.get("loading", 0.0),
        "tokenizing": took.get("tokenizing", 0.0),
        "training": estimate["seconds"],
        "validation": trial.validation_seconds(),
        "evaluation": expected_seconds(model, tokenizer, prepared.held_out, report, watch),
    }
    return {"estimate": estimate, "seconds": _with_total(parts), "batch_size": trial.sizing.at(0)}


def _with_total(parts: dict[str, float]) -> dict[str, float]:
    found = {name: round(value, 3) for name, value in parts.items()}
    return {**found, "total": round(sum(found.values()), 3)}
