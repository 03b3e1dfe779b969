"""Generation without a server, in a process of its own: vLLM's `LLM.generate` or transformers' `generate`.

    python benchmarks/offline.py vllm ARGUMENTS-OF-THE-API-SERVER...
    python benchmarks/offline.py transformers MODEL_FOLDER

Prints a line when it is ready. Each line on standard input, `{"prompts": [...], "max_tokens": N}`, is then answered by
one line, `{"seconds", "texts", "tokens"}`: greedy, special tokens kept, `tokens` as many as were generated for each
prompt. It ends with its input. Everything else that the libraries print goes to standard error.

vLLM gets the arguments that an engine of Modelyard's runs with, so that both differ in nothing but their way in.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence

Generate = Callable[[list[str], int], tuple[list[str], list[int]]]


def with_vllm(argv: Sequence[str]) -> Generate:
    """Start vLLM in this process, its engine core in another one, as vLLM does by default."""
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # The rest is the API server's alone: its socket, its log.
    known, _ = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_known_args(argv)
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(known))

    def generate(prompts: list[str], max_tokens: int) -> tuple[list[str], list[int]]:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, skip_special_tokens=False, include_stop_str_in_output=True
        )
        answers = [found.outputs[0] for found in llm.generate(prompts, sampling, use_tqdm=False)]
        return [answer.text for answer in answers], [len(answer.token_ids) for answer in answers]

    return generate


def with_transformers(argv: Sequence[str]) -> Generate:
    """Load the model in its own number format; prompts are one batch, filled up on the left."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    [folder] = argv
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()

    def generate(prompts: list[str], max_tokens: int) -> tuple[list[str], list[int]]:
        batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.inference_mode():
            # Else it fills up with the token that ends a text, and its text would be counted longer than it is.
            padding = {"pad_token_id": tokenizer.pad_token_id}
            found = model.generate(**batch, **padding, do_sample=False, max_new_tokens=max_tokens)
        new = found[:, batch["input_ids"].shape[1] :]
        counts = [int((row != tokenizer.pad_token_id).sum()) for row in new]
        return tokenizer.batch_decode(new, skip_special_tokens=False), counts

    return generate


def main() -> None:
    """Answer one line after the other."""
    kind, *argv = sys.argv[1:]
    # The libraries write to standard output whenever they like.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    generate = {"vllm": with_vllm, "transformers": with_transformers}[kind](argv)
    print(json.dumps({"ready": kind}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        texts, tokens = generate(asked["prompts"], asked["max_tokens"])
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "texts": texts, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main()
