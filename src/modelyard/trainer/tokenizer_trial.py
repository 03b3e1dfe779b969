"""The child that tries a model's tokenizer before an engine or a trainer relies on it: it prints what it found as JSON.

`{"template"}` is the chat template for a model that has none. `{"refusal"}` is a panic of the library, which an engine
would die of; an exception is not one, since an engine's own version of the library may know better.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from tokenizers import Tokenizer

from modelyard.evidence import in_words
from modelyard.trainer.default_template import default_template

#: Texts of many scripts: a normaliser that grows a text grows one of them.
SAMPLE = (
    "".join(map(chr, range(0x20, 0x7F))),
    "".join(map(chr, range(0xA0, 0x250))),
    "".join(map(chr, range(0x391, 0x450))),
    "\t\r\n  the quick brown fox 0123456789 \u4e2d\u6587 \u0639\u0631\u0628\u064a \U0001f600",
)


def attempt(folder: Path) -> dict[str, str]:
    """Load the tokenizer, use it, and return what is printed."""
    try:
        template = default_template(folder)
        with suppress(Exception):
            Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(list(SAMPLE))
    except BaseException as error:  # noqa: BLE001  # a panic of the library
        return {"refusal": in_words(error)}
    return {"template": template}


def compare(folder: str, other: str) -> None:
    """Print `{"same"}`: whether two folders' tokenizers have the same tokens, and make the same of a sample."""
    one, another = (Tokenizer.from_file(str(Path(each) / "tokenizer.json")) for each in (folder, other))
    same = one.get_vocab() == another.get_vocab() and all(
        one.encode(text).ids == another.encode(text).ids for text in SAMPLE
    )
    print(json.dumps({"same": same}))  # noqa: T201  # that is its answer


def main(folder: str) -> None:
    """Try the tokenizer of a folder and print what was found."""
    print(json.dumps(attempt(Path(folder))))  # noqa: T201  # that is its answer
