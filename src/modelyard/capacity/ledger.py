"""Works out what is left on each device from what the machine shows and what is reserved. Pure: no input or output.

A machine shows memory as free that a run was given and has not taken yet, and as taken what a run that must leave will
give back. `Ledger.left` counts both, device by device. `victims` chooses who leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from uuid import UUID

from modelyard.capacity.tables import LOCAL, MAIN_MEMORY, UNKNOWN_GPU, Kind
from modelyard.hardware import Machine, gib

#: More runs than that are not tried in every combination.
MOST_TRIED = 10


@dataclass(frozen=True)
class Allocation:
    """Memory for one run: bytes by device of a node."""

    devices: Mapping[int, int]
    node: str = LOCAL

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all devices together."""
        return sum(self.devices.values())

    @property
    def gpus(self) -> tuple[int, ...]:
        """Return the numbers of its GPUs, in the order of the PCI bus; none where nothing tells them."""
        return tuple(sorted(device for device in self.devices if device >= 0))


@dataclass(frozen=True)
class Held:
    """Memory of one device that one run holds, in bytes; `taken_bytes` is what the device does not show as free."""

    run_id: UUID
    kind: Kind
    job_id: UUID | None
    holder: str
    device: int
    memory_bytes: int
    taken_bytes: int = 0


@dataclass(frozen=True)
class Ledger:
    """All that is held of a node. `budget_bytes` is the most that all runs together may take of each device."""

    held: Sequence[Held] = ()
    budget_bytes: int | None = None

    def left(self, machine: Machine, *, but: Collection[UUID] = (), gone: Collection[UUID] = ()) -> Machine:
        """Return the machine with what a run may take as its free memory.

        Args:
            machine: The machine as it looks now.
            but: Runs that are not counted: what they hold is neither reserved nor given back.
            gone: Runs that will have given their memory back.
        """

        def free(device: int, free_bytes: int) -> int:
            here = [one for one in self.held if one.device == device and one.run_id not in but]
            staying = [one for one in here if one.run_id not in gone]
            free_bytes += sum(min(one.taken_bytes, one.memory_bytes) for one in here if one.run_id in gone)
            free_bytes -= sum(max(0, one.memory_bytes - one.taken_bytes) for one in staying)
            if self.budget_bytes is not None:
                free_bytes = min(free_bytes, self.budget_bytes - sum(one.memory_bytes for one in staying))
            return max(0, free_bytes)

        main_bytes = free(MAIN_MEMORY, machine.memory_available_bytes)
        gpus = tuple(
            replace(gpu, free_bytes=min(gpu.total_bytes, free(gpu.index, gpu.free_bytes))) for gpu in machine.gpus
        )
        return replace(machine, memory_available_bytes=main_bytes, gpus=gpus)

    def runs(self, kinds: Collection[Kind]) -> set[UUID]:
        """Return the runs of some kinds."""
        return {one.run_id for one in self.held if one.kind in kinds}

    def on_accelerator(self, machine: Machine, *, but: Collection[UUID] = ()) -> list[Held]:
        """Return what other runs hold of what engines and trainings take: the GPUs, or without one main memory."""
        return [
            one
            for one in self.held
            if one.run_id not in but and (one.device != MAIN_MEMORY if machine.has_gpu else one.device == MAIN_MEMORY)
        ]

    def in_words(self, kinds: Collection[Kind]) -> str:
        """Return to whom of some kinds how much is promised, as a sentence; empty if nothing is."""
        found = [one for one in self.held if one.kind in kinds]
        if not found:
            return ""
        holders = list(dict.fromkeys(one.holder for one in found))
        return f"{gib(sum(one.memory_bytes for one in found))} is promised to {' and '.join(holders)}."


@dataclass(frozen=True)
class Candidate:
    """A run that could leave for another. The first `order` came first."""

    run_id: UUID
    memory_bytes: int
    order: int


def victims(running: Sequence[Candidate], fits: Callable[[Collection[UUID]], bool]) -> list[UUID] | None:
    """Return the runs that must leave for another: as few as possible, and of those the smallest.

    Args:
        running: The runs that could leave.
        fits: Tells whether the other one fits when these have left.

    Returns:
        An empty list where it fits as it is; None where it would not fit even if all of them left.
    """
    by_size = sorted(running, key=lambda one: (one.memory_bytes, one.order))
    for count in range(min(len(by_size), MOST_TRIED) + 1):
        tried = by_size[-MOST_TRIED:] if count > 1 else by_size
        ways = [way for way in combinations(tried, count) if fits([one.run_id for one in way])]
        if ways:
            smallest = min(ways, key=lambda way: sum(one.memory_bytes for one in way))
            return [one.run_id for one in smallest]
    everybody = [one.run_id for one in by_size]
    return everybody if fits(everybody) else None


def on_main_memory(memory_bytes: int) -> Allocation:
    """Return an allocation of a node's own memory."""
    return Allocation({MAIN_MEMORY: memory_bytes})


def on_gpus(indexes: Collection[int], each_bytes: int) -> Allocation:
    """Return an allocation of as much on each GPU; without indexes, on GPUs of which nothing tells."""
    return Allocation(dict.fromkeys(indexes, each_bytes) if indexes else {UNKNOWN_GPU: each_bytes})
