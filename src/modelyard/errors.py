"""Every error that a client can see, as one drawn tree.

    ModelyardError                  500 internal_error
    ├── BadRequest                  400 bad_request
    │   └── InvalidJson             400 invalid_json
    ├── Unauthorized                401 unauthorized
    ├── Forbidden                   403 forbidden
    │   ├── HostNotAllowed          403 host_not_allowed
    │   ├── OriginNotAllowed        403 origin_not_allowed
    │   ├── ContentTypeNotAllowed   403 content_type_not_allowed
    │   └── UploadRefused           403 upload_refused
    ├── NotFound                    404 not_found
    │   ├── ModelNotFound           404 model_not_found
    │   ├── JobNotFound             404 job_not_found
    │   ├── ObjectNotFound          404 object_not_found
    │   ├── DatasetNotFound         404 dataset_not_found
    │   ├── DeploymentNotFound      404 deployment_not_found
    │   ├── AttemptNotFound         404 attempt_not_found
    │   ├── AliasNotFound           404 alias_not_found
    │   ├── FinetuneNotFound        404 finetune_not_found
    │   ├── NoFinetune              404 no_finetune
    │   └── NothingDeployed         404 nothing_deployed
    ├── MethodNotAllowed            405 method_not_allowed
    ├── RequestTooSlow              408 request_timeout
    ├── Conflict                    409 conflict
    │   ├── IllegalMove             409 illegal_move
    │   ├── JobFinished             409 job_finished
    │   ├── DeploymentEnded         409 deployment_ended
    │   ├── AliasTaken              409 alias_taken
    │   ├── NothingToRollBack       409 nothing_to_roll_back
    │   ├── ModelInUse              409 model_in_use
    │   ├── ModelLost               409 model_lost
    │   ├── DatasetInUse            409 dataset_in_use
    │   ├── FinetuneActive          409 finetune_active
    │   └── FinetuneDone            409 finetune_done
    ├── TooLarge                    413 body_too_large
    ├── EncodingNotAllowed          415 encoding_not_allowed    (with Accept-Encoding)
    ├── RangeNotSatisfiable         416 range_not_satisfiable   (with Content-Range)
    ├── Unprocessable               422 invalid_value
    │   ├── InvalidDataset          422 invalid_dataset     (with the report, where there is one)
    │   └── NotTrainable            422 not_trainable
    ├── HeadersTooLarge             431 headers_too_large
    ├── BadGateway                  502 engine_failed
    ├── UnsafePath                  500 unsafe_path
    └── Unavailable                 503 unavailable         (with Retry-After)
        ├── DatabaseUnavailable     503 database_unavailable
        ├── EngineStarting          503 engine_starting
        ├── StorageUnavailable      503 storage_unavailable
        ├── OutOfFiles              503 too_many_open_files
        ├── TooManyConnections      503 too_many_connections
        ├── TooManyFollowers        503 too_many_followers
        └── TooManyUploads          503 too_many_uploads

The application maps the tree to HTTP once (`http.error_response`). A message speaks to the user (what,
where, what to do), the code to a program (stable), and the log line with its cause to the operator.

`JobFailure` and `StartRefused` stand beside the tree: the recorded end of a job and that of a start, not the
answer to a request.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Any

from modelyard.plurals import counted


def storable(text: str) -> str:
    """Return a text that UTF-8 and every database can hold: without half surrogates and NUL."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\x00", "\ufffd")


#: Names that an error tells.
SHOWN_NAMES = 20


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN_NAMES]) + (" and others" if len(names) > SHOWN_NAMES else "")


