"""Chat templates of 51 families, as facts: what goes before, between and after their turns, and what that makes learnt.

The facts are read from the files of the repositories that `source` names. The templates themselves are made from the
facts, here (`template_of`), with the structure that matters: what a prompt ends with, what rendered answers have
instead, where a turn ends, what is done with thoughts. `prompt_of` says the same without a template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: A system message goes to the front of the first question.
MERGED = "merged"
#: There is no system message.
REFUSED = "refused"

#: The content's `</think>` is looked for: what is before it is rendered after the last question only, or never.
SPLIT = "split"
DROPPED = "dropped"
#: Thoughts are taken beside the content alone.
BESIDE = "beside"


@dataclass(frozen=True)
class Family:
    """One template.

    `asks` is the generation prompt, `answer` what rendered answers are between, `last` what the last one has before its
    content beside, `says` what a model says to the prompt, with the place of the content. `after` ends a conversation
    that asks nothing. The first of `ends` is the tokenizer's, the others are the generation configuration's.
    """

    name: str
    source: str
    user: tuple[str, str]
    answer: tuple[str, str]
    asks: str
    says: str
    ends: tuple[str, ...]
    begin: str = ""
    system: tuple[str, str] | str = REFUSED
    no_system: str = ""
    last: str = ""
    after: str = ""
    strips: bool = False
    thoughts: str = ""
    in_parts: bool = False


def _chatml(name: str, source: str, **more: Any) -> Family:
    facts: dict[str, Any] = {
        "user": ("<|im_start|>user\n", "<|im_end|>\n"),
        "answer": ("<|im_start|>assistant\n", "<|im_end|>\n"),
        "asks": "<|im_start|>assistant\n",
        "says": "{}<|im_end|>",
        "ends": ("<|im_end|>", "<|endoftext|>"),
        "system": ("<|im_start|>system\n", "<|im_end|>\n"),
    }
    return Family(name, source, **{**facts, **more})


def _headers(name: str, source: str, left: str, right: str, end: str, **more: Any) -> Family:
    facts: dict[str, Any] = {
        "begin": "<|begin_of_text|>",
        "user": (f"{left}user{right}\n\n", end),
        "answer": (f"{left}assistant{right}\n\n", end),
        "asks": f"{left}assistant{right}\n\n",
        "says": f"{{}}{end}",
        "ends": (end, "<|end_of_text|>"),
        "system": (f"{left}system{right}\n\n", end),
        "strips": True,
    }
    return Family(name, source, **{**facts, **more})


def _gemma(name: str, source: str, left: str, right: str, **more: Any) -> Family:
    facts: dict[str, Any] = {
        "begin": "<bos>",
        "user": (f"{left}user\n", f"{right}\n"),
        "answer": (f"{left}model\n", f"{right}\n"),
        "asks": f"{left}model\n",
        "says": f"{{}}{right}",
        "ends": ("<eos>", right),
        "strips": True,
    }
    return Family(name, source, **{**facts, **more})


def _cohere(name: str, source: str, **more: Any) -> Family:
    turn, end = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
    facts: dict[str, Any] = {
        "begin": "<BOS_TOKEN>",
        "user": (f"{turn}<|USER_TOKEN|>", end),
        "answer": (f"{turn}<|CHATBOT_TOKEN|>", end),
        "asks": f"{turn}<|CHATBOT_TOKEN|>",
        "says": f"{{}}{end}",
        "ends": (end,),
        "system": (f"{turn}<|SYSTEM_TOKEN|>", end),
    }
    return Family(name, source, **{**facts, **more})


def _deepseek(name: str, source: str, **more: Any) -> Family:
    end = "<｜end▁of▁sentence｜>"
    facts: dict[str, Any] = {
        "begin": "<｜begin▁of▁sentence｜>",
        "user": ("<｜User｜>", ""),
        "answer": ("<｜Assistant｜>", end),
        "asks": "<｜Assistant｜>",
        "says": f"{{}}{end}",
        "ends": (end,),
        "system": ("", ""),
    }
    return Family(name, source, **{**facts, **more})


_ROLE_LINES: dict[str, Any] = {"user": ("<|user|>\n", "\n"), "system": ("<|system|>\n", "\n")}
_LLAMA_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
_THINK: dict[str, Any] = {"asks": "<|im_start|>assistant\n<think>\n", "says": "\n</think>\n\n{}<|im_end|>"}
_NO_THOUGHT = "<think>\n\n</think>\n\n"

TABLE = (
    Family(
        "Llama 2", "meta-llama/Llama-2-7b-chat-hf, tokenizer_config.json",
        user=("<s>[INST] ", " [/INST]"), answer=(" ", " </s>"), asks="", says=" {} </s>", ends=("</s>",),
        system=MERGED, strips=True,
    ),
    _headers(
        "Llama 3", "meta-llama/Meta-Llama-3-8B-Instruct, tokenizer_config.json",
        "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    ),
    _headers(
        "Llama 3.1", "meta-llama/Llama-3.1-8B-Instruct, tokenizer_config.json: dates are always there",
        "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
        system=(f"<|start_header_id|>system<|end_header_id|>\n\n{_LLAMA_DATES}", "<|eot_id|>"),
        no_system=f"<|start_header_id|>system<|end_header_id|>\n\n{_LLAMA_DATES}<|eot_id|>",
    ),
    _headers(
        "Llama 4", "meta-llama/Llama-4-Scout-17B-16E-Instruct, chat_template.jinja",
        "<|header_start|>", "<|header_end|>", "<|eot|>", in_parts=True,
    ),
    Family(
        "Mixtral 8x7B", "mistralai/Mixtral-8x7B-Instruct-v0.1, tokenizer_config.json",
        user=(" [INST] ", " [/INST]"), answer=(" ", "</s>"), asks="", says=" {}</s>", ends=("</s>",), begin="<s>",
        system=MERGED, strips=True,
    ),
    Family(
        "Mistral 7B v0.3", "mistralai/Mistral-7B-Instruct-v0.3, tokenizer_config.json",
        user=("[INST] ", "[/INST]"), answer=(" ", "</s>"), asks="", says=" {}</s>", ends=("</s>",), begin="<s>",
        system=MERGED, strips=True,
    ),
    Family(
        "Mistral Small 3.1", "mistralai/Mistral-Small-3.1-24B-Instruct-2503, chat_template.json",
        user=("[INST]", "[/INST]"), answer=("", "</s>"), asks="", says="{}</s>", ends=("</s>",), begin="<s>",
        system=("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ),
    _chatml(
        "Qwen 1.5", "Qwen/Qwen1.5-7B-Chat, tokenizer_config.json",
        no_system="<|im_start|>system\nYou are a helpful assistant<|im_end|>\n",
    ),
    _chatml(
        "Qwen 2.5", "Qwen/Qwen2.5-7B-Instruct, tokenizer_config.json",
        no_system="<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. "
        "You are a helpful assistant.<|im_end|>\n",
    ),
    _chatml(
        "Qwen 3", "Qwen/Qwen3-0.6B, tokenizer_config.json",
        last=_NO_THOUGHT, says=f"{_NO_THOUGHT}{{}}<|im_end|>", thoughts=SPLIT,
    ),
    _chatml("Qwen 3 Instruct 2507", "Qwen/Qwen3-4B-Instruct-2507, tokenizer_config.json"),
    _chatml(
        "Qwen 3 Thinking 2507", "Qwen/Qwen3-4B-Thinking-2507, chat_template.jinja",
        **_THINK, last=_NO_THOUGHT, thoughts=SPLIT,
    ),
    _chatml(
        "Qwen 3.5", "Qwen/Qwen3.5-27B, chat_template.jinja", **_THINK, last=_NO_THOUGHT, thoughts=SPLIT,
    ),
    _chatml(
        "Qwen 3.5 small", "Qwen/Qwen3.5-0.8B, chat_template.jinja: thinks only where it is asked to",
        asks=f"<|im_start|>assistant\n{_NO_THOUGHT}", last=_NO_THOUGHT, thoughts=SPLIT,
    ),
    _chatml(
        "Qwen 3.8", "the template qwen3_8.jinja of TRL 1.16.0: thoughts beside the content, in all turns",
        **_THINK, answer=(f"<|im_start|>assistant\n{_NO_THOUGHT}", "<|im_end|>\n"), thoughts=BESIDE,
    ),
    _chatml("QwQ", "Qwen/QwQ-32B, tokenizer_config.json", **_THINK, thoughts=DROPPED),
    _gemma("Gemma 2", "google/gemma-2-2b-it, tokenizer_config.json", "<start_of_turn>", "<end_of_turn>"),
    _gemma(
        "Gemma 3", "google/gemma-3-4b-it, chat_template.jinja", "<start_of_turn>", "<end_of_turn>",
        system=MERGED, in_parts=True,
    ),
    _gemma(
        "Gemma 4 E4B", "google/gemma-4-E4B-it, chat_template.jinja", "<|turn>", "<turn|>",
        system=("<|turn>system\n", "<turn|>\n"), in_parts=True,
    ),
    _gemma(
        "Gemma 4 31B", "google/gemma-4-31B-it, chat_template.jinja: the prompt closes an empty thought",
        "<|turn>", "<turn|>", system=("<|turn>system\n", "<turn|>\n"), in_parts=True,
        asks="<|turn>model\n<|channel>thought\n<channel|>",
    ),
    Family(
        "Phi 3 mini", "microsoft/Phi-3-mini-4k-instruct, tokenizer_config.json",
        user=("<|user|>\n", "<|end|>\n"), answer=("<|assistant|>\n", "<|end|>\n"), asks="<|assistant|>\n",
        says="{}<|end|>", ends=("<|endoftext|>", "<|end|>"), system=("<|system|>\n", "<|end|>\n"),
        after="<|endoftext|>",
    ),
    Family(
        "Phi 4", "microsoft/phi-4, tokenizer_config.json",
        user=("<|im_start|>user<|im_sep|>", "<|im_end|>"), answer=("<|im_start|>assistant<|im_sep|>", "<|im_end|>"),
        asks="<|im_start|>assistant<|im_sep|>", says="{}<|im_end|>", ends=("<|im_end|>",),
        system=("<|im_start|>system<|im_sep|>", "<|im_end|>"),
    ),
    Family(
        "Phi 4 mini", "microsoft/Phi-4-mini-instruct, tokenizer_config.json",
        user=("<|user|>", "<|end|>"), answer=("<|assistant|>", "<|end|>"), asks="<|assistant|>", says="{}<|end|>",
        ends=("<|endoftext|>", "<|end|>"), system=("<|system|>", "<|end|>"), after="<|endoftext|>",
    ),
    _deepseek("DeepSeek V3", "deepseek-ai/DeepSeek-V3, tokenizer_config.json"),
    _deepseek(
        "DeepSeek R1", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B, tokenizer_config.json",
        asks="<｜Assistant｜><think>\n", says="\n</think>\n\n{}<｜end▁of▁sentence｜>", thoughts=DROPPED,
    ),
    _deepseek(
        "DeepSeek V3.1", "deepseek-ai/DeepSeek-V3.1, tokenizer_config.json: every answer is after a closed thought",
        asks="<｜Assistant｜></think>", answer=("<｜Assistant｜></think>", "<｜end▁of▁sentence｜>"),
    ),
    Family(
        "GLM 4", "zai-org/GLM-4-9B-0414, tokenizer_config.json: no end of turn",
        user=("<|user|>\n", ""), answer=("<|assistant|>\n", ""), asks="<|assistant|>\n", says="{}<|user|>",
        ends=("<|endoftext|>", "<|user|>", "<|observation|>"), begin="[gMASK]<sop>", system=("<|system|>\n", ""),
    ),
    Family(
        "GLM 4.5", "zai-org/GLM-4.5-Air, chat_template.jinja: no end of turn, thoughts after the last question",
        user=("<|user|>\n", ""), answer=("<|assistant|>\n<think></think>\n", ""), asks="<|assistant|>",
        says="\n<think></think>\n{}<|user|>", ends=("<|endoftext|>", "<|user|>", "<|observation|>"),
        begin="[gMASK]<sop>", system=("<|system|>\n", ""), strips=True, thoughts=SPLIT,
    ),
    Family(
        "GLM 5.3 Flash", "zai-org/GLM-5.3-Flash, chat_template.jinja: the prompt opens the thought",
        user=("<|user|>", ""), answer=("<|assistant|><think></think>", ""), asks="<|assistant|><think>",
        says="</think>{}<|user|>", ends=("<|endoftext|>", "<|user|>", "<|observation|>"), begin="[gMASK]<sop>",
        system=("<|system|>", ""), strips=True,
    ),
    _cohere("Command R", "CohereForAI/aya-23-8B, tokenizer_config.json", strips=True),
    _cohere(
        "Command R7B", "CohereForAI/c4ai-command-r7b-12-2024, tokenizer_config.json",
        answer=("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        asks="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>",
        says="{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    ),
    _cohere(
        "Command A", "CohereForAI/c4ai-command-a-03-2025, tokenizer_config.json: the next turn is opened, asked or not",
        answer=("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        asks="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>",
        after="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", says="{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    ),
    Family(
        "Granite 3", "ibm-granite/granite-3.3-2b-instruct, tokenizer_config.json",
        user=("<|start_of_role|>user<|end_of_role|>", "<|end_of_text|>\n"),
        answer=("<|start_of_role|>assistant<|end_of_role|>", "<|end_of_text|>\n"),
        asks="<|start_of_role|>assistant<|end_of_role|>", says="{}<|end_of_text|>", ends=("<|end_of_text|>",),
        system=("<|start_of_role|>system<|end_of_role|>", "<|end_of_text|>\n"),
    ),
    Family(
        "OLMo 2", "allenai/OLMo-2-1124-7B-Instruct, tokenizer_config.json: begins with what ends an answer",
        **_ROLE_LINES, answer=("<|assistant|>\n", "<|endoftext|>\n"), asks="<|assistant|>\n",
        says="{}<|endoftext|>", ends=("<|endoftext|>",), begin="<|endoftext|>",
    ),
    Family(
        "Falcon 3", "tiiuae/Falcon3-1B-Instruct, tokenizer_config.json",
        **_ROLE_LINES, answer=("<|assistant|>\n", "<|endoftext|>\n"), asks="<|assistant|>\n",
        says="{}<|endoftext|>", ends=("<|endoftext|>",),
    ),
    Family(
        "EXAONE 3.5", "LGAI-EXAONE/EXAONE-3.5-2.4B-Instruct, tokenizer_config.json",
        user=("[|user|]", "\n"), answer=("[|assistant|]", "[|endofturn|]\n"), asks="[|assistant|]",
        says="{}[|endofturn|]", ends=("[|endofturn|]",), system=("[|system|]", "[|endofturn|]\n"),
        no_system="[|system|][|endofturn|]\n",
    ),
    _chatml(
        "InternLM 2.5", "internlm/internlm2_5-7b-chat, tokenizer_config.json",
        begin="<s>", ends=("</s>", "<|im_end|>"),
    ),
    _chatml(
        "SmolLM 2", "HuggingFaceTB/SmolLM2-135M-Instruct, tokenizer_config.json",
        no_system="<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
        "trained by Hugging Face<|im_end|>\n",
    ),
    _chatml(
        "Yi 1.5", "01-ai/Yi-1.5-6B-Chat, tokenizer_config.json: a question opens the answer",
        system=("", ""), user=("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        answer=("", "<|im_end|>\n"), asks="",
    ),
    _chatml("Hermes 3", "NousResearch/Hermes-3-Llama-3.1-8B, tokenizer_config.json", begin="<|begin_of_text|>"),
    Family(
        "Zephyr", "HuggingFaceH4/zephyr-7b-beta, tokenizer_config.json",
        user=("<|user|>\n", "</s>\n"), answer=("<|assistant|>\n", "</s>\n"), asks="<|assistant|>\n",
        says="{}</s>", ends=("</s>",), system=("<|system|>\n", "</s>\n"),
    ),
    Family(
        "OpenChat 3.5", "openchat/openchat-3.5-0106, tokenizer_config.json: the prompt ends before a space",
        user=("GPT4 Correct User: ", "<|end_of_turn|>"), answer=("GPT4 Correct Assistant: ", "<|end_of_turn|>"),
        asks="GPT4 Correct Assistant:", says=" {}<|end_of_turn|>", ends=("<|end_of_turn|>",), begin="<s>",
    ),
    Family(
        "StableLM 2", "stabilityai/stablelm-2-zephyr-1_6b, tokenizer_config.json",
        user=("<|user|>\n", "<|endoftext|>\n"), answer=("<|assistant|>\n", "<|endoftext|>\n"),
        asks="<|assistant|>\n", says="{}<|endoftext|>", ends=("<|endoftext|>",),
        system=("<|system|>\n", "<|endoftext|>\n"),
    ),
    _chatml(
        "Nemotron 3", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B, chat_template.jinja: the thought is closed at once",
        asks="<|im_start|>assistant\n<think>\n", answer=("<|im_start|>assistant\n<think></think>", "<|im_end|>\n"),
        says="</think>{}<|im_end|>",
    ),
    Family(
        "Kimi K2", "moonshotai/Kimi-K2-Instruct, chat_template.jinja",
        user=("<|im_user|>user<|im_middle|>", "<|im_end|>"),
        answer=("<|im_assistant|>assistant<|im_middle|>", "<|im_end|>"),
        asks="<|im_assistant|>assistant<|im_middle|>", says="{}<|im_end|>", ends=("[EOS]", "<|im_end|>"),
        system=("<|im_system|>system<|im_middle|>", "<|im_end|>"),
    ),
    Family(
        "MiniMax M2", "MiniMaxAI/MiniMax-M2, chat_template.jinja: the prompt opens a thought",
        user=("]~b]user\n", "[e~[\n"), answer=("]~b]ai\n", "[e~[\n"), asks="]~b]ai\n<think>\n",
        says="\n</think>\n\n{}[e~[", ends=("[e~[",), begin="]~!b[", system=("]~b]system\n", "[e~[\n"),
        thoughts=DROPPED,
    ),
    Family(
        "Seed OSS", "ByteDance-Seed/Seed-OSS-36B-Instruct, chat_template.jinja",
        user=("<seed:bos>user\n", "<seed:eos>"), answer=("<seed:bos>assistant\n", "<seed:eos>"),
        asks="<seed:bos>assistant\n", says="{}<seed:eos>", ends=("<seed:eos>",),
        system=("<seed:bos>system\n", "<seed:eos>"),
    ),
    _chatml("LFM 2", "LiquidAI/LFM2-1.2B, chat_template.jinja", begin="<|startoftext|>", ends=("<|im_end|>",)),
    Family(
        "Apriel 1.5", "ServiceNow-AI/Apriel-1.5-15b-Thinker, chat_template.jinja: the prompt ends in a sentence",
        user=("<|user|>\n", "\n<|end|>\n"), answer=("<|assistant|>\n", "\n<|end|>\n"),
        asks="<|assistant|>\nHere are my reasoning steps:\n", says="{}\n<|end|>", ends=("<|end|>",), begin="<s>",
        system=("<|system|>\n", "\n<|end|>\n"), in_parts=True,
    ),
    Family(
        "SmolVLM", "HuggingFaceTB/SmolVLM-256M-Instruct, chat_template.json: the prompt ends before a space",
        user=("User: ", "<end_of_utterance>\n"), answer=("Assistant: ", "<end_of_utterance>\n"), asks="Assistant:",
        says=" {}<end_of_utterance>", ends=("<end_of_utterance>",), begin="<|im_start|>",
        system=("System: ", "<end_of_utterance>\n"), in_parts=True,
    ),
    Family(
        "Muse Glimmer", "the template muse_glimmer.jinja of TRL 1.16.0: an answer says whom it is for",
        user=("<|start|>user<|message|>", "<|eot|>"), answer=("<|start|>assistant to=user<|message|>", "<|eot|>"),
        asks="<|start|>assistant", says=" to=user<|message|>{}<|eot|>", ends=("<|eot|>",),
        system=("<|start|>system<|message|>", "<|eot|>"),
    ),
)  # fmt: skip

_TOKEN = re.compile(
    r"<[|｜][\w▁]+[|｜]>|<\|\w+>|<\w+\|>|</?(?:s|bos|eos|sop|think|BOS_TOKEN)>|<(?:start|end)_of_\w+>|<seed:\w+>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|gMASK|EOS)\]|\[\|\w+\|\]|\]~!?b[\[\]]|\[e~\["
)


def special_tokens() -> list[str]:
    """Return what has a token of its own in any of the families' tokenizers."""
    texts = [json.dumps(one.__dict__, ensure_ascii=False) for one in TABLE]
    return sorted({found for text in texts for found in _TOKEN.findall(text)})


