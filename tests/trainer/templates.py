"""Chat templates in the manner of each family, and tokenizers that have their tokens.

The templates are written for these tests: each has one or more of the habits that make labels go wrong.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from modelyard.demo.tiny_llama import CHAT_TEMPLATE, CORPUS, make_llama
from tests.fixtures import missing

#: End of turn by a token of its own, a newline after it.
CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

#: Like Qwen3: an empty thought before the last answer, thoughts dropped before the last question, tools, calls.
THINKING = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set found = namespace(query=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set found.query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > found.query and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

#: Like Llama 3: headers, trimmed content, the date in the system message, JSON of what a tool said.
HEADERS = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + strftime_now('%d %b %Y %H:%M:%S.%f') + '\\n\\n' }}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}{{- message.content | tojson }}{{- '<|eot_id|>' }}
    {%- elif message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('Only single tool-calls!') }}{%- endif %}
        {%- set function = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + function.name + '", "parameters": ' }}
        {{- function.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

#: Like Mistral's: turns must alternate, the system message goes into the last question, no generation prompt.
INST = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{%- set turns = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}
{%- for message in turns %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {%- if loop.last and system %}{{- '[INST] ' + system + '\\n\\n' + message.content + ' [/INST]' }}
        {%- else %}{{- '[INST] ' + message.content + ' [/INST]' }}{%- endif %}
    {%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}
    {%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}
{%- endfor %}"""

#: Like Gemma's: no system role, the assistant is 'model', contents trimmed.
TURNS = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

#: Like Phi's.
PHI = """{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

#: Like DeepSeek R1's: the prompt begins a thought, and no answer is rendered with one.
REASONING = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'system' %}{{ message.content }}
{%- elif message.role == 'user' %}{{ '<|User|>' + message.content }}
{%- else %}{{ '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""

#: Like GLM's: no end of turn, the next role's token is where the engine stops.
GLM = """[gMASK]<sop>{% for message in messages %}
{%- if message.role == 'tool' %}{{ '<|observation|>\\n' + message.content }}
{%- else %}{{ '<|' + message.role + '|>\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- call.function.name + '\\n' }}{{ call.function.arguments | tojson }}{% endfor %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

#: Like Zephyr's: the end-of-text ends every turn.
ZEPHYR = """{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

#: Like Vicuna's: words instead of special tokens.
VICUNA = """{%- for message in messages %}
{%- if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}
{%- elif message.role == 'assistant' %}{{ 'ASSISTANT: ' + message.content + eos_token }}
{%- else %}{{ message.content + ' ' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

#: The prompt ends with a space, which a tokenizer takes together with the answer's first word.
TRAILING_SPACE = VICUNA.replace("'ASSISTANT:' }}{% endif", "'ASSISTANT: ' }}{% endif")

#: The end-of-text only at the very end.
END_AT_THE_END = """{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}
{%- if loop.last and not add_generation_prompt %}{{ eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

#: No end of turn at all.
ENDLESS = """{% for message in messages %}
{{- message.role | capitalize + ': ' + message.content + '\\n\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

#: Goes through the content as parts, as those of models that see pictures do.
PARTS = """{% for message in messages %}{{ '<|' + message.role + '|>' }}
{%- for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}{{ '<image>' }}{% endif %}
{%- endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

#: Forgets what it does not know: system messages, tools and calls of them.
FORGETFUL = """{% for message in messages %}{% if message.role in ['user', 'assistant'] %}
{{- '<|' + message.role + '|>' + message.content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|User|>", "<|Assistant|>", "[gMASK]", "<sop>", "<|observation|>"),
    *("[INST]", "[/INST]"),
]
#: Template, the tokenizer's end, and what else the engine stops at.
FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "tiny": (CHAT_TEMPLATE, "<|end|>", ()),
    "chatml": (CHATML, "<|im_end|>", ("<|endoftext|>",)),
    "chatml-by-list": (CHATML, "<|endoftext|>", ("<|im_end|>", "<|endoftext|>")),
    "thinking": (THINKING, "<|im_end|>", ("<|endoftext|>",)),
    "headers": (HEADERS, "<|eot_id|>", ("<|endoftext|>",)),
    "inst": (INST, "<|end|>", ()),
    "turns": (TURNS, "<|endoftext|>", ("<end_of_turn>",)),
    "phi": (PHI, "<|endoftext|>", ("<|end|>",)),
    "reasoning": (REASONING, "<|endoftext|>", ()),
    "glm": (GLM, "<|endoftext|>", ("<|user|>", "<|observation|>")),
    "zephyr": (ZEPHYR, "<|end|>", ()),
    "vicuna": (VICUNA, "<|end|>", ()),
    "trailing-space": (TRAILING_SPACE, "<|end|>", ()),
    "end-at-the-end": (END_AT_THE_END, "<|end|>", ()),
    "endless": (ENDLESS, "<|endoftext|>", ()),
    "parts": (PARTS, "<|end|>", ()),
    "forgetful": (FORGETFUL, "<|end|>", ()),
}


def need_transformers() -> None:
    """Skip the module's tests where the trainer's packages are not installed."""
    if importlib.util.find_spec("transformers") is None:
        missing("engine", "transformers is not installed: make test installs it")


@lru_cache(maxsize=1)
def _tiny_tokenizer() -> Any:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as parent:
        make_llama(Path(parent) / "tiny")
        tokenizer = AutoTokenizer.from_pretrained(f"{parent}/tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def byte_tokenizer(template: Any, end: str = "<|end|>") -> Any:
    """Return the tiny Llama's tokenizer with everybody's special tokens."""
    tokenizer = copy.deepcopy(_tiny_tokenizer())
    tokenizer.eos_token = end
    tokenizer.chat_template = template
    return tokenizer


def word_tokenizer(template: str | None) -> Any:
    """Return a tokenizer in the manner of SentencePiece: a space belongs to the word after it, and one goes first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence([
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    special = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special, show_progress=False)
    inner.train_from_iterator(CORPUS.read_text("utf-8").splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


def ids_of(tokenizer: Any, names: tuple[str, ...]) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(name) for name in names]
