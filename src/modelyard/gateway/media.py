"""Addresses and tensors that an engine would fetch or load for a message: found where vLLM looks, and refused (SSRF).

vLLM takes the parts of a message by their `type`, and where that is missing, or a `uuid` is there, by the names of
their keys (`chat_utils`, read in vLLM 0.32). What other keys say, such as a message's `avatar_url` or a text's
`source_url`, it never fetches: that is the client's own. Media inside the request (`data:`) pass.
"""

from __future__ import annotations

from typing import Any

from modelyard.errors import BadRequest

#: Types of parts whose media engines fetch, in OpenAI's and Anthropic's interfaces; of each any address is looked at.
FETCHED = frozenset(
    {
        "image_url", "audio_url", "video_url", "file_url", "image", "audio", "video", "document", "file",
        "input_image", "input_audio", "input_video", "input_file", "computer_screenshot",
    }
)  # fmt: skip
#: Keys by which vLLM fetches for a part without a type, or with a `uuid`.
FETCHED_KEYS = frozenset({"image_url", "audio_url", "video_url", "file_url"})
#: Keys under which parts lie within a message or a part.
INSIDE = frozenset({"content", "output"})
_PLAIN = frozenset({"role", "content", "name", "tool_call_id"})


def check_media(value: Any, where: str) -> None:
    """Walk through messages and their parts. A tool's arguments are left alone.

    Raises:
        BadRequest: an address that is no `data:` URL, or serialized tensors, where an engine would take them.
    """
    _walk(value, where, is_part=False)


def _walk(value: Any, where: str, *, is_part: bool) -> None:
    if isinstance(value, list):
        for number, item in enumerate(value):
            if isinstance(item, dict | list):
                _walk(item, f"{where}[{number}]", is_part=is_part)
    elif isinstance(value, dict):
        # Most messages: a text, and who says it.
        if type(value.get("content")) is str and value.keys() <= _PLAIN:
            return
        kind = value.get("type")
        is_media = isinstance(kind, str) and kind in FETCHED
        if isinstance(kind, str) and kind.endswith("_embeds"):
            raise _tensors(where, where)
        is_guessed = is_part and (not isinstance(kind, str) or value.get("uuid") is not None)
        for key, inner in value.items():
            if inner is None:
                continue
            if key in INSIDE:
                if not isinstance(inner, str):
                    _walk(inner, f"{where}.{key}", is_part=True)
            elif key.endswith("_embeds"):
                raise _tensors(f"{where}.{key}", where)
            elif (is_media and key.endswith("_url")) or (is_guessed and key in FETCHED_KEYS):
                _check_address(inner.get("url") if isinstance(inner, dict) else inner, f"{where}.{key}")
            elif is_media and isinstance(inner, dict) and key in ("source", "file"):
                _check_source(inner, f"{where}.{key}")


def _check_source(source: dict[str, Any], where: str) -> None:
    for key, inner in source.items():
        if key == "url" or key.endswith("_url"):
            _check_address(inner, where)
        elif key in INSIDE and not isinstance(inner, str):
            _walk(inner, f"{where}.{key}", is_part=True)


def _check_address(address: Any, where: str) -> None:
    if address is None:
        return
    if not isinstance(address, str) or address[:5].lower() != "data:":
        raise BadRequest(
            f"'{where}' must be a data: URL with the content in it. Engines fetch nothing from a network or a disk.",
            param=where,
        )


def _tensors(what: str, where: str) -> BadRequest:
    return BadRequest(f"'{what}' is not accepted: it holds serialized tensors.", param=where)
