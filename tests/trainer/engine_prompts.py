"""The engine's own prompts, without an engine: vLLM's chat rendering in a process of its own.

`python engine_prompts.py TOKENIZER_FOLDER < REQUESTS`: each line is `{"template", "eos", "messages"}`, and each line of
the answer the token ids that a server of vLLM makes of such a request to /v1/chat/completions.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any


def main(folder: str) -> None:
    """Answer each line of the input."""
    from transformers import AutoTokenizer
    from vllm.config import ModelConfig, VllmConfig
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers.hf import HfRenderer
    from vllm.tokenizers.hf import get_cached_tokenizer

    config = ModelConfig(model=folder, tokenizer=folder, dtype="float32")
    plain = AutoTokenizer.from_pretrained(folder)
    renderers: dict[str, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        template = asked["template"]
        if template not in renderers:
            tokenizer = copy.deepcopy(plain)
            tokenizer.eos_token, tokenizer.chat_template = asked["eos"], template
            renderers[template] = HfRenderer(VllmConfig(model_config=config), get_cached_tokenizer(tokenizer))
        renderer = renderers[template]
        request = ChatCompletionRequest(model="any", messages=asked["messages"])
        # As `OnlineRenderer.preprocess_chat` does; the template is given, since one model has all tokenizers here.
        chat = request.build_chat_params(template, "auto").with_defaults({"tools": None, "tokenize": False})
        _, (prompt,) = renderer.render_chat([request.messages], chat, request.build_tok_params(config))
        sys.stdout.write(json.dumps(list(prompt["prompt_token_ids"])) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
