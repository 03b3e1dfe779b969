"""The command line: `modelyard serve | migrate | doctor | demo`.

Settings come from the environment and `.env`, so that a command says nothing that a service file could not say too.
A refusal is one line on stderr and exit status 2.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from modelyard.errors import StartRefused

app = typer.Typer(
    name="modelyard",
    help="Self-hosted LLM management server. Settings: MODELYARD_* in the environment or in .env.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

#: How long open streams may go on when the server stops, in seconds.
SHUTDOWN_S = 5


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except StartRefused as refusal:
        print(f"modelyard: {refusal}", file=sys.stderr)
        raise SystemExit(2) from None


@app.command()
def serve() -> None:
    """Run the server until Ctrl-C."""
    # Imported here: `modelyard --help` need not wait for the whole application.
    import uvicorn

    from modelyard.app import create_app
    from modelyard.foundation import Foundation
    from modelyard.settings import load_settings

    with _refusals():
        settings = load_settings()
        logging.basicConfig(
            level=settings.log_level.upper(),
            stream=sys.stderr,
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        )
        logging.getLogger("alembic").setLevel(logging.WARNING)
        foundation = Foundation(settings)
        foundation.lay()
        try:
            config = uvicorn.Config(
                create_app(foundation),
                host=settings.host,
                port=settings.port,
                loop="uvloop",
                http="httptools",
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=SHUTDOWN_S,
            )
            _run(uvicorn.Server(config))
        finally:
            foundation.close()


def _run(server: object) -> None:
    import asyncio
    import socket

    import uvicorn
    import uvloop

    assert isinstance(server, uvicorn.Server)
    config = server.config
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        listener.listen(2048)
    except OSError as error:
        raise StartRefused(
            f"Cannot listen on {config.host}:{config.port}: {error.strerror}. Set MODELYARD_PORT to a free port."
        ) from error
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"Modelyard listens on http://{shown}:{port} (documentation: http://{shown}:{port}/api/docs)", flush=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.serve(sockets=[listener]))


@app.command()
def migrate() -> None:
    """Bring the database's tables up to date; `serve` does so by itself."""
    from modelyard.db import database_url
    from modelyard.foundation import migrate as bring_up_to_date
    from modelyard.settings import load_settings

    with _refusals():
        settings = load_settings()
        url = database_url(settings.database_url, settings.data_dir)
        changed = bring_up_to_date(url)
        shown = url.render_as_string(hide_password=True)
        print(f"{shown}: {'brought up to date' if changed else 'up to date already'}.")


@app.command()
def doctor() -> None:
    """Check this machine and these settings: what works, what does not, and what to do."""
    from modelyard.doctor import run_doctor

    with _refusals():
        raise SystemExit(run_doctor())


@app.command()
def demo(
    model: str = typer.Option("", help="A model's id on Hugging Face; by default a tiny one is made on the spot."),
    once: bool = typer.Option(False, help="End when all is shown; the exit status says whether all of it worked."),
) -> None:
    """Show the main job: start the server, put a model into service, and ask it something."""
    from modelyard.demo.run import run_demo

    with _refusals():
        raise SystemExit(run_demo(model or None, once))


def main() -> None:
    """Run the command line."""
    app()
