"""What the gateway reads of a body, refuses in it, and changes in it."""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from typing import Any

import pytest

from modelyard.client_watch import ClientGone
from modelyard.errors import BadRequest, ContentTypeNotAllowed, InvalidJson, ModelyardError, TooLarge
from modelyard.gateway.envelope import REFUSED, Envelope, check_headers, parse, read_body, with_model

PNG = "data:image/png;base64,iVBORw0KGgo="


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b'{"model": "a"',
        b'{"model": "a"} more',
        b"[1]",
        b'"text"',
        b"null",
        b'{"a": NaN}',
        '{"model": "a"}'.encode("utf-16"),
        b'{"deep": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"messages": ' + b'{"content": [' * 700 + b"]}" * 700 + b"}",
    ],
)
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJson) as caught:
        parse(body)
    assert caught.value.status == 400
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("body", [b"", b" \r\n"])
def test_a_request_without_a_body_is_told_that_it_has_none(body: bytes) -> None:
    with pytest.raises(InvalidJson, match="The request has no body: send a JSON object"):
        parse(body)
    with pytest.raises(InvalidJson, match="not valid JSON: Input data was truncated"):
        parse(b'{"model": ')


@pytest.mark.parametrize("value", ["3", '["a"]'])
def test_a_model_that_is_no_text_is_refused(value: str) -> None:
    with pytest.raises(BadRequest, match="'model' has the wrong type") as caught:
        parse(f'{{"model": {value}}}'.encode())
    assert caught.value.param == "model"


def test_fields_that_the_gateway_does_not_know_are_left_to_the_engine() -> None:
    envelope = parse(b'{"model": "a", "stream": "yes", "top_k": "x", "tools": [{"chat_template": 1}], "stop": null}')
    assert envelope.model == "a"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"logprobs": 21}', "logprobs"),
        (b'{"logprobs": -1}', "logprobs"),
        (b'{"top_logprobs": 1000000, "logprobs": true}', "top_logprobs"),
        (b'{"prompt_logprobs": 20.5}', "prompt_logprobs"),
        (b'{"use_beam_search": true, "n": 11}', "n"),
    ],
)
def test_log_probabilities_have_vllms_bound_although_engines_are_started_without(body: bytes, param: str) -> None:
    with pytest.raises(BadRequest, match="at most") as caught:
        parse(body)
    assert caught.value.param == param
    for fine in (b'{"logprobs": 20}', b'{"logprobs": true, "top_logprobs": 20}', b'{"logprobs": "x"}', b'{"n": 11}',
                 b'{"use_beam_search": true, "n": 10, "prompt_logprobs": 0}'):  # fmt: skip
        parse(fine)


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_a_field_that_no_engine_should_see_is_refused_with_its_reason(field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(json.dumps({"model": "a", field: {"any": "thing"}}).encode())
    assert caught.value.param == field
    assert REFUSED[field] in caught.value.message


def test_every_refused_field_is_one_that_the_envelope_reads() -> None:
    assert set(REFUSED) <= set(Envelope.__struct_fields__)


def test_a_refused_field_is_seen_behind_escapes_and_behind_a_harmless_twin() -> None:
    with pytest.raises(BadRequest, match="chat_template"):
        parse(rb'{"chat\u005ftemplate": "{{ 1 }}"}')
    with pytest.raises(BadRequest, match="chat_template"):
        parse(b'{"chat_template": null, "chat_template": "{{ 1 }}"}')


def test_a_template_may_be_given_options_but_not_be_replaced() -> None:
    parse(b'{"chat_template_kwargs": {"enable_thinking": false}}')
    with pytest.raises(BadRequest, match=r"chat_template_kwargs\.chat_template"):
        parse(b'{"chat_template_kwargs": {"chat_template": "x"}}')


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
        {"type": "image_url", "image_url": "https://example.org/a.png"},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": {"url": " data:image/png;base64,AA"}},
        {"type": "image_url", "image_url": {"url": 3}},
        {"type": "video_url", "video_url": {"url": "http://a/b.mp4"}},
        {"type": "audio_url", "audio_url": {"url": "//a/b.mp3"}},
        {"type": "input_image", "image_url": "https://example.org/a.png"},
        {"type": "input_file", "file_url": "https://example.org/a.pdf"},
        {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}},
        {"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": "http://a/"}}]},
        {"type": "function_call_output", "output": [{"type": "input_image", "image_url": "http://a/"}]},
        {"type": "image_embeds", "image_embeds": "AAAA"},
    ],
)
@pytest.mark.parametrize("field", ["messages", "input"])
def test_media_by_address_and_tensors_are_refused_wherever_parts_may_stand(part: dict[str, Any], field: str) -> None:
    for value in ([{"role": "user", "content": [part]}], [[{"role": "user", "content": [part]}]], [part]):
        with pytest.raises(BadRequest, match=r"not accepted|must be a data: URL"):
            parse(json.dumps({field: value}).encode())


