"""An imitation of the trainer child that keeps its promises to the server and learns nothing.

It takes `max_steps` steps, reports a point for each and a checkpoint each `checkpoint_steps`, goes on from the newest
checkpoint, writes one when it is asked to end, and leaves an adapter whose weights depend on the seed and the last step
alone. Words in the training's name have it misbehave:

    pace=S          seconds that a step takes
    hold=PHASE      stay in that phase (loading, training: after the first step, evaluating) until it is asked to end
    kill=N          be killed by SIGKILL at step N, unless it has been killed there `times` times already
    times=N         how often (1)
    exit=N          leave at step N with status 3 and a last word, without a result
    fail=CODE       fail with this code at the first step
    deaf=1          pass over being asked to end
    broken=1        write an adapter that no engine can serve
    better=0|1      score rows that were held back, and find the adapter no better, or better
    garbage=1       write a line among its reports that is no report

Only the standard library, so that it starts at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any


class Trainer:
    """One run of it."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.settings = spec["hyperparameters"]
        self.words = dict(word.split("=", 1) for word in spec["name"].split() if "=" in word)
        self.work = Path(spec["work_dir"])
        self.checkpoints = self.work / "checkpoints"
        self.reports = open(spec["progress"], "ab", buffering=0)  # noqa: SIM115
        self.stopping = False
        self.step = 0

    def say(self, kind: str, **values: Any) -> None:
        self.reports.write(json.dumps({"kind": kind, **values}).encode() + b"\n")

    def run(self) -> dict[str, Any]:
        signal.signal(signal.SIGTERM, self.asked)
        self.say("phase", phase="loading")
        self.hold("loading")
        if self.stopping:
            return {"stopped": True, "step": 0}
        rows = [line for line in Path(self.spec["data"]).read_bytes().splitlines() if line.strip()]
        steps = self.settings["max_steps"]
        self.say("prepared", rows=len(rows), steps=steps)
        self.say("phase", phase="training")
        found = sorted(int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*"))
        if found:
            self.step = int((self.checkpoints / f"step-{found[-1]}" / "state.json").read_text())
            self.say("note", level="INFO", message=f"Going on from step {self.step}.", data={"step": self.step})
        if "fail" in self.words:
            failure = {"code": self.words["fail"], "message": "It failed.", "hint": "Do this.", "evidence": ["a line"]}
            return {"failure": failure}
        if "garbage" in self.words:
            self.reports.write(b'{"kind": "point", "step": 1, "lo\n[]\n{"kind": 3}\n')
        while self.step < steps:
            time.sleep(float(self.words.get("pace", "0.005")))
            self.step += 1
            self.misbehave()
            self.say(
                "point", step=self.step, epoch=self.step / 10, loss=1 / self.step, tokens=self.step * 10,
                tokens_per_s=100.0, learning_rate=0.1, memory_bytes=50_000_000,
            )  # fmt: skip
            self.say("progress", done=self.step, total=steps, unit="steps")
            if self.step % (self.settings["checkpoint_steps"] or 10) == 0 or self.step == steps:
                self.save()
            self.hold("training")
            if self.stopping:
                self.save()
                return {"stopped": True, "step": self.step}
        evaluation = None
        if "better" in self.words:
            self.say("phase", phase="evaluating")
            is_better = self.words["better"] == "1"
            scores = {"loss": 1.0, "exact_match": 0.5, "rouge_l": 0.5, "rows": 1}
            evaluation = {"base": scores, "adapter": scores, "better": is_better, "why": "It was said so.", "rows": 1}
        self.hold("evaluating")
        if self.stopping:
            return {"stopped": True, "step": self.step}
        self.say("phase", phase="saving")
        return {
            "adapter_dir": str(self.adapter()),
            "figures": {"steps": steps, "seconds": 1.0, "last_loss": 1 / steps},
            "evaluation": evaluation,
            "probes": None,
            "versions": {"imitation": "1"},
            "learnt_from": {"data_sha256": hashlib.sha256(b"".join(rows)).hexdigest()},
        }

    def asked(self, *_: object) -> None:
        self.stopping = self.stopping or "deaf" not in self.words

    def hold(self, phase: str) -> None:
        if self.words.get("hold") == phase:
            if phase == "evaluating":
                self.say("phase", phase=phase)
            while not self.stopping:
                time.sleep(0.01)

    def misbehave(self) -> None:
        if self.words.get("exit") == str(self.step):
            print("the last word", flush=True)
            os._exit(3)
        if self.words.get("kill") == str(self.step):
            count = self.work / "killed"
            so_far = len(count.read_bytes()) if count.exists() else 0
            if so_far < int(self.words.get("times", "1")):
                count.write_bytes(b"x" * (so_far + 1))
                os.kill(os.getpid(), signal.SIGKILL)

    def save(self) -> None:
        folder = self.checkpoints / f"step-{self.step}"
        beside = self.checkpoints / f".step-{self.step}"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        (beside / "state.json").write_text(str(self.step))
        (beside / "weights.bin").write_bytes(str(self.step).encode() * 1000)
        if not folder.exists():
            os.rename(beside, folder)
        self.say("checkpoint", step=self.step, folder=str(folder))
        for old in sorted(self.checkpoints.glob("step-*"), key=lambda path: int(path.name[5:]))[:-2]:
            shutil.rmtree(old)

    def adapter(self) -> Path:
        folder = self.work / "adapter"
        folder.mkdir(exist_ok=True)
        rank = self.settings["rank"]
        config = {
            "peft_type": "LORA", "r": rank, "lora_alpha": self.settings["alpha"], "target_modules": ["q_proj"],
            "base_model_name_or_path": self.spec["model_id"],
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config))
        base = json.loads((Path(self.spec["model_dir"]) / "config.json").read_text())
        hidden = base["hidden_size"] + ("broken" in self.words)
        out = base["num_attention_heads"] * (base.get("head_dim") or base["hidden_size"] // base["num_attention_heads"])
        name, data, header = "base_model.model.model.layers.0.self_attn.q_proj", b"", {}
        for part, shape in (("A", [rank, hidden]), ("B", [out, rank])):
            number = struct.pack("<f", 0.001 * (self.settings["seed"] + self.step))
            begin = len(data)
            data += number * (shape[0] * shape[1])
            key = f"{name}.lora_{part}.weight"
            header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, len(data)]}
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
        return folder


def main(path: str) -> None:
    """Do what the spec says and write one result."""
    spec = json.loads(Path(path).read_text())
    result = Trainer(spec).run()
    beside = Path(spec["result"] + ".part")
    beside.write_text(json.dumps(result))
    os.rename(beside, spec["result"])


if __name__ == "__main__":
    main(sys.argv[1])
