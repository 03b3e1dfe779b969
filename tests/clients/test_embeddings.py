"""all-MiniLM-L6-v2 through the official client, beside what transformers makes of the same texts."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence

import openai
import pytest

from tests.clients.service import MINILM, Service

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

STORY = "a river runs from the hills past mills and meadows under nine bridges to the grey sea"
WORDS = STORY.split()
#: Of one word to some 240, which is nearly as many tokens as the model was made for; in several scripts.
TEXTS = [
    "river",
    "Who won the world series in 2020?",
    "Річка тече до моря.",
    "黄河 is called the Yellow River 🏞️",
    *(" ".join(WORDS[(7 * number + step) % len(WORDS)] for step in range(20 * number)) for number in range(1, 13)),
]
#: The mean over a text's tokens, scaled to length 1: what the model's own card says to do.
REFERENCE = """
import json, sys, torch
from transformers import AutoModel, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModel.from_pretrained(sys.argv[1]).eval()
for text in json.load(sys.stdin):
    tokens = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        mean = model(**tokens).last_hidden_state.mean(dim=1)[0]
    print(json.dumps([tokens["input_ids"].shape[1], (mean / mean.norm()).tolist()]))
"""


@pytest.fixture(scope="module")
def reference(service: Service) -> list[tuple[int, list[float]]]:
    """The number of tokens and the vector of each text, by transformers in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE, str(service.minilm)],
        input=json.dumps(TEXTS), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / (math.hypot(*one) * math.hypot(*other))


def test_vectors_are_those_of_transformers(client: openai.OpenAI, reference: list[tuple[int, list[float]]]) -> None:
    assert len(TEXTS) == 16
    answer = client.embeddings.create(model=MINILM, input=TEXTS, encoding_format="float")
    assert [one.index for one in answer.data] == list(range(16))
    assert answer.usage.prompt_tokens == sum(count for count, _ in reference)
    for text, one, (_, expected) in zip(TEXTS, answer.data, reference, strict=True):
        assert len(one.embedding) == 384
        assert cosine(one.embedding, expected) > 0.9999, text
        assert math.hypot(*one.embedding) == pytest.approx(1.0, abs=1e-4), text
    # Two texts of another meaning: vectors that were all alike would pass as well.
    assert cosine(answer.data[0].embedding, answer.data[1].embedding) < 0.5


def test_the_same_vector_comes_in_either_form_alone_or_among_others(client: openai.OpenAI) -> None:
    # Where nothing is said the client asks for base64, and decodes it.
    packed = client.embeddings.create(model="Compressa-Embedding", input=TEXTS).data
    assert all(isinstance(one.embedding, list) for one in packed)
    for number in (0, 3, 15):
        [plain] = client.embeddings.create(model=MINILM, input=TEXTS[number], encoding_format="float").data
        assert cosine(plain.embedding, packed[number].embedding) > 0.99999


def test_a_text_that_is_too_long_is_refused_or_cut_as_asked(client: openai.OpenAI) -> None:
    long = " ".join(WORDS * 40)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.embeddings.create(model=MINILM, input=long)
    cut = client.embeddings.create(model=MINILM, input=long, extra_body={"truncate_prompt_tokens": 32})
    assert cut.usage.prompt_tokens == 32
