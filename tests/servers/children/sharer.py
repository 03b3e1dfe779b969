"""A deaf child that holds shared memory and a semaphore, as an engine's processes do; it prints the memory's name."""

import multiprocessing
import signal
import time
from multiprocessing import shared_memory

signal.signal(signal.SIGTERM, signal.SIG_IGN)
memory = shared_memory.SharedMemory(create=True, size=4096)
semaphore = multiprocessing.get_context("spawn").Semaphore()
print(f"sharing {memory.name}.", flush=True)
while True:
    time.sleep(60)
