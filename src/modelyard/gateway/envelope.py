"""The envelope of a request: its body up to a limit, and in it the fields that decide where it goes.

It promises that what goes on to an engine is a JSON object in which no field names a file, a template, a tensor or
an address to fetch. All else is the engine's to judge: values are neither checked nor changed here, and the bytes
that arrived are the bytes that leave, but for `model` where an alias was asked for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from operator import attrgetter
from typing import Any

import msgspec

from modelyard.bodies import as_utf8, decompressor, refuse_half_characters
from modelyard.client_watch import ClientGone
from modelyard.errors import BadRequest, ContentTypeNotAllowed, InvalidJson, TooLarge
from modelyard.gateway.media import check_media

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

#: Fields that no engine sees, and why. A null is as good as none.
REFUSED = {
    "chat_template": "a template is a program; the model's own is used",
    "lora_path": "adapters are put into service by deploying them, and then named as the model",
    "lora_request": "adapters are put into service by deploying them, and then named as the model",
    "prompt_embeds": "it holds serialized tensors; send the prompt as text or as token ids",
    "logits_processors": "it names code",
    "mm_processor_kwargs": "it reaches into how the model's files are loaded",
    "media_io_kwargs": "it reaches into how media are read",
    "logprob_token_ids": "vLLM 0.32 then takes the log probabilities of other requests in the same step from them, too",
    "kv_transfer_params": "it names other machines",
    "ec_transfer_params": "it names other machines",
}
#: How many of the likeliest tokens a request may see at each place; vLLM's own bound, which is off for beam searches.
MOST_LOGPROBS = 20
LOGPROBS = ("logprobs", "top_logprobs", "prompt_logprobs")
#: Names within `vllm_xargs`, which vLLM's plugins and connectors read as they read the request's own.
REFUSED_ENDS = ("_transfer_params", "_embeds", "_url", "_path")
#: Fields whose parts may hold media.
CONVERSATIONS = ("messages", "input", "system", "previous_input_messages")
TOO_DEEP = "The body is nested too deeply."
NO_BODY = "The request has no body: send a JSON object, with the header Content-Type: application/json."


ABSENT = msgspec.Raw(b"null")


class Envelope(msgspec.Struct):
    """The fields of a request that the gateway looks at; the rest is skipped without being built."""

    model: str | None = None
    messages: Any = None
    input: Any = None
    system: Any = None
    previous_input_messages: Any = None
    vllm_xargs: Any = None
    chat_template_kwargs: Any = None
    chat_template: Any = None
    lora_path: Any = None
    lora_request: Any = None
    prompt_embeds: Any = None
    logits_processors: Any = None
    logprob_token_ids: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    prompt_logprobs: Any = None
    use_beam_search: Any = None
    n: Any = None
    mm_processor_kwargs: Any = None
    media_io_kwargs: Any = None
    kv_transfer_params: Any = None
    ec_transfer_params: Any = None
    # What `limits` looks at, mostly as it came: it is taken apart only where it is long enough to matter.
    best_of: Any = None
    prompt: msgspec.Raw = ABSENT
    tokens: msgspec.Raw = ABSENT
    stop: msgspec.Raw = ABSENT
    stop_sequences: msgspec.Raw = ABSENT
    bad_words: msgspec.Raw = ABSENT
    stop_token_ids: msgspec.Raw = ABSENT
    allowed_token_ids: msgspec.Raw = ABSENT
    logit_bias: msgspec.Raw = ABSENT
    tools: msgspec.Raw = ABSENT
    functions: msgspec.Raw = ABSENT
    response_format: msgspec.Raw = ABSENT
    structured_outputs: msgspec.Raw = ABSENT
    text: msgspec.Raw = ABSENT
    output_config: msgspec.Raw = ABSENT
    output_format: msgspec.Raw = ABSENT
    guided_json: msgspec.Raw = ABSENT
    guided_regex: msgspec.Raw = ABSENT
    guided_grammar: msgspec.Raw = ABSENT
    guided_choice: msgspec.Raw = ABSENT

    def raw(self, name: str) -> bytes:
        """Return a field as it came; nothing for one that is null or not there."""
        found = getattr(self, name)
        if found is ABSENT:
            return b""
        data = bytes(found)
        return b"" if data == b"null" else data


_decoder = msgspec.json.Decoder(Envelope)
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
# One call for all of them: nearly every request has none.
_refused = attrgetter(*REFUSED)
_log_probabilities = attrgetter(*LOGPROBS, "use_beam_search")
_NOTHING_REFUSED, _NO_LOG_PROBABILITIES = _refused(Envelope()), _log_probabilities(Envelope())


def check_headers(content_type: bytes | None, content_length: bytes | None, limit_bytes: int) -> None:
    """Refuse by its headers what need not be read.

    Raises:
        ContentTypeNotAllowed: the body says that it is something else than JSON. A browser sends other types to other
            sites without asking them first, so they are refused even where their content would do.
        TooLarge: it announces more than `limit_bytes`.
    """
    check_type(content_type)
    check_length(content_length, limit_bytes)


def check_type(content_type: bytes | None) -> None:
    """Refuse a body that says that it is something else than JSON.

    Raises:
        ContentTypeNotAllowed: it does.
    """
    if content_type and content_type.partition(b";")[0].strip().lower() != b"application/json":
        kind = content_type[:100].decode("latin-1")
        raise ContentTypeNotAllowed(
            f"The body has the type {kind}; send JSON with the header Content-Type: application/json."
        )


def check_length(content_length: bytes | None, limit_bytes: int) -> None:
    """Refuse a body that is announced to be too large.

    Raises:
        TooLarge: it announces more than `limit_bytes`.
    """
    if content_length is not None and content_length.isdigit() and int(content_length) > limit_bytes:
        raise _too_large(limit_bytes)


async def read_body(receive: Receive, limit_bytes: int, content_encoding: bytes | None = None) -> bytes:
    """Read a request's body: unpacked, and as UTF-8 without a byte order mark.

    Raises:
        TooLarge: as soon as more than `limit_bytes` have come or were unpacked, without waiting for the rest.
        EncodingNotAllowed: it is packed in a way that is not known here.
        InvalidJson: it is not packed as it says, or begins like UTF-16 and is not.
        ClientGone: the client left before its end.
    """
    packed = decompressor(content_encoding) if content_encoding is not None else None
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGone
        if part := message.get("body"):
            if packed is not None:
                part = await packed.feed(part, limit_bytes - size)
            size += len(part)
            if size > limit_bytes:
                raise _too_large(limit_bytes)
            parts.append(part)
        if not message.get("more_body"):
            if packed is not None:
                packed.finish()
            return as_utf8(parts[0] if len(parts) == 1 else b"".join(parts))


def _too_large(limit_bytes: int) -> TooLarge:
    return TooLarge(
        f"The body is larger than {limit_bytes >> 20} MiB. MODELYARD_MAX_BODY_MIB sets the limit of this server."
    )


def parse(body: bytes) -> Envelope:
    """Read the envelope of a body and refuse what no engine should see.

    Raises:
        InvalidJson: nothing at all, not JSON, or not an object.
        BadRequest: `model` is no text, or a field or a media address that is refused.
    """
    refuse_half_characters(body)
    try:
        envelope = _decoder.decode(body)
        _refuse_fields(envelope)
        _check_logprobs(envelope)
        for name in CONVERSATIONS:
            value = getattr(envelope, name)
            if isinstance(value, dict | list):
                check_media(value, name)
    except msgspec.ValidationError as error:
        reason, _, where = str(error).partition(" - at `$.")
        if not where:
            raise InvalidJson(f"The body must be a JSON object. {reason}.") from None
        param = where.rstrip("`")
        raise BadRequest(f"'{param}' has the wrong type. {reason}.", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if not body.strip():
            raise InvalidJson(NO_BODY) from None
        raise InvalidJson(f"The body is not valid JSON: {error}.") from None
    except RecursionError:
        raise InvalidJson(TOO_DEEP) from None
    return envelope


def with_model(body: bytes, name: str) -> bytes:
    """Return the body with its top-level `model` set to `name`; every other value keeps its very bytes.

    Of a key that occurs twice the last counts, as for the engine. `body` must have passed `parse`.
    """
    fields = _fields_decoder.decode(body)
    fields["model"] = msgspec.Raw(msgspec.json.encode(name))
    return msgspec.json.encode(fields)


def _refuse_fields(envelope: Envelope) -> None:
    if (values := _refused(envelope)) != _NOTHING_REFUSED:
        for (field, reason), value in zip(REFUSED.items(), values, strict=True):
            if value is not None:
                raise BadRequest(f"The field '{field}' is not accepted: {reason}.", param=field)
    options = envelope.chat_template_kwargs
    if isinstance(options, dict) and "chat_template" in options:
        raise BadRequest(
            f"The field 'chat_template_kwargs.chat_template' is not accepted: {REFUSED['chat_template']}.",
            param="chat_template_kwargs",
        )
    extra = envelope.vllm_xargs
    for name in extra if isinstance(extra, dict) else ():
        if name in REFUSED or name.startswith("lora_") or name.endswith(REFUSED_ENDS):
            reason = REFUSED.get(name, "engines fetch and load nothing that a request names")
            raise BadRequest(f"The field 'vllm_xargs.{name[:200]}' is not accepted: {reason}.", param="vllm_xargs")


def _check_logprobs(envelope: Envelope) -> None:
    """Hold requests to vLLM's bound: of a whole vocabulary, a step of one would keep all others waiting."""
    if _log_probabilities(envelope) == _NO_LOG_PROBABILITIES:
        return
    asked = {name: getattr(envelope, name) for name in LOGPROBS}
    if envelope.use_beam_search and isinstance(envelope.n, int):
        asked["n"] = 2 * envelope.n  # so many are looked at in each step
    for name, count in asked.items():
        if isinstance(count, int | float) and not 0 <= count <= MOST_LOGPROBS:
            most = f"{MOST_LOGPROBS // 2} with use_beam_search" if name == "n" else str(MOST_LOGPROBS)
            raise BadRequest(f"'{name}' must be at least 0 and at most {most}.", param=name)
