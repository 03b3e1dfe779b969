"""Limits on one client connection, before and beside the key check: bytes of headers, time, requests in a row.

uvicorn's protocol class reads headers of any size for any time, and loses a body behind `Upgrade: h2c`. The class here
counts and times what comes, and answers 431, 408 or 503 itself, in the one envelope of all errors. All of them stand in
the register (`connection_register`), which asks each whether its time is up.

A refused client may still be sending: closed at once, its connection would be reset and the answer lost with it. So
what it sends is read and thrown away for a moment.
"""

from __future__ import annotations

import enum
import math
from http import HTTPStatus
from time import monotonic
from typing import Any

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from modelyard.connection_register import Connections
from modelyard.errors import (
    BadRequest,
    HeadersTooLarge,
    ModelyardError,
    RequestTooSlow,
    TooManyConnections,
    Unavailable,
)

#: The most headers that a request may have.
MOST_HEADERS = 256
#: Requests that may wait behind the one that is answered; a connection with more of them ends after those.
MOST_PIPELINED = 16
#: A body must grow by this much (or end) within the time that is allowed without any of it: a byte a minute is none.
LEAST_BODY_BYTES = 1024
#: How long a client that was refused may go on sending, in seconds.
LINGER_S = 2.0
#: How long the rest of a body may go on coming that nobody wants: its request is answered.
DRAIN_S = 30.0
#: How soon a client that sends no more is asked whether it is still there, and how often, once it seems so, in seconds.
KNOCK_AFTER_S = 1.0
KNOCK_AGAIN_S = 5.0
#: An answer of which its client takes nothing for so long is given up.
UNREAD_S = 600.0


class Phase(enum.Enum):
    """The part of a request that a connection waits for."""

    #: The first byte of a request.
    IDLE = enum.auto()
    #: The rest of its headers.
    HEAD = enum.auto()
    #: The rest of its body.
    BODY = enum.auto()
    #: Nothing: it was refused, and what still comes is thrown away.
    DEAF = enum.auto()


class _Refused(Exception):
    """Raised within a callback of the parser, so that it stops."""


