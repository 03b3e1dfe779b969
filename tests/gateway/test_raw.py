"""Raw prompts over real sockets: what is answered, how it goes on, what is refused, what a broken engine leaves."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelyard.gateway.raw_beams import PROMPTS_AT_ONCE
from tests.gateway.conftest import EngineChild, Target, wait_until
from tests.gateway.lane import BATCH, CATS, DOGS, GREEDY, ONE, Lane, lane

END = "</s>"
PLAIN = "text/plain; charset=utf-8"
SMILE = CATS.index("🙂")
#: Tokens of CATS that end inside its two characters of several bytes.
TORN = [len(CATS[: CATS.index("ï")].encode()) + 1, *(len(CATS[:SMILE].encode()) + part for part in (1, 2, 3))]


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Lane]:
    with lane(tmp_path) as found:
        yield found


def completions(engine: EngineChild) -> list[dict[str, Any]]:
    """What the engine was asked to generate."""
    return [json.loads(one["body"]) for one in engine.record("request") if one["path"] == "/v1/completions"]


def counted(yard: Lane, status: str) -> float:
    labels = {"endpoint": "generate-one", "model": "acme/tiny", "status": status}
    return yard.running.sample("modelyard_gateway_requests_total", **labels)


def limited(tokens: int, **more: Any) -> dict[str, Any]:
    return {"generation_config": {**GREEDY, "max_new_tokens": tokens}, **more}


def test_a_text_is_streamed_as_it_is_generated(yard: Lane) -> None:
    yard.engine(chunk_ms=60_000)
    with yard.opened(ONE, json.dumps({"request_id": "a", "prompt": "cats?"}).encode()) as response:
        assert (response.status, response.headers["content-type"]) == (200, PLAIN)
        assert response.headers["transfer-encoding"] == "chunked"
        assert response.read1(65536).decode() == CATS[0], "the second token is a minute away"


def test_a_text_ends_with_the_models_ending_token(yard: Lane) -> None:
    yard.engine()
    assert yard.text() == CATS + END
    wait_until(lambda: counted(yard, "200") == 1, "the request is counted")
    assert yard.running.board.open_requests == 0


@pytest.mark.parametrize("streams", [True, False])
def test_a_full_sequence_begins_with_the_prompt_and_its_special_tokens(yard: Lane, streams: bool) -> None:
    yard.engine()
    said = yard.text(prompt="[INST] cats? [/INST]", only_new_tokens=False, stream_response=streams)
    assert said == "<s>[INST] cats? [/INST]" + CATS + END


def test_an_answer_that_is_not_streamed_is_one_whole_text(yard: Lane) -> None:
    engine = yard.engine()
    answer = yard.one(stream_response=False)
    assert (answer.status, answer.headers["content-type"], answer.text) == (200, PLAIN, CATS + END)
    assert answer.headers["content-length"] == str(len(answer.body))
    assert completions(engine)[-1]["stream"] is False


@pytest.mark.parametrize("odd", [0, "no", None, []])
def test_a_flag_that_is_no_boolean_counts_as_true(yard: Lane, odd: Any) -> None:
    engine = yard.engine()
    assert yard.text(only_new_tokens=odd, stream_response=odd) == CATS + END
    assert completions(engine)[-1]["stream"] is True


def test_a_text_that_stops_at_its_length_has_no_ending_token_and_goes_on_under_its_id(yard: Lane) -> None:
    engine = yard.engine()
    assert yard.text(**limited(5)) == CATS[:5]
    assert yard.text(prompt=None, **limited(5)) == CATS[5:10]
    assert yard.text(prompt="dogs? this is ignored", **limited(500)) == CATS[10:] + END
    assert completions(engine)[-1]["prompt"][0] == [256, *b"cats?", *CATS[:10].encode()], "the very tokens"
    assert yard.text(prompt="dogs?", **limited(5)) == DOGS[:5], "what ended is not kept: the id begins anew"


@pytest.mark.parametrize("seed", range(4))
def test_a_text_in_pieces_of_any_length_is_the_text_of_one_long_run(yard: Lane, seed: int) -> None:
    yard.engine()
    chance = random.Random(seed)
    pieces: list[str] = []
    while not "".join(pieces).endswith(END):
        more = limited(chance.randint(1, 6), stream_response=chance.random() < 0.5)
        pieces.append(yard.text(prompt=None if pieces else "cats?", **more))
        assert "\N{REPLACEMENT CHARACTER}" not in pieces[-1]
    assert "".join(pieces) == CATS + END


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("tokens", TORN)
def test_a_text_that_stops_inside_a_character_leaves_it_to_its_continuation(
    yard: Lane, tokens: int, streams: bool
) -> None:
    yard.engine()
    first = yard.text(**limited(tokens))
    assert CATS.startswith(first)
    shown = yard.text(prompt=None, **limited(1), only_new_tokens=False, stream_response=streams)
    assert ("<s>cats?" + CATS).startswith(shown)
    rest = yard.text(prompt=None, **limited(500), stream_response=streams)
    assert shown + rest == "<s>cats?" + CATS + END


@pytest.mark.parametrize("beams", [1, 3])
def test_a_prompt_that_ends_with_a_replacement_character_is_not_repeated_in_the_answer(yard: Lane, beams: int) -> None:
    yard.engine()
    config = {**GREEDY, "num_beams": beams}
    assert yard.text(prompt="cats \N{REPLACEMENT CHARACTER}", generation_config=config) == CATS + END
    answer = yard.batch(("x", "cats \N{REPLACEMENT CHARACTER}"), ("y", "dogs?"), generation_config=config)
    assert [one["response"] for one in answer.json()] == [CATS + END, DOGS + END]


def test_how_a_text_was_generated_is_kept_with_it_unless_the_request_says_how(yard: Lane) -> None:
    engine = yard.engine()
    config = {"temperature": 0.25, "top_k": 7, "top_p": 0.5, "repetition_penalty": 1.5, "max_new_tokens": 3}
    yard.text(generation_config=config)
    yard.post(ONE, {"request_id": "a"})
    yard.post(ONE, {"request_id": "a", "generation_config": {"top_k": 9, "max_new_tokens": 2}})
    yard.post(ONE, {"request_id": "a"})
    asked = [(one["temperature"], one["top_k"], one["top_p"], one["repetition_penalty"], one["max_tokens"])
             for one in completions(engine)]  # fmt: skip
    assert asked == [(0.25, 7, 0.5, 1.5, 3)] * 2 + [(1.0, 9, 1.0, 1.0, 2)] * 2, "it is replaced whole"


def test_what_a_request_leaves_out_comes_from_the_settings(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "generate_temperature": 0.5, "generate_top_p": 0.75, "generate_top_k": -1, "generate_max_new_tokens": 4,
        "generate_repetition_penalty": 1.25, "generate_seed": 7,
    }  # fmt: skip
    with lane(tmp_path, **values) as yard:
        engine = yard.engine()
        assert yard.post(ONE, {"request_id": "a", "prompt": "cats?"}).text == CATS[:4]
        assert yard.post(ONE, {"request_id": "a"}).text == CATS[4:8]
        assert yard.text("b", generation_config={"do_sample": False, "max_new_tokens": 2}) == CATS[:2]
        first, second, greedy = completions(engine)
        assert {name: first[name] for name in ("temperature", "top_p", "top_k", "max_tokens", "seed")} == {
            "temperature": 0.5, "top_p": 0.75, "top_k": 0, "max_tokens": 4, "seed": 7,
        }  # fmt: skip
        assert first["repetition_penalty"] == 1.25
        assert second["seed"] == 7 + 4, "a text that goes on does not draw the same chances again"
        assert greedy["temperature"] == 0


def test_without_a_seed_in_the_settings_every_drawing_is_new(yard: Lane) -> None:
    engine = yard.engine()
    yard.text()
    assert "seed" not in completions(engine)[-1]


@pytest.mark.parametrize("streams", [True, False])
def test_beams_are_searched_whole_and_their_text_is_that_of_all_tokens(yard: Lane, streams: bool) -> None:
    engine = yard.engine()
    config = {**GREEDY, "num_beams": 4, "length_penalty": 1.5}
    answer = yard.one(generation_config=config, stream_response=streams)
    assert (answer.status, answer.text) == (200, CATS + END), "with its first space and its ending token"
    assert "content-length" in answer.headers, "beams are not streamed"
    first, second = completions(engine)[:2]
    assert (first["logprobs"], first["max_tokens"], len(first["prompt"])) == (8, 1, 1)
    assert first["prompt"][0] == [256, *b"cats?"]
    assert len(second["prompt"]) == 4, "one request for all beams"
    full = yard.text("b", generation_config=config, only_new_tokens=False)
    assert full == "<s>cats?" + CATS + END


def test_a_beam_search_that_stopped_goes_on(yard: Lane) -> None:
    yard.engine()
    pieces = [yard.text(generation_config={**GREEDY, "num_beams": 2, "max_new_tokens": TORN[-1]})]
    while not pieces[-1].endswith(END):
        pieces.append(yard.post(ONE, {"request_id": "a"}).text)
    assert "".join(pieces) == CATS + END


def test_a_batch_is_one_request_to_the_engine_and_is_answered_in_its_order(yard: Lane) -> None:
    engine = yard.engine()
    answer = yard.batch(("x", "dogs?"), ("y", "cats?"), ("z", ""))
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == [
        {"request_id": "x", "response": DOGS + END},
        {"request_id": "y", "response": CATS + END},
        {"request_id": "z", "response": CATS + END},
    ]
    [asked] = completions(engine)
    assert asked["prompt"] == ["dogs?", "cats?", ""]


def test_a_batch_in_full_shows_each_prompt_with_its_special_tokens(yard: Lane) -> None:
    yard.engine()
    answer = yard.batch(("x", "dogs?"), ("z", ""), only_new_tokens=False)
    assert answer.json() == [
        {"request_id": "x", "prompt": "<s>dogs?", "response": DOGS + END},
        {"request_id": "z", "prompt": "<s>", "response": CATS + END},
    ]


def test_a_batch_in_which_a_text_stopped_is_206_and_only_that_text_goes_on(yard: Lane) -> None:
    engine = yard.engine()
    length = len(DOGS.encode()) + 1
    first = yard.batch(("x", "cats?"), ("y", "dogs?"), **limited(length))
    assert first.status == 206
    said = {one["request_id"]: one["response"] for one in first.json()}
    assert said["y"] == DOGS + END
    assert CATS.startswith(said["x"])
    swapped = yard.batch(("y", None), ("x", None))
    assert (swapped.status, "prompt" in swapped.text) == (400, True), "another order is another key"
    second = yard.batch(("x", None), ("y", None), **limited(500))
    assert second.status == 200
    assert [one["response"] for one in second.json()] == [CATS.removeprefix(said["x"]) + END, ""]
    assert len(completions(engine)[-1]["prompt"]) == 1
    assert yard.batch(("x", None), ("y", None)).status == 400, "all have ended: nothing is kept"


def test_a_batch_that_goes_on_shows_everything_so_far_where_it_is_asked_for_in_full(yard: Lane) -> None:
    yard.engine()
    asked = (("x", "cats?"), ("y", "dogs?"))
    yard.batch(*asked, **limited(TORN[2]))
    second = yard.batch(*asked, **limited(500), only_new_tokens=False)
    assert second.json() == [
        {"request_id": "x", "prompt": "<s>cats?", "response": CATS + END},
        {"request_id": "y", "prompt": "<s>dogs?", "response": DOGS + END},
    ]


def test_a_batch_takes_beams(yard: Lane) -> None:
    engine = yard.engine()
    answer = yard.batch(("x", "cats?"), ("y", "dogs?"), generation_config={**GREEDY, "num_beams": 3})
    assert [one["response"] for one in answer.json()] == [CATS + END, DOGS + END]
    assert answer.status == 200
    asked = completions(engine)
    assert [len(one["prompt"]) for one in asked[:3]] == [2, 6, 6], "a step of all beams of all texts is one request"


def test_a_batch_may_have_more_prompts_than_the_engine_takes_at_once(yard: Lane) -> None:
    engine = yard.engine()
    count = PROMPTS_AT_ONCE + 1
    answer = yard.batch(*((f"n{number}", "dogs?" if number % 2 else "cats?") for number in range(count)), **limited(3))
    assert answer.status == 206
    assert [one["response"] for one in answer.json()] == [(CATS, DOGS)[number % 2][:3] for number in range(count)]
    assert sorted(len(one["prompt"]) for one in completions(engine)) == [1, PROMPTS_AT_ONCE]


BAD_DATA = [
    b"[]", b"{}", b'"text"', b'{"prompt": "x"}', b'{"request_id": "", "prompt": "x"}',
    b'{"request_id": 5, "prompt": "x"}', b'{"request_id": "a", "prompt": ""}', b'{"request_id": "a", "prompt": 5}',
    b'{"request_id": "a", "prompt": "x", "generation_config": []}',
    b'{"request_id": "a", "prompt": "x", "generation_config": {"num_beams": 1.5}}',
    b'{"request_id": "a", "prompt": "x", "generation_config": {"top_k": true}}',
    b'{"request_id": "a", "prompt": "x", "generation_config": {"max_new_tokens": "9"}}',
    b'{"request_id": "a", "prompt": "x", "generation_config": {"do_sample": 1}}',
    b'{"request_id": "a", "prompt": "x", "generation_config": {"temperature": "1"}}',
    b'{"request_id": "a", "prompt": "x", "generation_config": {"length_penalty": null}}',
    b'{"request_id": "a", "prompt": "x", "model": 5}',
]  # fmt: skip


@pytest.mark.parametrize("body", BAD_DATA, ids=bytes.decode)
def test_what_has_a_wrong_type_or_is_missing_is_invalid_data(yard: Lane, body: bytes) -> None:
    answer = yard.post(ONE, body)
    assert (answer.status, answer.headers["content-type"], answer.text) == (400, PLAIN, "Invalid Data Format")


@pytest.mark.parametrize("path", [ONE, BATCH])
@pytest.mark.parametrize("body", [b"", b"{", b"nonsense", b'{"a": "\xff"}', b"[" * 100_000])
def test_what_is_not_json_is_said_so(yard: Lane, path: str, body: bytes) -> None:
    answer = yard.post(path, body)
    assert (answer.status, answer.headers["content-type"], answer.text) == (400, PLAIN, "Invalid JSON format")


@pytest.mark.parametrize(
    "prompts",
    [None, [], {}, "x", [5], [{"prompt": "x"}], [{"request_id": "a", "prompt": 5}], [{"request_id": "", "prompt": ""}]],
    ids=json.dumps,
)
def test_a_batch_without_well_formed_prompts_is_invalid_data(yard: Lane, prompts: Any) -> None:
    answer = yard.post(BATCH, {"prompts": prompts})
    assert (answer.status, answer.text) == (400, "Invalid Data Format")


def test_a_batch_with_an_id_twice_is_refused(yard: Lane) -> None:
    assert yard.batch(("x", "a"), ("x", "b")).text == "Duplicate request_ids"


def test_unknown_keys_are_ignored_and_whole_numbers_do_as_floats(yard: Lane) -> None:
    yard.engine()
    config = {"temperature": 1, "top_p": 1, "repetition_penalty": 1, "length_penalty": 2, "typical_p": "what?"}
    assert yard.text(generation_config=config, colour="green") == CATS + END


@pytest.mark.parametrize(
    ("name", "value", "range_"),
    [
        ("num_beams", 0, "at least 1 and at most 32"),
        ("num_beams", 33, "at least 1 and at most 32"),
        ("temperature", -0.1, "at least 0 and at most 2"),
        ("temperature", 2.5, "at least 0 and at most 2"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_k", -2, "at least -1"),
        ("max_new_tokens", 0, "at least 1"),
        ("max_new_tokens", 4096, "at least 1 and at most 2048"),
        ("repetition_penalty", 0, "at least 0.01 and at most 100"),
        ("length_penalty", 99, "at least -10 and at most 10"),
        ("top_k", 10**30, "at least -1 and at most 1000000000"),
    ],
)
def test_a_value_out_of_its_range_is_an_error_that_names_the_field_and_the_range(
    yard: Lane, name: str, value: float, range_: str
) -> None:
    yard.engine()
    for answer in (yard.one(generation_config={name: value}), yard.batch(("x", "y"), generation_config={name: value})):
        assert (answer.status, answer.headers["content-type"]) == (400, PLAIN)
        assert f"generation_config.{name} must be {range_}" in answer.text
        assert f"it is {value}" in answer.text


@pytest.mark.parametrize(
    "config",
    [
        {"do_sample": False, "temperature": 0.5, "top_p": 0.9, "top_k": 3},
        {"do_sample": False, "repetition_penalty": 1.01},
        {"do_sample": False, "repetition_penalty": 0.99},
        {"do_sample": True, "temperature": 0},
        {"do_sample": False, "num_beams": 32, "repetition_penalty": 0.05},
        {"do_sample": False, "temperature": 25.0, "top_p": 7.0, "repetition_penalty": 1.000001},
        {"do_sample": True, "temperature": 0.05, "top_p": 0},
        {"do_sample": True, "temperature": 0.1, "top_k": 2},
        {"do_sample": True, "temperature": 0.1, "top_k": 0, "top_p": 0.9},
        {"do_sample": True, "top_k": 50, "top_p": 0.5, "repetition_penalty": 1.01},
    ],
    ids=str,
)
def test_a_beam_search_heeds_every_field(yard: Lane, config: dict[str, Any]) -> None:
    engine = yard.engine()
    answer = yard.one(generation_config={"num_beams": 2, "max_new_tokens": 12, **config})
    assert (answer.status, answer.text) == (200, CATS[:12])
    asked = completions(engine)
    assert {(one["temperature"], one["repetition_penalty"]) for one in asked} == {(0, 1)}, "they are the search's"
    assert all(one["logprobs"] < 258 for one in asked), "an engine refuses to tell more tokens than there are"
    if config.get("top_k") == 0:
        assert {one["logprobs"] for one in asked} == {-1}, "any of its few tokens may be drawn"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", {"eos_token_id": [7, 257]}),
        ("tokenizer_config.json", {"eos_token": "</s>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "</s>"}}),
    ],
)
def test_beams_end_at_the_tokens_that_the_models_files_name(
    yard: Lane, tmp_path: Path, name: str, content: dict[str, Any]
) -> None:
    yard.engine()
    (tmp_path / "config.json").write_text("{}", "utf-8")
    (tmp_path / name).write_text(json.dumps(content), "utf-8")
    assert yard.text(generation_config={**GREEDY, "num_beams": 2}) == CATS + END


def test_texts_are_bounded_each_beam_being_one(tmp_path: Path) -> None:
    with lane(tmp_path, request_max_prompts=7) as yard:
        engine = yard.engine()
        asked = [(str(number), "cats?") for number in range(8)]
        few = {**GREEDY, "max_new_tokens": 2}
        for count, beams in ((8, 1), (3, 3), (1, 8)):
            answer = yard.batch(*asked[:count], generation_config={**few, "num_beams": beams})
            assert (answer.status, "7 texts are allowed" in answer.text) == (400, True)
            assert "MODELYARD_REQUEST_MAX_PROMPTS" in answer.text
        assert not completions(engine)
        assert yard.batch(*asked[:7], generation_config=few).status == 206
        assert yard.batch(*asked[:3], generation_config={**few, "num_beams": 2}).status == 206


def test_beams_draw_the_same_with_the_same_seed(tmp_path: Path) -> None:
    config = {"num_beams": 3, "temperature": 2, "top_k": 0, "max_new_tokens": 6}
    with lane(tmp_path, generate_seed=3) as yard:
        yard.engine()
        texts = [yard.text(name, generation_config=config) for name in "abc"]
    assert len(set(texts)) == 1
    with lane(tmp_path) as yard:
        yard.engine()
        assert len({yard.text(name, generation_config=config) for name in "abcdef"}) > 1


def test_an_engine_without_numbers_is_a_502_and_not_a_traceback(yard: Lane) -> None:
    yard.engine(no_logprobs=True)
    answer = yard.one(generation_config={**GREEDY, "num_beams": 2})
    assert (answer.status, "gave no log probabilities" in answer.text) == (502, True)


def test_a_default_length_beyond_the_models_is_lowered_to_it(tmp_path: Path) -> None:
    with lane(tmp_path, generate_max_new_tokens=100_000) as yard:
        engine = yard.engine()
        assert yard.text(generation_config={}) == CATS + END
        assert completions(engine)[-1]["max_tokens"] == 2048


@pytest.mark.parametrize("only_new", [True, False])
def test_a_prompt_that_leaves_no_room_is_named_with_the_numbers(yard: Lane, only_new: bool) -> None:
    yard.engine()
    for answer, name in (
        (yard.one(prompt="x" * 2047, only_new_tokens=only_new), "prompt"),
        (yard.one(prompt="x" * 3000, only_new_tokens=only_new), "prompt"),
        (yard.batch(("x", "fine"), ("y", "x" * 2047), only_new_tokens=only_new), "prompts[1].prompt"),
    ):
        assert answer.status == 400
        assert answer.text.startswith(f"{name} has {3001 if '3001' in answer.text else 2048} tokens"), answer.text
        assert "2048" in answer.text
    assert yard.text(prompt="x" * 2046, only_new_tokens=True) == CATS[:1], "one token fits"


def test_a_text_as_long_as_the_model_takes_cannot_go_on(yard: Lane) -> None:
    yard.engine()
    assert yard.text(prompt="x" * 2046) == CATS[:1]
    answer = yard.one(prompt=None)
    assert (answer.status, "2048 tokens" in answer.text) == (400, True), answer.text
    both = yard.batch(("y", "x" * 2046), ("z", "dogs?"), **limited(5))
    assert both.status == 206
    again = yard.batch(("y", None), ("z", None), **limited(5))
    assert [one["response"] for one in again.json()] == ["", DOGS[5:10]], "the other one still can"


def test_a_text_without_a_prompt_needs_something_to_go_on_with(yard: Lane) -> None:
    yard.engine()
    for answer in (yard.one(prompt=None), yard.batch(("x", "y"), ("z", None))):
        assert (answer.status, "send the prompt" in answer.text) == (400, True)


def test_a_model_may_be_named_and_a_continuation_stays_with_it(yard: Lane) -> None:
    yard.engine()
    yard.running.engine("acme/other", "poet", misbehave={"recites": {"": DOGS}})
    assert yard.text(model="poet", **limited(3)) == DOGS[:3]
    assert yard.text(prompt=None, **limited(3)) == DOGS[3:6], "without naming it again"
    assert yard.one("b", model="no/such").status == 404
    # Another model's tokens are nothing to it: it begins anew.
    assert yard.text(prompt="cats?", model="acme/tiny", **limited(3)) == CATS[:3]


def test_a_kept_text_whose_model_left_begins_anew_on_the_current_one(yard: Lane) -> None:
    yard.engine()
    yard.running.engine("acme/other", "poet", misbehave={"recites": {"": DOGS}})
    assert yard.text(model="poet", **limited(3)) == DOGS[:3]
    yard.running.board.targets.pop("poet")
    assert yard.text(prompt="cats?", **limited(3)) == CATS[:3]
    assert yard.text(prompt=None, **limited(3)) == CATS[3:6]


def test_no_such_model_a_starting_one_and_one_that_only_embeds_are_a_status_and_a_line_of_text(yard: Lane) -> None:
    answer = yard.one()
    assert (answer.status, answer.headers["content-type"]) == (404, PLAIN)
    yard.engine()
    yard.running.change("acme/tiny", state="STARTING")
    for answer in (yard.one(), yard.batch(("x", "y"))):
        assert (answer.status, answer.headers["content-type"], answer.headers["retry-after"]) == (503, PLAIN, "7")
        assert answer.text == "The engine of 'acme/tiny' is starting."
    yard.running.board.put(Target("acme/vectors", "acme/vectors", "unix:/nowhere", "embed"))
    answer = yard.one(model="acme/vectors")
    assert (answer.status, answer.text) == (400, "The model 'acme/vectors' answers /embeddings only.")


@pytest.mark.parametrize("streams", [True, False])
def test_an_engine_that_dies_before_the_first_byte_is_502(yard: Lane, streams: bool) -> None:
    yard.engine(die_mid_stream=0)
    answer = yard.one(stream_response=streams, only_new_tokens=streams)
    assert (answer.status, answer.headers["content-type"]) == (502, PLAIN)
    assert "ended before it answered" in answer.text
    assert yard.batch(("x", "y")).status == 502, "and so it is when nobody is there"


def test_an_engines_own_failure_is_502_with_its_words(yard: Lane) -> None:
    yard.engine(fail={"status": 500, "message": "out of cheese"})
    for answer in (yard.one(), yard.batch(("x", "y"))):
        assert (answer.status, "out of cheese" in answer.text) == (502, True)


@pytest.mark.parametrize("plan", [{"die_mid_stream": 12}, {"stream_error": 12}], ids=str)
def test_an_engine_that_fails_in_the_middle_breaks_the_transfer_and_nothing_is_kept(
    yard: Lane, plan: dict[str, Any]
) -> None:
    yard.engine(chunk_ms=1, **plan)
    with pytest.raises(http.client.IncompleteRead) as broken:
        yard.one()
    assert broken.value.partial.decode() == CATS[:12], "its words are not posed as text"
    wait_until(lambda: yard.running.board.open_requests == 0, "the request has ended")
    wait_until(lambda: counted(yard, "599") == 1, "it is counted as broken off")
    yard.running.board.targets.clear()
    yard.running.board.current = None
    yard.engine("acme/tiny")
    assert yard.one(prompt=None).status == 400
    assert yard.text() == CATS + END, "the same request again is answered whole"


def test_a_client_that_leaves_ends_the_generation_and_can_go_on_from_there(yard: Lane) -> None:
    engine = yard.engine(chunk_ms=60_000)
    with yard.opened(ONE, json.dumps({"request_id": "a", "prompt": "cats?"}).encode()) as response:
        first = response.read1(4)
    wait_until(lambda: bool(engine.record("cancelled")), "the engine has stopped")
    wait_until(lambda: yard.running.board.open_requests == 0, "what was sent is kept")
    yard.running.board.current = None
    yard.running.board.targets.clear()
    yard.engine()
    assert first.decode() + yard.text(prompt=None) == CATS + END


@pytest.mark.parametrize("config", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("path", [ONE, BATCH])
def test_a_client_that_leaves_before_an_answer_in_one_piece_ends_it_too(
    yard: Lane, path: str, config: dict[str, Any]
) -> None:
    engine = yard.engine(first_token_ms=60_000)
    one = {"request_id": "a", "prompt": "cats?"}
    body = one | {"stream_response": False} if path == ONE else {"prompts": [one]}
    connection = http.client.HTTPConnection("127.0.0.1", yard.running.port)
    connection.request("POST", path, json.dumps(body | {"generation_config": config}).encode())
    wait_until(lambda: bool(completions(engine)), "the engine is at work")
    connection.close()
    wait_until(lambda: bool(engine.record("cancelled")), "the engine has stopped")
    wait_until(lambda: yard.running.board.open_requests == 0, "the request has ended")
    assert yard.one(prompt=None).status == 400, "nothing was given, so nothing is kept"


def test_a_body_beyond_the_limit_is_refused_in_plain_text(yard: Lane) -> None:
    answer = yard.one(prompt="x" * (1 << 20))
    assert (answer.status, answer.headers["content-type"]) == (413, PLAIN)


def test_another_process_on_the_same_database_goes_on_with_a_text(tmp_path: Path) -> None:
    with lane(tmp_path) as first, lane(tmp_path) as second:
        first.engine()
        second.engine()
        assert first.text(**limited(9)) == CATS[:9]
        assert second.text(prompt=None) == CATS[9:] + END
        assert first.one(prompt=None).status == 400


def test_entries_belong_to_their_caller(tmp_path: Path) -> None:
    with lane(tmp_path) as local, lane(tmp_path, admin_key="a long secret") as keyed:
        local.engine()
        keyed.engine()
        key = {"Authorization": "Bearer a long secret"}
        body = {"request_id": "a", "prompt": "dogs?", "generation_config": {**GREEDY, "max_new_tokens": 5}}
        assert local.text(**limited(5)) == CATS[:5]
        assert keyed.post(ONE, body, key).text == DOGS[:5]
        assert local.text(prompt=None, **limited(5)) == CATS[5:10]
        assert keyed.post(ONE, body, {"X-API-KEY": "a long secret"}).text == DOGS[5:10]
        refused = keyed.post(ONE, body)
        assert (refused.status, refused.headers["content-type"]) == (401, PLAIN)


PAGE = "https://chat.example.org"


def test_the_documents_page_posts_a_string_and_is_answered_if_it_may_call(tmp_path: Path) -> None:
    body = json.dumps({"request_id": "a", "prompt": "cats?"}).encode()
    as_a_browser = {
        "Content-Type": "text/plain;charset=UTF-8",
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "cors",
    }
    with lane(tmp_path, cors_origins=PAGE) as yard:
        yard.engine()
        answer = yard.post(ONE, body, {**as_a_browser, "Origin": PAGE})
        assert (answer.status, answer.text) == (200, CATS + END)
        assert answer.headers["access-control-allow-origin"] == PAGE
        bad = yard.post(ONE, b"{", {**as_a_browser, "Origin": PAGE})
        assert (bad.status, bad.headers["access-control-allow-origin"]) == (400, PAGE), "it can read its error"
        own = yard.post(ONE, body, {**as_a_browser, "Origin": f"http://127.0.0.1:{yard.running.port}"})
        assert own.status == 200, "a page of the server itself"
        for origin in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {}):
            answer = yard.post(ONE, body, {**as_a_browser, **origin})
            assert (answer.status, answer.headers["content-type"]) == (403, PLAIN)
            assert "access-control-allow-origin" not in answer.headers


def test_with_a_key_too_another_page_may_not_send_what_needs_no_question_before(tmp_path: Path) -> None:
    body = json.dumps({"request_id": "a", "prompt": "cats?"}).encode()
    with lane(tmp_path, admin_key="a long secret", cors_origins=PAGE) as yard:
        yard.engine()
        sent = {"X-API-KEY": "a long secret", "Content-Type": "text/plain"}
        assert yard.post(ONE, body, {**sent, "Origin": "https://evil.example"}).status == 403
        assert yard.post(ONE, body, {**sent, "Origin": PAGE}).status == 200
        assert yard.post(ONE, body, sent).status == 200