class ModelyardError(Exception):
    """Base of all errors with an HTTP answer. `param` names the field or parameter at fault, if one is.

    `evidence` are lines that show it, as a job's failure has them (`JobFailure`); the answer has them if there are any.
    """

    status = 500
    code = "internal_error"
    evidence: tuple[str, ...] = ()

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        message = storable(message)
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    @property
    def type(self) -> str:
        """The error family as OpenAI's clients know it."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 403:
            return "permission_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def envelope(self) -> dict[str, Any]:
        """Return the body of the answer: `{"error": {"message", "type", "param", "code"}}`, and `evidence` if any."""
        error: dict[str, Any] = {
            "message": self.message, "type": self.type, "param": self.param, "code": self.code
        }  # fmt: skip
        return {"error": error | ({"evidence": list(self.evidence)} if self.evidence else {})}


class BadRequest(ModelyardError):
    status = 400
    code = "bad_request"


class InvalidJson(BadRequest):
    code = "invalid_json"


class Unauthorized(ModelyardError):
    status = 401
    code = "unauthorized"


class Forbidden(ModelyardError):
    status = 403
    code = "forbidden"


class HostNotAllowed(Forbidden):
    code = "host_not_allowed"


class OriginNotAllowed(Forbidden):
    code = "origin_not_allowed"


class ContentTypeNotAllowed(Forbidden):
    code = "content_type_not_allowed"


class UploadRefused(Forbidden):
    """A signed upload URL that was changed, has expired or is for something else."""

    code = "upload_refused"


class NotFound(ModelyardError):
    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """No such model in the store, or none such in service; `known` are the names that would have worked.

    The first `SHOWN_NAMES` of these are said, and that there are others: pass one more than that where there are many.
    """

    code = "model_not_found"

    def __init__(
        self, model_id: str, *, where: str = "in the store", known: Sequence[str] = (), hint: str = "",
        what: str = "model", param: str | None = None,
    ) -> None:  # fmt: skip
        names = f"there are: {_listed(known)}" if known else "there are none"
        # A caller's text: no name is longer, and what is longer is in nobody's log and answer.
        shown = model_id if len(model_id) <= 256 else f"{model_id[:256]}..."
        message = f"There is no {what} '{shown}' {where}; {names}."
        param = param or ("model_id" if where == "in the store" else "model")
        super().__init__(f"{message} {hint}".strip(), param=param)


class JobNotFound(NotFound):
    code = "job_not_found"

    def __init__(self, job_id: object, *, param: str = "job_id") -> None:
        super().__init__(f"There is no job {job_id}. GET /api/v1/jobs/ lists them.", param=param)


class ObjectNotFound(NotFound):
    code = "object_not_found"

    def __init__(self, key: str) -> None:
        super().__init__(f"There is no object '{key}' in the storage.")


class DatasetNotFound(NotFound):
    code = "dataset_not_found"

    def __init__(self, dataset_id: object, *, param: str = "dataset_id") -> None:
        super().__init__(f"There is no dataset {dataset_id}. GET /api/v1/datasets/ lists them.", param=param)


class DeploymentNotFound(NotFound):
    code = "deployment_not_found"

    def __init__(self, deployment_id: object, *, param: str = "deployment_id") -> None:
        super().__init__(f"There is no deployment {deployment_id}. GET /api/v1/deployments/ lists them.", param=param)


class AttemptNotFound(NotFound):
    code = "attempt_not_found"

    def __init__(self, number: int, known: int) -> None:
        there = f"its engine was started {known} times" if known != 1 else "its engine was started once"
        super().__init__(f"The deployment has no attempt {number}: {there}.", param="number")


class AliasNotFound(NotFound):
    code = "alias_not_found"

    def __init__(self, name: str, *, known: Sequence[str] = ()) -> None:
        names = f"; there are: {_listed(known)}" if known else ""
        super().__init__(f"There is no alias '{name}'{names}.", param="name")


class FinetuneNotFound(NotFound):
    code = "finetune_not_found"

    def __init__(self, finetune_id: object, *, param: str = "finetune_id") -> None:
        super().__init__(f"There is no training {finetune_id}. GET /api/v1/finetune/ lists them.", param=param)


class NoFinetune(NotFound):
    code = "no_finetune"

    def __init__(self) -> None:
        super().__init__("Nothing was trained yet. POST /api/v1/finetune/ starts a training.")


class NothingDeployed(NotFound):
    code = "nothing_deployed"

    def __init__(self, last_failure: str = "") -> None:
        super().__init__(f"No model is deployed. POST /api/v1/deploy/ deploys one. {last_failure}".strip())


class MethodNotAllowed(ModelyardError):
    status = 405
    code = "method_not_allowed"


class RequestTooSlow(ModelyardError):
    """The client did not send the rest of its request in time."""

    status = 408
    code = "request_timeout"


class Conflict(ModelyardError):
    status = 409
    code = "conflict"


class IllegalMove(Conflict):
    """A state machine was asked for a move that its table does not have, or a row has moved meanwhile."""

    code = "illegal_move"


class JobFinished(Conflict):
    code = "job_finished"

    def __init__(self, job_id: object, status: str) -> None:
        super().__init__(f"Job {job_id} has ended already ({status}): there is nothing to interrupt.")


class DeploymentEnded(Conflict):
    code = "deployment_ended"

    def __init__(self, deployment_id: object, state: str) -> None:
        super().__init__(f"Deployment {deployment_id} has ended already ({state}).")


class AliasTaken(Conflict):
    """An alias may not have the name of a model or an adapter: nobody could tell which is meant."""

    code = "alias_taken"

    def __init__(self, name: str, *, param: str = "name") -> None:
        super().__init__(f"'{name}' is a model or an adapter in the store: give the alias another name.", param=param)


class NothingToRollBack(Conflict):
    code = "nothing_to_roll_back"

    def __init__(self, name: str) -> None:
        super().__init__(f"No move of the alias '{name}' is known that has not been taken back already.", param="name")


class ModelInUse(Conflict):
    code = "model_in_use"


class ModelLost(Conflict):
    """The store has a model's row, and its files are gone from the data folder."""

    code = "model_lost"

    def __init__(self, model_id: str, hint: str) -> None:
        super().__init__(f"{model_id} is lost: its files are not in the data folder any more. {hint}", param="model_id")


