"""What every test shares. Async tests run on a fresh event loop each, by the hook below: no plugin is needed."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.fixtures", "tests.deploy.fixtures"]

# Tests run beside one another: the threads of several tests would wait, busily, for one another's core. What a test
# starts inherits it, servers and their engines aside, which have an environment of their own (tests/server.py).
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes is also up to whatever else this machine does.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


def pytest_configure() -> None:
    """Hear Ctrl-C, and have all that tests start hear it: a shell has what it starts in the background pass it over."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests to their end, so that a forgotten await fails instead of passing unseen."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in names if name in pyfuncitem.funcargs}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True
