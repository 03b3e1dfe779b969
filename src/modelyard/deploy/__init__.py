"""Deployments: models in service.

A request writes what is wanted (`actions`, and `succession`: who leaves for whom): a `Deployment` row and its DEPLOY
job, which runs for as long as the model is in service. One `Service` per deployment, the job's function by way of the
`supervisor`, makes it so on an `engine` and writes what is, in its `record`; `steps` decides what it does next.

- to start an engine: `fitting` (may it start now, and with which memory)
- while it runs: `adapter_changes` (adapters come), `draining` (requests and adapters go)
- for requests: `routing` (which engine serves a name, by a `snapshot`; in an outage of the database the one
  `last_known`), `aliases`, `admission` (what is refused before it is wanted)
"""
