"""The demo's HTTP: each request is one object, which is both sent and printed as the curl command that does the same.

Blocking, on the standard library's client. Everything that can go wrong becomes a `DemoFailed` with a sentence for
the user.
"""

from __future__ import annotations

import http.client
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from modelyard.evidence import in_words

TIMEOUT_S = 60.0
BOUNDARY = "modelyard-demo-5b0d3c1f"


class DemoFailed(Exception):
    """The demo cannot go on; the message says why, and what to do."""


@dataclass(frozen=True)
class Call:
    """A request to the server."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    streams: bool = False
    #: Sent as the form field `file`.
    file: Path | None = None

    def curl(self, base_url: str, *, with_key: bool) -> str:
        """Return the command that sends this request, to be pasted into a shell. Names the key, never shows it."""
        words = ["curl"]
        if self.streams:
            words.append("-N")
        if self.method != "GET":
            words += ["-X", self.method]
        words.append(shlex.quote(base_url + self.path))
        if with_key:
            words.append('-H "Authorization: Bearer $MODELYARD_ADMIN_KEY"')
        if self.body is not None:
            words += ["-H", shlex.quote("Content-Type: application/json")]
            words += ["-d", shlex.quote(json.dumps(self.body, ensure_ascii=False))]
        if self.file is not None:
            words += ["-F", shlex.quote(f"file=@{self.file}")]
        return " ".join(words)


class Client:
    """A Modelyard server at an address such as http://127.0.0.1:8080."""

    def __init__(self, base_url: str, key: str | None) -> None:
        self.base_url = base_url
        self.key = key

    def curl(self, call: Call) -> str:
        """Return the curl command of a call to this server."""
        return call.curl(self.base_url, with_key=self.key is not None)

    def json(self, call: Call, *, timeout_s: float = TIMEOUT_S) -> Any:
        """Send a call and return the JSON of its answer.

        Raises:
            DemoFailed: the server can't be reached, or refuses.
        """
        connection, response = self._send(call, timeout_s)
        try:
            return _parsed(response.read())
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    def events(self, call: Call) -> Iterator[tuple[str, str]]:
        """Send a call whose answer is a stream of server-sent events; yield the name and data of each.

        Raises:
            DemoFailed: the server can't be reached, refuses, or breaks off.
        """
        connection, response = self._send(call, TIMEOUT_S)
        try:
            name = "message"
            while line := response.readline():
                field, _, value = line.decode("utf-8", "replace").rstrip("\r\n").partition(": ")
                if field == "event":
                    name = value
                elif field == "data":
                    yield name, value
                elif not field:
                    name = "message"
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    def _send(self, call: Call, timeout_s: float) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(urlsplit(self.base_url).netloc, timeout=timeout_s)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key is not None else {}
        body = None
        if call.body is not None:
            headers["Content-Type"] = "application/json"
            body = json.dumps(call.body).encode()
        elif call.file is not None:
            headers["Content-Type"] = f"multipart/form-data; boundary={BOUNDARY}"
            body = _form(call.file)
        try:
            connection.request(call.method, call.path, body, headers)
            response = connection.getresponse()
            if response.status >= 400:
                raise DemoFailed(_refusal(call, response.status, response.read()))
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._unreachable(error) from error
        except DemoFailed:
            connection.close()
            raise
        return connection, response

    def _unreachable(self, error: Exception) -> DemoFailed:
        return DemoFailed(f"The server at {self.base_url} does not answer: {in_words(error)}.")


def _form(file: Path) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{file.name}"\r\n\r\n'
    return head.encode() + file.read_bytes() + f"\r\n--{BOUNDARY}--\r\n".encode()


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        raise DemoFailed(f"What answers is no Modelyard server; it said: {body[:200]!r}.") from None


def _refusal(call: Call, status: int, body: bytes) -> str:
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = body[:500].decode("utf-8", "replace")
    if status == 401:
        message += " Set MODELYARD_ADMIN_KEY to the server's key."
    return f"{call.method} {call.path} was refused ({status}): {message}"
