"""Is the adapter better than its base? Both answer and are measured on the rows that training never saw.

`evaluate` measures the loss per learnt token, and lets each give a greedy answer to the last question of every row,
which is scored by exact match and ROUGE-L (`scores`). Of many rows a sample is taken, the same for the same rows. An
answer may be as long as the one that was wanted and a quarter more, plus some tokens: what runs on after that was no
match anyway. Rows are answered in batches of like length, padded on the left, each row cut at its own limit, so that
which rows share a batch changes no answer but by the rounding of a near tie.

The model is left as it was found. Repeatable; ends within a token when it is told to stop.
"""

from __future__ import annotations

import inspect
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

from modelyard.trainer.certainty import CONFIDENCE, RowLoss, lowered
from modelyard.trainer.examples import Example, HeldOut
from modelyard.trainer.failures import is_out_of_memory
from modelyard.trainer.reports import Reports
from modelyard.trainer.rows import decoded
from modelyard.trainer.scores import Verdict, is_exact, mean, rouge_l, verdict
from modelyard.trainer.stall_watch import StallWatch

#: Rows that are scored, at most.
MOST_ROWS = 200
SAMPLE_SEED = 0
#: Answers of base and adapter that are kept side by side, and how much of each.
SHOWN_ROWS = 20
SHOWN_CHARACTERS = 4000
#: An answer's limit in tokens: that of the wanted one times this, plus that.
LENGTH_FACTOR = 1.25
LENGTH_MARGIN = 16
#: What one batch may be: rows, tokens with their padding, and the bytes of its logits.
BATCH_ROWS = 32
BATCH_TOKENS = 8192
BATCH_LOGIT_BYTES = 512 * 1024 * 1024
#: Tokens of an answer by which the time of all is estimated.
TRIED_TOKENS = 8

IGNORED = -100

T = TypeVar("T")


class Stopped(Exception):
    """The evaluation was told to stop, and has not been finished."""


def evaluate(
    model: Any,
    tokenizer: Any,
    held_out: Sequence[HeldOut],
    report: Reports,
    watch: StallWatch,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    batch_rows: int = BATCH_ROWS,
) -> dict[str, Any] | None:
    """Return the scores of the base and of the adapter on it (a PeftModel); None where nothing was held back.

    `{"rows", "held_out_rows", "base", "adapter", "better", "verdict", "lower", "why", "answers", "seconds"}`; `base`
    and `adapter` are `{"loss", "exact_match", "rouge_l", "rows"}`, `verdict` a `scores.Verdict`, `lower` by how much
    the loss per token is lower (`{"mean", "low", "high", "confidence"}`, None where nothing can be said), `answers` the
    first rows' `{"line", "question", "wanted", "base", "adapter"}`.

    Raises:
        Stopped: `should_stop` said so.
    """
    if not held_out:
        return None
    import torch

    began = time.monotonic()
    rows = sample(held_out)
    report.phase("evaluating")
    if len(rows) < len(held_out):
        report.note(f"Of the {len(held_out)} rows that were held back, {len(rows)}, drawn at random, are scored.")
    asked = [row for row in rows if row.prompt_ids]  # a text has a loss, but no question
    examiner = _Examiner(model, tokenizer, report, watch, should_stop, batch_rows, 2 * len(asked))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            with model.disable_adapter():
                base_losses, base_answers = examiner.examine(rows)
            losses, answers = examiner.examine(rows)
    finally:
        model.train(was_training)
    base = _scored(asked, base_losses, base_answers) | {"rows": len(rows)}
    adapter = _scored(asked, losses, answers) | {"rows": len(rows)}
    lower = lowered(base_losses, losses)
    found, why = verdict(base, adapter, lower)
    return {
        "rows": len(rows),
        "held_out_rows": len(held_out),
        "base": base,
        "adapter": adapter,
        "better": found is Verdict.BETTER,
        "verdict": found,
        "lower": {**asdict(lower), "confidence": CONFIDENCE} if lower is not None else None,
        "why": why,
        "answers": [
            {
                "line": row.line,
                "question": _question(row)[:SHOWN_CHARACTERS],
                "wanted": row.answer[:SHOWN_CHARACTERS],
                "base": before[:SHOWN_CHARACTERS],
                "adapter": after[:SHOWN_CHARACTERS],
            }
            for row, before, after in list(zip(asked, base_answers, answers, strict=True))[:SHOWN_ROWS]
        ],
        "seconds": round(time.monotonic() - began, 3),
    }


