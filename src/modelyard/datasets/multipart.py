"""The one file of a form, as a stream: its bytes are handed on as they come, and kept nowhere.

A form may have other fields beside the file: `mapping` is kept, all others mean nothing here and are passed over, up to
`OTHER_BYTES` with all that is not the file's content. Of a file the first MiB is read ahead, so that in a form with a
small one it does not matter which of the two stands first. What the form says of the file is its name, which never
becomes a path: only what follows the last slash counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from modelyard.errors import BadRequest, TooLarge, Unprocessable

FIELD = "file"
MAPPING = "mapping"
#: What is read of a file before anything is done with it.
AHEAD_BYTES = 1024 * 1024
MAX_NAME_LENGTH = 255
#: Other fields, boundaries and headers of parts, and what lies around them: all that a form may add to its file.
OTHER_BYTES = 64 * 1024
HINT = f"Send it as a form with the field '{FIELD}': curl -F '{FIELD}=@train.jsonl'."


class FormFile:
    """The file in a form's body: `open` reads up to it and its begin, then `name`, `mapping` and `head` are known.

    `chunks` are its bytes, from the first one on.
    """

    def __init__(self, content_type: str, body: AsyncIterable[bytes]) -> None:
        self.name = ""
        self.mapping: str | None = None
        self._body = body.__aiter__()
        self._data: deque[bytes] = deque()
        self._field, self._value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._in_file = self._is_found = self._has_ended = self._is_handed_on = False
        self._text: bytearray | None = None
        self._is_empty = True
        self._other_bytes = 0
        self._parser = MultipartParser(
            _boundary(content_type),
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    async def open(self) -> None:
        """Read up to the file, and the begin of it.

        Raises:
            BadRequest: there is no such field, or a second mapping, or the body is no form.
            TooLarge: too much comes before it.
            Unprocessable: the file has no name, or one that is too long.
        """
        while not self._is_found:
            if not await self._read():
                raise BadRequest(f"The form has no field '{FIELD}'. {HINT}", param=FIELD, code="file_missing")
        while sum(map(len, self._data)) < AHEAD_BYTES and await self._read():
            pass

    def head(self, size_bytes: int) -> bytes:
        """Return so many of the file's first bytes, or all of them; only before the first chunk is taken."""
        begin = b""
        for piece in self._data:
            begin += piece[: size_bytes - len(begin)]
            if len(begin) == size_bytes:
                break
        return begin

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Yield the file's bytes, and read the form to its end.

        Raises:
            BadRequest: a second file, a mapping that comes too late, or the body ends before the form does.
            TooLarge: the form has too much beside the file.
        """
        self._is_handed_on = True
        while True:
            while self._data:
                yield self._data.popleft()
            if not await self._read():
                return

    async def _read(self) -> bool:
        """Parse what comes next; False at the end of the body."""
        chunk = await anext(self._body, None)
        self._is_empty = self._is_empty and not chunk
        if chunk is None:
            if not self._has_ended and not self._is_empty:
                raise BadRequest(f"The form ends in the middle: its last boundary is missing. {HINT}", code="bad_form")
            return False
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise BadRequest(
                f"The body is not the form that its header says: {error}. {HINT}", code="bad_form"
            ) from None
        self._other_bytes += len(chunk)
        if self._other_bytes > OTHER_BYTES:
            raise TooLarge(
                f"The form has more than {OTHER_BYTES // 1024} KiB beside the file. {HINT}", code="form_too_large"
            )
        return True

    def _on_part_begin(self) -> None:
        self._headers, self._field, self._value = {}, b"", b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field, self._value = b"", b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b"").decode("latin-1"))
        self._in_file = options.get(b"name") == FIELD.encode()
        if options.get(b"name") == MAPPING.encode():
            if self._is_handed_on:
                raise BadRequest(
                    f"The field '{MAPPING}' comes after the file: put it in front, as in curl -F '{MAPPING}=...' "
                    f"-F '{FIELD}=@FILE'.",
                    param=MAPPING,
                    code="mapping_after_file",
                )
            if self.mapping is not None:
                raise BadRequest(
                    f"The form has the field '{MAPPING}' more than once: put all of it into one JSON object.",
                    param=MAPPING,
                    code="more_than_one_mapping",
                )
            self._text = bytearray()
        if not self._in_file:
            return
        if self._is_found:
            raise BadRequest(
                f"The form has the field '{FIELD}' more than once: upload one file at a time.",
                param=FIELD,
                code="more_than_one_file",
            )
        name = options.get(b"filename")
        if name is None:
            raise BadRequest(
                f"The field '{FIELD}' is text, not a file. {HINT} (Mind the '@'.)", param=FIELD, code="file_missing"
            )
        self.name = file_name(name)
        self._is_found = True

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._data.append(data[start:end])
            self._other_bytes -= end - start
        elif self._text is not None:
            self._text += data[start:end]

    def _on_part_end(self) -> None:
        self._in_file = False
        if self._text is not None:
            self.mapping, self._text = self._text.decode("utf-8", "replace"), None

    def _on_end(self) -> None:
        self._has_ended = True


def file_name(sent: bytes) -> str:
    """Return the name of a file as it may be shown and kept: the last part of a path, without control characters.

    Raises:
        BadRequest: nothing is left of it.
        Unprocessable: it is too long.
    """
    name = sent.decode("utf-8", "replace").replace("%22", '"').replace("\\", "/").rpartition("/")[2]
    name = "".join(char for char in name if char.isprintable()).strip()
    if name in ("", ".", ".."):
        raise BadRequest(f"The file in the form has no name: choose a file. {HINT}", param=FIELD, code="file_missing")
    if len(name) > MAX_NAME_LENGTH:
        raise Unprocessable(
            f"The file's name has {len(name)} characters; {MAX_NAME_LENGTH} are allowed: rename it.",
            param=FIELD,
            code="name_too_long",
        )
    return name


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        shown = f"The content type says {content_type[:100]!r}," if content_type else "There is no content type,"
        raise BadRequest(f"{shown} not multipart/form-data. {HINT}", code="not_a_form")
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 200:
        raise BadRequest(
            "The content type has no boundary: let the client that makes the form set the header "
            f"'Content-Type: multipart/form-data; boundary=...'. {HINT}",
            code="boundary_missing",
        )
    return boundary
