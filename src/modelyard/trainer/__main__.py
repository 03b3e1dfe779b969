"""The trainer child: `python -m modelyard.trainer SPEC` does what a spec says and writes one result.

Trains, plans or merges; whatever happens ends in a result, unless the system kills this process. SIGTERM ends it in
good order: at once where nothing needs to be finished, and in the midst of the training after the step that runs,
with a checkpoint. Everything that it writes is beside its place until it is whole, so that SIGKILL at any moment
costs the time since the last checkpoint, and nothing else. Started by `accelerate launch`, several processes share one
training (`ranks`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelyard.trainer import choices, memory, ranks
from modelyard.trainer.failures import as_failure
from modelyard.trainer.preparation import prepare_all
from modelyard.trainer.reports import Reports, finite
from modelyard.trainer.results import failed, write_result
from modelyard.trainer.spec import Mode, Spec

log = logging.getLogger("modelyard.trainer")

#: What torch reads when it is imported.
ENVIRONMENT = {
    # How often threads look for work before they sleep. As often as by default takes the cores from whoever else works
    # here (an engine, another training); to sleep at once costs a small model more than half of its speed.
    "GOMP_SPINCOUNT": "2000",
    # Kernels in bfloat16 are made for each shape, and kept: a thousand of them take as much memory as a small model.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    "LRU_CACHE_CAPACITY": "256",
}

#: Beside the adapter: what it came to, so that a restart after the last step trains nothing again.
TRAINED = "trained.json"
PROBES = "probes.json"
TEMPLATE = "chat_template.jinja"


def main(argv: list[str]) -> None:
    """Run, write the result file, and leave with 0, or 1 after a failure."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    spec = Spec.read(Path(argv[0]))
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ranks.end_with_the_launcher()
    if not ranks.is_first():
        spec = replace(spec, progress=os.devnull, tensorboard_dir=None)
    stop = _Stop(spec)
    signal.signal(signal.SIGTERM, stop)
    report = Reports(Path(spec.progress))
    try:
        result = _run(spec, report, stop)
    except Exception as error:
        memory.let_go()
        # The edge of the child: whatever it was becomes the result.
        log.exception("failed")
        if ranks.has_lost_another(error):
            os._exit(1)
        result = failed(as_failure(error))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if ranks.is_first() or "failure" in result:
        write_result(spec, result)
    log.info("%s", {name: result[name] for name in result if name in ("failure", "stopped", "step", "figures")})
    sys.stderr.flush()
    os._exit(1 if "failure" in result else 0)


class _Stop:
    """The handler of SIGTERM. `asked` is for the training to look at; unless it runs, the process ends at once."""

    def __init__(self, spec: Spec) -> None:
        self.asked = False
        self.at_once = True
        #: What the result says that was reached.
        self.step = 0
        self._spec = spec

    def __call__(self, number: int, frame: Any) -> None:
        self.asked = True
        if self.at_once:
            if ranks.is_first():
                write_result(self._spec, {"stopped": True, "step": self.step})
            os._exit(0)


def _run(spec: Spec, report: Reports, stop: _Stop) -> dict[str, Any]:
    if spec.mode is Mode.PLAN:
        from modelyard.trainer.plan import plan

        return {"plan": plan(spec, report)}
    if spec.mode is Mode.MERGE:
        from modelyard.trainer.merge import merge

        return merge(spec, report)
    return train(spec, report, stop)


