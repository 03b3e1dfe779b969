"""An engine that generates nothing: a real process with the HTTP surface of vLLM 0.32 on a Unix socket.

Started through `engine_python` with vLLM's own arguments; it heeds --model, --served-model-name A B, --uds, --runner,
--max-model-len, --enable-lora, --lora-modules, --max-loras and --max-lora-rank, and ignores the rest. Answers take
max_tokens tokens (16 by default) of " tok0 tok1 ...", as Server-Sent Events where the request says `stream`. Their ids
and log probabilities, in completions that ask for them, are the same for a prompt and others for each adapter.

A file `misbehave.json` in the model's folder, or `misbehave` in its generation_config.json, has it misbehave. All keys
are optional:
  starts            list of start numbers (1 is the first) at which the rest holds; absent: at every start
  lacks_cures       ["name"]: plugins of ours that its Python does not have
  record_dir        folder for what it records; absent: the environment's ENGINE_RECORD_DIR, else the socket's folder
  die_at_start      {"stderr": text, "exit_code": 1, "signal": 4, "after_s": 0}: it never binds
  start_delay_s     seconds before it binds its socket
  never             "bind" | "healthy" (/health answers 503) | "complete" (answers /health, generation hangs)
  die_after_s       seconds after its first generation
  hangs             {"after_s": 1.0, "for_s": 3.0, "busy": true, "says": text}: it answers nobody for so long, on the
                    processor all the while or (busy: false) off it, and writes the text to its log before
  die_on_request    number of the generation request (1 is the first) that ends it before a byte is answered
  die_mid_stream    tokens of an answer after which it dies
  exit_code, signal how it dies in service: exit code (default 1) or a signal's number
  last_words        what it writes to its log before it dies in service
  fail              {"status": 500, "message": text, "from_request": 1}: the engine's own error to every generation
  first_token_ms, chunk_ms   pauses before the first token and between tokens
  recites           {"part of a prompt": text, "": text}: completions recite a text, token by token (see recital.py),
                    and end it with "</s>"; a prompt has the first one whose name is in it
  model_folder      where it says that its model lies
  no_logprobs       true: it gives none with a recited text
  stream_error      tokens of a recited stream after which it reports an error, as vLLM does
  gives_nan         true: its log probabilities and embeddings are NaN, which its JSON cannot say (400), as in vLLM
  fail_load         text: no adapter loads, and this is the worker's complaint; {"prefix": text}: none named so does
  slow_load         seconds that it takes to load an adapter
  fail_adapters     {"prefix": text}: a generation with an adapter whose name begins so is the engine's error
  adapter_ignored   ["prefix"]: with adapters whose names begin so it answers just as without
  adapter_weak      ["prefix"]: with those it takes the same tokens, but not with quite the same probabilities
  noise             how much the log probabilities of the same answer differ from one time to the next
  tokenizer_differs position of the first token of a conversation's prompt that is another than it should be
  no_chat_template  true: it makes no prompt of a conversation
  ignore_sigterm    true: SIGTERM does nothing
  grandchild        true: it starts a process in its group that ignores SIGTERM, SIGINT and SIGHUP
  allocate_mib      memory that it takes and touches
  takes             {"folder": path, "bytes": N}: it takes N bytes of each of its GPUs from the imitation of NVML

Adapters are as in vLLM: unloading takes the name away, and what has begun ends whole; no more than --max-loras of them
generate at the same time, and a request for another one waits until one has nothing to do.

Numbers of generation requests count the readiness probe too. It appends JSON lines to `engine-record.jsonl` (read them
with `read_record`): start {number, pid, argv, env, grandchild}, request {number, connection, path, headers, body},
finished {number, status, tokens}, cancelled {number, tokens}, lora {action, name}, stop {signal}.
Nothing here is imported by the server; only the standard library is used.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Run by path and isolated: nothing else is on the search path.
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.servers import recital

RECORD = "engine-record.jsonl"
GENERATION = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"})
POOLING = frozenset({"/v1/embeddings"})
REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout",
           422: "Unprocessable Entity", 429: "Too Many Requests", 500: "Internal Server Error", 501: "Not Implemented",
           503: "Service Unavailable"}  # fmt: skip
GRANDCHILD = (
    "import signal,time\n"
    "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)\n"
    "print('deaf', flush=True)\n"
    "time.sleep(3600)"
)

Json = dict[str, Any]


def read_record(folder: Path, kind: str | None = None) -> list[Json]:
    """Return what an engine recorded in `folder` so far, of one kind of event or of all; nothing yet is no error."""
    try:
        lines = (folder / RECORD).read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    events: list[Json] = [json.loads(line) for line in lines]
    return [event for event in events if kind is None or event["event"] == kind]


class Refused(Exception):
    """An error that vLLM would answer itself."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


