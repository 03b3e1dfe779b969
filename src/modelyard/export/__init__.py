"""Exports: a model or an adapter leaves as a zip, alone or, an adapter, inside its base.

`exports` says what is in it, and has a trainer child merge where that is asked for; `archive` writes the zip as it is
sent, with its length known before.
"""
