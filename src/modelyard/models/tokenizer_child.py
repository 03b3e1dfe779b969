"""Runs whatever reads a model's tokenizer in a child with limits, for the server, which never does so itself.

The library that reads `tokenizer.json` is native code, and the file is a stranger's: a chain of replacements doubles a
text until nothing ends, a table asks for gigabytes and aborts the process, an odd value is a panic. In a child all of
that is a refusal with its reason. The program prints one JSON value; at most two such children run at a time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import AsyncIterable
from pathlib import Path
from typing import Any

from modelyard.errors import JobFailure
from modelyard.filters import Filter, FilterFailed, Limits
from modelyard.models import rescan

log = logging.getLogger(__name__)

GIB = 1024**3
#: A vocabulary of 262,144 tokens (33 MB of JSON) takes 1.1 GiB of address space, and a second.
LIMITS = Limits(memory_bytes=4 * GIB, cpu_s=300, stall_s=60.0)
CHILDREN = 2
BAD = "bad_tokenizer"
NO_PROCESS = "no_process"
HINT = "Its tokenizer.json is damaged or made to deceive: tell the model's authors, or try another revision."


class TokenizerChildren:
    """Starts the children, and keeps those that come too many waiting. A server has one of it, for all who ask."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self._limits = limits
        self._turn = asyncio.Semaphore(CHILDREN)

    async def ask(self, model_id: str, program: str, blocks: AsyncIterable[bytes] | None = None) -> Any:
        """Return what the program printed after it was fed the blocks. Cancelling it ends the child.

        Raises:
            JobFailure: `bad_tokenizer`: it needs more than it may, or died; `no_process`: the machine has no room.
        """
        async with self._turn:
            try:
                child = Filter(program, self._limits)
            except OSError as error:
                raise _no_process(model_id, error.strerror or str(error)) from error
            try:
                if blocks is not None:
                    await _feed(child, blocks)
                return json.loads(await child.finish())
            except ValueError as error:
                raise JobFailure(BAD, f"The tokenizer of {model_id} made its reader answer nonsense.", HINT) from error
            except FilterFailed as failed:
                log.warning("the tokenizer of %s could not be read in a child: %s", model_id, failed)
                raise self._failure(model_id, failed) from failed
            finally:
                await child.close()

    async def tried(self, model_id: str, folder: Path) -> str | None:
        """Load and use a folder's tokenizer once, and return the chat template that the model gets if it has none.

        For whoever is about to start an engine or a trainer, which have no limits of their own. The configuration is
        scanned again before, by the rules of today. None: there is no tokenizer.json.

        Raises:
            JobFailure: `bad_tokenizer` or `no_process`; as `rescan.check`.
        """
        await self._scan_again(model_id, folder)
        if not await asyncio.to_thread((folder / "tokenizer.json").exists):
            return None
        program = f"from modelyard.trainer.tokenizer_trial import main; main({str(folder)!r})"
        found = await self.ask(model_id, program)
        if "refusal" in found:
            raise JobFailure(BAD, f"The tokenizer of {model_id} cannot be read: {found['refusal']}.", HINT)
        return str(found["template"])

    async def _scan_again(self, model_id: str, folder: Path) -> None:
        if await asyncio.to_thread(rescan.is_small, folder):
            return await asyncio.to_thread(rescan.check, model_id, folder)
        program = f"from modelyard.models.rescan import main; main({model_id!r}, {str(folder)!r})"
        found = await self.ask(model_id, program)
        if "failure" in found:
            raise JobFailure(*found["failure"])

    def _failure(self, model_id: str, failed: FilterFailed) -> JobFailure:
        found = failed.outcome
        gib, cpu_s, stall_s = self._limits.memory_bytes / GIB, self._limits.cpu_s, self._limits.stall_s
        if found is None:
            what = f"did not go on within {stall_s:g} s"
        elif found.signal == signal.SIGKILL:
            return _no_process(model_id, "its process was killed, most often by the system because memory ran out")
        elif found.signal == signal.SIGXCPU:
            what = f"needed more than {cpu_s} s of processor time"
        elif found.signal is not None:
            what = f"ended the process that read it ({found.describe()}): most often it asked for over {gib:g} GiB"
        else:
            what = f"could not be read in a process of its own ({found.describe()})"
        return JobFailure(BAD, f"The tokenizer of {model_id} {what}.", HINT)


async def _feed(child: Filter, blocks: AsyncIterable[bytes]) -> None:
    async for block in blocks:
        try:
            await child.feed(block)
        except BrokenPipeError:
            return  # it has said what it has to say, or died: `finish` tells


def _no_process(model_id: str, why: str) -> JobFailure:
    what = f"The tokenizer of {model_id} could not be read: {why}."
    return JobFailure(NO_PROCESS, what, "Free memory on the server, and try again.")
