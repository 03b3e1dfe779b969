"""Tokenising long conversations for a training: `python -m benchmarks.tokenising [--mb N] [--write]`.

Each case is a file of so many MB, prepared as a trainer does (`trainer.rows.prepare`) in a process of its own, with the
tokenizer of the demo's tiny model. Prints MB/s of the file, by the clock and by the processor's time (that of all
threads together, which says more on a machine that is not idle), the tokens that are kept to learn from, and the peak
of memory above what the process had when its tokenizer was loaded. What is kept takes eight bytes a token of that.

    one text         conversations of 160 turns, whose template renders all turns as parts of one text
    turn by turn     the same, with a template that leaves earlier thoughts out: each turn is learnt by itself
    documents        one answer each, to a document of 16 KiB
    short            one question and answer of some 300 bytes
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

if __package__ in {None, ""}:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

MB = 1_000_000
MAX_MODEL_LEN = 32_768
TURNS = 160
DOCUMENT_BYTES = 16_384
#: As Qwen3's: the last turn has a thought, be it an empty one, and those before it have none.
THOUGHTFUL = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CASES = ("one text", "turn by turn", "documents", "short")


def rows(case: str, chance: random.Random) -> Iterator[Mapping[str, Any]]:
    """Yield rows of a case without end, no two alike."""
    words = (Path(__file__).parent.parent / "src/modelyard/demo/corpus.txt").read_text("utf-8").split()

    def text(characters: int) -> str:
        return " ".join(chance.choices(words, k=characters // 6))

    turns = {"documents": 2, "short": 2}.get(case, TURNS)
    asked = {"documents": DOCUMENT_BYTES, "short": 100}.get(case, 200)
    while True:
        said = [("user", text(asked)) if number % 2 == 0 else ("assistant", text(200)) for number in range(turns)]
        yield {"messages": [{"role": role, "content": content} for role, content in said]}


def write(path: Path, case: str, size_bytes: int) -> None:
    """Write a case's file of about so many bytes."""
    written, source = 0, rows(case, random.Random(case))
    with open(path, "wb") as file:
        while written < size_bytes:
            written += file.write(json.dumps(next(source)).encode() + b"\n")


def measure(folder: Path, case: str, max_seq_len: int | None) -> dict[str, Any]:
    """Prepare the case's file in this process, and return its figures."""
    from transformers import AutoTokenizer

    from modelyard.finetune.schemas import HyperparametersIn
    from modelyard.trainer.reports import Reports
    from modelyard.trainer.rows import prepare
    from modelyard.trainer.spec import Mode, Spec
    from modelyard.trainer.stall_watch import StallWatch

    spec = Spec(
        mode=Mode.PLAN, name="x", model_id="local:tiny", model_dir=str(folder / "model"), adapter_id="",
        data=str(folder / "data.jsonl"), max_line_bytes=16 * 1024**2, work_dir=str(folder),
        hyperparameters=HyperparametersIn(max_seq_len=max_seq_len).filled(), progress=str(folder / "progress.jsonl"),
        result=str(folder / "result.json"),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    if case == "turn by turn":
        tokenizer.chat_template = THOUGHTFUL
    # What is imported at the first rendering is no tokenising.
    tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    before = _peak_bytes()
    began, processor_began = time.perf_counter(), time.process_time()
    watch = StallWatch(spec.model_id, lambda failure: sys.exit(failure.message))
    prepared = prepare(spec, tokenizer, MAX_MODEL_LEN, Reports(Path(spec.progress)), watch)
    seconds, processor_s = time.perf_counter() - began, time.process_time() - processor_began
    size = Path(spec.data).stat().st_size
    return {
        "mb": size / MB,
        "mb_s": size / MB / seconds,
        "processor_mb_s": size / MB / processor_s,
        "tokens": prepared.facts["tokens"],
        "examples": prepared.facts["examples"],
        "above_mb": (_peak_bytes() - before) / MB,
    }


def _peak_bytes() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def main(argv: list[str] | None = None) -> None:
    """Measure each case in a child, print the table, and write it to RESULTS.md if that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mb", type=float, default=100.0, help="size of each file")
    parser.add_argument("--case", choices=CASES, action="append", help="only this one; may be repeated")
    parser.add_argument("--max-seq-len", type=int, help="4,096 if left out")
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.here is not None:
        print(json.dumps(measure(options.here, options.case[0], options.max_seq_len)))
        return
    from modelyard.demo.tiny_llama import make_llama

    table = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_llama(folder / "model")
        for case in options.case or CASES:
            write(folder / "data.jsonl", case, int(options.mb * MB))
            command = [sys.executable, __file__, "--here", name, "--case", case]
            command += ["--max-seq-len", str(options.max_seq_len)] if options.max_seq_len else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                table.append([case, f"ended by {done.returncode}", "", "", ""])
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            figures = [f"{found[figure]:.2f}" for figure in ("mb_s", "processor_mb_s")]
            tokens = f"{found['tokens'] / 1e6:.1f} million"
            table.append([case, *figures, f"{found['above_mb']:,.0f} MB", tokens])
    title = f"Files of {options.mb:g} MB, rows of up to {options.max_seq_len or 4096:,} tokens"
    header = ["", "MB/s", "MB/s of processor time", "peak above its start", "tokens kept"]
    lines = report.table(title, header, table)
    print("\n".join(lines))
    if options.write:
        report.write(Path(__file__).with_name("RESULTS.md"), "Tokenising", lines)


if __name__ == "__main__":
    main()
