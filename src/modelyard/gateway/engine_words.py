"""An engine's own errors, for the clients of this server: what vLLM calls by its switches gains the name it has here.

Who asks this server cannot set `--tool-call-parser`: who deploys the model says `options.tool_call_parser`. The
engine's words stay, and a sentence follows. On Anthropic's paths the error gets that interface's form and types.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from modelyard.http import anthropic_envelope

#: vLLM's switches by the names that they have in its messages, and what sets each here; None: nothing does.
OURS: dict[str, str | None] = {
    "--enable-auto-tool-choice": "options.tool_call_parser",
    "--tool-call-parser": "options.tool_call_parser",
    "--reasoning-parser": "options.reasoning_parser",
    "--reasoning-config": "options.reasoning_parser",
    "--max-model-len": "options.max_model_len",
    "--max-num-seqs": "options.max_num_seqs",
    "--gpu-memory-utilization": "options.gpu_memory_utilization",
    "--tensor-parallel-size": "options.tensor_parallel_size",
    "--max-loras": "options.max_loras",
    "--max-lora-rank": "options.max_lora_rank",
    "--enable-lora": "options.max_loras",
    "--enforce-eager": "options.enforce_eager",
    "--enable-prefix-caching": "options.enable_prefix_caching",
    "--kv-cache-dtype": "options.kv_cache_dtype",
    "--dtype": "options.dtype",
    "VLLM_CPU_KVCACHE_SPACE": "options.cpu_kv_cache_gib",
    "VLLM_MAX_N_SEQUENCES": "MODELYARD_REQUEST_MAX_N",
    "VLLM_ENGINE_READY_TIMEOUT_S": "MODELYARD_ENGINE_START_TIMEOUT_S",
    "--allowed-local-media-path": None,
    "--allowed-media-domains": None,
    "--chat-template": None,
    "--chat-template-content-format": None,
    "--default-chat-template-kwargs": None,
    "--enable-mm-embeds": None,
    "--enable-prompt-embeds": None,
    "--enable-scale-out": None,
    "--enable-trace-replay": None,
    "--kv-sharing-fast-prefill": None,
    "--limit-mm-per-prompt": None,
    "--logprobs-mode": None,
    "--max-logprobs": None,
    "--media-io-kwargs": None,
    "--mm-processor-cache-gb": None,
    "--pooler-config": None,
    "--skip-tokenizer-init": None,
    "--stream-interval": None,
    "--structured-outputs-config": None,
    "--tokenizer": None,
    "--tool-server": None,
    "--trust-remote-code": None,
    "--trust-request-chat-template": None,
    "--trust-request-mm-kwargs": None,
    "VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT": None,
    "VLLM_MAX_AUDIO_DECODE_BYTES": None,
    "VLLM_MAX_AUDIO_DECODE_DURATION_S": None,
    "VLLM_MAX_IMAGE_PIXELS": None,
}
_SWITCH = re.compile(r"(?<![\w-])(?:--[a-z][a-z-]{2,40}|VLLM_[A-Z_]{3,40})(?![\w-])")
#: An assertion of vLLM's that fails in a request gives an empty message, such as an echo of tokens without any text.
_WORDLESS = re.compile(rb'"message": {0,8}" {0,8}"')
_WITHOUT_WORDS = (
    "The engine failed at this request and did not say why. Its log does: "
    "GET /api/v1/deployments/{id}/attempts/{number}/log/."
)
#: A message may quote what was sent; a switch stands at its beginning or its end, not deep within.
LOOKED_AT = 4096


def in_our_words(status: int, body: bytes, *, for_anthropic: bool) -> bytes:
    """Return the body of an engine's error as clients here get it; the same where there is nothing to add."""
    if not for_anthropic and b"--" not in body and b"VLLM_" not in body and _WORDLESS.search(body) is None:
        return body
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        answer = None
    error: Any = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    if not isinstance(message, str):
        if not for_anthropic:
            return body
        message = f"The engine answered with status {status}: {body[:500].decode('utf-8', 'replace')}"
    explained = explain(message) if message.strip() else _WITHOUT_WORDS
    if for_anthropic:
        return msgspec.json.encode(anthropic_envelope(status, explained))
    if explained == message:
        return body
    error["message"] = explained
    return msgspec.json.encode(answer)


def explain(message: str) -> str:
    """Return a message with a sentence on each of vLLM's switches in it."""
    seen = _SWITCH.findall(message if len(message) <= 2 * LOOKED_AT else message[:LOOKED_AT] + message[-LOOKED_AT:])
    named = [switch for switch in dict.fromkeys(seen) if switch in OURS]
    sets: dict[str, list[str]] = {}
    for switch in named:
        sets.setdefault(OURS[switch] or "", []).append(switch)
    parts = []
    for ours, switches in sets.items():
        listed = " and ".join(switches)
        if not ours:
            parts.append(f"{listed} cannot be set on this server.")
        elif ours.startswith("options."):
            parts.append(f"On this server {ours} of POST /api/v1/deploy/ sets {listed}.")
        else:
            parts.append(f"On this server {ours} takes the place of {listed}.")
    return " ".join([message, *parts])
