"""A child that takes its time after SIGTERM (argument: seconds), counts each one that comes, and exits with 7."""

import os
import signal
import sys
import time
from types import FrameType

ends_at = float("inf")


def asked(_number: int, _frame: FrameType | None) -> None:
    global ends_at
    os.write(1, b"SIGTERM\n")  # print may not be entered again while it still flushes what is below
    ends_at = min(ends_at, time.monotonic() + float(sys.argv[1]))


signal.signal(signal.SIGTERM, asked)
print("tidy", flush=True)
while time.monotonic() < ends_at:
    time.sleep(0.01)
sys.exit(7)