def expected_seconds(
    model: Any, tokenizer: Any, held_out: Sequence[HeldOut], report: Reports, watch: StallWatch
) -> float:
    """Return about how long `evaluate` would take at most, by beginning the answers of one typical batch."""
    if not held_out:
        return 0.0
    import torch

    rows = [row for row in sample(held_out) if row.prompt_ids]
    if not rows:
        return 0.0
    examiner = _Examiner(model, tokenizer, report, watch, lambda: False, BATCH_ROWS, 2 * len(rows))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            once = examiner.seconds(rows)
    finally:
        model.train(was_training)
    return 2 * once


def sample(held_out: Sequence[HeldOut], most: int = MOST_ROWS) -> list[HeldOut]:
    """Return the rows to score, in their order: all, or so many of them, the same ones each time."""
    if len(held_out) <= most:
        return list(held_out)
    chosen = random.Random(SAMPLE_SEED).sample(range(len(held_out)), most)
    return [held_out[index] for index in sorted(chosen)]


def _scored(rows: Sequence[HeldOut], losses: Sequence[RowLoss], answers: Sequence[str]) -> dict[str, Any]:
    pairs = [(row.answer, answer) for row, answer in zip(rows, answers, strict=True)]
    learnt = sum(tokens for _, tokens in losses)
    return {
        "loss": sum(loss for loss, _ in losses) / learnt if learnt else None,
        "exact_match": mean(float(is_exact(wanted, answer)) for wanted, answer in pairs),
        "rouge_l": mean(rouge_l(wanted, answer) for wanted, answer in pairs),
        "rows": len(rows),
    }


def _question(row: HeldOut) -> str:
    """Return what was said last before the answer, for display."""
    asked = [message for message in row.messages if message.get("role") != "assistant"]
    content = asked[-1].get("content") if asked else ""
    return content if isinstance(content, str) else str(content or "")