@pytest.mark.parametrize(
    "part",
    [
        {"image_url": "https://example.org/a.png"},
        {"type": None, "video_url": {"url": "https://example.org/a.mp4"}},
        {"type": "text", "text": "x", "uuid": "1", "image_url": "https://example.org/a.png"},
        {"type": "text", "text": "x", "uuid": "1", "audio_url": {"url": "file:///etc/passwd"}},
        {"type": "prompt_embeds", "data": "AAAA"},
        {"type": "audio_embeds"},
        {"type": "input_file", "file": {"file_url": "https://example.org/a.pdf"}},
        {"type": "file", "file": {"url": "https://example.org/a.pdf"}},
        {"type": "document", "source": {"type": "url", "url": "https://example.org/a.pdf"}},
        {"type": "computer_call_output", "output": {"type": "computer_screenshot", "image_url": "https://a.test/"}},
        {"role": "user", "image_url": "https://example.org/a.png"},
    ],
)
@pytest.mark.parametrize("field", ["messages", "input", "system", "previous_input_messages"])
def test_parts_are_looked_at_as_the_engine_looks_at_them(part: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest, match=r"not accepted|must be a data: URL"):
        parse(json.dumps({field: [{"role": "user", "content": [part]}]}).encode())


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "hi", "avatar_url": "https://example.org/a.png"},
        {"role": "user", "content": "hi", "image_url": "https://example.org/a.png"},
        {"role": "user", "content": [{"type": "text", "text": "hi", "source_url": "https://example.org/a"}]},
        {"role": "user", "content": [{"type": "text", "text": "hi", "image_url": "https://example.org/a"}]},
        {"role": "user", "content": [{"type": "text", "text": "hi", "source": {"url": "https://example.org/a"}}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "", "annotations": [
            {"type": "url_citation", "url": "https://example.org/a"}]}]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": "{}", "image_url": "http://a"}}]},
        {"type": "web_search_call", "action": {"url": "https://example.org"}, "callback_url": "https://example.org"},
    ],
)  # fmt: skip
def test_keys_that_no_engine_fetches_are_the_clients_own(message: dict[str, Any]) -> None:
    for field in ("messages", "input", "previous_input_messages"):
        parse(json.dumps({field: [message]}).encode())


@pytest.mark.parametrize(
    "name",
    [
        "kv_transfer_params", "ec_transfer_params", "lora_path", "lora_request", "chat_template", "logits_processors",
        "prompt_embeds", "any_embeds", "media_url", "model_path",
    ],
)  # fmt: skip
def test_names_within_vllms_own_arguments_are_looked_at_like_the_requests(name: str) -> None:
    parse(b'{"vllm_xargs": {"bad_words_penalty": 1, "note": "https://example.org"}}')
    parse(b'{"vllm_xargs": null}')
    with pytest.raises(BadRequest, match="vllm_xargs") as caught:
        parse(json.dumps({"vllm_xargs": {name: "x"}}).encode())
    assert caught.value.param == "vllm_xargs"