class Connection(HttpToolsProtocol):
    """One client connection; uvicorn makes it."""

    def __init__(self, connections: Connections, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._connections = connections
        self._limits = connections.limits
        self._phase = Phase.IDLE
        self._deadline: float | None = None
        self._missed: float | None = None
        self._head_bytes = 0
        self._head_at_most = 0
        self._length = self._coding = b""
        self._fresh_body_bytes = 0
        self._framing_bytes = 0
        self._had_body = False
        self._is_resumed = False
        self._unread_since: float | None = None
        self._refusal: ModelyardError | None = None
        self._running: RequestResponseCycle | None = None
        self._knock_at = math.inf
        self._knocks = 0

    # The transport's side.

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline = monotonic() + self._limits.header_timeout_s
        if not self._connections.admit(self):
            self._refuse(TooManyConnections(self._limits.max_connections))

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.forget(self)
        running = self._running
        super().connection_lost(exc)
        if running is not None and running is not self.cycle and not running.response_complete:
            # uvicorn tells only the last request of a connection that its client is gone.
            running.disconnected = True
            running.message_event.set()

    def eof_received(self) -> bool | None:  # type: ignore[override]  # asyncio knows both
        """Keep the way back open where a whole request waits for its answer: its client may just send no more.

        One that has gone looks the same at first. `_knock` tells them apart, while there is nothing of the answer yet.
        """
        cycle = self.cycle
        if cycle is None or cycle.more_body or cycle.response_started or self.pipeline or self._phase is Phase.DEAF:
            return None
        if cycle.scope["http_version"] != "1.1":
            return None  # it knows no answer before the answer
        cycle.keep_alive = False
        self._knock_at = monotonic() + KNOCK_AFTER_S
        return True

    def _knock(self, now: float) -> None:
        """Send a client that sends no more a word that it passes over; where nobody is there, the next one fails."""
        if self.cycle.response_started or self.transport.is_closing():
            self._knock_at = math.inf
            return
        self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._knocks += 1
        self._knock_at = now + (KNOCK_AFTER_S / 2 if self._knocks < 3 else KNOCK_AGAIN_S)

    def data_received(self, data: bytes) -> None:
        phase = self._phase
        if phase is Phase.DEAF:
            return
        if phase is Phase.BODY:
            self._had_body = False
        else:
            if not self._head_bytes:
                self._deadline = monotonic() + self._limits.header_timeout_s
            self._head_bytes += len(data)
        # No head that ends here is longer: it needs measuring only where this is too much.
        self._head_at_most = len(data) + (self._head_at_most if phase is Phase.HEAD else 0)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._stop_parsing()
        if self._phase is Phase.BODY:
            self._watch_body(len(data), phase is Phase.BODY)
        elif self._phase is not Phase.DEAF and self._head_bytes > self._limits.header_bytes:
            self._refuse(HeadersTooLarge(self._limits.header_bytes // 1024))

    def pause_writing(self) -> None:
        self._unread_since = monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._unread_since = None
        super().resume_writing()

    # The parser's side.

    def on_message_begin(self) -> None:
        if self._is_resumed:
            return
        super().on_message_begin()
        self._deadline = monotonic() + self._limits.header_timeout_s
        self._phase = Phase.HEAD

    def on_headers_complete(self) -> None:
        if self._is_resumed:
            return
        if (refusal := self._fault_in_head()) is not None:
            self._refusal = refusal
            raise _Refused
        if len(self.pipeline) >= MOST_PIPELINED:
            raise _Refused
        super().on_headers_complete()
        # What comes behind a body in chunks is no header: access was decided long ago.
        self.headers = []
        self._phase = Phase.BODY
        self._deadline = None
        self._head_bytes = 0
        self._fresh_body_bytes = self._framing_bytes = 0

    def on_body(self, body: bytes) -> None:
        self._had_body = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() and self._has_body():
            return  # the parser thinks that another protocol follows; `_decline_upgrade` reads the body
        super().on_message_complete()
        self._phase = Phase.IDLE
        self._deadline = None
        if self.cycle.response_complete and not self.pipeline:
            self._deadline = monotonic() + self._limits.idle_timeout_s

    # The application's side.

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        # uvicorn's own arms a timer for each answer, and none where the answer came before the end of the body.
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._phase is Phase.BODY:
            self._deadline = monotonic() + DRAIN_S
        elif self._phase is Phase.IDLE:
            self._deadline = monotonic() + self._limits.idle_timeout_s

    # Time.

    def check_time(self, now: float) -> None:
        """End the connection, or the request on it, if its client has had its time."""
        if now >= self._knock_at:
            self._knock(now)
        if self._unread_since is not None and now - self._unread_since > UNREAD_S:
            self._connections.note("answer_not_read", self.client)
            self.transport.abort()
        elif self._deadline is None:
            if self.transport.is_closing():
                self._deadline = now + UNREAD_S
        elif now >= self._deadline:
            # A loop that was held up comes here before it reads what came in time: that is read before the next sweep.
            if self._missed == self._deadline:
                self._end_of_time(now)
            self._missed = self._deadline

    def _end_of_time(self, now: float) -> None:
        if self._phase is Phase.DEAF or self.transport.is_closing():
            self.transport.abort()
        elif self._phase is Phase.IDLE and not self._head_bytes:
            self._phase, self._deadline = Phase.DEAF, now + LINGER_S
            self.transport.close()
        elif self.flow.read_paused or (self._phase is Phase.BODY and self.cycle.waiting_for_100_continue):
            # It is us who do not read yet.
            self._deadline = now + self._limits.body_timeout_s
        elif self._phase is Phase.BODY:
            self._refuse(RequestTooSlow(f"Too little of the body came within {self._limits.body_timeout_s:g} s."))
        else:
            self._refuse(RequestTooSlow(f"The headers were not complete within {self._limits.header_timeout_s:g} s."))

    def _watch_body(self, received: int, is_all_body: bool) -> None:
        """Push the deadline of a body that comes, unless what comes is next to nothing, or nobody wants it any more."""
        self._fresh_body_bytes += received
        if self._deadline is None or (self._fresh_body_bytes >= LEAST_BODY_BYTES and not self.cycle.response_complete):
            self._fresh_body_bytes = 0
            self._deadline = monotonic() + self._limits.body_timeout_s
        if is_all_body and not self._had_body:
            # The frame of chunks without any content: their extensions, or trailers, whose parts the parser keeps.
            self._framing_bytes += received
            if self._framing_bytes > self._limits.header_bytes:
                self._refuse(HeadersTooLarge(self._limits.header_bytes // 1024))
        else:
            self._framing_bytes = 0

    # Refusals.

    def _fault_in_head(self) -> ModelyardError | None:
        """Return why a request is refused by its headers: two readers could take it for different ones (smuggling)."""
        headers = self.headers
        if len(headers) > MOST_HEADERS or (self._head_at_most > self._limits.header_bytes and self._is_too_large()):
            return HeadersTooLarge(self._limits.header_bytes // 1024)
        self._length = self._coding = b""
        for name, value in headers:
            if name == b"content-length":
                self._length = value
            elif name == b"transfer-encoding":
                self._coding += value
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            return BadRequest(f"HTTP/{version} is not spoken here, but HTTP/1.1.", code="http_version")
        if self._coding and (version == "1.0" or self._coding.lower() != b"chunked"):
            return BadRequest("The only Transfer-Encoding here is chunked, in HTTP/1.1.", code="transfer_encoding")
        if self.parser.get_method() == b"CONNECT":
            return BadRequest("This server is no proxy.", code="not_a_proxy")
        return None

    def _is_too_large(self) -> bool:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        return size > self._limits.header_bytes

    def _has_body(self) -> bool:
        return bool(self._coding) or self._length.strip(b"0 ") != b""

    def _decline_upgrade(self, rest: bytes) -> None:
        """Go on in HTTP/1.1 with a request that offered another protocol, as a server may; its body is its body."""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        try:
            if self._phase is Phase.BODY:
                framing = b"transfer-encoding: chunked" if self._coding else b"content-length: " + self._length
                self._is_resumed = True
                try:
                    self.parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n\r\n")
                finally:
                    self._is_resumed = False
            if rest:
                self.parser.feed_data(rest)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(rest[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._stop_parsing()

    def _stop_parsing(self) -> None:
        refusal, self._refusal = self._refusal, None
        if refusal is None and len(self.pipeline) >= MOST_PIPELINED and self._phase is Phase.HEAD:
            self._end_after_answers()
            return
        self._refuse(refusal or BadRequest("This is not HTTP that can be read.", code="malformed_request"))

    def _end_after_answers(self) -> None:
        """Read no more, and close the connection when what it asked so far is answered."""
        self._phase, self._deadline = Phase.DEAF, None
        self.cycle.keep_alive = False

    def _refuse(self, error: ModelyardError) -> None:
        """Answer with an error, unless another answer is on its way, and end the connection."""
        self._connections.note(error.code, self.client)
        is_about_body = self._phase is Phase.BODY
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering and not is_about_body:
            self._end_after_answers()
            return
        self._phase, self._deadline = Phase.DEAF, monotonic() + LINGER_S
        may_answer = not is_about_body or (is_answering and not self.cycle.response_started and not self.pipeline)
        if is_answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not may_answer or not self._connections.linger(self):
            self.transport.close()
            return
        self.flow.resume_reading()
        self.transport.write(_as_bytes(error))
        if self.transport.can_write_eof():
            self.transport.write_eof()


def _as_bytes(error: ModelyardError) -> bytes:
    body = msgspec.json.encode(error.envelope())
    retry = f"retry-after: {error.retry_after_s}\r\n" if isinstance(error, Unavailable) else ""
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n{retry}connection: close\r\n\r\n"
    )
    return head.encode() + body
