"""Models and conversations for the benchmark of trainings: `python benchmarks/training_inputs.py FOLDER` makes models.

`tiny` is the demo's Llama, where what is around the arithmetic weighs most; `larger` is a Llama of random numbers with
34 million weights, where the arithmetic does. Both have the demo's tokenizer and a chat template that marks what the
assistant says, which TRL needs to learn from nothing else.

Conversations are of the corpus's words, of one to three turns, and their lengths are as those of real chats: most
are short, a few are many times as long.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

if __package__ in {None, ""}:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modelyard.demo.tiny_llama import CORPUS, LLAMA_SPECIAL, make_llama

TINY, LARGER = "tiny", "larger"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
HIDDEN, LAYERS, HEADS, VOCABULARY = 512, 8, 8, 8192
#: Words of a conversation: the median, the deviation of its logarithm, and the bounds. The tokenizer makes some 3
#: tokens of 2 words.
WORDS, SPREAD, FEWEST, MOST = 70, 0.9, 8, 600


def conversations(count: int, seed: int = 0) -> list[str]:
    """Return that many lines of a dataset."""
    chance = random.Random(seed)
    words = CORPUS.read_text("utf-8").split()
    lines = []
    for _ in range(count):
        size = round(min(MOST, max(FEWEST, WORDS * chance.lognormvariate(0.0, SPREAD))))
        turns = min(chance.choice((1, 1, 1, 2, 3)), size // 4)
        messages = []
        for _turn in range(turns):
            for role, part in (("user", 0.3), ("assistant", 0.7)):
                said = [chance.choice(words) for _ in range(max(1, round(size * part / turns)))]
                messages.append({"role": role, "content": " ".join(said)})
        lines.append(json.dumps({"messages": messages}))
    return lines


def make_models(folder: Path) -> None:
    """Make both models below a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_llama(folder / TINY)
    (folder / TINY / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    torch.manual_seed(0)
    names = {name: LLAMA_SPECIAL[number] for number, name in enumerate(("pad", "bos", "eos"))}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        **{f"{name}_token_id": LLAMA_SPECIAL.index(token) for name, token in names.items()},
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / LARGER)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / TINY / file, folder / LARGER / file)


if __name__ == "__main__":
    make_models(Path(sys.argv[1]))
