"""What transformers and PEFT answer greedily: `python -m tests.greedy_answers BASE ADAPTER DATASET TOKENS`.

Writes a JSON list with one list of token ids for each conversation of the dataset: the answer to its first message, in
the number format that the base is kept in. A process of its own, since torch is slow to load.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(base: str, adapter: str, dataset: Path, tokens: int) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    found = []
    for line in dataset.read_text("utf-8").splitlines():
        question = json.loads(line)["messages"][:1]
        prompt = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            answer = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
        found.append(answer[0, prompt["input_ids"].shape[1] :].tolist())
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
