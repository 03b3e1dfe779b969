"""A stand-in for the server: takes the lock, starts (or adopts) a child, says so, and stays until it is killed.

Arguments: lock, folder, grace_s, stop_timeout_s, then the child's argv. Prints `started PID`, `adopted PID` or
`locked out`, and later how the child ended. With `ignore-sigchld` before them it runs as under a supervisor that
ignores SIGCHLD.
"""

import asyncio
import signal
import sys
from pathlib import Path

from modelyard.child_environment import child_environment
from modelyard.processes import Children, Command
from modelyard.server_lock import ServerLock
from tests.servers.lifetime import end_with_parent


async def main(lock: str, folder: str, grace_s: str, stop_timeout_s: str, *argv: str) -> None:
    own = ServerLock(Path(lock))
    if not own.take():
        print("locked out", flush=True)
        return
    children = Children(Path(lock), float(grace_s))
    child = await children.adopt(Path(folder))
    verb = "adopted"
    if child is None:
        command = Command(argv, child_environment(), scratch=Path(folder) / "scratch")
        log = Path(folder).with_suffix(".log")
        child = await children.start(Path(folder), command, log=log, stop_timeout_s=float(stop_timeout_s))
        verb = "started"
    print(verb, child.pid, flush=True)
    print((await child.wait()).describe(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    end_with_parent(signal.SIGKILL)
    arguments = sys.argv[1:]
    if arguments[0] == "ignore-sigchld":
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        del arguments[0]
    asyncio.run(main(*arguments))
