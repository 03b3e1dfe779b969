"""The context length of an engine's model, in tokens: asked of the engine once, since it may choose it by itself."""

from __future__ import annotations

import msgspec

from modelyard.errors import BadGateway
from modelyard.gateway.upstream import EngineBrokeOff, Engines, EngineUnreachable

#: Every start of an engine has a URL of its own: those of old are forgotten now and then.
KNOWN = 64
LARGEST_ANSWER_BYTES = 1 << 20


class _Found(msgspec.Struct):
    max_model_len: int


class Lengths:
    """The lengths by the engines' URLs."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._known: dict[str, int] = {}

    async def of(self, url: str, served_name: str) -> int:
        """Return the most tokens that a model takes. May be cancelled.

        Raises:
            BadGateway: the engine did not say.
        """
        if url not in self._known:
            found = await self._ask(url, served_name)
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[url] = found
        return self._known[url]

    async def _ask(self, url: str, served_name: str) -> int:
        body = msgspec.json.encode({"model": served_name, "prompt": "?"})
        parts: list[bytes] = []

        async def take(piece: bytes) -> None:
            if sum(map(len, parts)) < LARGEST_ANSWER_BYTES:
                parts.append(piece)

        call = self._engines.call(url)
        try:
            await call.start("/tokenize", ((b"Content-Type", b"application/json"),), body)
            await call.hand_on(take)
            return msgspec.json.decode(b"".join(parts), type=_Found).max_model_len
        except (EngineUnreachable, EngineBrokeOff, msgspec.MsgspecError) as error:
            raise BadGateway(
                f"The engine of '{served_name}' does not say how much its model takes: {error}."
            ) from error
        finally:
            call.close()