def template_of(family: Family) -> str:
    """Return a template that does what the facts say."""
    content = "message.content"
    lines = []
    if family.in_parts:
        lines += [
            "{%- macro text(message) %}{%- for part in message.content %}{{- part.text }}{%- endfor %}{%- endmacro %}"
        ]
        content = "text(message)"
    content = f"({content} | trim)" if family.strips else content
    lines += [
        f"{{{{- {_quoted(family.begin)} }}}}",
        "{%- set turns = namespace(first='', query=-1) %}",
        "{%- if messages[0].role == 'system' %}{%- set message = messages[0] %}{%- set rest = messages[1:] %}",
    ]
    if family.system == REFUSED:
        lines.append("{{- raise_exception('System role not supported') }}")
    elif family.system == MERGED:
        lines.append(f"{{%- set turns.first = {content} + '\\n\\n' %}}")
    else:
        lines.append(f"{{{{- {_quoted(family.system[0])} + {content} + {_quoted(family.system[1])} }}}}")
    lines += [
        f"{{%- else %}}{{%- set rest = messages %}}{{{{- {_quoted(family.no_system)} }}}}{{%- endif %}}",
        "{%- for message in rest %}{%- if message.role == 'user' %}{%- set turns.query = loop.index0 %}",
        "{%- endif %}{%- endfor %}{%- for message in rest %}{%- if message.role == 'user' %}",
        f"{{{{- {_quoted(family.user[0])} + turns.first + {content} + {_quoted(family.user[1])} }}}}",
        "{%- set turns.first = '' %}{%- else %}",
        *_answer_lines(family, content),
        "{%- endif %}{%- endfor %}",
        f"{{%- if add_generation_prompt %}}{{{{- {_quoted(family.asks)} }}}}",
        f"{{%- else %}}{{{{- {_quoted(family.after)} }}}}{{%- endif %}}",
    ]
    return "\n".join(lines)


