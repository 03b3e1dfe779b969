"""The beginning of a training and of its plan: the base's configuration and tokenizer, and every row prepared.

Whatever the base or the rows would be refused for is found here, before the weights are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from modelyard.trainer import memory, vocabulary
from modelyard.trainer.examples import Prepared
from modelyard.trainer.reports import Reports
from modelyard.trainer.results import leave
from modelyard.trainer.spec import Spec
from modelyard.trainer.stall_watch import StallWatch


@dataclass(frozen=True)
class Preparation:
    """The rows of a training, and what they were prepared with; `watch` is for what else the tokenizer does."""

    config: Any
    tokenizer: Any
    watch: StallWatch
    rows: Prepared


def prepare_all(spec: Spec, report: Reports) -> Preparation:
    """Read the base's configuration and tokenizer, keep to the memory of the spec, and prepare the rows.

    Raises:
        JobFailure: as `model.read_config`, `model.load_tokenizer`, `rows.prepare` and `vocabulary.check`.
    """
    from modelyard.trainer.model import load_tokenizer, max_length, read_config
    from modelyard.trainer.rows import prepare

    config = read_config(spec)
    memory.hold_to(spec.memory_bytes)
    tokenizer = load_tokenizer(spec)
    watch = StallWatch(spec.model_id, partial(leave, spec))
    rows = prepare(spec, tokenizer, max_length(config), report, watch)
    every = (*rows.train, *(each.example for each in rows.held_out))
    vocabulary.check(spec.model_id, config, tokenizer, (one.input_ids for one in every))
    return Preparation(config, tokenizer, watch, rows)
