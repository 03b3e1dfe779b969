"""Modelyard: a self-hosted LLM management server.

One process (`modelyard serve`) answers REST, passes requests to engines, and runs jobs; all heavy work is done by
children: downloads on huggingface_hub, engines on vLLM, trainings on PEFT. The rooms, from the top of the import order
down:

cli, doctor, demo   the command line; demo is a client like any other
server              the process: a listening socket, an event loop, an end in good order
app                 wires everything: routes, middleware, lifespan, answers to errors
services            what routes share, made by the application when it starts
health              /health, /ready, /metrics
export              models and adapters as zips, an adapter inside its base too
finetune            trainings: from a dataset and a model to an adapter in service that is known to be better
gateway             the OpenAI-compatible API: requests to engines, bytes back; raw prompts, continued by request id
routing             names and aliases, and the engine that each leads to
deploy              models in service: wishes, one supervisor per deployment
engine              vLLM: its options, memory, command line, client, failures and our plugins in it
capacity            the ledger of memory: who holds how much of which device, and who must leave for whom
models              the store: downloads, checks, imports, removal
trainer             the child that trains: only its spec is the server's business
datasets            conversations to learn from: validated while they arrive, kept in storage
jobs                pieces of work with status, events and log, and the runner that runs them
auth, docs          the gate before every route; Swagger UI and the manual
http                what routes share: either slash, documented errors, limits on bodies
connections         limits on client connections before the key check: header bytes, time, number; their register
foundation          data folder, locks and migrations: what must stand before the server serves
filters             children that read what they are fed, answer once, and are gone
storage             objects: a local folder or S3
processes, keeper   children that are never orphaned
server_lock         the lock of a data folder's one server, by which its children know that it lives
states              state machines on rows, with their history
db                  sessions on SQLite and PostgreSQL
settings, tasks     configuration; background tasks that cannot fail in silence
bodies              request bodies as they come: gzip, byte order marks, UTF-16, half surrogates
client_watch        requests whose client went away are given up
file_headers        ranges and names of files that are handed out
outages             database outages: which errors pass, and how work waits for the database
retry               pauses between tries, and the loop around work that may fail for a while
paths               the only join of a folder and a name from elsewhere
private_files       the data folder closed to other users: umask and modes
hardware            GPUs, processors, and the memory that the machine or the container has left
log_limits          a bound on log lines that clients cause
evidence            lines of a log that may be shown: no secrets, no paths
signals             who is called after a commit, by what it wrote
errors              every error that a client can see

A request writes what is wanted; one background task per thing makes it so and writes what is; requests read it.
"""

__version__ = "0.1.0"
