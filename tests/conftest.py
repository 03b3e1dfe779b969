"""What every test shares. Async tests run on a fresh event loop each, by the hook below: no plugin is needed."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest

pytest_plugins = ["tests.fixtures"]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests to their end, so that a forgotten await fails instead of passing unseen."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in names if name in pyfuncitem.funcargs}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True
