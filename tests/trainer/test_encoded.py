"""Tokens of texts that begin alike or are too long: the same as of each text by itself."""

from __future__ import annotations

import random
from typing import Any

import pytest

from modelyard.trainer import encoded
from modelyard.trainer.encoded import Encoder
from tests.trainer.templates import FAMILIES, byte_tokenizer, need_transformers

pytestmark = [pytest.mark.slow]

WORDS = ["bridge", "  stone", "été", "\n\n", "水", "🙂", "x" * 30]
LONG = encoded.SHARED_CHARACTERS + 100


@pytest.fixture(autouse=True, scope="module")
def _transformers() -> None:
    need_transformers()


def backend(family: str = "tiny") -> tuple[Any, Any]:
    tokenizer = byte_tokenizer(*FAMILIES[family][:2])
    return tokenizer, tokenizer.backend_tokenizer


def turns(stop: str, count: int, seed: int = 0) -> list[str]:
    """Texts of which each begins as the one before it did, but for its end."""
    chance = random.Random(seed)
    said, found = "", []
    for number in range(count):
        said += " ".join(chance.choices(WORDS, k=60)) + stop
        found.append(f"{said}<thought>{number}</thought> answer{stop}")
    return found


def assert_alike(tokens: Any, text: str, found: encoded.Encoded) -> None:
    whole = tokens.encode(text, add_special_tokens=False)
    assert found.ids.tolist() == whole.ids
    assert found.characters == len(text)
    places, tokens_ = range(0, len(text), 53), range(0, len(whole.ids), 53)
    assert [found.token_at(at) for at in places] == [whole.char_to_token(at) for at in places]
    assert [found.characters_of(at) for at in tokens_] == [whole.token_to_chars(at) for at in tokens_]


def test_of_texts_that_begin_alike_only_what_follows_is_tokenised_and_it_is_the_same() -> None:
    tokenizer, tokens = backend()
    taken: list[int] = []

    class Counting:
        """The tokenizer, and how many characters it was given."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokens, name)

        def encode_batch(self, texts: list[str], **more: Any) -> Any:
            taken.append(sum(map(len, texts)))
            return tokens.encode_batch(texts, **more)

    rows = [turns(tokenizer.eos_token, 12), turns(tokenizer.eos_token, 3, seed=1), ["alone"]]
    for texts, found in zip(rows, Encoder(Counting(), [tokenizer.eos_token_id]).encode(rows), strict=True):
        for text, one in zip(texts, found, strict=True):
            assert_alike(tokens, text, one)
    assert sum(taken) < 0.4 * sum(len(text) for texts in rows for text in texts)


def test_texts_are_tokenised_whole_where_nothing_splits_them_for_certain() -> None:
    tokenizer, tokens = backend()
    texts = turns(tokenizer.eos_token, 4)
    for stop_ids in ([], [tokens.token_to_id("a")], [10**6]):
        (found,) = Encoder(tokens, stop_ids).encode([texts])
        for text, one in zip(texts, found, strict=True):
            assert_alike(tokens, text, one)


def test_hundreds_of_turns_are_no_deeper_than_one() -> None:
    tokenizer, tokens = backend()
    texts = [("word " * 150 + tokenizer.eos_token) * (number + 1) for number in range(1200)]
    (found,) = Encoder(tokens, [tokenizer.eos_token_id], 64).encode([texts[:1] + [text[:4000] for text in texts[1:]]])
    assert found[-1].token_at(0) == 0
    assert found[-1].characters_of(0)[0] == 0


@pytest.mark.parametrize("most", [16, 200])
def test_of_a_long_text_the_tokens_asked_for_are_those_of_the_whole(most: int) -> None:
    tokenizer, tokens = backend()
    for text in ("word " * 20_000, " " * 50_000, "水" * 3000, turns(tokenizer.eos_token, 40)[-1], "=" * 9000):
        ((found,),) = Encoder(tokens, [tokenizer.eos_token_id], most).encode([[text]])
        whole = tokens.encode(text, add_special_tokens=False).ids
        assert found.ids[:most].tolist() == whole[:most]
        assert found.characters < len(text) or len(found.ids) < 4 * (most + encoded.MARGIN) * encoded.TOKEN_CHARACTERS
        assert Encoder(tokens, [], most).count(text) >= min(most, len(whole)) or found.characters == len(text)