class DatasetInUse(Conflict):
    code = "dataset_in_use"


class FinetuneActive(Conflict):
    code = "finetune_active"

    def __init__(self, finetune_id: object, status: str) -> None:
        super().__init__(
            f"Training {finetune_id} has not ended ({status}): wait for it, or interrupt its job first.",
            param="finetune_id",
        )


class FinetuneDone(Conflict):
    code = "finetune_done"

    def __init__(self, finetune_id: object, adapter_id: str) -> None:
        super().__init__(
            f"Training {finetune_id} has done its work: its adapter is '{adapter_id}'. POST /api/v1/finetune/ starts "
            "another one.",
            param="finetune_id",
        )


class TooLarge(ModelyardError):
    status = 413
    code = "body_too_large"


class EncodingNotAllowed(ModelyardError):
    """A body that is packed in a way that is not unpacked here; the answer says which one is."""

    status = 415
    code = "encoding_not_allowed"

    def __init__(self, encoding: str, *, accepted: str = "gzip") -> None:
        instead = f"as it is, or with Content-Encoding: {accepted}" if accepted != "identity" else "as it is"
        super().__init__(f"A body with Content-Encoding: {encoding} is not read here. Send it {instead}.",
                         param="Content-Encoding")  # fmt: skip
        self.accepted = accepted


class RangeNotSatisfiable(ModelyardError):
    """None of the bytes that were asked for exist; the answer says how many there are."""

    status = 416
    code = "range_not_satisfiable"

    def __init__(self, size_bytes: int) -> None:
        super().__init__(f"There is no such part: the file has {counted(size_bytes, 'byte')}.", param="Range")
        self.size_bytes = size_bytes


class Unprocessable(ModelyardError):
    status = 422
    code = "invalid_value"


