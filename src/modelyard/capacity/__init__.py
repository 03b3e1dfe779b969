"""Capacity: the one ledger of memory, of which device of which node, and who holds it.

Whoever starts something that takes memory for longer than a moment (an engine, a training, the run of a plan or of a
merge) writes a reservation first (`reservations`, on the table of `tables`), and everybody works out what is left from
all of them (`ledger`, without input or output): on each device of its own, within the budget that holds for each.
Hold the supervisor's `sharing_memory` from the look at what is left until the reservation is committed.
"""
