"""How much the gateway costs: the same streams asked directly, through nginx, through Modelyard, through LiteLLM.

    python benchmarks/gateway.py [--vllm MODEL_FOLDER | --vllm tiny] [--rounds 3] [--seconds 2] [--write]

All places are measured interleaved in one run, a short window each, several rounds, medians of them; so that what the
machine does besides weighs on all. Three questions, on a replayed stream and (with --vllm) on real vLLM: how many
tokens a second at 1, 16 and 64 streaming clients; how long to the first token at one client; how much processor time of
the proxy's process a chunk costs, at a fixed rate per stream, where nobody can save by handing on several at once.

nginx comes from the system's packages, LiteLLM from a virtual environment of its own (.venv-litellm, made on demand);
what can't be had is named and left out. `--server PORT --server-pid PID --server-model NAME` measures a running
Modelyard beside them, `--before CHECKOUT` the gateway of another checkout with a .venv of its own. --write puts the
tables into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import uvloop

if __package__ in {None, ""}:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.load import Address, Result, run

HERE = Path(__file__).resolve().parent
LEVELS = (1, 16, 64)
RATE = 100.0
START_S = 30.0
ENGINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Threads that wait for one another, on cores that they share with proxy and client, would stand still in turn.
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    # As Modelyard runs its engines on a CPU; without, all places stand still for seconds (see RESULTS.md).
    "VLLM_PLUGINS": "modelyard_amx,modelyard_sleep,modelyard_lora",
}
LITELLM = HERE.parent / ".venv-litellm"


@dataclass(frozen=True)
class Place:
    """Somewhere to ask, and the processes whose time is its cost."""

    name: str
    address: Address
    pids: tuple[int, ...] = ()


def cpu_s(pids: Sequence[int]) -> float:
    """Return the processor time of processes with all their threads, in seconds, to the nanosecond."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def wait_for(answers: Callable[[], bool], process: subprocess.Popen[bytes], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not answers():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not start")
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def child(argv: Sequence[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in a group of its own, and end the group."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            argv, stdout=out, stderr=out, env={**os.environ, **environment}, start_new_session=True
        )
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(20)
        except ProcessLookupError:
            process.wait()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def replay(folder: Path, rate: float) -> Iterator[tuple[Path, int]]:
    """Run the replayed stream; gives its socket and its port."""
    uds, port = folder / f"replay-{rate:.0f}.sock", free_port()
    argv = [sys.executable, str(HERE / "replay.py"), "--uds", str(uds), "--port", str(port), "--rate", str(rate)]
    with child(argv, folder / "replay.log") as process:
        wait_for(lambda: accepts(uds), process, "the replayed stream", START_S)
        yield uds, port


@contextmanager
def nginx(folder: Path, uds: Path) -> Iterator[Place]:
    """Run nginx with one worker before a socket, set up for streams: no buffering, connections kept alive."""
    port = free_port()
    conf = folder / f"nginx-{port}.conf"
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    conf.write_text(
        f"daemon off; user {os.environ.get('USER') or 'root'}; worker_processes 1; pid {folder}/nginx-{port}.pid;\n"
        f"error_log {folder}/nginx.log; events {{ worker_connections 1024; }}\n"
        f"http {{ access_log off; {temporary}\n"
        f"upstream engine {{ server unix:{uds}; keepalive 128; }}\n"
        f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://engine; proxy_http_version 1.1;\n"
        'proxy_set_header Connection ""; proxy_buffering off; proxy_read_timeout 600s; keepalive_requests 1000000; }\n'
        "} }\n"
    )
    with child(["nginx", "-p", str(folder), "-c", str(conf)], folder / "nginx.out") as process:
        wait_for(lambda: listens(port), process, "nginx", START_S)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield Place("nginx", Address("/v1/chat/completions", "", port=port), tuple(map(int, workers)))


@contextmanager
def gateway(folder: Path, uds: Path, model: str, checkout: Path | None = None) -> Iterator[Place]:
    """Run the gateway alone, before one engine; that of another checkout is called `before`."""
    port = free_port()
    python = str(checkout / ".venv" / "bin" / "python") if checkout else sys.executable
    script = (checkout or HERE.parent) / "benchmarks" / "serve_gateway.py"
    argv = [python, str(script), "--engine", f"unix:{uds}", "--model", model, "--port", str(port)]
    with child(argv, folder / "gateway.log") as process:
        wait_for(lambda: listens(port), process, "the gateway", START_S)
        name = "before" if checkout else "Modelyard"
        yield Place(name, Address("/v1/chat/completions", model, port=port), (process.pid,))


def litellm_python() -> Path | None:
    """Return the interpreter of LiteLLM's environment, making the environment where that works."""
    python = LITELLM / "bin" / "python"
    if not (LITELLM / "bin" / "litellm").exists():
        print("setting up LiteLLM in .venv-litellm ...", flush=True)
        uv = shutil.which("uv")
        make = [uv, "venv", "-q", str(LITELLM)] if uv else [sys.executable, "-m", "venv", str(LITELLM)]
        fill = (
            [uv, "pip", "install", "-q", "--python", str(python)] if uv else [str(python), "-m", "pip", "install", "-q"]
        )
        try:
            subprocess.run(make, check=True)
            subprocess.run([*fill, "litellm[proxy]"], check=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"left out: LiteLLM can't be installed ({error})")
            return None
    return python


@contextmanager
def litellm(folder: Path, engine_port: int) -> Iterator[Place]:
    """Run LiteLLM's proxy with one worker, quiet, before the replay's port: it knows no Unix sockets."""
    port = free_port()
    config = folder / "litellm.yaml"
    config.write_text(
        "model_list:\n- model_name: replay\n  litellm_params:\n    model: openai/replay\n"
        f"    api_base: http://127.0.0.1:{engine_port}/v1\n    api_key: none\n"
        "litellm_settings:\n  telemetry: false\n  set_verbose: false\n"
    )
    argv = [str(LITELLM / "bin" / "litellm"), "--config", str(config), "--port", str(port), "--host", "127.0.0.1",
            "--num_workers", "1"]  # fmt: skip
    key = f"sk-{secrets.token_hex(16)}"  # it starts with none only when told that this is dangerous
    environment = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": key}
    with child(argv, folder / "litellm.log", **environment) as process:
        wait_for(lambda: listens(port), process, "LiteLLM", 120)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        address = Address("/v1/chat/completions", "replay", port=port, headers=(("Authorization", f"Bearer {key}"),))
        yield Place("LiteLLM", address, (process.pid, *map(int, children)))


@dataclass(frozen=True)
class Cell:
    """One window at one place: what came, and the processor time that the place spent on it."""

    result: Result
    cpu_s: float

    @property
    def per_second(self) -> float:
        return self.result.tokens / self.result.seconds

    @property
    def cpu_us(self) -> float:
        return self.cpu_s / self.result.chunks * 1e6 if self.result.chunks else 0.0

    @property
    def first_ms(self) -> float:
        return statistics.median(self.result.first_s) * 1000 if self.result.first_s else float("nan")


Cells = dict[tuple[int, str], list[Cell]]


def measure(places: Sequence[Place], levels: Sequence[int], tokens: int, seconds: float, rounds: int) -> Cells:
    """Measure places in turn, level by level, round by round; each round begins with another one of them."""
    cells: Cells = {}
    for number in range(rounds):
        first = number % len(places)
        for level in levels:
            for place in [*places[first:], *places[:first]]:
                before = cpu_s(place.pids)
                result = uvloop.run(run(place.address, level, tokens, seconds))
                cell = Cell(result, cpu_s(place.pids) - before)
                if result.failures or not result.chunks:
                    raise RuntimeError(f"{place.name} at {level} clients: {result.failures[:2] or 'nothing came'}")
                cells.setdefault((level, place.name), []).append(cell)
                print(
                    f"  round {number + 1}: {level:3} clients, {place.name:10} {cell.per_second:9.0f} tokens/s in "
                    f"{result.tokens / result.chunks:.1f} to an event, first after {cell.first_ms:6.2f} ms, "
                    f"{cell.cpu_us:6.1f} us an event",
                    flush=True,
                )
    return cells


def named(place: Place, model: str) -> Place:
    return replace(place, address=replace(place.address, model=model))


def on_replay(folder: Path, rounds: int, seconds: float, before: Path | None) -> list[str]:
    """Measure on the replayed stream; returns Markdown."""
    with ExitStack() as stack:
        fast, fast_port = stack.enter_context(replay(folder, 0))
        paced, _ = stack.enter_context(replay(folder, RATE))
        places = [Place("direct", Address("/v1/chat/completions", "replay", uds=str(fast)))]
        slow = []
        if shutil.which("nginx"):
            places.append(named(stack.enter_context(nginx(folder, fast)), "replay"))
            slow.append(named(stack.enter_context(nginx(folder, paced)), "replay"))
        else:
            print("left out: nginx is not installed (Debian: apt-get install nginx-light)")
        places.append(stack.enter_context(gateway(folder, fast, "replay")))
        slow.append(stack.enter_context(gateway(folder, paced, "replay")))
        if before is not None:
            places.append(stack.enter_context(gateway(folder, fast, "replay", before)))
            slow.append(stack.enter_context(gateway(folder, paced, "replay", before)))
        if before is None and litellm_python() is not None:
            try:
                places.append(stack.enter_context(litellm(folder, fast_port)))
            except RuntimeError as error:
                print(f"left out: {error}; its log ends so:\n{(folder / 'litellm.log').read_text()[-1500:]}")
        print("Replayed stream, as fast as it is taken:")
        ceiling = measure(places, LEVELS, 256, seconds, rounds)
        print(f"Replayed stream, {RATE:.0f} chunks a second for each client:")
        cost = measure(slow, LEVELS, int(RATE * seconds), 0, rounds)
        print("Replayed stream, time to the first token:")
        first = measure(places, (1,), 4, seconds, rounds)
    return [
        *report.throughput("As fast as it is taken: tokens per second", ceiling, LEVELS),
        *report.cost(f"{RATE:.0f} chunks a second for each client: processor time of the proxy", cost, LEVELS),
        *report.first_token("Time to the first token, one client", first),
    ]


def on_vllm(folder: Path, model: str, rounds: int, seconds: float, server: Place | None) -> list[str]:
    """Measure on real vLLM; returns Markdown."""
    uds = folder / "vllm.sock"
    if model == "tiny":
        model = str(folder / "tiny")
        subprocess.run([sys.executable, "-m", "modelyard.demo.tiny_llama", model], check=True)
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model,
            "--served-model-name", "bench", "--uds", str(uds), "--max-model-len", "2048",
            "--max-num-seqs", "64", "--enforce-eager", "--disable-log-stats"]  # fmt: skip
    print("starting vLLM ...", flush=True)
    with ExitStack() as stack:
        process = stack.enter_context(child(argv, folder / "vllm.log", **ENGINE))
        try:
            wait_for(lambda: accepts(uds), process, "vLLM", 300)
        except RuntimeError:
            print((folder / "vllm.log").read_text()[-3000:])
            raise
        places = [Place("direct", Address("/v1/chat/completions", "bench", uds=str(uds)))]
        if shutil.which("nginx"):
            places.append(named(stack.enter_context(nginx(folder, uds)), "bench"))
        places.append(stack.enter_context(gateway(folder, uds, "bench")))
        if server is not None:
            places.append(server)
        print("Real vLLM:")
        measure(places[:1], (1, 16, 64), 64, 2.0, 1)  # warm
        cells = measure(places, LEVELS, 128, seconds, rounds)
        print("Real vLLM, time to the first token:")
        first = measure(places, (1,), 4, seconds, rounds)
    return [
        *report.throughput("Tokens per second", cells, LEVELS),
        *report.cost("Processor time of the proxy", cells, LEVELS),
        *report.first_token("Time to the first token, one client", first),
    ]


def main() -> None:
    """Read the command line, measure, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="MODEL", help="measure on real vLLM too: a model's folder, or `tiny`")
    parser.add_argument("--no-replay", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--server", type=int, metavar="PORT")
    parser.add_argument("--server-pid", type=int)
    parser.add_argument("--server-model")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="and the gateway there, LiteLLM left out")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # through every `finally`, so that no child is left
    folder = Path(tempfile.mkdtemp(prefix="my-bench-"))
    server = None
    if given.server:
        address = Address("/v1/chat/completions", given.server_model, port=given.server)
        server = Place("Modelyard, whole", address, (given.server_pid,) if given.server_pid else ())
    sections: dict[str, list[str]] = {}
    try:
        if not given.no_replay:
            sections["Gateway, replayed stream"] = on_replay(folder, given.rounds, given.seconds, given.before)
        if given.vllm:
            model, seconds = given.vllm, max(given.seconds, 3.0)
            sections["Gateway, real vLLM"] = on_vllm(folder, model, given.rounds, seconds, server)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for subject, lines in sections.items():
        print("\n" + "\n".join(lines))
        if given.write:
            report.write(HERE / "RESULTS.md", subject, lines)


if __name__ == "__main__":
    main()