class InvalidDataset(Unprocessable):
    """A file that cannot be learnt from. With a `report`, the answer has it beside the error."""

    code = "invalid_dataset"

    def __init__(self, message: str, *, report: Mapping[str, Any] | None = None, code: str | None = None) -> None:
        super().__init__(message, param="file", code=code)
        self.report = report

    def envelope(self) -> dict[str, Any]:
        """Return the body of the answer, with the report."""
        return super().envelope() | ({"report": self.report} if self.report is not None else {})


class NotTrainable(Unprocessable):
    """A model that no adapter can be trained for, or none that could be served; the message says why."""

    code = "not_trainable"


class UnsafePath(ModelyardError):
    """A stored or reported name leads out of the folder that it belongs to: nothing was read or changed."""

    code = "unsafe_path"

    def __init__(self, name: str, folder: str) -> None:
        super().__init__(
            f"{ascii(name)[:200]} leads out of the folder '{folder}' that it belongs to, or names nothing in it. "
            "Nothing was touched: the data folder or the database may have been changed by hand."
        )


class BadGateway(ModelyardError):
    status = 502
    code = "engine_failed"


class HeadersTooLarge(ModelyardError):
    """The request line and the headers are longer than is allowed, or more."""

    status = 431
    code = "headers_too_large"

    def __init__(self, limit_kib: int) -> None:
        super().__init__(
            f"The request's address and headers are more than {limit_kib} KiB or 256 headers. "
            "MODELYARD_MAX_HEADER_KIB sets the limit of this server."
        )


class Unavailable(ModelyardError):
    """Not now: `retry_after_s` becomes the Retry-After header."""

    status = 503
    code = "unavailable"

    def __init__(self, message: str, *, retry_after_s: int = 5, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class DatabaseUnavailable(Unavailable):
    """The database does not answer; `database_locked`, `database_full` and `database_read_only` are codes of it."""

    code = "database_unavailable"

    def __init__(self, message: str = "", *, code: str | None = None) -> None:
        away = "The database does not answer. The server's log has the cause; GET /ready tells when it does."
        super().__init__(message or away, code=code)


class EngineStarting(Unavailable):
    code = "engine_starting"


class OutOfFiles(Unavailable):
    code = "too_many_open_files"

    def __init__(self) -> None:
        super().__init__(
            "The server has as many files and connections open as its limit allows. Try again; if this goes on, raise "
            "the limit (ulimit -n, or LimitNOFILE of a systemd unit)."
        )


def is_out_of_files(error: BaseException) -> bool:
    """Return whether an error means that this process, or the machine, has too many files open."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


class TooManyConnections(Unavailable):
    code = "too_many_connections"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"This server takes {counted(limit, 'connection')} at a time, and all are in use: close some. "
            "MODELYARD_MAX_CONNECTIONS and the limit of open files (ulimit -n) set how many there are."
        )


class TooManyFollowers(Unavailable):
    code = "too_many_followers"

    def __init__(self, fact: str, setting: str) -> None:
        super().__init__(
            f"{fact} already, as many as {setting} allows. Ask for its status instead, or with follow=false.",
            retry_after_s=10,
        )


class TooManyUploads(Unavailable):
    code = "too_many_uploads"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"MODELYARD_MAX_UPLOADS allows {counted(limit, 'upload')} at a time: upload it when one has ended."
        )


class StorageUnavailable(Unavailable):
    """The store of objects cannot be reached, refuses us, is misconfigured or full; the message says which."""

    code = "storage_unavailable"


class JobFailure(Exception):
    """A job ends as FAILED: `code` for programs, `message` in one sentence, `hint` says what to do.

    `evidence` are the few lines of a log that show it (`evidence.clipped`). The texts may quote a stranger's file:
    what no database or answer can hold is replaced.
    """

    def __init__(self, code: str, message: str, hint: str = "", evidence: Sequence[str] = ()) -> None:
        message = storable(message)
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = storable(hint)
        self.evidence = tuple(map(storable, evidence))


class StartRefused(Exception):
    """The server cannot start as configured; the message is the one line that the user reads."""
