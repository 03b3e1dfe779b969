"""Deployments: models in service.

A request writes what is wanted (`actions`, and `succession`: who leaves for whom): a `Deployment` row and its DEPLOY
job, which runs for as long as the model is in service. One `Service` per deployment, the job's function by way of the
`supervisor`, makes it so on an `engine` and writes what is, in its `record`; `steps` decides what it does next.

- to start an engine: `fitting` (may it start now, and with which memory)
- while it runs: `adapter_changes` (adapters come), `draining` (requests and adapters go)
- for requests: `open_requests` (which an engine still has), `admission` (what is refused before it is wanted)
"""
