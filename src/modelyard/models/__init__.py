"""Models: what is in the store, and how it gets in and out.

A row stands for a model or an adapter whose folder is whole, verified and scanned; nothing else is ever in a row.
A request writes the wish for a DOWNLOAD job; the job runs `download_child`, which alone speaks to the hub, writes
beside, and moves the folder into place; then the job writes the row. `scan` says what is refused and why.
Engines and trainers read the folders; who deploys what is not known here.
"""
