"""Forks trainers, each a real process that runs the whole of `python -m modelyard.trainer`, without its imports' time.

On standard input, lines `{"spec", "log"}`; on standard output a line `{"pid"}` when it has started and a line
`{"pid", "status"}` (as os.waitpid says it) when it has ended. One at a time. This process itself multiplies nothing,
so that the trainers find OpenMP as a fresh process would; it ends with its standard input.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Import what every training does, then fork for each line."""
    from modelyard.trainer.__main__ import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import modelyard.trainer.evaluation
    import modelyard.trainer.loop
    import modelyard.trainer.rows  # noqa: F401
    from modelyard.trainer.__main__ import main as train

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            handle = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            for name, value in order.get("limits", {}).items():
                import resource

                resource.setrlimit(getattr(resource, name), (value, value))
            train([order["spec"]])
            os._exit(3)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"pid": pid, "status": status}), flush=True)


if __name__ == "__main__":
    main()
