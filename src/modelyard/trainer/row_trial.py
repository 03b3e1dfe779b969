"""The child that says which rows of a dataset a training with a model would learn from, by the trainer's own rendering.

Rows on its standard input, one JSON object on its standard output: `{"figures"}`, `{"refusal"}` where the model's
tokenizer or chat template cannot be used, or `{"unknown"}` where this Python has no transformers. The server starts it
with limits (`models.tokenizer_child`), as no trainer is, since anybody may ask.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from modelyard.errors import JobFailure
from modelyard.evidence import in_words


def main(folder: str, model_id: str, longest: int | None, max_line_bytes: int) -> None:
    """Read rows to the end of the standard input, and print what was found."""
    if importlib.util.find_spec("transformers") is None:
        _say({"unknown": "the server's Python has no transformers, which renders rows; a plan of a training tells"})
        return
    found: dict[str, Any]
    try:
        found = {"figures": attempt(Path(folder), model_id, longest, max_line_bytes)}
    except JobFailure as failure:
        found = {"refusal": failure.message}
    except BaseException as error:  # noqa: BLE001  # the tokenizer's library panics with no Exception
        found = {"refusal": in_words(error)}
    _say(found)


def attempt(folder: Path, model_id: str, longest: int | None, max_line_bytes: int) -> dict[str, Any]:
    """Return how many rows are learnt from, and the reasons of the others by line.

    Raises:
        JobFailure: the model's tokenizer or chat template cannot be used, or stalls at a row.
    """
    from transformers import AutoTokenizer

    from modelyard.trainer.default_template import default_template
    from modelyard.trainer.labels import IGNORED, Labeller
    from modelyard.trainer.model_files import stop_ids_of
    from modelyard.trainer.rendering import Renderer
    from modelyard.trainer.reports import Reports
    from modelyard.trainer.rows import Reading, length_limit
    from modelyard.trainer.stall_watch import StallWatch

    def give_up(failure: JobFailure) -> None:
        _say({"refusal": failure.message})
        os._exit(0)

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    renderer = Renderer(tokenizer, stop_ids_of(folder), None, lambda: default_template(folder))
    limit = length_limit(None, longest)
    watch = StallWatch(model_id, give_up)
    reading = Reading("/dev/stdin", max_line_bytes, renderer, Labeller(renderer, limit), limit, watch)
    rows = reading.read(Reports(Path(os.devnull)))
    examples = [example for row in rows for example in row.examples]
    return {
        "rows": len(rows),
        "tried_rows": len(rows) + reading.left_out,
        "left_out_rows": reading.left_out,
        "left_out": reading.listed,
        "truncated_rows": sum(row.is_cut for row in rows),
        "max_seq_len": limit,
        "tokens": sum(len(one.input_ids) for one in examples),
        "learnt_tokens": sum(len(one.labels) - one.labels.count(IGNORED) for one in examples),
        "longest": max((len(one.input_ids) for one in examples), default=0),
        "template_source": renderer.template_source,
    }


def _say(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)  # noqa: T201  # that is its answer
