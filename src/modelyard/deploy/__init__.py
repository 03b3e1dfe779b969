"""Deployments: models in service.

A request writes what is wanted: a `Deployment` row and its DEPLOY job, which runs for as long as the model is in
service. One supervisor per deployment, the job's function, makes it so on vLLM (`vllm_args` says with which command)
and writes what is. `routing` tells the gateway which engine serves a name.
"""
