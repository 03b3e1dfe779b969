"""The readiness probe of one start of an engine: one short piece of real work, and the verdict on its answer.

Ready means that the engine answered with finite numbers. An answer that cannot change (the engine refuses the request
or the model, or computes NaN) ends the start at once with the engine's own words; an engine that is on its way, busy or
silent is asked again. Nothing is written here.
"""

from __future__ import annotations

import time

from modelyard.engine.client import EngineClient, Wrong
from modelyard.errors import JobFailure

#: An engine that says it is well and answers the probe with an error of its own (500) for so long will go on so.
FAILING_S = 10.0


class Readiness:
    """Asks one engine for its first answer. `complaint`: what was wrong with the last one."""

    def __init__(self, model_id: str, task: str) -> None:
        self.complaint = ""
        self._model_id = model_id
        self._task = task
        self._failing_since: float | None = None

    async def works(self, client: EngineClient, timeout_s: float) -> bool:
        """Return whether the engine does its work; False: ask again later.

        Raises:
            JobFailure: `model_gives_nan` or `engine_refuses`: it never will.
        """
        wrong = await client.generates(self._model_id, self._task, timeout_s)
        if wrong is None:
            return True
        self.complaint = wrong.message
        if wrong.is_not_finite:
            raise self._not_finite(wrong)
        if wrong.is_final or self._keeps_failing(wrong):
            raise self._refused(wrong)
        return False

    def never_ready(self, timeout_s: float, evidence: tuple[str, ...]) -> JobFailure:
        """Return the failure of an engine that took too long."""
        said = f"; its answer was {self.complaint}." if self.complaint else "."
        return JobFailure(
            "engine_never_ready",
            f"The engine did not generate a token within {timeout_s:.0f} s{said}",
            "Read the job's log; a large model may need a longer MODELYARD_ENGINE_START_TIMEOUT_S.",
            evidence,
        )

    def _keeps_failing(self, wrong: Wrong) -> bool:
        if wrong.status < 500 or wrong.status == 503:
            self._failing_since = None
            return False
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        return now - self._failing_since >= FAILING_S

    def _not_finite(self, wrong: Wrong) -> JobFailure:
        return JobFailure(
            "model_gives_nan",
            f"{self._model_id} loads, but computes no numbers: {wrong.message}. It would answer every prompt with the "
            "same meaningless token.",
            "Weights that are missing or damaged do this: delete the model and add it again, or choose another "
            "revision. So does a number format that is too small for it: if options.dtype is float16, try bfloat16 or "
            "float32.",
            (wrong.message,),
        )

    def _refused(self, wrong: Wrong) -> JobFailure:
        work = "to embed one word" if self._task == "embed" else "to continue a prompt of one word"
        return JobFailure(
            "engine_refuses",
            f"The engine loaded {self._model_id} and then refused {work}: {wrong.message}",
            "The model is not of a kind that can be served in this way, or its configuration does not fit it: "
            "GET /api/v1/jobs/<id>/log has all that the engine wrote.",
            (wrong.message,),
        )