def test_media_inside_the_request_and_addresses_in_text_and_arguments_pass() -> None:
    content = [
        {"type": "text", "text": "see https://example.org"},
        {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "DATA:image/png;base64,AA"}},
        {"type": "image_url", "image_url": None, "uuid": "cached"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}},
        {
            "type": "tool_use",
            "id": "1",
            "name": "fetch",
            "input": {"url": "https://example.org", "image_url": "http://a"},
        },
    ]
    parse(json.dumps({"messages": [{"role": "user", "content": content}, {"role": "user", "content": None}]}).encode())
    parse(b'{"input": [1, 2, 3]}')
    parse(b'{"input": [[1, 2], [3]]}')


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"alias","n":1}',
        b'\n {\t"n" : 1 ,\r\n "model" : "alias" } \n',
        rb'{"mod\u0065l": "ali\u0061s", "n": 1}',
        b'{"model": "first", "n": 1, "model": "alias"}',
        b'{"n": 1}',
        b'{"model": null, "n": 1}',
    ],
)
def test_the_model_is_renamed_however_it_is_written(body: bytes) -> None:
    renamed = with_model(body, 'acme/"tiny"')
    assert json.loads(renamed) == {"model": 'acme/"tiny"', "n": 1}
    assert renamed.count(b'"model"') == 1


def test_renaming_the_model_keeps_the_bytes_of_every_other_value() -> None:
    values = [
        rb'"caf\u00e9 \ud83d\ude00 \/ \\\" \n"',
        "\"café 😀 'model': 'alias'\"".encode(),
        b'{ "model" : "nested",  "deep": [ { "model":"alias" } ] }',
        b"1.50",
        b"1e400",
        b"-0",
        b"123456789012345678901234567890",
        b'"}, \\"model\\": \\"x\\", {"',
        b"[ ]",
        b"null",
    ]
    body = b"{" + b",".join(b'"v%d": %b' % (i, value) for i, value in enumerate(values)) + b', "model" : "alias"}'
    parse(body)
    renamed = with_model(body, "acme/tiny")
    for value in values:
        assert value in renamed
    before, after = json.loads(body), json.loads(renamed)
    assert after.pop("model") == "acme/tiny"
    assert before.pop("model") == "alias"
    assert after == before
    assert list(after) == list(before)


def test_headers_alone_refuse_another_type_and_an_announced_size() -> None:
    check_headers(None, None, 100)
    check_headers(b"Application/JSON; charset=utf-8", b"100", 100)
    for kind in (b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x"):
        with pytest.raises(ContentTypeNotAllowed, match="Content-Type: application/json"):
            check_headers(kind, b"1", 100)
    with pytest.raises(TooLarge, match="MODELYARD_MAX_BODY_MIB"):
        check_headers(None, b"101", 100)


async def test_a_body_too_large_is_refused_before_all_of_it_was_read() -> None:
    taken = 0

    async def receive() -> MutableMapping[str, Any]:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": b"x" * 60, "more_body": True}

    with pytest.raises(ModelyardError) as caught:
        await read_body(receive, 100)
    assert caught.value.status == 413
    assert taken == 2


async def test_a_body_is_put_together_and_a_client_that_leaves_within_it_is_noticed() -> None:
    messages: list[MutableMapping[str, Any]] = [
        {"type": "http.request", "body": b"ab", "more_body": True},
        {"type": "http.request", "body": b"", "more_body": True},
        {"type": "http.request", "body": b"c", "more_body": False},
        {"type": "http.request", "body": b"d", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> MutableMapping[str, Any]:
        return messages.pop(0)

    assert await read_body(receive, 3) == b"abc"
    with pytest.raises(ClientGone):
        await read_body(receive, 3)
