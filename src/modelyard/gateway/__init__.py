"""The gateway: OpenAI's and Anthropic's interface under /v1 and /api/v1, answered by the engine that serves the model.

A request's body is read once, up to a limit; `model` is looked up, what no engine should see is refused, and the bytes
go to the engine's Unix socket. The answer flows back as the engine's own bytes, its errors included. A client that goes
away ends its generation; an engine that dies in the middle breaks the transfer instead of ending it as if complete.

Nothing is written here and no state is kept that a second process could not read from the database: `deploy` says
which engine serves a name. Only the paths in `routes.PASSAGES` ever reach an engine.
"""