class _Examiner:
    """Measures and asks a model, in batches that become smaller when memory does not suffice."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        report: Reports,
        watch: StallWatch,
        should_stop: Callable[[], bool],
        batch_rows: int,
        total: int,
    ) -> None:
        # The adapter lives in the base's own layers: the base answers with it, or without where it is disabled.
        self._model = model.get_base_model()
        self._tokenizer = tokenizer
        self._report = report
        self._watch = watch
        self._should_stop = should_stop
        self._batch_rows = batch_rows
        self._done, self._total = 0, total
        self._pad = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)
        self._stops = stop_tokens(self._model, tokenizer)
        self._takes_positions = "logits_to_keep" in inspect.signature(self._model.forward).parameters

    def examine(self, rows: Sequence[HeldOut]) -> tuple[list[RowLoss], list[str]]:
        """Return the loss of each row, and an answer to each that is a question, in the rows' order."""
        return self._losses([row.example for row in rows]), self._answers([row for row in rows if row.prompt_ids])

    def seconds(self, rows: Sequence[HeldOut]) -> float:
        """Return about how long `examine` takes at most."""
        limits = {id(row): self._limit(row) for row in rows}
        found = list(batches(rows, lambda row: len(row.prompt_ids) + limits[id(row)], self._batch_rows, BATCH_TOKENS))
        typical = found[len(found) // 2]
        began = time.monotonic()
        self._generate([row.prompt_ids for row in typical], [min(TRIED_TOKENS, limits[id(row)]) for row in typical])
        spent = time.monotonic() - began
        per_token = spent / min(TRIED_TOKENS, max(limits[id(row)] for row in typical))
        return sum(max(per_token * max(limits[id(row)] for row in batch), spent) for batch in found)

    def _losses(self, examples: Sequence[Example]) -> list[RowLoss]:
        config = self._model.config.get_text_config()
        most_tokens = max(1, min(BATCH_TOKENS, BATCH_LOGIT_BYTES // (4 * int(config.vocab_size))))
        found: dict[int, RowLoss] = {}
        order = range(len(examples))

        def measure(batch: Sequence[int]) -> list[tuple[int, RowLoss]]:
            return list(zip(batch, self._losses_of([examples[index] for index in batch]), strict=True))

        for batch in batches(order, lambda index: len(examples[index].input_ids), self._batch_rows, most_tokens):
            found.update(self._in_parts(batch, measure))
        return [found[index] for index in order]

    def _losses_of(self, batch: Sequence[Example]) -> list[RowLoss]:
        import torch

        self._leave_if_stopped()
        width = max(len(one.input_ids) for one in batch)

        def padded(rows: Iterable[Sequence[int]], filler: int) -> Any:
            filled = [[*row, *([filler] * (width - len(row)))] for row in rows]
            return torch.tensor(filled, device=self._model.device)

        ids = padded((one.input_ids for one in batch), self._pad)
        labels = padded((one.labels for one in batch), IGNORED)[:, 1:]
        mask = padded(([1] * len(one.input_ids) for one in batch), 0)
        # Only where something is learnt: the logits of a long prompt in a large vocabulary are gigabytes.
        positions = (labels != IGNORED).any(0).nonzero().flatten()
        if not len(positions):
            return [(0.0, 0)] * len(batch)
        asked = {"logits_to_keep": positions} if self._takes_positions else {}
        logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False, **asked).logits
        if not self._takes_positions:
            logits = logits[:, positions]
        wanted = labels[:, positions]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(wanted.shape)
        return list(zip(losses.sum(1).tolist(), (wanted != IGNORED).sum(1).tolist(), strict=True))

    def _answers(self, rows: Sequence[HeldOut]) -> list[str]:
        found: dict[int, str] = {}
        limits = [self._limit(row) for row in rows]
        order = list(range(len(rows)))

        def size(index: int) -> int:
            return len(rows[index].prompt_ids) + limits[index]

        def answer(batch: Sequence[int]) -> list[tuple[int, str]]:
            texts = self._generate([rows[index].prompt_ids for index in batch], [limits[index] for index in batch])
            self._done += len(batch)
            self._report.progress(self._done, self._total, "answers")
            return list(zip(batch, texts, strict=True))

        for batch in batches(order, size, self._batch_rows, BATCH_TOKENS):
            found.update(self._in_parts(batch, answer))
        return [found[index] for index in order]

    def _limit(self, row: HeldOut) -> int:
        """Return how many tokens an answer may have."""

        def encode(text: str) -> Any:
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]

        with self._watch.tokenizing([(f"line {row.line} of the dataset", [row.answer])], encode):
            wanted = len(encode(row.answer))
        limit = math.ceil(wanted * LENGTH_FACTOR) + LENGTH_MARGIN
        longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return max(1, min(limit, longest - len(row.prompt_ids)) if isinstance(longest, int) else limit)

    def _generate(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[str]:
        import torch
        from transformers import GenerationConfig

        self._leave_if_stopped()
        width = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (width - len(one)) + list(one) for one in prompts], device=self._model.device)
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=self._model.device)
        ends = torch.tensor(limits, device=self._model.device) + width

        def at_its_limit(so_far: Any, _scores: Any, **_: Any) -> Any:
            self._leave_if_stopped()
            return so_far.shape[1] >= ends

        config = GenerationConfig(
            do_sample=False, max_new_tokens=max(limits), eos_token_id=self._stops, pad_token_id=self._pad
        )
        with _generation_config(self._model, config):
            said = self._model.generate(
                input_ids=ids, attention_mask=mask, use_cache=True, stopping_criteria=[at_its_limit]
            )
        return [self._text(row[width : width + limit]) for row, limit in zip(said.tolist(), limits, strict=True)]

    def _text(self, tokens: list[int]) -> str:
        end = next((at for at, token in enumerate(tokens) if token in self._stops), len(tokens))
        with self._watch.decoding("an answer to a row that was held back"):
            return decoded(self._tokenizer, tokens[:end])

    def _leave_if_stopped(self) -> None:
        if self._should_stop():
            raise Stopped

    def _in_parts(self, batch: Sequence[Any], work: Callable[[Sequence[Any]], list[T]]) -> list[T]:
        """Do a batch; where memory does not suffice, in halves."""
        try:
            return work(batch)
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(batch) // 2
        return [*self._in_parts(batch[:middle], work), *self._in_parts(batch[middle:], work)]


def batches(rows: Sequence[T], size: Callable[[T], int], most_rows: int, most_tokens: int) -> Iterator[list[T]]:
    """Yield rows of like size together, longest first, so that memory that does not suffice shows at once."""
    batch: list[T] = []
    for row in sorted(rows, key=size, reverse=True):
        if batch and (len(batch) >= most_rows or (len(batch) + 1) * size(batch[0]) > most_tokens):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer when the model is served: its own and its tokenizer's."""
    named = getattr(model.generation_config, "eos_token_id", None)
    found = named if isinstance(named, list) else [named]
    return sorted({int(one) for one in (*found, tokenizer.eos_token_id) if one is not None})


@contextmanager
def _generation_config(model: Any, config: Any) -> Iterator[None]:
    """Have a model generate by this alone: what its own file says (sampling, penalties) would be mixed in."""
    kept = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = kept
