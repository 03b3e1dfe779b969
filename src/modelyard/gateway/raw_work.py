"""The work of a request for raw text: its texts, the engine that has them go on, and how the engine is asked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from modelyard.errors import BadGateway, BadRequest, ModelyardError, NotFound
from modelyard.gateway.beam_search import Rules, Search
from modelyard.gateway.raw_beams import PROMPTS_AT_ONCE, run
from modelyard.gateway.raw_engine import Asking, Choice, EngineRefused, Vocabulary, completion_body, together
from modelyard.gateway.raw_schemas import Config, RawRequest, out_of_range
from modelyard.gateway.raw_turns import Turn
from modelyard.gateway.relay import Target, engine_ended

#: Small questions to an engine, such as for a prompt's text, at the same time.
QUESTIONS_AT_ONCE = 8
#: The most tokens of a beam of which the next may be drawn; what lies beyond is hardly ever drawn, and costs the most.
DRAWN_AMONG = 1000
NOTHING_KNOWN = Vocabulary()


@dataclass
class Work:
    """The texts of one request, in its order, on one engine.

    `length` is the most tokens that the model takes, `vocabulary` what a beam search must know of them.
    """

    request: RawRequest
    asking: Asking
    target: Target
    config: Config
    seed: int | None
    turns: list[Turn]
    length: int
    vocabulary: Vocabulary = NOTHING_KNOWN

    @property
    def open(self) -> list[Turn]:
        """The texts that can go on: those that have not ended and have room."""
        return [turn for turn in self.turns if not turn.text.is_finished and len(turn.text.all_ids) < self.length]

    def check(self) -> None:
        """Refuse what this model cannot do.

        Raises:
            BadRequest: more tokens are asked for than it takes, or every text has as many already.
        """
        asked = self.config.max_new_tokens
        if asked > self.length and "max_new_tokens" in self.config.sent:
            raise out_of_range(
                "max_new_tokens",
                f"must be at least 1 and at most {self.length}, the length of '{self.target.model_id}'; it is {asked}",
            )
        if not self.open:
            raise BadRequest(
                f"The text has {self.length} tokens, which is all that '{self.target.model_id}' takes: it cannot go "
                "on. Begin another one under another request_id."
            )

    async def look(self) -> None:
        """Find out where the texts stand, if anything depends on it.

        Raises:
            BadRequest: a prompt without tokens, or with too many.
            EngineRefused, BadGateway, ClientGone: as from the engine.
        """
        is_full = not self.request.only_new_tokens
        # All or none: the engine takes either texts or tokens.
        if is_full or self.config.num_beams > 1 or any(turn.must_be_looked_at for turn in self.turns):
            looked_at = self.turns if is_full else self.open
            await together([partial(turn.look, self.asking, is_full=is_full) for turn in looked_at], QUESTIONS_AT_ONCE)
            for turn in looked_at:
                self._check_room(turn)

    async def complete(self) -> list[str]:
        """Have all texts go on at the same time; return what is new in each, '' for those that do not go on.

        Raises:
            BadRequest, EngineRefused, BadGateway, ClientGone: as `look`.
        """
        await self.look()
        turns, beams = self.open, self.config.num_beams
        choices = await (self._search(turns) if beams > 1 else self._generate(turns))
        if len(choices) != len(turns):
            raise engine_ended(self.target.model_id)
        for turn, choice in zip(turns, choices, strict=True):
            turn.advance(choice)
        if beams > 1:
            texts = await together([partial(turn.new_of_beams, self.asking) for turn in turns], QUESTIONS_AT_ONCE)
        else:
            texts = [turn.new(choice.text) for turn, choice in zip(turns, choices, strict=True)]
        news = {id(turn): text for turn, text in zip(turns, texts, strict=True)}
        return [news.get(id(turn), "") for turn in self.turns]

    async def _generate(self, turns: Sequence[Turn]) -> list[Choice]:
        parts = [turns[start : start + PROMPTS_AT_ONCE] for start in range(0, len(turns), PROMPTS_AT_ONCE)]
        asked = [partial(self.asking.complete, self.body(part, stream=False)) for part in parts]
        return [choice for answer in await together(asked, len(parts)) for choice in answer]

    async def _search(self, turns: Sequence[Turn]) -> list[Choice]:
        searches = [Search(turn.text.all_ids, self._rules(turn), random.Random(self._seed([turn]))) for turn in turns]
        await run(self.asking, searches, self.vocabulary.size)
        eos_ids = self.vocabulary.eos_ids
        return [
            Choice(token_ids=ids, finish_reason="stop" if ids[-1] in eos_ids else "length")
            for ids in (search.best for search in searches)
        ]

    def _rules(self, turn: Turn) -> Rules:
        config = self.config
        return Rules(
            num_beams=config.num_beams,
            max_new_tokens=min(config.max_new_tokens, self.length - len(turn.text.all_ids)),
            length_penalty=config.length_penalty,
            repetition_penalty=config.repetition_penalty,
            eos_ids=self.vocabulary.eos_ids,
            vocabulary=self.vocabulary.size,
            # As without beams, temperature 0 draws nothing.
            do_sample=config.do_sample and config.temperature > 0,
            temperature=config.temperature,
            top_k=min(config.top_k if config.top_k > 0 else DRAWN_AMONG, DRAWN_AMONG),
            top_p=config.top_p,
        )

    def _seed(self, turns: Sequence[Turn]) -> int | None:
        # Drawing begins anew with every request: with the same seed a text that goes on would have the same chances
        # again.
        return None if self.seed is None else self.seed + max(len(turn.text.ids) for turn in turns)

    def body(self, turns: Sequence[Turn], *, stream: bool) -> bytes:
        """Return the request that has these texts go on."""
        prompts = [turn.asks for turn in turns]
        limit = min(self.config.max_new_tokens, self.length)
        return completion_body(self.target.served_name, prompts, self.config, limit, self._seed(turns), stream=stream)

    def _check_room(self, turn: Turn) -> None:
        tokens, model_id = len(turn.text.prompt_ids), self.target.model_id
        if not tokens:
            raise BadRequest(f"{turn.field} is empty, and '{model_id}' puts no token before it.", param=turn.field)
        if tokens >= self.length:
            raise BadRequest(
                f"{turn.field} has {tokens} tokens; '{model_id}' takes {self.length} together with what it generates.",
                param=turn.field,
            )

    async def explained(self, error: EngineRefused) -> ModelyardError:
        """Return what the client is told about an engine's own error.

        Raises:
            BadRequest: where a prompt is the cause.
        """
        model_id = self.target.model_id
        if error.status >= 500:
            return BadGateway(f"The engine of '{model_id}' failed: {error.message}")
        if error.status == 404:
            return NotFound(f"'{model_id}' does not serve what was asked for: {error.message}", param="model")
        with suppress(EngineRefused):
            for turn in self.turns:
                if not turn.text.prompt_ids:
                    turn.text.prompt_ids, _ = await self.asking.tokenize(turn.prompt or "")
                    self._check_room(turn)
        return BadRequest(f"The engine of '{model_id}' refused the request: {error.message}")
