"""A child with relatives: one in its own group, one that has left for a session of its own (with a child in turn).

They ignore every signal that can be ignored. Argument: `stay` lives until SIGTERM, `leave` ends at once and leaves
them behind, `crash` ends by SIGSEGV, `deaf` ignores SIGTERM as well.
"""

import os
import resource
import signal
import sys
import time


def live(name: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.write(1, f"{name}\n".encode())
    while True:
        time.sleep(60)


if os.fork() == 0:
    live("in the group")
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        live("far")
    live("apart")

manner = sys.argv[1]
with open("/proc/self/environ", "rb") as file:
    own = next(entry for entry in file.read().split(b"\0") if entry.startswith(b"MODELYARD_CHILD="))


def relatives() -> int:
    found = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                environment = file.read()
            with open(f"/proc/{pid}/status") as file:
                # The keeper carries the token too; only the relatives ignore SIGTERM (bit 14).
                ignored = next(int(line.split()[1], 16) for line in file if line.startswith("SigIgn:"))
        except OSError:
            continue
        found += own in environment and bool(ignored >> 14 & 1)
    return found


while relatives() < 3:
    time.sleep(0.01)
if manner == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("family complete", flush=True)
if manner == "leave":
    sys.exit(0)
if manner == "crash":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), signal.SIGSEGV)
while True:
    time.sleep(60)
