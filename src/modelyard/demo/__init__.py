"""The run of `modelyard demo`: a client of the server like any other, and the tiny models that it may show.

`run.py` takes the steps, `tuning.py` those with a dataset and an adapter, `client.py` sends (and prints as curl) the
requests, `server.py` finds or starts the server, `terminal.py` prints. `tiny_llama.py` runs in a child and makes a
model on the spot, so that the demo works with no network. Nothing here imports the application: what the demo can do,
any client can.
"""
