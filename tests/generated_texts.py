"""What transformers' `generate` writes: `python -m tests.generated_texts MODEL < ASKED`.

ASKED is JSON, `{"prompts": [...], "tokens": N, "configs": [[config, [number, ...]], ...]}`: each config is asked with
the prompts of these numbers. The prompts are cut to N tokens each, so that one batch of them needs no padding (which
`repetition_penalty` would take for a token that occurs). The answer has the prompts as they were cut and, for each
config, the text that follows each of its own, special tokens included. In float32, in a process of its own, since torch
is slow to load.
"""

from __future__ import annotations

import json
import sys


def main(folder: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = json.load(sys.stdin)
    # On a machine that does other things as well, threads would wait for one another.
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [tokenizer(prompt)["input_ids"][: asked["tokens"]] for prompt in asked["prompts"]]
    prompts = [tokenizer.decode(one, skip_special_tokens=False) for one in ids]
    assert [tokenizer(prompt)["input_ids"] for prompt in prompts] == ids, "a prompt cannot be cut there"
    texts = []
    for config, numbers in asked["configs"]:
        batch = torch.tensor([ids[number] for number in numbers])
        with torch.no_grad():
            found = model.generate(batch, attention_mask=torch.ones_like(batch), **config)
        whole = [tokenizer.decode(one, skip_special_tokens=False) for one in found]
        after = [text.removeprefix(prompts[number]) for text, number in zip(whole, numbers, strict=True)]
        texts.append([_until_end(text, tokenizer.eos_token) for text in after])
    json.dump({"prompts": prompts, "texts": texts}, sys.stdout)


def _until_end(text: str, end: str) -> str:
    """Return a text without what fills a batch's shorter ones up."""
    before, ended, _ = text.partition(end)
    return before + ended


if __name__ == "__main__":
    main(sys.argv[1])
