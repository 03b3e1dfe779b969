"""The gateway: what clients ask of models in service, answered by the engine that serves the model.

Two lanes. `relay` passes OpenAI's and Anthropic's interface on: a body is read once, `model` is looked up, what no
engine should see is refused, and bytes flow to the engine's socket and back. Only the paths in `routes.PASSAGES` go
this way. `raw` generates text from raw prompts, one or many at once, and continues it by request id: requests in
`raw_schemas`, one text's turn in `raw_turns`, a request's texts in `raw_work`, questions to vLLM in `raw_engine`, beam
search in `beam_search` (pure) and `raw_beams` (on an engine).

Refused before an engine sees it: `media` (addresses to fetch), `limits` and `schema_cost` (what would cost others).
An engine's errors pass through `engine_words`.

A client that goes away ends its generation; an engine that dies in the middle breaks the transfer instead of ending it
as if complete. No state is kept that a second process could not read from the database: `deploy` says which engine
serves a name, and `continuations`, the one thing that is written here, holds texts that can go on (`kept_texts`: also
while the database is away).
"""