class Engine:
    """The process-wide state: who it is, what is loaded, how it misbehaves, what it has seen."""

    def __init__(self, argv: list[str]) -> None:
        options = _options(argv)
        self.model = options["--model"][0]
        self.names = options.get("--served-model-name") or [self.model]
        self.socket = options["--uds"][0]
        self.is_pooling = options.get("--runner") == ["pooling"]
        asked = int((options.get("--max-model-len") or ["-1"])[0])
        self.max_model_len = asked if asked > 0 else 2048  # -1 asks vLLM to find out what fits
        self.has_lora = "--enable-lora" in options and bool(os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"))
        self.max_lora_rank = int((options.get("--max-lora-rank") or ["16"])[0])
        modules = [json.loads(module) for module in options.get("--lora-modules", [])]
        self.loras: dict[str, str] = {module["name"]: module["path"] for module in modules}
        self.max_loras = int((options.get("--max-loras") or ["1"])[0])
        self.has_answered = asyncio.Event()
        self.running: list[str | None] = []  # the adapter of each request that generates
        self.waiting = 0
        self.freed = asyncio.Event()
        self.lora_info: dict[str, float] = {}
        self.prompts = self.ended = 0
        self.connections = 0
        self.requests = 0
        self.generations = 0
        self.tokens = 0
        plan: Json = {}
        file, within = Path(self.model, "misbehave.json"), Path(self.model, "generation_config.json")
        if file.is_file():
            plan = json.loads(file.read_text("utf-8"))
        elif within.is_file():
            plan = json.loads(within.read_text("utf-8")).get("misbehave", {})
        folder = plan.get("record_dir") or os.environ.get("ENGINE_RECORD_DIR") or str(Path(self.socket).parent)
        self.folder = Path(folder)
        self.number = len(read_record(self.folder, "start")) + 1
        self.plan: Json = plan if self.number in plan.get("starts", [self.number]) else {}

    def note_cures(self) -> None:
        """Write down which of the plugins that are named were called, as ours do."""
        if path := os.environ.get("MODELYARD_ENGINE_CURES"):
            names = os.environ.get("VLLM_PLUGINS", "").split(",")
            found = [name for name in names if name not in self.plan.get("lacks_cures", [])]
            Path(path).write_text("".join(json.dumps({"cure": name, "error": None}) + "\n" for name in found), "utf-8")

    def record(self, event: str, **data: object) -> None:
        # One O_APPEND write per line: a reader never sees half of one, and a kill loses nothing.
        line = json.dumps({"event": event, "at": time.time(), **data}) + "\n"
        descriptor = os.open(self.folder / RECORD, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    @asynccontextmanager
    async def slot(self, name: str) -> AsyncIterator[None]:
        """Generate for a name: at once for the base, when few enough adapters generate for one of them."""
        adapter = name if name in self.loras else None
        self.waiting += 1
        try:
            while adapter and len({*self._adapters(), adapter}) > self.max_loras:
                await self.freed.wait()
        finally:
            self.waiting -= 1
        self.running.append(adapter)
        self.lora_info[",".join(self._adapters())] = time.time()
        try:
            yield
            self.ended += 1
        finally:
            self.running.remove(adapter)
            self.lora_info[",".join(self._adapters())] = time.time()
            self.freed.set()
            self.freed = asyncio.Event()

    def _adapters(self) -> list[str]:
        return list(dict.fromkeys(name for name in self.running if name is not None))

    def die(self) -> None:
        if words := self.plan.get("last_words"):
            say(words)
        if number := self.plan.get("signal"):
            os.kill(os.getpid(), number)
        os._exit(int(self.plan.get("exit_code", 1)))


def say(text: str) -> None:
    """Write a line where vLLM logs."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _options(argv: list[str]) -> dict[str, list[str]]:
    """Read `--name value value` and `--name=value`; a bare flag has an empty list."""
    options: dict[str, list[str]] = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            options[name] = [value] if equals else []
        else:
            options.setdefault(name, []).append(word)
    return options


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, kept alive; a request at a time, cancelled when the peer goes away."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        engine.connections += 1
        self.number = engine.connections
        self.buffer = b""
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.task is None:
            self._next()

    def _next(self) -> None:
        self.task = None
        head, separator, rest = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _version = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        if headers.get("transfer-encoding"):
            raise RuntimeError("a body of unknown length is more than this engine reads")
        if len(rest) < length:
            return
        body, self.buffer = rest[:length], rest[length:]
        work = answer(self, self.engine, method, target.partition("?")[0], headers, body)
        self.task = asyncio.get_running_loop().create_task(work)
        self.task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not self.transport.is_closing():
            task.result()
            self._next()

    def reply(self, status: int, body: bytes, kind: str = "application/json") -> None:
        head = f"HTTP/1.1 {status} {REASONS[status]}\r\nserver: uvicorn\r\ncontent-type: {kind}\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)

    def start_stream(self) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )

    def chunk(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


async def answer(
    link: Connection, engine: Engine, method: str, path: str, headers: dict[str, str], body: bytes
) -> None:
    """Answer one request as vLLM would, or misbehave as planned."""
    if method == "GET":
        status, text, kind = _get(engine, path)
        return link.reply(status, text, kind)
    engine.requests += 1
    number = engine.requests
    said = body.decode("utf-8", "replace")
    engine.record("request", number=number, connection=link.number, path=path, headers=headers, body=said)
    sent = [0]
    try:
        status = await _post(link, engine, path, headers, body, sent)
    except Refused as error:
        status = error.status
        link.reply(status, json.dumps(error.body).encode())
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # vLLM checks every field before it begins. Without an answer, whoever asked would wait for ever.
        status = 400
        link.reply(
            status, json.dumps(Refused(400, f"The request has a field of a wrong type: {error!r}").body).encode()
        )
    except asyncio.CancelledError:
        engine.record("cancelled", number=number, tokens=sent[0])
        raise
    engine.record("finished", number=number, status=status, tokens=sent[0])
    engine.has_answered.set()


def _get(engine: Engine, path: str) -> tuple[int, bytes, str]:
    kind = "application/json"
    if path == "/health":
        return (503 if engine.plan.get("never") == "healthy" else 200), b"", kind
    if path == "/version":
        return 200, b'{"version":"0.32.0"}', kind
    if path == "/v1/models":
        root = engine.plan.get("model_folder", engine.model)
        cards: list[tuple[str, str, str | None]] = [(name, root, None) for name in engine.names]
        cards += [(name, root, engine.names[0]) for name, root in engine.loras.items()]
        data: list[Json] = [
            {"id": name, "object": "model", "created": int(time.time()), "owned_by": "vllm", "root": root,
             "parent": parent, "max_model_len": None if parent else engine.max_model_len, "permission": []}
            for name, root, parent in cards
        ]  # fmt: skip
        return 200, json.dumps({"object": "list", "data": data}).encode(), kind
    if path == "/metrics":
        return 200, _metrics(engine).encode(), "text/plain; version=1.0.0; charset=utf-8"
    return 404, b'{"detail":"Not Found"}', kind


def _metrics(engine: Engine) -> str:
    label = f'{{engine="0",model_name="{engine.names[0]}"}}'
    # As in vLLM: a line for every set of adapters that ever ran together, with the time when it last did.
    adapters = [
        f'vllm:lora_requests_info{{max_lora="{engine.max_loras}",running_lora_adapters="{names}",'
        f'waiting_lora_adapters="{names}"}} {at!r}\n'
        for names, at in engine.lora_info.items()
    ]
    return (
        "# HELP vllm:num_requests_running Number of requests in model execution batches.\n"
        "# TYPE vllm:num_requests_running gauge\n"
        f"vllm:num_requests_running{label} {float(len(engine.running))}\n"
        "# HELP vllm:num_requests_waiting Number of requests waiting to be processed.\n"
        "# TYPE vllm:num_requests_waiting gauge\n"
        f"vllm:num_requests_waiting{label} {float(engine.waiting)}\n"
        "# HELP vllm:prompt_tokens_total Number of prefill tokens processed.\n"
        "# TYPE vllm:prompt_tokens_total counter\n"
        f"vllm:prompt_tokens_total{label} {float(engine.prompts)}\n"
        "# HELP vllm:generation_tokens_total Number of generation tokens processed.\n"
        "# TYPE vllm:generation_tokens_total counter\n"
        f"vllm:generation_tokens_total{label} {float(engine.tokens)}\n"
        "# HELP vllm:request_success_total Count of successfully processed requests.\n"
        "# TYPE vllm:request_success_total counter\n"
        f'vllm:request_success_total{{engine="0",finished_reason="length",model_name="{engine.names[0]}"}} '
        f"{float(engine.ended)}\n"
        "# HELP vllm:lora_requests_info Running stats on lora requests.\n"
        "# TYPE vllm:lora_requests_info gauge\n" + "".join(adapters)
    )


async def _post(
    link: Connection, engine: Engine, path: str, headers: dict[str, str], body: bytes, sent: list[int]
) -> int:
    handler = POSTS.get(path)
    served = path not in GENERATION or (path in POOLING) == engine.is_pooling
    if handler is None or not served or ("lora" in path and not engine.has_lora):
        link.reply(404, b'{"detail":"Not Found"}')
        return 404
    if headers.get("content-type", "").partition(";")[0] != "application/json":
        raise Refused(400, "Unsupported Media Type: Only 'application/json' is allowed")
    try:
        request = json.loads(body)
    except ValueError as error:
        raise Refused(400, f"JSON decode error: {error}") from None
    name = request.get("model")
    if path in GENERATION:
        if name and name not in engine.names and name not in engine.loras:
            raise Refused(404, f"The model `{name}` does not exist.", "NotFoundError", "model")
        await _misbehave(engine, str(name))
        # As vLLM does: the answer names the first served name, or the adapter, never the alias that was asked for.
        request["model"] = name if name in engine.loras else engine.names[0]
        async with engine.slot(request["model"]):
            engine.prompts += 1
            return await handler(link, engine, request, sent)
    return await handler(link, engine, request, sent)


async def _misbehave(engine: Engine, name: str) -> None:
    engine.generations += 1
    for prefix, text in engine.plan.get("fail_adapters", {}).items():
        if name in engine.loras and name.startswith(prefix):
            raise Refused(500, text, "InternalServerError")
    if engine.plan.get("never") == "complete":
        await asyncio.Event().wait()
    if engine.generations == engine.plan.get("die_on_request"):
        engine.die()
    fail = engine.plan.get("fail")
    if fail and engine.generations >= fail.get("from_request", 1):
        raise Refused(fail.get("status", 500), fail.get("message", "planned failure"), "InternalServerError")


async def _generate(engine: Engine, limit: int, sent: list[int], emit: Callable[[str], None] | None) -> str:
    """Make `limit` tokens, one by one; `emit` is called with each as it comes."""
    words = []
    for number in range(limit):
        pause = engine.plan.get("first_token_ms" if number == 0 else "chunk_ms", 0)
        await asyncio.sleep(pause / 1000)
        if number == engine.plan.get("die_mid_stream"):
            engine.die()
        words.append(f" tok{number}")
        sent[0] += 1
        engine.tokens += 1
        if emit is not None:
            emit(words[-1])
    return "".join(words)


def _limit(engine: Engine, request: Json, *fields: str) -> tuple[int, str]:
    asked = next((request[field] for field in fields if request.get(field) is not None), None)
    if asked is None:
        return 16, "stop"
    if not isinstance(asked, int) or asked < 1:
        raise Refused(400, f"{fields[0]} must be at least 1, got {asked}.", param=fields[0])
    if asked > engine.max_model_len:
        raise Refused(400, f"This model's maximum context length is {engine.max_model_len} tokens.", param=fields[0])
    return asked, "length"


def _usage(prompt: object, tokens: int) -> Json:
    before = max(1, len(json.dumps(prompt).split()))
    return {"prompt_tokens": before, "total_tokens": before + tokens, "completion_tokens": tokens}


def _sse(data: Json, event: str | None = None) -> bytes:
    prefix = f"event: {event}\n" if event else ""
    return f"{prefix}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


async def _completions(link: Connection, engine: Engine, request: Json, sent: list[int], *, chat: bool) -> int:
    prompt = request.get("messages" if chat else "prompt")
    if not prompt:
        raise Refused(400, f"{'messages' if chat else 'prompt'}: Field required")
    limit, reason = _limit(engine, request, "max_completion_tokens", "max_tokens")
    kind = "chat.completion" if chat else "text_completion"
    base = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{engine.generations}", "object": kind,
            "created": int(time.time()), "model": request["model"]}  # fmt: skip
    if not request.get("stream"):
        text = await _generate(engine, limit, sent, None)
        choice: Json = {"index": 0, "logprobs": None, "finish_reason": reason, "stop_reason": None}
        choice |= {"message": {"role": "assistant", "content": text, "tool_calls": []}} if chat else {"text": text}
        choices = [choice]
        if not chat and isinstance(request.get("logprobs"), int):
            if engine.plan.get("gives_nan"):
                raise Refused(400, "Out of range float values are not JSON compliant: nan")
            prompts = prompt if isinstance(prompt[0], list) else [prompt]
            choices = [
                {**choice, "index": at, **_tokens(engine, request["model"], one, limit)}
                for at, one in enumerate(prompts)
            ]
        link.reply(200, json.dumps({**base, "choices": choices, "usage": _usage(prompt, limit)}).encode())
        return 200
    base["object"] = "chat.completion.chunk" if chat else kind
    link.start_stream()

    def emit(word: str, finish: str | None = None) -> None:
        part: Json = {"delta": {"content": word}} if chat else {"text": word}
        link.chunk(_sse({**base, "choices": [{"index": 0, **part, "logprobs": None, "finish_reason": finish}]}))

    if chat:
        first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        link.chunk(_sse({**base, "choices": [first]}))
    await _generate(engine, limit, sent, emit)
    emit("", reason)
    if (request.get("stream_options") or {}).get("include_usage"):
        link.chunk(_sse({**base, "choices": [], "usage": _usage(prompt, limit)}))
    link.chunk(b"data: [DONE]\n\n")
    link.transport.write(b"0\r\n\r\n")
    return 200


def _tokens(engine: Engine, name: str, prompt: object, limit: int) -> Json:
    """Return ids and log probabilities of an answer's tokens, as a choice has them."""
    adapter = name.partition("@")[0] if name in engine.loras else ""
    if name.startswith(tuple(engine.plan.get("adapter_ignored", ()))):
        adapter = ""
    is_weak = name.startswith(tuple(engine.plan.get("adapter_weak", ())))
    seed = zlib.crc32(json.dumps([prompt, "" if is_weak else adapter]).encode())
    ids = [(seed >> (number % 16)) % 50_000 + number for number in range(limit)]
    shift = 0.01 if is_weak else random.uniform(0, engine.plan.get("noise", 0))
    logprobs = [-0.1 - (seed >> (number % 8)) % 100 / 100 - shift for number in range(limit)]
    return {"token_ids": ids, "logprobs": {"token_logprobs": logprobs, "tokens": [f"tok{one}" for one in ids]}}


async def _chat(link: Connection, engine: Engine, request: Json, sent: list[int]) -> int:
    return await _completions(link, engine, request, sent, chat=True)


async def _text(link: Connection, engine: Engine, request: Json, sent: list[int]) -> int:
    if "recites" in engine.plan:
        return await _recite(link, engine, request, sent)
    return await _completions(link, engine, request, sent, chat=False)


async def _recite(link: Connection, engine: Engine, request: Json, sent: list[int]) -> int:
    request.setdefault("max_tokens", 16)
    try:
        recital.check(request, engine.max_model_len)
        parts = recital.parts_of(request, engine.plan["recites"], engine.max_model_len)
    except recital.Invalid as error:
        raise Refused(400, error.message, param=error.param) from None
    base = {"id": f"cmpl-{engine.generations}", "object": "text_completion", "created": int(time.time()),
            "model": request["model"]}  # fmt: skip
    streams = bool(request.get("stream"))
    if streams:
        link.start_stream()
    for step in range(max(len(part.ids) for part in parts)):
        pause = engine.plan.get("first_token_ms" if step == 0 else "chunk_ms", 0)
        await asyncio.sleep(pause / 1000)
        if step == engine.plan.get("die_mid_stream"):
            engine.die()
        running = sum(step < len(part.ids) for part in parts)
        sent[0] += running
        engine.tokens += running
        if streams and step == engine.plan.get("stream_error"):
            failure = {"message": "planned failure", "type": "InternalServerError", "param": None, "code": 500}
            link.chunk(_sse({"error": failure}))
            break
        for event in recital.events(base, parts, step) if streams else ():
            link.chunk(event)
    if streams:
        link.chunk(b"data: [DONE]\n\n")
        link.transport.write(b"0\r\n\r\n")
        return 200
    choices = [part.choice(index) for index, part in enumerate(parts)]
    if isinstance(count := request.get("logprobs"), int) and not engine.plan.get("no_logprobs"):
        for part, choice in zip(parts, choices, strict=True):
            choice["logprobs"] = recital.logprobs(part, count, has_adapter=request["model"] in engine.loras)
    usage = _usage(request["prompt"], sum(len(part.ids) for part in parts))
    link.reply(200, json.dumps({**base, "choices": choices, "usage": usage}).encode())
    return 200


async def _embeddings(link: Connection, engine: Engine, request: Json, sent: list[int]) -> int:
    given = request.get("input")
    if not given:
        raise Refused(400, "input: Field required")
    if engine.plan.get("gives_nan"):
        raise Refused(400, "Out of range float values are not JSON compliant: nan")
    texts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    data = [{"index": i, "object": "embedding", "embedding": [1.0, 0.0, float(len(str(text)))]}
            for i, text in enumerate(texts)]  # fmt: skip
    body = {"id": f"embd-{engine.generations}", "object": "list", "created": int(time.time()),
            "model": request["model"], "data": data, "usage": _usage(given, 0)}  # fmt: skip
    link.reply(200, json.dumps(body).encode())
    return 200


async def _responses(link: Connection, engine: Engine, request: Json, sent: list[int]) -> int:
    limit, _reason = _limit(engine, request, "max_output_tokens")
    base = {"id": f"resp_{engine.generations}", "object": "response", "created_at": int(time.time()),
            "model": request["model"], "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}  # fmt: skip
    streaming = bool(request.get("stream"))
    if streaming:
        link.start_stream()
        link.chunk(_sse({"type": "response.created", "response": {**base, "output": []}}, "response.created"))

    def emit(word: str) -> None:
        event = "response.output_text.delta"
        link.chunk(_sse({"type": event, "item_id": "msg_0", "output_index": 0, "delta": word}, event))

    text = await _generate(engine, limit, sent, emit if streaming else None)
    content = [{"type": "output_text", "text": text, "annotations": []}]
    message = {"id": "msg_0", "type": "message", "role": "assistant", "status": "completed", "content": content}
    usage = {"input_tokens": 1, "output_tokens": limit, "total_tokens": limit + 1}
    whole = {**base, "status": "completed", "output": [message], "usage": usage}
    if streaming:
        link.chunk(_sse({"type": "response.completed", "response": whole}, "response.completed"))
        link.transport.write(b"0\r\n\r\n")
    else:
        link.reply(200, json.dumps(whole).encode())
    return 200


async def _messages(link: Connection, engine: Engine, request: Json, sent: list[int]) -> int:
    limit, reason = _limit(engine, request, "max_tokens")
    reason = "max_tokens" if reason == "length" else "end_turn"
    base = {"id": f"msg_{engine.generations}", "type": "message", "role": "assistant", "model": request["model"]}
    usage = {"input_tokens": 1, "output_tokens": limit}
    if not request.get("stream"):
        text = await _generate(engine, limit, sent, None)
        body = {**base, "content": [{"type": "text", "text": text}], "stop_reason": reason, "usage": usage}
        link.reply(200, json.dumps(body).encode())
        return 200
    link.start_stream()

    def event(kind: str, **data: object) -> None:
        link.chunk(_sse({"type": kind, **data}, kind))

    def delta(word: str) -> None:
        event("content_block_delta", index=0, delta={"type": "text_delta", "text": word})

    event("message_start", message={**base, "content": [], "usage": usage})
    event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    await _generate(engine, limit, sent, delta)
    event("content_block_stop", index=0)
    event("message_delta", delta={"stop_reason": reason}, usage=usage)
    event("message_stop")
    link.transport.write(b"0\r\n\r\n")
    return 200


def chat_prompt(messages: list[Json], tools: list[Json] | None = None) -> str:
    """Return what this engine's chat template makes of a conversation."""
    return json.dumps(messages if not tools else [tools, *messages])


async def _tokenize(link: Connection, engine: Engine, request: Json, sent: list[int]) -> int:
    if "messages" in request and engine.plan.get("no_chat_template"):
        raise Refused(400, "As of transformers v4.44, default chat template is no longer allowed, so you must provide "
                           "a chat template if the tokenizer does not define one.")  # fmt: skip
    if not isinstance(request.get("prompt"), str) and not isinstance(request.get("messages"), list):
        raise Refused(400, "prompt: Field required")
    text = request["prompt"] if "prompt" in request else chat_prompt(request["messages"], request.get("tools"))
    has_begin = "recites" in engine.plan and request.get("add_special_tokens", True)
    tokens = recital.tokenize(text, has_begin=has_begin)
    if "messages" in request and "tokenizer_differs" in engine.plan:
        tokens[engine.plan["tokenizer_differs"]] += 1
    body = {"count": len(tokens), "max_model_len": engine.max_model_len, "tokens": tokens, "token_strs": None}
    link.reply(200, json.dumps(body).encode())
    return 200


async def _detokenize(link: Connection, engine: Engine, request: Json, sent: list[int]) -> int:
    tokens = request.get("tokens")
    if not isinstance(tokens, list) or any(type(one) is not int or not 0 <= one < recital.TOKENS for one in tokens):
        raise Refused(400, "tokens: Input should be a valid list of token ids")
    link.reply(200, json.dumps({"prompt": recital.decode(tokens)}).encode())
    return 200


async def _load_lora(link: Connection, engine: Engine, request: Json, sent: list[int]) -> int:
    name, path = request.get("lora_name"), request.get("lora_path")
    if not name or not path:
        raise Refused(400, "Both 'lora_name' and 'lora_path' must be provided.", "InvalidUserInput")
    if name in engine.names:
        raise Refused(400, f"The lora adapter '{name}' conflicts with a served base model.", "InvalidUserInput")
    if name in engine.loras:
        message = f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
        raise Refused(400, f"{message}set 'load_inplace' to True.", "InvalidUserInput")
    await asyncio.sleep(engine.plan.get("slow_load", 0))
    file = Path(path, "adapter_config.json")
    if not file.is_file():
        raise Refused(404, f"Loading lora {name} failed: No adapter found for <path>", "NotFoundError")
    complaint = engine.plan.get("fail_load")
    if isinstance(complaint, dict):
        complaint = next((text for prefix, text in complaint.items() if name.startswith(prefix)), None)
    rank = json.loads(file.read_text("utf-8")).get("r", 0)
    if rank > engine.max_lora_rank:
        complaint = f"LoRA rank {rank} is greater than max_lora_rank {engine.max_lora_rank}."
    if complaint:
        said = f"Call to add_lora method failed: Worker failed with error '{complaint}', "
        raise Refused(500, f"{said}please check the stack trace above for the root cause", "InternalServerError")
    engine.loras[name] = path
    engine.record("lora", action="load", name=name, path=path)
    link.reply(200, f"Success: LoRA adapter '{name}' added successfully.".encode(), "text/plain")
    return 200


async def _unload_lora(link: Connection, engine: Engine, request: Json, sent: list[int]) -> int:
    name = request.get("lora_name", "")
    if engine.loras.pop(name, None) is None:
        raise Refused(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
    engine.record("lora", action="unload", name=name)
    link.reply(200, f"Success: LoRA adapter '{name}' removed successfully.".encode(), "text/plain")
    return 200


Handler = Callable[[Connection, Engine, Json, list[int]], Awaitable[int]]
POSTS: dict[str, Handler] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _text,
    "/v1/embeddings": _embeddings,
    "/v1/responses": _responses,
    "/v1/messages": _messages,
    "/tokenize": _tokenize,
    "/detokenize": _detokenize,
    "/v1/load_lora_adapter": _load_lora,
    "/v1/unload_lora_adapter": _unload_lora,
}


async def serve(engine: Engine) -> None:
    """Bind the socket as late as planned and serve until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def stop(number: int) -> None:
        engine.record("stop", signal=number)
        if not engine.plan.get("ignore_sigterm"):
            ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    if engine.plan.get("never") == "bind":
        await ended.wait()
        return
    serving = asyncio.create_task(_bind(engine))
    await ended.wait()
    serving.cancel()


async def _bind(engine: Engine) -> None:
    await asyncio.sleep(engine.plan.get("start_delay_s", 0))
    loop = asyncio.get_running_loop()
    # As vLLM: a socket file that is there already stops the start. asyncio would unlink it.
    if os.path.exists(engine.socket):
        say(f"OSError: [Errno 98] Address already in use: {engine.socket}")
        os._exit(1)
    await loop.create_unix_server(lambda: Connection(engine), engine.socket, backlog=2048)
    say("INFO:     Application startup complete.")
    if seconds := engine.plan.get("die_after_s"):
        await engine.has_answered.wait()
        await asyncio.sleep(seconds)
        engine.die()
    if hang := engine.plan.get("hangs"):
        await asyncio.sleep(hang["after_s"])
        say(hang.get("says", ""))
        until = time.monotonic() + hang["for_s"]
        while (left := until - time.monotonic()) > 0:
            if not hang["busy"]:
                time.sleep(left)
    await asyncio.Event().wait()


def main(argv: list[str]) -> int:
    """Run until told to stop; returns the exit code."""
    engine = Engine(argv)
    grandchild = None
    if engine.plan.get("grandchild"):
        deaf = subprocess.Popen([sys.executable, "-I", "-S", "-c", GRANDCHILD], stdout=subprocess.PIPE)
        assert deaf.stdout is not None
        deaf.stdout.readline()
        grandchild = deaf.pid
    engine.record("start", number=engine.number, pid=os.getpid(), argv=argv, env=sorted(os.environ),
                  grandchild=grandchild)  # fmt: skip
    engine.note_cures()
    say(f"INFO imitation engine, start {engine.number}, model {engine.model}")
    if death := engine.plan.get("die_at_start"):
        time.sleep(death.get("after_s", 0))
        say(death.get("stderr", ""))
        if number := death.get("signal"):
            os.kill(os.getpid(), number)
        return int(death.get("exit_code", 1))
    if takes := engine.plan.get("takes"):
        gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        lines = "".join(f"{gpu} {takes['bytes']}\n" for gpu in gpus)
        Path(takes["folder"], f"taken-{os.getpid()}").write_text(lines, "utf-8")
    ballast = bytearray(b"\1") * (engine.plan.get("allocate_mib", 0) << 20)
    asyncio.run(serve(engine))
    del ballast
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
