"""Datasets: files of conversations to learn from, validated while they arrive, and never changed after.

A row stands for a dataset whose file is whole and stored, with its hash and a report of what is in it; a file that
cannot be learnt from is refused with a report that says where. Objects come before their row and go after it, and a
note (`Leftover`) is made before the first and struck after the last: so whatever a crash leaves is found by the next
start, and nothing else is ever removed. `conversations` says what a row means, `validation` reads a whole file,
`inspection` has that done here or, for a large one, by a child, and `intake` brings it in. Who trains on a dataset is
not known here.
"""
