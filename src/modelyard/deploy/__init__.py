"""Deployments: models in service.

A request writes what is wanted (`actions`, and `succession`: who leaves for whom): a `Deployment` row and its DEPLOY
job, which runs for as long as the model is in service. One `Service` per deployment, the job's function by way of the
`supervisor`, makes it so on vLLM and writes what is, in its `record`; `steps` decides what it does next.

- to start an engine: `fitting` (may it start now), `fit` (what it takes, of `hardware`), `vllm_args` (the command),
  `attempts` (each start's folder and log), `scratch` (where its socket lies), `failures` (why it failed), `promises`
  (memory that is left free for other rooms)
- whether it is ready: `readiness` (its first answer)
- while it runs: `running_engine` (its process and client), `engine_client` (asking it), `silence` (busy or dead),
  `adapter_changes` and `loading` (adapters come, checked by `adapter_probes`), `draining` (requests and adapters go)
- inside it: our vLLM plugins (`*_plugin`), whose effect is checked by `cures`
- for requests: `routing` (which engine serves a name, by a `snapshot`; in an outage of the database the one
  `last_known`), `aliases`, `admission` (what is refused before it is wanted)
"""
