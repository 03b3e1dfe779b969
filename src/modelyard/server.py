"""The server process: a foundation, a listening socket and an event loop, from start to end.

SIGTERM or Ctrl-C end it in good order, with its children, and with exit status 0. A server that must not go on (its
job runner ended, another server took its database) ends the same way but with status 1, so that whatever watches
over it starts it again. A second Ctrl-C ends it at once; its children then live on for their grace.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import resource
import signal
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import Message, Receive, Scope, Send

from modelyard.app import create_app
from modelyard.connection_register import Connections, Limits
from modelyard.connections import Connection
from modelyard.errors import StartRefused
from modelyard.foundation import Foundation, shown
from modelyard.log_limits import limit_repeats
from modelyard.outages import first_line, is_passing
from modelyard.settings import Settings, unread_names

#: How long open streams may go on when the server stops, in seconds.
SHUTDOWN_S = 5
BACKLOG = 2048
#: The most files that the server asks the system for; some systems allow a thousand million.
MOST_FILES = 1 << 20
#: Open files that the server keeps for itself: database, logs, children, engines.
OWN_FILES = 256
#: What a client's connection takes: itself, and an engine's connection or a file.
FILES_FOR_A_CONNECTION = 2

log = logging.getLogger(__name__)


def serve(settings: Settings) -> int:
    """Serve until told to end; return the exit status.

    Raises:
        StartRefused: with the one line that the user reads; nothing is left running or locked then.
    """
    logging.basicConfig(
        level=settings.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # uvicorn says of each request that is not HTTP that it came: who sends them must not fill the disk.
    limit_repeats(logging.getLogger("uvicorn.error"))
    for line in unread_names():
        log.warning(line)
    foundation = Foundation(settings)
    foundation.lay()
    try:
        listener = _listen(settings.host, settings.port)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            connections = Connections(_limits(settings, _raise_file_limit()))
            app = _WithoutAWord(create_app(foundation))
            try:
                runner.run(_Server(app, connections).serve(sockets=[listener]))
            except SystemExit as error:  # how uvicorn says that the application did not start
                if app.outage_at_start is None:
                    raise
                said = first_line(app.outage_at_start)
                raise StartRefused(
                    f"The database {shown(foundation.url)} cannot be used now: {said}. Give its disk space, or end the "
                    "program that holds it, and start again."
                ) from error
    finally:
        foundation.close()
    return 0 if foundation.failure is None else 1


def _raise_file_limit() -> int:
    """Allow this process, and its children, as many open files as it may allow itself; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def _limits(settings: Settings, files: int) -> Limits:
    possible = max((files - OWN_FILES) // FILES_FOR_A_CONNECTION, 1)
    if possible < settings.max_connections:
        log.warning(
            "at most %s client connections, not %s (MODELYARD_MAX_CONNECTIONS): %s open files are allowed; "
            "raise the limit with ulimit -n or LimitNOFILE",
            possible, settings.max_connections, files,
        )  # fmt: skip
    return Limits(
        max_connections=min(possible, settings.max_connections),
        header_bytes=settings.max_header_kib * 1024,
        header_timeout_s=settings.header_timeout_s,
        body_timeout_s=settings.body_timeout_s,
        idle_timeout_s=settings.keep_alive_s,
    )


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # A port whose last connections still linger in the kernel is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise StartRefused(
            f"Cannot listen on {_address(host, port)}: {error.strerror}. "
            "Set MODELYARD_PORT to a free port and MODELYARD_HOST to an address of this machine."
        ) from error
    return listener


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _WithoutAWord:
    """The application without tracebacks of what is nobody's fault.

    Those are requests that were cut off because the server stops, and an outage of the database during the start.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        #: For which the application did not start.
        self.outage_at_start: SQLAlchemyError | None = None

    def hang_up(self) -> None:
        """End what is followed without end."""
        self._app.state.services.hang_up()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        with contextlib.suppress(asyncio.CancelledError):
            await self._app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure: Message | None = None

        async def hold_failure(message: Message) -> None:
            nonlocal failure
            if message["type"] == "lifespan.startup.failed":
                failure = message  # its text is a traceback
            else:
                await send(message)

        try:
            await self._app(scope, receive, hold_failure)
        except SQLAlchemyError as error:
            if failure is None or not is_passing(error):
                raise
            self.outage_at_start = error
            failure = {"type": "lifespan.startup.failed"}
        finally:
            if failure is not None:
                await send(failure)


class _Server(uvicorn.Server):
    """uvicorn's server, which says where it listens once it answers and ends with a status of our own."""

    def __init__(self, app: _WithoutAWord, connections: Connections) -> None:
        self._app = app
        self._connections = connections
        protocol: Any = functools.partial(Connection, connections)
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                # Nothing here asks for the client's address, and whoever claims one is not believed.
                proxy_headers=False,
                timeout_graceful_shutdown=SHUTDOWN_S,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.freeze()
        gc.enable()
        for listener in sockets or ():
            url = f"http://{_address(*listener.getsockname()[:2])}"
            print(f"Modelyard listens on {url} (documentation: {url}/api/docs)", flush=True)

    async def on_tick(self, counter: int) -> bool:
        # Ten times a second.
        self._connections.sweep()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.hang_up()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own would raise the signal once more at the end, and the exit status would be that of a victim.
        self.force_exit |= self.should_exit and sig == signal.SIGINT
        self.should_exit = True
