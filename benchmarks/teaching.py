"""Sweep of batch, learning rate and epochs over four small sets, on a real small model: what do they teach?

`python benchmarks/teaching.py MODEL FOLDER [--only identity facts style JSON] SETTING...` trains in this process, by
the trainer's own loop, one adapter for each set and SETTING, and appends what it came to to FOLDER/runs.jsonl; what is
there already is not trained again. A SETTING is `ROWS:RATE:EPOCHS[:RETENTION]`, or `auto`: a request that names none.
--write puts the table of all runs into benchmarks/RESULTS.md. MODEL is a folder: `python -m tests.small_model MODEL`
makes it (SmolLM2-135M-Instruct).

Of each run: loss per learnt token on the held-out questions, answers that are right of those taught and of those held
back (greedy; `teaching_sets` says what right is), and the perplexity of an ordinary text outside the set (its first
1,024 tokens) beside the base's. Rows of every set are all learnt from: what is held back is a set of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __package__ in {None, ""}:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import report
from benchmarks.teaching_sets import FRANCE, Pair, TeachingSet, teaching_sets
from modelyard.finetune.schemas import HyperparametersIn
from modelyard.trainer.spec import Mode, Spec

TEXT = Path(__file__).with_name("ordinary_text.txt")
RUNS = "runs.jsonl"
RESULTS = Path(__file__).with_name("RESULTS.md")
#: Tokens of the ordinary text that are read at a time.
WINDOW = 512
TEXT_TOKENS = 1024
ASKED_AT_ONCE = 16
#: Of the taught questions about so many are asked, evenly over the set.
ASKED = 20
#: An answer may be so much longer than the longest that was taught to those it is generated with.
MARGIN_TOKENS = 4


INTRODUCTION = """\
SmolLM2-135M-Instruct in bfloat16, LoRA of rank 16 on all linear layers, cosine schedule. Identity: 91 rows; facts: 50
about towns that there are not, asked in other words when held out; style: 60 answers that begin and end alike; JSON: 60
orders as JSON. Right: what was taught is in the greedy answer (`benchmarks/teaching_sets.py`). The ordinary text is
prose that has nothing to do with any set (`benchmarks/ordinary_text.txt`)."""


class _Never:
    asked = False


class Bench:
    """The base model, loaded once, and what is measured of an adapter on it."""

    def __init__(self, model_dir: Path, folder: Path) -> None:
        from modelyard.trainer.model import load_base, load_tokenizer
        from modelyard.trainer.reports import Reports
        from modelyard.trainer.results import leave
        from modelyard.trainer.stall_watch import StallWatch

        self.folder = folder
        self.model_dir = model_dir
        self.report = Reports(folder / "progress.jsonl")
        spec = self.spec(folder, folder / "none", {})
        self.tokenizer = load_tokenizer(spec)
        self.watch = StallWatch(spec.model_id, partial(leave, spec))
        self.base = load_base(spec, self.report)

    def spec(self, folder: Path, data: Path, settings: dict[str, Any]) -> Spec:
        """Return the spec of a training with these settings, as a request would give them."""
        filled = HyperparametersIn.model_validate({"validation_split": 0.0, **settings}).filled()
        return Spec(
            mode=Mode.TRAIN, name="sweep", model_id="local:smollm2", model_dir=str(self.model_dir), adapter_id="",
            data=str(data), max_line_bytes=1 << 20, hyperparameters=replace(filled, checkpoint_steps=1_000_000),
            work_dir=str(folder / "work"), progress=str(folder / "progress"), result=str(folder / "result"),
        )  # fmt: skip

    def rows(self, folder: Path, pairs: Sequence[Pair], settings: dict[str, Any]) -> tuple[Spec, Any]:
        """Return a spec for these rows, and what the trainer makes of them."""
        from modelyard.trainer.rows import prepare

        folder.mkdir(parents=True)
        data = folder / "rows.jsonl"
        data.write_text("".join(pair.line() + "\n" for pair in pairs), "utf-8")
        spec = self.spec(folder, data, settings)
        Path(spec.work_dir).mkdir()
        return spec, prepare(spec, self.tokenizer, 2048, self.report, self.watch)

    def train(self, teaching: TeachingSet, settings: dict[str, Any]) -> dict[str, Any]:
        """Train an adapter and return what it came to."""
        from modelyard.trainer import choices
        from modelyard.trainer.batches import Rows
        from modelyard.trainer.checkpoints import Checkpoints
        from modelyard.trainer.ending import Ending
        from modelyard.trainer.loop import Training
        from modelyard.trainer.model import with_adapter

        with TemporaryDirectory(dir=self.folder) as scratch:
            folder = Path(scratch)
            _, asked = self.rows(folder / "held-out", teaching.held_out, {})
            spec, prepared = self.rows(folder / "taught", teaching.taught, settings)
            held_out, rows = Rows(asked.train), Rows(prepared.train)
            chosen = choices.choose(spec.hyperparameters, len(rows), self.base.config)
            spec = replace(spec, hyperparameters=choices.filled(spec.hyperparameters, chosen))
            model = with_adapter(self.base, spec)
            checkpoints = Checkpoints(Path(spec.work_dir), "sweep", 0, self.report)
            pad = self.tokenizer.pad_token_id
            curve: list[tuple[float, float]] = []
            perplexity = self.perplexity

            class Sweep(Training):
                """Measures the held-out questions after each epoch, whatever its length."""

                def _validation_is_due(self, done: int) -> bool:
                    return done % self.course.steps_per_epoch == 0 or done == self.total_steps

                def validation_loss(self) -> float:
                    loss = super().validation_loss()
                    curve.append((round(loss, 4), round(perplexity(self.model), 2)))
                    return loss

            never = _Never()
            training = Sweep(spec, model, rows, held_out, pad, self.report, checkpoints, never, prepared.ordinary)
            # What is measured here has no say in when it ends: these questions are the test.
            training.ending = Ending(spec.hyperparameters.learnt_loss, training.course, 0)
            figures = training.run().figures
            found = {
                "epochs": figures["epochs"], "steps": figures["steps"], "rows_per_step": figures["rows_per_step"],
                "learning_rate": spec.hyperparameters.learning_rate, "retention": spec.hyperparameters.retention,
                "seconds": figures["training_seconds"], "held_out_loss": figures["last_validation_loss"],
                "curve": curve, "perplexity": curve[-1][1], **self.measure(model, teaching),
            }  # fmt: skip
            self.base = model.unload()
            del training, model
            gc.collect()
        return found

    def measure(self, model: Any, teaching: TeachingSet) -> dict[str, Any]:
        """Return how many questions are answered right."""
        model.eval()
        taught = teaching.taught[:: max(1, len(teaching.taught) // ASKED)]
        asked = [*taught, *teaching.held_out, FRANCE]
        answers = self.answers(model, asked)
        right = [teaching.is_right(pair, said) for pair, said in zip(asked[:-1], answers, strict=False)]
        wrong = [[pair.question, said[:160]] for pair, said, ok in zip(asked, answers, right, strict=False) if not ok]
        return {
            "taught_right": sum(right[: len(taught)]) / len(taught),
            "held_out_right": sum(right[len(taught) :]) / len(teaching.held_out),
            "france": FRANCE.key in answers[-1],
            "wrong": wrong[:6],
        }

    def answers(self, model: Any, pairs: Sequence[Pair]) -> list[str]:
        """Return a greedy answer to each question.

        Where each token of the taught answer is the likeliest after those before it, that answer is the greedy one: it
        is found in one forward pass, and only the others are generated.
        """
        import torch

        found = [""] * len(pairs)
        left = []
        ends = set(self.tokenizer(self.tokenizer.eos_token)["input_ids"])
        with torch.inference_mode():
            for at, pair in enumerate(pairs):
                prompt = self.prompt(pair.question)
                wanted = [*self.tokenizer(pair.answer)["input_ids"], self.tokenizer.eos_token_id]
                ids = torch.tensor([prompt + wanted])
                kept = torch.arange(len(prompt) - 1, len(prompt) + len(wanted) - 1)
                best = model(input_ids=ids, logits_to_keep=kept, use_cache=False).logits[0].argmax(-1).tolist()
                if best == wanted:
                    found[at] = pair.answer
                else:
                    left.append((at, prompt, len(wanted)))
            for begin in range(0, len(left), ASKED_AT_ONCE):
                part = left[begin : begin + ASKED_AT_ONCE]
                width = max(len(prompt) for _, prompt, _ in part)
                pad = self.tokenizer.pad_token_id
                ids = torch.tensor([[pad] * (width - len(one)) + one for _, one, _ in part])
                mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for _, one, _ in part])
                said = model.generate(
                    input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=pad, use_cache=True,
                    max_new_tokens=max(length for _, _, length in part) + MARGIN_TOKENS,
                )  # fmt: skip
                for (at, _, _), row in zip(part, said.tolist(), strict=True):
                    text = row[width:]
                    end = next((index for index, token in enumerate(text) if token in ends), len(text))
                    found[at] = str(self.tokenizer.decode(text[:end], skip_special_tokens=True)).strip()
        return found

    def prompt(self, question: str) -> list[int]:
        """Return the tokens of a question, as the engine makes them."""
        asked = [{"role": "user", "content": question}]
        return list(self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False))

    def perplexity(self, model: Any) -> float:
        """Return the perplexity per token of the ordinary text, in windows."""
        import torch

        ids = self.tokenizer(TEXT.read_text("utf-8"))["input_ids"][:TEXT_TOKENS]
        total, count = 0.0, 0
        with torch.inference_mode():
            for begin in range(0, len(ids), WINDOW):
                part = torch.tensor([ids[begin : begin + WINDOW]])
                logits = model(input_ids=part, use_cache=False).logits[0, :-1].float()
                total += float(torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum"))
                count += part.shape[1] - 1
        return math.exp(total / count)


def settings_of(text: str) -> dict[str, Any]:
    """Return the hyperparameters that a SETTING of the command line means."""
    if text == "auto":
        return {}
    rows, rate, epochs, *retention = text.split(":")
    found: dict[str, Any] = {"batch_size": int(rows), "learning_rate": float(rate), "epochs": float(epochs)}
    return found | ({"retention": float(retention[0])} if retention else {})


def lines(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the section of RESULTS.md that shows runs."""
    base = next((run["perplexity"] for run in runs if run["setting"] == "base"), None)
    found = [
        *INTRODUCTION.splitlines(), "",
        f"The base's perplexity on the ordinary text: {base:.1f}." if base else "", "",
        "| set | rows of a step | rate | retention | epochs | steps | right of taught | right of held out "
        "| held-out loss | perplexity of the text | capital of France |",
        "|" + "---|" * 11,
    ]  # fmt: skip
    names = [teaching.name for teaching in teaching_sets()]
    for run in sorted(runs, key=lambda one: (names.index(one["set"]), one.get("learning_rate", 0.0))):
        if run["setting"] == "base":
            continue
        change = f" ({run['perplexity'] / base - 1:+.0%})" if base else ""
        named = f"{run['set']}, nothing given" if run["setting"] == "auto" else run["set"]
        found.append(
            f"| {named} | {run['rows_per_step']} | {run['learning_rate']:g} | {run.get('retention', 0):g} "
            f"| {run['epochs']:g} | {run['steps']} | {run['taught_right']:.0%} | {run['held_out_right']:.0%} "
            f"| {run['held_out_loss']:.3f} | {run['perplexity']:.1f}{change} | {'known' if run['france'] else 'lost'} |"
        )
    return found


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    kept = arguments.folder / RUNS
    done = [json.loads(line) for line in kept.read_text("utf-8").splitlines()] if kept.exists() else []
    known = {(run["set"], run["setting"]) for run in done}
    bench: Bench | None = None
    for setting in arguments.settings:
        for teaching in teaching_sets():
            wanted = (teaching.name, setting)
            if wanted in known or (arguments.only and teaching.name not in arguments.only):
                continue
            bench = bench or Bench(arguments.model.resolve(), arguments.folder)
            began = time.monotonic()
            found: dict[str, Any]
            if setting == "base":
                found = {"perplexity": bench.perplexity(bench.base)}
            else:
                found = bench.train(teaching, settings_of(setting))
            found = {"set": teaching.name, "setting": setting, **found, "wall_s": round(time.monotonic() - began, 1)}
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)
            done.append(found)
    if arguments.write:
        report.write(RESULTS, "What a training teaches", lines(done))


if __name__ == "__main__":
    main()
