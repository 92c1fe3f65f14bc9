"""What every measurement shares: a real server as a process, a load generator, texts, conditions and rows."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench"
TOOLS = ROOT / ".tools" / "bin"
STARTER = "all-minilm-l6-v2"
SHARED = Path(os.environ.get("UNDERSTUDY_SHARED", ROOT.parent / "shared"))


@dataclass
class Row:
    """One line of the result: what the bar asks, what was seen, whether that meets it. `parts` are the figures behind a bar of several."""

    name: str
    bar: str
    measured: Any
    met: bool
    parts: list[dict[str, Any]] = field(default_factory=list)

    def line(self) -> str:
        shown = self.measured if isinstance(self.measured, str) else json.dumps(self.measured)
        return f"{'met   ' if self.met else 'MISSED'}  {self.name:<11} {shown}   (bar: {self.bar})"


def part(name: str, bar: str, measured: Any, met: bool, **more: Any) -> dict[str, Any]:
    return {"name": name, "bar": bar, "measured": measured, "met": bool(met), **more}


def row_of(name: str, bar: str, parts: list[dict[str, Any]]) -> Row:
    """A bar of several parts is met when each part is."""
    return Row(name, bar, {p["name"]: p["measured"] for p in parts}, all(p["met"] for p in parts), parts)


def tests_pass(name: str, *arguments: str) -> dict[str, Any]:
    """Runs pytest; met when every test passed and there was one at least."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|error|skipped)", last)}
    met = done.returncode == 0 and counts.get("passed", 0) > 0
    return part(name, "every test passes", counts, met, tests=" ".join(arguments), problems=[] if met else [done.stdout[-1500:]])


def conditions() -> dict[str, Any]:
    """The machine and the libraries, so that a figure is never without them."""
    import numpy

    from server.runtime.kernels import describe

    cpu = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    flags = Path("/proc/cpuinfo").read_text()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    dirty = bool(
        subprocess.run(
            ["git", "status", "--porcelain", "--", ".", ":!bench/results"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "avx512_vnni": "avx512_vnni" in flags,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "grpcio": grpc.__version__,
        "kernels": {key: value for key, value in describe().items() if key != "path"},
        "commit": commit + ("+changes" if dirty else ""),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_average": os.getloadavg(),
        "texts": "banking77" if (SHARED / "data" / "banking77").is_dir() else "own examples",
    }


def short_texts(limit: int = 3000) -> list[str]:
    """Customers' questions in arrival order: Banking77's training part where it is at hand, else the project's own sentences."""
    import csv

    source = SHARED / "data" / "banking77" / "train.csv"
    if source.is_file():
        with source.open(newline="", encoding="utf-8") as file:
            texts = [r["text"] for r in csv.DictReader(file)]
        import random

        random.Random(7).shuffle(texts)
        return texts[:limit]
    own = (ROOT / "server" / "runtime" / "graphs" / "calibration.txt").read_text(encoding="utf-8").splitlines()
    own = [t for t in own if 20 < len(t) < 200]
    return (own * (limit // len(own) + 1))[:limit]


def texts_of_length(tokens: Sequence[int], tokenizer: Any, seed: int = 3) -> list[str]:
    """Texts with exactly these token counts (special tokens included), cut from running text."""
    import random

    rng = random.Random(seed)
    words = " ".join(short_texts(3000)).split()
    out = []
    for want in tokens:
        start = rng.randrange(len(words) - 700)
        ids = tokenizer.encode(" ".join(words[start : start + want + 20]), add_special_tokens=False).ids[: want - 2]
        out.append(tokenizer.decode(ids))
    return out


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Server:
    """A started server. `address` is host:port; `process` the psutil handle of the serving process."""

    address: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.popen.pid)

    def rss(self) -> int:
        return int(self.process.memory_info().rss)

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def serve(
    models: Path | None = None, *, extra: dict[str, Any] | None = None, env: dict[str, str] | None = None, config: str = ""
) -> Iterator[Server]:
    """Starts `understudy serve` on a free port, with `config` as its understudy.toml, and stops it by SIGTERM."""
    port = free_port()
    flags = {
        "models.path": str(models or ROOT / "models"),
        "server.metrics_port": 0,
        "log.access": False,
        "log.format": "json",
        **(extra or {}),
    }
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port)]
    for key, value in flags.items():
        command += [
            "--set",
            f"{key}={json.dumps(value) if isinstance(value, (list, dict)) else str(value).lower() if isinstance(value, bool) else value}",
        ]
    work = Path(tempfile.mkdtemp(prefix="understudy-bench-"))
    (work / "understudy.toml").write_text(config)
    log = work / "server.log"
    with log.open("wb") as out:
        popen = subprocess.Popen(
            command,
            cwd=work,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'clients' / 'python'}", "ORT_DISABLE_TELEMETRY": "1", **(env or {})},
        )
    server = Server(f"127.0.0.1:{port}", popen, log)
    try:
        wait_ready(server)
        yield server
    finally:
        if popen.poll() is None:
            popen.send_signal(signal.SIGTERM)
            try:
                popen.wait(60)
            except subprocess.TimeoutExpired:
                popen.kill()
                popen.wait()


