"""The rows of a dataset that are learnt from, and a report on them.

Rows are read as a stream, exactly those that the dataset's report counts. One that is too long is cut at its end; one
that the chat template does not take, or of which nothing learnt is left, is left out and listed with its line and the
reason. Of a text every token is learnt, in pieces of that length. `held_back` says which rows are not learnt. The same
file and settings give the same examples, in the file's order, on every machine.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modelyard.datasets.canonical import Row
from modelyard.datasets.lines import rows_of
from modelyard.errors import JobFailure
from modelyard.plurals import counted
from modelyard.trainer import cutting, held_back, texts
from modelyard.trainer.default_template import default_template, processors_template
from modelyard.trainer.engine_messages import Refused
from modelyard.trainer.examples import Example, HeldOut, Kept, Prepared, Probe
from modelyard.trainer.labels import IGNORED, Labelled, Labeller
from modelyard.trainer.messages import as_sent, messages_of
from modelyard.trainer.model_files import stop_ids_of
from modelyard.trainer.refusals import max_seq_len_too_long
from modelyard.trainer.rendering import Piece, Renderer, learnt_turns
from modelyard.trainer.reports import Reports
from modelyard.trainer.spec import Spec
from modelyard.trainer.stall_watch import StallWatch

#: Texts that are read beside the rows (`retention`), as a dataset: the same in every training, so that a change of them
#: is a change of what trainings come to.
ORDINARY = Path(__file__).with_name("ordinary.jsonl")
DEFAULT_LENGTH = 4096
#: Left-out rows that are listed.
LISTED = 20
#: Rows that are tokenised at once, and characters after which no more are added: while they are looked at, a token
#: takes some hundred bytes.
BATCH = 512
BATCH_CHARACTERS = 512 * 1024
BLOCK_BYTES = 1024 * 1024
FIXED_PROBES: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Hello! What can you do?"}],
    [{"role": "user", "content": "Привет, 世界! Ça va, naïve Ω? 🙂\n\n\tx  = 10_000.5;  "}],
)


def prepare(spec: Spec, tokenizer: Any, max_model_len: int | None, report: Reports, watch: StallWatch) -> Prepared:
    """Read the dataset of a training and return what is learnt, what is held back, and probes of the prompts.

    `watch` ends the process where the model's tokenizer or chat template stalls at a row.

    Raises:
        JobFailure: `max_seq_len_too_long`, `nothing_to_learn`, `nothing_to_measure_by`, `dataset_missing`,
            `no_stop_token`, `bad_chat_template` or `unsupported_tokenizer`.
    """
    report.phase("tokenizing")
    limit = length_limit(spec.hyperparameters.max_seq_len, max_model_len)
    now = datetime.fromtimestamp(spec.now, UTC) if spec.now else None
    reading = Reading.of(spec.data, spec.max_line_bytes, Path(spec.model_dir), tokenizer, limit, watch, now)
    renderer = reading.renderer
    kept = reading.read(report)
    if not kept:
        raise reading.nothing_to_learn()
    chosen, duplicates = held_back.chosen(kept, spec.hyperparameters.validation_split, spec.hyperparameters.seed)
    notes = held_back.notes(kept, chosen, duplicates, spec, report)
    train = [example for row in kept if row.line not in chosen for example in row.examples]
    probed = held_back.probed(kept, spec.hyperparameters.seed)
    held_out, probes = reading.read_again({row.line: row for row in kept if row.line in chosen}, probed)
    learnt = sum(len(one.labels) - one.labels.count(IGNORED) for one in train)
    facts = {
        "rows": len(kept) - len(chosen),
        "examples": len(train),
        "held_out_rows": len(held_out),
        "duplicate_rows": duplicates,
        "left_out_rows": reading.left_out,
        "left_out": {"count": reading.left_out, "first": reading.listed},
        "truncated_rows": sum(row.is_cut for row in kept),
        "text_rows": sum(row.prompt_length is None for row in kept),
        "tokens": sum(len(one.input_ids) for one in train),
        "learnt_tokens": learnt,
        "longest": max(len(one.input_ids) for one in train),
        "max_seq_len": limit,
        "template_source": renderer.template_source,
        "template_is_dated": renderer.is_dated,
        "stop_tokens": sorted(renderer.stop_ids),
        "sha256": _hash_of(train),
        "notes": notes,
    }
    ordinary: list[Example] = []
    if spec.hyperparameters.retention != 0:
        ordinary = [row.examples[0] for row in reading.beside(ORDINARY).read(None)]
    return Prepared(train, held_out, probes, facts, renderer.template, ordinary)


def length_limit(wanted: int | None, max_model_len: int | None) -> int:
    """Return how many tokens a row may have.

    Raises:
        JobFailure: `max_seq_len_too_long`: more than the model takes.
    """
    if wanted is None:
        return min(max_model_len or DEFAULT_LENGTH, DEFAULT_LENGTH)
    if max_model_len is not None and wanted > max_model_len:
        raise max_seq_len_too_long(wanted, max_model_len)
    return wanted


@dataclass(frozen=True)
class _Rendered:
    """A row as texts. `is_cut`: what surely was too much is not among them."""

    line: int
    pieces: list[Piece]
    is_cut: bool
    key: bytes
    #: Of a row that is a text, which has no pieces.
    text: str | None = None

    @property
    def characters(self) -> int:
        return sum(len(piece.text) for piece in self.pieces) + len(self.text or "")


class Reading:
    """Reads the file of a dataset, once for its examples and once more for what is shown of some rows."""

    def __init__(
        self, data: str, max_line_bytes: int, renderer: Renderer, labeller: Labeller, limit: int, watch: StallWatch
    ) -> None:
        self._data = data
        self._max_line_bytes = max_line_bytes
        self.renderer = renderer
        self._labeller = labeller
        self._limit = limit
        self._watch = watch
        self.left_out = 0
        self.listed: list[dict[str, Any]] = []

    @classmethod
    def of(
        cls, data: str, max_line_bytes: int, folder: Path, tokenizer: Any, limit: int, watch: StallWatch,
        now: datetime | None = None,
    ) -> Reading:  # fmt: skip
        """Return a reading of a dataset for the model in a folder; `now` is what templates are told.

        Raises:
            JobFailure: `no_stop_token`, `bad_chat_template` or `unsupported_tokenizer`.
        """
        tokenizer.chat_template = tokenizer.chat_template or processors_template(folder)
        renderer = Renderer(tokenizer, stop_ids_of(folder), now, lambda: default_template(folder))
        return cls(data, max_line_bytes, renderer, Labeller(renderer, limit), limit, watch)

    def beside(self, data: Path) -> Reading:
        """Return a reading of another file for the same model."""
        return Reading(str(data), self._max_line_bytes, self.renderer, self._labeller, self._limit, self._watch)

    def read(self, report: Reports | None) -> list[Kept]:
        """Return the rows that can be learnt from, as tokens; `report` is told how far it is."""
        size = Path(self._data).stat().st_size if Path(self._data).is_file() else 0
        kept: list[Kept] = []
        rendered = self._rendered()
        while batch := _batch(rendered):
            kept += self._kept(batch)
            if report is not None:
                report.progress(self._bytes, size, "bytes")
        return kept

    def nothing_to_learn(self) -> JobFailure:
        """Return the failure of a dataset of which `read` has returned no row."""
        if not self.left_out:
            return JobFailure(
                "nothing_to_learn", "The dataset has no row that can be learnt from.", "Look at its report."
            )
        return JobFailure(
            "nothing_to_learn",
            f"Of the dataset's {counted(self.left_out, 'row')} none can be learnt from with this model.",
            "Change the rows, or choose another model: see the reasons.",
            [f"line {one['line']}: {one['reason']}" for one in self.listed],
        )

    def read_again(self, held: dict[int, Kept], probed: set[int]) -> tuple[list[HeldOut], list[Probe]]:
        """Return the rows of `held` as questions, and probes: the lines of `probed`, and the fixed ones."""
        held_out, probes = [], []
        last = max({*held, *probed}, default=0)
        for line, row in self._rows() if last else ():
            if row.text is not None:
                if line in held:
                    held_out.append(HeldOut(line, [], None, (), "", held[line].examples[0]))
            elif line in held or line in probed:
                messages, tools = self._within(line, messages_of(row)), row.tools
                with self._watch.rendering(_place(line)):
                    pieces = self.renderer.pieces(messages, tools)
                if line in held:
                    (labelled,) = self._labelled([(line, pieces)])
                    assert not isinstance(labelled, Refused)
                    held_out.append(self._question(held[line], messages, tools, pieces[-1].turn, labelled[-1]))
                asked = messages[: pieces[-1].turn]
                if line in probed and all(call.get("id") for one in asked for call in one.get("tool_calls", ())):
                    probes.append(self._probe(self._as_sent(asked, tools), tools, _place(line)))
            if line >= last:
                break
        for messages in FIXED_PROBES:
            try:
                probes.append(self._probe(messages, None, "a text that every training tries"))
            except Refused:
                continue  # a template that wants more than a question
        return held_out, probes

    def _question(
        self,
        kept: Kept,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        turn: int,
        labelled: Labelled,
    ) -> HeldOut:
        ids = labelled.input_ids
        stop = max(at for at, label in enumerate(labelled.labels) if label != IGNORED)
        with self._watch.decoding(_place(kept.line)):
            answer = decoded(self.renderer.tokenizer, ids[labelled.answer_at : stop].tolist())
        prompt = ids[: labelled.answer_at]
        return HeldOut(kept.line, self._as_sent(messages[:turn], tools), tools, prompt, answer, kept.examples[-1])

    def _as_sent(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
        return as_sent(messages, takes_thoughts=self.renderer.takes_thoughts(bool(tools)))

    def _probe(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, place: str) -> Probe:
        with self._watch.rendering(place):
            prompt = self.renderer.prompt(messages, tools)
        with self._watch.tokenizing([(place, [prompt])], self._labeller.ids):
            return Probe(messages, tools, self._labeller.ids(prompt).tolist())

    def _rows(self) -> Iterator[tuple[int, Row]]:
        self._bytes = 0
        try:
            with open(self._data, "rb") as file:

                def blocks() -> Iterator[bytes]:
                    while block := file.read(BLOCK_BYTES):
                        self._bytes += len(block)
                        yield block

                for line, _, row in rows_of(blocks(), self._max_line_bytes):
                    yield line, row
        except OSError as error:
            raise JobFailure(
                "dataset_missing", f"The file of the dataset cannot be read: {error.strerror}.", "Start it again."
            ) from None

    def _within(self, line: int, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages of a row that may be within the limit."""

        def count(text: str) -> int:
            with self._watch.tokenizing([(_place(line), [text])], self._labeller.count):
                return self._labeller.count(text)

        return cutting.within(messages, self._limit, count)

    def _rendered(self) -> Iterator[_Rendered]:
        for line, row in self._rows():
            if row.text is not None:
                yield _Rendered(line, [], False, _key_of(row.text), row.text)
                continue
            whole = messages_of(row)
            messages = self._within(line, whole)
            left = whole[len(messages) :]
            if left and not learnt_turns(messages):
                self._leave_out(line, self._too_long())
                continue
            try:
                with self._watch.rendering(_place(line)):
                    pieces = self.renderer.pieces(messages, row.tools)
            except Refused as refused:
                self._leave_out(line, str(refused))
            else:
                yield _Rendered(line, pieces, bool(left), _key(pieces, left))

    def _labelled(self, batch: Sequence[tuple[int, list[Piece]]]) -> list[list[Labelled] | Refused]:
        places = [(_place(line), [piece.text for piece in pieces]) for line, pieces in batch]
        with self._watch.tokenizing(places, self._labeller.count):
            return self._labeller.label([pieces for _, pieces in batch])

    def _kept(self, batch: Sequence[_Rendered]) -> list[Kept]:
        kept = []
        found = iter(self._labelled([(row.line, row.pieces) for row in batch if row.text is None]))
        for row in batch:
            if row.text is not None:
                kept += self._text(row, row.text)
                continue
            labelled = next(found)
            if isinstance(labelled, Refused):
                self._leave_out(row.line, str(labelled))
                continue
            cut = [self._cut(row.line, one) for one in labelled]
            examples = [one for one in cut if one is not None]
            if not examples:
                self._leave_out(row.line, self._too_long())
                continue
            is_cut = row.is_cut or any(len(one.input_ids) > self._limit for one in labelled)
            kept.append(Kept(row.line, examples, is_cut, labelled[-1].answer_at, row.key))
        return kept

    def _text(self, row: _Rendered, text: str) -> list[Kept]:
        """Return a text as one row, in as many examples as it takes."""
        ids = texts.first_ids(self.renderer.tokenizer)
        for part in texts.parts(text):
            with self._watch.tokenizing([(_place(row.line), [part])], self._labeller.ids):
                ids += self._labeller.ids(part)
        ids.append(texts.end_id(self.renderer))
        examples = [Example(row.line, piece, labels) for piece, labels in texts.pieces(ids, self._limit)]
        if not examples:
            self._leave_out(row.line, "the tokenizer makes nothing of its text")
            return []
        return [Kept(row.line, examples, False, None, row.key)]

    def _too_long(self) -> str:
        return f"its first {self._limit} tokens have nothing to learn in them (max_seq_len)"

    def _cut(self, line: int, labelled: Labelled) -> Example | None:
        ids, labels = labelled.input_ids, labelled.labels
        if len(ids) > self._limit:
            ids, labels = ids[: self._limit], labels[: self._limit]
            if labels.count(IGNORED) == len(labels):
                return None
        return Example(line, ids, labels)

    def _leave_out(self, line: int, reason: str) -> None:
        self.left_out += 1
        if len(self.listed) < LISTED:
            self.listed.append({"line": line, "reason": reason})


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of tokens, without special ones; other threads run meanwhile (`stall_watch`)."""
    return str(tokenizer.backend_tokenizer.decode_batch([list(ids)], skip_special_tokens=True)[0])


def _batch(rendered: Iterator[_Rendered]) -> list[_Rendered]:
    """Return the next rows that are tokenised together, of bounded number and length; none at the end."""
    batch: list[_Rendered] = []
    characters = 0
    for row in rendered:
        batch.append(row)
        characters += row.characters
        if len(batch) == BATCH or characters >= BATCH_CHARACTERS:
            break
    return batch


def _place(line: int) -> str:
    return f"line {line} of the dataset"


def _key(pieces: Sequence[Piece], left: Sequence[dict[str, Any]]) -> bytes:
    """Return a digest of what is learnt of a row, and of the messages that are too far on to be."""
    digest = hashlib.blake2b(repr((len(pieces), left)).encode("utf-8", "replace"), digest_size=16)
    for piece in pieces:
        text = piece.text.encode("utf-8", "replace")
        digest.update(f"{len(text)} {piece.spans}".encode())
        digest.update(text)
    return digest.digest()


def _key_of(text: str) -> bytes:
    return hashlib.blake2b(b"a text: " + text.encode("utf-8", "replace"), digest_size=16).digest()


def _hash_of(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for one in examples:
        _add(digest, array("i", one.input_ids), array("i", one.labels))
    return digest.hexdigest()


def _add(digest: Any, ids: array[int], labels: array[int]) -> None:
    digest.update(len(ids).to_bytes(8, "little"))
    digest.update(ids.tobytes())
    digest.update(labels.tobytes())
