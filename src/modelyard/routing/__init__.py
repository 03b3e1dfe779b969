"""Names, and the engine that each leads to.

The gateway asks the `router` at every request, which answers from a `snapshot` of deployments and `aliases` in memory;
in an outage of the database the one `last_known`. It writes nothing but the wish that an idle deployment wakes.
"""