def wait_ready(server: Server, timeout: float = 120.0) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    end = time.monotonic() + timeout
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            if server.popen.poll() is not None:
                raise SystemExit(f"the server stopped at start:\n{server.log.read_text()[-4000:]}")
            try:
                reply = stub.Check(health_pb2.HealthCheckRequest(service="understudy.v1.InferenceService"), timeout=2)
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
            if time.monotonic() > end:
                raise SystemExit(f"the server did not become ready in {timeout} s:\n{server.log.read_text()[-4000:]}")
            time.sleep(0.02)


@dataclass(frozen=True)
class Load:
    """What a load generator saw: answered calls a second and latencies in milliseconds; `codes` counts statuses."""

    per_s: float
    p50: float
    p95: float
    p99: float
    codes: dict[str, int]
    seconds: float

    @property
    def ok(self) -> int:
        return self.codes.get("OK", 0)


def ghz(
    address: str, call: str, data: Sequence[dict[str, Any]], *, proto: Path, concurrency: int, seconds: float, options: Sequence[str] = ()
) -> Load:
    """Closed loop by ghz, `concurrency` calls in flight over min(concurrency, 4) connections, requests taken in turn from `data`."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".json", dir=BUILD) as file:
        json.dump(list(data), file)
        file.flush()
        command = [str(TOOLS / "ghz"), "--insecure", "--proto", str(proto), "-i", include_path(), "--call", call, "-D", file.name]
        command += [
            "-c",
            str(concurrency),
            "--connections",
            str(min(concurrency, 4)),
            "-z",
            f"{seconds}s",
            "--duration-stop",
            "wait",
            "-O",
            "json",
        ]
        done = subprocess.run([*command, *options, address], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"ghz failed: {done.stderr or done.stdout}")
    report = json.loads(done.stdout)
    return _load(report)


def _load(report: dict[str, Any]) -> Load:
    spread = {d["percentage"]: d["latency"] / 1e6 for d in report.get("latencyDistribution") or []}
    codes = {str(k): int(v) for k, v in (report.get("statusCodeDistribution") or {}).items()}
    seconds = report["total"] / 1e9
    return Load(codes.get("OK", 0) / seconds, spread.get(50, 0.0), spread.get(95, 0.0), spread.get(99, 0.0), codes, seconds)


def http_load(port: int, path: str, bodies: Sequence[dict[str, Any]], *, concurrency: int, seconds: float) -> Load:
    """Closed loop over HTTP/1.1 keep-alive, bodies in turn, for the peers that speak nothing else; about 0.1 ms of one core a request."""
    requests = [_http_request(port, path, json.dumps(body).encode()) for body in bodies]
    return asyncio.run(_http_loop(port, requests, concurrency, seconds))


def _http_request(port: int, path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def _http_loop(port: int, requests: Sequence[bytes], concurrency: int, seconds: float) -> Load:
    times: list[float] = []
    codes: dict[str, int] = {}
    begun = time.perf_counter()

    async def caller(first: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        n = first
        while time.perf_counter() - begun < seconds:
            start = time.perf_counter()
            writer.write(requests[n % len(requests)])
            n += concurrency
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"content-length: (\d+)", head)
            assert length, head
            await reader.readexactly(int(length[1]))
            code = "OK" if b" 200 " in head.split(b"\r\n", 1)[0] else head.split(b" ", 2)[1].decode()
            codes[code] = codes.get(code, 0) + 1
            times.append((time.perf_counter() - start) * 1e3)
        writer.close()

    await asyncio.gather(*(caller(i) for i in range(concurrency)))
    total = time.perf_counter() - begun
    times.sort()
    p50, p95, p99 = (times[min(len(times) - 1, int(len(times) * q))] for q in (0.50, 0.95, 0.99))
    return Load(codes.get("OK", 0) / total, p50, p95, p99, codes, total)


def include_path() -> str:
    """Where google/api and google/rpc protos are, for tools that read ours."""
    import google.rpc.status_pb2 as status

    return f"{ROOT / 'protos'},{Path(status.__file__).parents[2]}"


PROTO = ROOT / "protos" / "understudy" / "v1" / "inference_service.proto"
EMBED = "understudy.v1.InferenceService.Embed"


def embed_requests(texts: Sequence[str], per_call: int = 1) -> list[dict[str, Any]]:
    return [{"model": {"name": STARTER}, "texts": list(texts[i : i + per_call])} for i in range(0, len(texts) - per_call + 1, per_call)]


class Asked:
    """A process that prints a line of JSON when it is ready, then answers each line of JSON with one, {"reply": ...}."""

    def __init__(self, command: Sequence[str]) -> None:
        env = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'clients' / 'python'}"}
        self.popen = subprocess.Popen(list(command), cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.first = self._read()  # what it said of itself

    def _read(self) -> dict[str, Any]:
        assert self.popen.stdout
        while True:
            line = self.popen.stdout.readline()
            if not line:
                raise SystemExit("a contestant stopped; its message is above")
            with contextlib.suppress(json.JSONDecodeError):
                return dict(json.loads(line))

    def ask(self, **command: Any) -> Any:
        assert self.popen.stdin
        self.popen.stdin.write(json.dumps(command) + "\n")
        self.popen.stdin.flush()
        return self._read()["reply"]

    def memory_mb(self) -> float:
        return float(psutil.Process(self.popen.pid).memory_info().rss / 1e6)

    def close(self) -> None:
        assert self.popen.stdin
        self.popen.stdin.close()
        self.popen.wait(30)


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def write_results(path: Path, rows: Sequence[Row], seen: dict[str, Any]) -> None:
    """Rows of bars that were not measured this time are kept from the file that is there, with their own commit beside them."""
    old: dict[str, Any] = {}
    if path.is_file():
        old = {r["name"]: r for r in json.loads(path.read_text())["rows"]}
    for r in rows:
        old[r.name] = {"name": r.name, "bar": r.bar, "measured": r.measured, "met": r.met, "parts": r.parts, "commit": seen["commit"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"conditions": seen, "rows": list(old.values())}, indent=2) + "\n")


def run_modules(name: str, measures: Mapping[str, tuple[str, str]], about: str | None) -> None:
    """As run_measures; `measures` maps a bar's name to a module of bench.measures and its function, imported when it is measured."""

    def later(module: str, function: str) -> Callable[[], Row]:
        def measure() -> Row:
            row = getattr(importlib.import_module(f"bench.measures.{module}"), function)()
            assert isinstance(row, Row)
            return row

        return measure

    run_measures(name, {bar: (f"see bench/measures/{module}.py", later(module, of)) for bar, (module, of) in measures.items()}, about)


def run_measures(name: str, measures: Mapping[str, tuple[str, Callable[[], Row]]], about: str | None) -> None:
    """The command line of a bench: `measures` maps a bar's name to its text and what measures it; rows go to results/<name>.json."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--only", action="append", choices=list(measures), help="measure this bar alone; may be repeated")
    chosen = parser.parse_args().only or list(measures)
    seen = conditions()
    print(f"on {seen['cpu']}, {seen['cores']} cores, kernels {seen['kernels'].get('isa')}, commit {seen['commit']}", flush=True)
    rows: list[Row] = []
    for one in chosen:
        begun = time.perf_counter()
        try:
            row = measures[one][1]()
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            row = Row(one, measures[one][0], f"could not be measured: {error}", False)
        rows.append(row)
        print(f"{row.line()}   [{time.perf_counter() - begun:.0f} s]", flush=True)
        write_results(ROOT / "bench" / "results" / f"{name}.json", rows, seen)
    print(f"{sum(r.met for r in rows)} of {len(rows)} bars met; bench/results/{name}.json has the figures")
