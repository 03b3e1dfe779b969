"""The command line: `modelyard serve | migrate | doctor | demo`.

Settings come from the environment and `.env`, so that a command says nothing that a service file could not say too.
A refusal is one line on stderr and exit status 2; a server that breaks off ends with status 1.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from modelyard.errors import StartRefused
from modelyard.private_files import UMASK

app = typer.Typer(
    name="modelyard",
    help="Self-hosted LLM management server. Settings: MODELYARD_* in the environment or in .env.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    with _refusals():
        from modelyard.settings import load_settings

        settings = load_settings()
        # What is made while the application loads stays: looking through it for garbage is a tenth of the start.
        gc.disable()
        # Imported here: neither `modelyard --help` nor a bad setting need wait for the whole application.
        from modelyard.server import serve as run_server

        raise SystemExit(run_server(settings))


@app.command()
def migrate() -> None:
    """Bring the database's tables up to date; `serve` does so by itself."""
    from modelyard.foundation import configured_database, shown
    from modelyard.foundation import migrate as bring_up_to_date
    from modelyard.settings import load_settings

    with _refusals():
        settings = load_settings()
        url = configured_database(settings)
        changed = bring_up_to_date(url)
        print(f"{shown(url)}: {'brought up to date' if changed else 'up to date already'}.")


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
    tune: bool = typer.Option(True, help="Fine-tune the model too, and compare base and adapter."),
) -> None:
    """Show the main job: start the server, put a model into service, ask it something, and make it better."""
    from modelyard.demo.run import run_demo

    with _refusals():
        raise SystemExit(run_demo(model or None, once, tune))


def main() -> None:
    """Run the command line. Whatever it makes, children included, is for its user alone."""
    os.umask(UMASK)
    app()
