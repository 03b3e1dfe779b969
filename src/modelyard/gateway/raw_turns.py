"""One text's turn in a request: where it stands, what its engine is asked for, and which characters of it are new.

The engine's own text of new tokens is right, and costs nothing, but for two cases. Where a text stopped inside a
character, vLLM 0.32 begins its first piece with the whole text so far; and a beam search's text lacks the ending token
and, with some tokenizers, its first space. In both the new text is cut out of the text of all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelyard.gateway.continuations import Text
from modelyard.gateway.raw_engine import Asking, Choice

#: What stands for bytes that are no character, or not yet one.
TORN = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Turn:
    """A text that goes on. `field` is what the client calls its prompt."""

    text: Text
    prompt: str | None
    field: str
    #: The prompt's text with its special tokens, where somebody needs it.
    prompt_text: str = ""
    #: The whole text as far as the client has it or will be shown it, where somebody needs it.
    before: str = ""
    #: As much of it as ends with a whole character, if the rest does not.
    torn_after: str | None = None

    @property
    def must_be_looked_at(self) -> bool:
        """True if the engine's own text of what is new cannot be had without a look."""
        return bool(self.text.ids) or (self.prompt or "").endswith(TORN)

    @property
    def asks(self) -> str | list[int]:
        """The text that the engine is to continue."""
        return self.text.all_ids if self.text.prompt_ids else self.prompt or ""

    @property
    def so_far(self) -> str:
        """The text that was generated in earlier turns."""
        return self.before[len(self.prompt_text) :]

    async def look(self, asking: Asking, *, is_full: bool) -> None:
        """Find out where the text stands; `is_full`: for an answer that shows what is there already."""
        text = self.text
        if not text.prompt_ids:
            text.prompt_ids, _ = await asking.tokenize(self.prompt or "")
        whole = await asking.detokenize(text.all_ids)
        whole_characters = whole.rstrip(TORN)
        is_torn = whole_characters != whole
        if not text.ids:
            self.prompt_text = whole
        elif is_full or is_torn:
            self.prompt_text = await asking.detokenize(text.prompt_ids)
        self.before = whole
        if is_torn:
            self.torn_after = whole_characters
            shown = len(whole_characters) if is_full else len(self.prompt_text) + text.given
            self.before = whole[: max(shown, len(self.prompt_text))]
            text.given = len(self.so_far)

    def advance(self, choice: Choice) -> None:
        """Note the tokens of an answer, or of a piece of one."""
        if not self.text.prompt_ids:
            self.text.prompt_ids = choice.prompt_token_ids or []
        self.text.ids += choice.token_ids or []
        self.text.is_finished = choice.is_finished

    def new(self, piece: str) -> str:
        """Return what is new in the engine's text, and count it as given."""
        if piece and self.torn_after is not None:
            if piece.startswith(self.torn_after):
                piece = piece[len(self.before) :]
            self.torn_after = None
        self.text.given += len(piece)
        return piece

    async def new_of_beams(self, asking: Asking) -> str:
        """Return what is new in the text that a beam search chose, and count it as given."""
        whole = await asking.detokenize(self.text.all_ids)
        new = (whole if self.text.is_finished else whole.rstrip(TORN))[len(self.before) :]
        self.text.given += len(new)
        return new
