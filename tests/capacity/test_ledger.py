"""The arithmetic of what is left, device by device, and of who leaves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from uuid import UUID, uuid4

import pytest

from modelyard.capacity.ledger import Allocation, Candidate, Held, Ledger, on_gpus, on_main_memory, victims
from modelyard.capacity.tables import MAIN_MEMORY, UNKNOWN_GPU, Kind
from modelyard.hardware import GIB, Gpu, Machine

CPU = Machine(has_gpu=False, cpus=(0, 1), memory_available_bytes=20 * GIB)
ONE, TWO, PLAN = uuid4(), uuid4(), uuid4()


def gpus(*free_gib: int, total_gib: int = 80) -> Machine:
    found = tuple(Gpu(index, "A100", total_gib * GIB, free * GIB) for index, free in enumerate(free_gib))
    return replace(CPU, has_gpu=True, gpus=found)


def held(run_id: UUID, gib: float, device: int = MAIN_MEMORY, taken_gib: float = 0, kind: Kind = Kind.ENGINE) -> Held:
    return Held(run_id, kind, uuid4(), "org/a", device, int(gib * GIB), int(taken_gib * GIB))


def free_of(machine: Machine) -> list[int]:
    """Return what is free in GiB: of each GPU, or of the machine's memory."""
    return [gpu.free_bytes // GIB for gpu in machine.gpus] or [machine.memory_available_bytes // GIB]


@pytest.mark.parametrize(
    ("machine", "holding", "budget_gib", "but", "gone", "left"),
    [
        (CPU, [], None, [], [], [20]),
        # What a run has not taken yet is not free; what it has taken, the machine does not show.
        (CPU, [held(ONE, 5)], None, [], [], [15]),
        (CPU, [held(ONE, 25)], None, [], [], [0]),
        (CPU, [held(ONE, 5, taken_gib=5)], None, [], [], [20]),
        (CPU, [held(ONE, 5, taken_gib=3)], None, [], [], [18]),
        (CPU, [held(ONE, 5, taken_gib=7)], None, [], [], [20]),
        # A run's own reservation does not stand in its way.
        (CPU, [held(ONE, 5)], 8, [ONE], [], [8]),
        # A budget counts all that is held, taken or not; it is no promise of what others have taken.
        (CPU, [held(ONE, 5, taken_gib=5)], 8, [], [], [3]),
        (CPU, [held(ONE, 5), held(TWO, 4, taken_gib=4)], 8, [], [], [0]),
        (CPU, [], 100, [], [], [20]),
        # Those that leave give back what they have taken, and free the budget.
        (CPU, [held(ONE, 5, taken_gib=5)], None, [], [ONE], [25]),
        (CPU, [held(ONE, 5), held(TWO, 2)], 8, [], [ONE], [6]),
        (CPU, [held(ONE, 30, taken_gib=3)], None, [], [ONE], [23]),
        # Each GPU for itself: 36 GiB on the first leave the budget of the second as it is.
        (gpus(44, 80), [held(ONE, 36, 0, 36)], 40, [], [], [4, 40]),
        (gpus(80, 80), [held(ONE, 36, 0)], 40, [], [], [4, 40]),
        (gpus(80, 80), [held(ONE, 36, 0)], None, [], [], [44, 80]),
        (gpus(70, 10), [held(ONE, 10, 0, 10), held(ONE, 70, 1, 70)], None, [], [ONE], [80, 80]),
        (gpus(8, 8), [held(ONE, 72, 0, 72), held(TWO, 72, 1, 72)], None, [], [TWO], [8, 80]),
        # A GPU has no more than it has.
        (gpus(30), [held(ONE, 72, 0, 72)], None, [], [ONE], [80]),
        # The machine's own memory, which merges take, is none of the GPUs'.
        (gpus(80, 80), [held(PLAN, 10, kind=Kind.MERGE)], None, [], [], [80, 80]),
        (gpus(80, 80), [held(ONE, 72, UNKNOWN_GPU)], None, [], [], [80, 80]),
    ],
)
def test_what_is_left_of_each_device(
    machine: Machine, holding: list[Held], budget_gib: int | None, but: list[UUID], gone: list[UUID], left: list[int]
) -> None:
    ledger = Ledger(holding, budget_gib * GIB if budget_gib else None)
    assert free_of(ledger.left(machine, but=but, gone=gone)) == left


def test_a_merge_beside_gpus_takes_the_machines_memory() -> None:
    ledger = Ledger([held(PLAN, 15, kind=Kind.MERGE)])
    assert ledger.left(gpus(80)).memory_available_bytes == 5 * GIB


def test_only_runs_on_what_engines_take_are_on_the_accelerator() -> None:
    ledger = Ledger([held(ONE, 1), held(TWO, 2, 0), held(PLAN, 3, UNKNOWN_GPU)])
    assert [one.run_id for one in ledger.on_accelerator(CPU)] == [ONE]
    assert [one.run_id for one in ledger.on_accelerator(gpus(80))] == [TWO, PLAN]
    assert [one.run_id for one in ledger.on_accelerator(gpus(80), but=[TWO])] == [PLAN]


@pytest.mark.parametrize(
    ("allocation", "total_gib", "numbers"),
    [
        (on_main_memory(3 * GIB), 3, ()),
        (on_gpus([2, 0], 5 * GIB), 10, (0, 2)),
        (on_gpus([], 5 * GIB), 5, ()),
        (Allocation({}), 0, ()),
    ],
)
def test_an_allocation_knows_its_sum_and_its_gpus(
    allocation: Allocation, total_gib: int, numbers: tuple[int, ...]
) -> None:
    assert (allocation.total_bytes, allocation.gpus) == (total_gib * GIB, numbers)


SIZES: Mapping[int, int] = {1: 2, 2: 3, 3: 5}


@pytest.mark.parametrize(
    ("needed", "leave"),
    [
        (0, []), (1, [1]), (2, [1]), (3, [2]), (5, [3]), (7, [1, 3]), (8, [2, 3]), (9, [1, 2, 3]), (10, [1, 2, 3]),
        (11, None),
    ],
)  # fmt: skip
def test_as_few_leave_as_possible_and_of_those_the_smallest(needed: int, leave: list[int] | None) -> None:
    running = {UUID(int=number): Candidate(UUID(int=number), size, number) for number, size in SIZES.items()}

    def fits(gone: Collection[UUID]) -> bool:
        return sum(running[one].memory_bytes for one in gone) >= needed

    found = victims(list(running.values()), fits)
    assert (sorted(one.int for one in found) if found is not None else None) == leave


def test_of_equals_the_older_one_leaves() -> None:
    found = victims([Candidate(UUID(int=2), 5, 2), Candidate(UUID(int=1), 5, 1)], bool)
    assert found == [UUID(int=1)]


def test_many_runs_are_not_tried_in_every_combination() -> None:
    running = [Candidate(UUID(int=number), 1, number) for number in range(1, 41)]
    asked = 0

    def fits(gone: Collection[UUID]) -> bool:
        nonlocal asked
        asked += 1
        return len(gone) == len(running)

    assert len(victims(running, fits) or []) == len(running)
    assert asked < 3000