def _answer_lines(family: Family, content: str) -> list[str]:
    opens, closes = family.answer
    lines = [f"{{%- set said = {content} %}}{{%- set thought = '' %}}"]
    if family.thoughts in (SPLIT, DROPPED):
        lines += [
            "{%- if '</think>' in said %}",
            "{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip() %}",
            "{%- set said = said.split('</think>')[-1].lstrip('\\n') %}{%- endif %}",
        ]
    elif family.thoughts == BESIDE:
        lines.append("{%- set thought = message.reasoning_content or '' %}")
    empty = re.search(r"<think>\s*</think>\s*", f"{opens}{family.last}")
    if family.thoughts in (SPLIT, BESIDE) and empty:
        shown = _quoted(empty[0].replace("<think>\n", "<think>\nTHOUGHT").replace("<think><", "<think>THOUGHT<"))
        where = "true" if family.thoughts == BESIDE else "loop.index0 > turns.query"
        lines += [
            f"{{{{- {_quoted(opens.removesuffix(empty[0]))} }}}}",
            f"{{%- if thought and {where} %}}{{{{- {shown}.replace('THOUGHT', thought) }}}}",
            f"{{%- elif {'loop.last' if family.last else 'true'} %}}{{{{- {_quoted(empty[0])} }}}}{{%- endif %}}",
        ]
    else:
        lines.append(f"{{{{- {_quoted(opens)} }}}}")
    return [*lines, f"{{{{- said + {_quoted(closes)} }}}}"]


def prompt_of(family: Family, messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the prompt by the facts alone, for messages without thoughts in them that end in a question."""

    def text(message: Mapping[str, Any]) -> str:
        # As Jinja's trim does.
        return str(message["content"]).strip() if family.strips else str(message["content"])

    said, first = family.begin, ""
    if messages[0]["role"] != "system":
        said += family.no_system
    for message in messages:
        if message["role"] == "user":
            said += family.user[0] + first + text(message) + family.user[1]
            first = ""
        elif message["role"] == "assistant":
            said += family.answer[0] + text(message) + family.answer[1]
        elif family.system == MERGED:
            first = text(message) + "\n\n"
        else:
            said += family.system[0] + text(message) + family.system[1]
    return said + family.asks


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
