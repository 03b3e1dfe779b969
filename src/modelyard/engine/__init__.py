"""vLLM: what an engine is, takes and says. Nobody above knows a flag, an endpoint or an error message of it.

- to start one: `options` (what a request may set), `model_files`, `memory` (what it takes, on a machine), `command`
  (the command line), `socket_dir` (where its socket lies), `attempts` (each start's folder and log)
- once it runs: `running_engine` (its process and client), `client` (asking it), `readiness` (its first answer),
  `silence` (busy or dead), `failures` (why it ended, by `failure_table`)
- adapters on it: `adapter_support` (of which models), `adapter_loading`, checked by `adapter_probes`
- inside it: our `plugins`
"""
