"""The child that says which rows of a dataset a training with a model would learn from, by the trainer's own rendering.

Rows on its standard input, one JSON object on its standard output: `{"figures"}`, `{"refusal": {"code", "message"}}`
with what the trainer itself would refuse the model or the rows for, or `{"unknown"}` with a sentence that says why
neither can be said here. The server starts it with limits (`models.tokenizer_child`), as no trainer is, since anybody
may ask.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelyard.errors import JobFailure
from modelyard.evidence import in_words


@dataclass(frozen=True)
class _Model:
    model_id: str
    model_dir: str


def main(folder: str, model_id: str, longest: int | None, max_line_bytes: int) -> None:
    """Read rows to the end of the standard input, and print what was found."""
    if importlib.util.find_spec("transformers") is None:
        _say({"unknown": "The server's Python has no transformers, which renders rows: a plan of a training tells."})
        return
    found: dict[str, Any]
    try:
        found = {"figures": attempt(_Model(model_id, folder), longest, max_line_bytes)}
    except JobFailure as failure:
        found = {"refusal": _refusal(failure)}
    except BaseException as error:  # noqa: BLE001  # the tokenizer's library panics with no Exception
        found = {"unknown": f"The rows could not be tried with {model_id}: {in_words(error)}."}
    _say(found)


def attempt(model: _Model, longest: int | None, max_line_bytes: int) -> dict[str, Any]:
    """Return how many rows are learnt from, and the reasons of the others by line.

    Raises:
        JobFailure: as the trainer's own: of the model's configuration, its tokenizer or chat template, a row at which
            one of these stalls, or rows with tokens that the model does not have.
    """
    from modelyard.trainer import vocabulary
    from modelyard.trainer.labels import IGNORED
    from modelyard.trainer.model import load_tokenizer, read_config
    from modelyard.trainer.reports import Reports
    from modelyard.trainer.rows import Reading, length_limit
    from modelyard.trainer.stall_watch import StallWatch

    def give_up(failure: JobFailure) -> None:
        _say({"refusal": _refusal(failure)})
        os._exit(0)

    config, tokenizer = read_config(model), load_tokenizer(model)
    limit = length_limit(None, longest)
    watch = StallWatch(model.model_id, give_up)
    reading = Reading.of("/dev/stdin", max_line_bytes, Path(model.model_dir), tokenizer, limit, watch)
    rows = reading.read(Reports(Path(os.devnull)))
    examples = [example for row in rows for example in row.examples]
    vocabulary.check(model.model_id, config, tokenizer, (one.input_ids for one in examples))
    return {
        "refusal": None if rows else _refusal(reading.nothing_to_learn()),
        "rows": len(rows),
        "tried_rows": len(rows) + reading.left_out,
        "left_out_rows": reading.left_out,
        "left_out": reading.listed,
        "truncated_rows": sum(row.is_cut for row in rows),
        "max_seq_len": limit,
        "tokens": sum(len(one.input_ids) for one in examples),
        "learnt_tokens": sum(len(one.labels) - one.labels.count(IGNORED) for one in examples),
        "longest": max((len(one.input_ids) for one in examples), default=0),
        "template_source": reading.renderer.template_source,
    }


def _refusal(failure: JobFailure) -> dict[str, str]:
    """Return a failure as the answer to a plan has it (`finetune.errands.refusal`)."""
    return {"code": failure.code, "message": f"{failure.message} {failure.hint}".strip()}


def _say(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)  # noqa: T201  # that is its answer