def train(spec: Spec, report: Reports, stop: _Stop) -> dict[str, Any]:
    """Train an adapter, or go on where an attempt before was ended, and score it."""
    report.phase("loading")
    ranks.meet()
    from modelyard.trainer.batches import Rows
    from modelyard.trainer.model import device_name, load_base, with_adapter

    ready = prepare_all(spec, report)
    config, tokenizer, prepared, watch = ready.config, ready.tokenizer, ready.rows, ready.watch

    rows, held_out = Rows(prepared.train), Rows([each.example for each in prepared.held_out])
    chosen = choices.choose(spec.hyperparameters, len(rows), config)
    spec = replace(spec, hyperparameters=choices.filled(spec.hyperparameters, chosen))
    for name, one in chosen.items():
        report.note(f"{name} is {one.value:g}. {one.why}", setting=name, value=one.value)
    report.phase("loading")
    model = with_adapter(load_base(spec, report), spec)

    from modelyard.trainer.checkpoints import Checkpoints, described
    from modelyard.trainer.loop import Training

    work_dir = Path(spec.work_dir)
    beside = [Rows(prepared.ordinary)] if spec.hyperparameters.retention else []
    print_ = fingerprint(spec, rows, held_out, *beside)
    checkpoints = Checkpoints(work_dir, print_, spec.disk_reserve_bytes, report)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    training = Training(spec, model, rows, held_out, pad, report, checkpoints, stop, prepared.ordinary)
    report.prepared(
        {
            **prepared.facts,
            "steps": training.total_steps,
            "steps_per_epoch": training.course.steps_per_epoch,
            "rows_per_step": training.course.rows_per_step,
            "chosen": choices.told(chosen),
        }
    )
    done = _trained(work_dir, print_)
    if done is None:
        stop.at_once = False
        outcome = training.run()
        if outcome.stopped:
            return {"stopped": True, "step": outcome.step}
        if not ranks.is_first():
            return {}
        stop.step = outcome.step
        stop.at_once = True
        if stop.asked:
            stop(signal.SIGTERM, None)
        report.phase("saving")
        done = _save(work_dir, model, prepared, outcome.figures, print_)
    elif not ranks.is_first():
        return {}
    else:
        from safetensors.torch import load_file

        from modelyard.trainer.model import WEIGHTS, set_adapter_weights

        report.note("The adapter is whole already: it is scored again.")
        stop.step = int(done["figures"]["steps"])
        set_adapter_weights(model, load_file(work_dir / "adapter" / WEIGHTS))

    from modelyard.trainer.evaluation import evaluate

    evaluation = evaluate(model, tokenizer, prepared.held_out, report, watch)
    figures = {
        **done["figures"],
        "seconds": report.seconds,
        "device": device_name(model.device),
        "dtype": str(model.get_base_model().dtype).removeprefix("torch."),
    }
    return {
        "adapter_dir": str(work_dir / "adapter"),
        "figures": figures,
        "evaluation": evaluation,
        "probes": len(prepared.probes),
        "versions": versions(),
        "chosen": choices.told(chosen),
        "learnt_from": {
            "data_sha256": described(Path(spec.data))["sha256"],
            "rows_sha256": prepared.facts.get("sha256"),
            "rows": len(rows),
        },
    }


def fingerprint(spec: Spec, *rows: Any) -> str:
    """Return what tells one training from another: settings, the base's files, and all rows with their labels.

    `rows` are those that are learnt from, those held back, and the texts of `retention` if it reads any; what the
    settings left open has been chosen.
    """
    digest = hashlib.sha256()
    from dataclasses import asdict

    settings = asdict(spec.hyperparameters)
    # As in checkpoints from before there were such settings.
    for name in ("retention", "learnt_loss"):
        if not settings[name]:
            del settings[name]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    if spec.hyperparameters.batch_size is None:
        digest.update(f"rows of a step: {choices.rows_per_step(spec.hyperparameters, len(rows[0]))}".encode())
    digest.update(spec.model_id.encode())
    folder = Path(spec.model_dir)
    digest.update((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
    for each in rows:
        each.update(digest)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of what the adapter was made with."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "peft", "modelyard"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _save(work_dir: Path, model: Any, prepared: Any, figures: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """Put the adapter in its place, then write down that it is there."""
    from modelyard.trainer.checkpoints import MANIFEST, described, sync, write_folder
    from modelyard.trainer.model import CONFIG, WEIGHTS, adapter_config, adapter_weights

    target, partial = work_dir / "adapter", work_dir / ".adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    probes = {
        "probes": [
            {"messages": each.messages, "tools": each.tools, "token_ids": list(each.token_ids)}
            for each in prepared.probes
        ],
        "template_source": prepared.facts.get("template_source"),
        "template_is_dated": prepared.facts.get("template_is_dated"),
    }
    texts = {CONFIG: adapter_config(model), PROBES: json.dumps(probes), TEMPLATE: prepared.template}
    write_folder(partial, {WEIGHTS: adapter_weights(model)}, texts, {})
    (partial / MANIFEST).unlink()
    shutil.rmtree(target, ignore_errors=True)
    os.rename(partial, target)
    sync(work_dir)
    done = {"fingerprint": fingerprint, "weights": described(target / WEIGHTS), "figures": figures}
    beside = work_dir / f".{TRAINED}.partial"
    beside.write_text(json.dumps(finite(done)), "utf-8")
    sync(beside)
    os.rename(beside, work_dir / TRAINED)
    return done


def _trained(work_dir: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return what an attempt before wrote when the adapter was whole; None: it is not, or it is another's."""
    from modelyard.trainer.checkpoints import described
    from modelyard.trainer.model import WEIGHTS

    try:
        done: dict[str, Any] = json.loads((work_dir / TRAINED).read_text("utf-8"))
        is_ours = done["fingerprint"] == fingerprint
        return done if is_ours and described(work_dir / "adapter" / WEIGHTS) == done["weights"] else None
    except (OSError, ValueError, KeyError):
        return None


if __name__ == "__main__":
    main(sys.argv[1:])
