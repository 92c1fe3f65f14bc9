"""Hostile HTTP requests over raw sockets: what a stranger may send, and what may come back.

`hostile(address)` sends them and counts the answers. Each must be a 4xx, or the connection is closed without one. A 5xx, a 2xx, a stack
trace, an answer to something smuggled, or a slow sender that is waited for without end is a failure, and raises.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

TIMEOUT_S = 40.0  # more than the gateway's own patience with slow senders
UNFINISHED_S = 2.0  # for what may be the beginning of a request: then we leave
BEHIND_S = 0.15  # what was smuggled is answered within it
WORKERS = 16
MARK = "smuggled-7c1f"
EMBED = "/v1/inference:embed"
JSON = "Content-Type: application/json\r\n"
BEHIND = frozenset(["smuggling TE", "smuggling CL.CL", "bad content-length", "bad chunk", "noise in chunks", "pipeline"])
LEAKS = re.compile(rb"goroutine \d|Traceback|\.go:\d+|\.py\", line|panic:|runtime error|/root/|/home/")


@dataclass(frozen=True, slots=True)
class Case:
    """`data` is sent, in pieces of `piece` bytes with `pause_s` between them where it is set."""

    kind: str
    data: bytes
    piece: int = 0
    pause_s: float = 0.0

    @property
    def slow(self) -> bool:
        """Whether it is never complete, so that the gateway must end it."""
        return self.kind.startswith("slow")


def hostile(address: str, *, seed: int = 7) -> Counter[str]:
    """Sends all to "host:port"; returns how often each "kind: outcome" came. Raises AssertionError with the first that were not refused."""
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    lock = threading.Lock()

    def one(case: Case) -> None:
        answer = send(address, case)
        outcome, wrong = judge(case, answer)
        with lock:
            outcomes[f"{case.kind}: {outcome}"] += 1
            if wrong:
                failures.append(f"{case.kind}: {wrong}\n  sent {case.data[:200]!r}\n  got {(answer or b'')[:300]!r}")

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(one, cases(seed)))
    assert not failures, f"{len(failures)} were not refused:\n" + "\n".join(failures[:10])
    return outcomes


def send(address: str, case: Case) -> bytes | None:
    """What came back until the connection was closed or the answer was whole. None: nothing came, and we left first."""
    host, _, port = address.rpartition(":")
    answer = bytearray()
    try:
        with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
            with contextlib.suppress(ConnectionError):  # refused before all was sent: the answer may be there all the same
                _write(connection, case)
            connection.settimeout(TIMEOUT_S if case.slow else UNFINISHED_S)
            while len(answer) < 1 << 20 and (part := connection.recv(65536)):
                answer += part
                if complete(bytes(answer)):
                    if case.kind not in BEHIND:
                        break
                    connection.settimeout(BEHIND_S)
    except TimeoutError:
        return bytes(answer) or None
    except ConnectionError:
        pass  # closed on us: what came is judged
    return bytes(answer)


def _write(connection: socket.socket, case: Case) -> None:
    if not case.piece:
        connection.sendall(case.data)
        return
    waiting = threading.Event()
    for start in range(0, len(case.data), case.piece):
        connection.sendall(case.data[start : start + case.piece])
        waiting.wait(case.pause_s)


def complete(answer: bytes) -> bool:
    """Whether the first answer is whole."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return False
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    return length is None or len(body) >= int(length[1])


def judge(case: Case, answer: bytes | None) -> tuple[str, str]:
    """The outcome in a word, and what was wrong with it, or nothing."""
    if answer is None:
        return "unfinished", "is waited for without end" if case.slow else ""
    if LEAKS.search(answer):
        return "leak", "the answer shows the program's inside"
    if MARK.encode() in answer:
        return "smuggled", "the hidden request was answered"
    codes = [int(code) for code in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]
    if not codes:
        return "closed", "what came back is not HTTP" if answer else ""
    wrong = [code for code in codes if not 400 <= code < 500]
    return str(codes[0]), f"answered with {wrong[0]}; expected a refusal" if wrong else ""


def request(method: str, target: str, headers: str = "", body: bytes = b"", *, length: bool = True) -> bytes:
    """One request as bytes; `headers` are lines that end with CRLF."""
    size = f"Content-Length: {len(body)}\r\n" if length and body else ""
    return f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n{headers}{size}\r\n".encode("latin-1") + body


def cases(seed: int) -> Iterator[Case]:
    """All of them, in one order for a seed."""
    found = [
        case for family in (smuggling, oversized, slow, bodies, paths, headers, methods, protocols) for case in family(random.Random(seed))
    ]
    random.Random(seed).shuffle(found)
    yield from found


def smuggling(rng: random.Random) -> Iterator[Case]:
    """Two readers of these would disagree on where the first request ends."""
    hidden = f"GET /v1/models/{MARK}/versions/1 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    encodings = [
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: cow",
        "Transfer-Encoding:\x0bchunked",
        'Transfer-Encoding: "chunked"',
        "Transfer-Encoding: identity",
        "Transfer-Encoding: chunked;q=1",
        "Transfer-Encoding\t: chunked",
        "Transfer-Encoding: chunk",
        "Transfer-Encoding: CHUNKED, chunked",
    ]
    for encoding in encodings:
        for size in (3, 6, 40):
            yield Case(
                "smuggling TE",
                request("POST", EMBED, f"{JSON}{encoding}\r\nContent-Length: {size}\r\n", b"0\r\n\r\n" + hidden, length=False),
            )
    # A folded line is part of the header before it; content-length alone counts, and what follows is a request of its own.
    for folded in (" Transfer-Encoding: chunked", "X: y\r\n Transfer-Encoding: chunked", "X: y\r\n\tTransfer-Encoding: chunked"):
        yield Case(
            "folded TE",
            request("POST", EMBED, f"Content-Type: text/plain\r\n{folded}\r\nContent-Length: 5\r\n", b"0\r\n\r\n", length=False),
        )
    for one, other in ((4, 40), (40, 4), (0, 9), (5, 6), (4, 5)):
        yield Case(
            "smuggling CL.CL",
            request("POST", EMBED, f"{JSON}Content-Length: {one}\r\nContent-Length: {other}\r\n", b"{}\r\n" + hidden, length=False),
        )
    for length in ("-1", "+5", "0x10", "1e3", "5, 6", "5 6", "", " ", "99999999999999999999", "5;", "5\x00", "٣"):
        head = f"POST {EMBED} HTTP/1.1\r\nHost: localhost\r\n{JSON}Content-Length: {length}\r\n\r\n".encode()
        yield Case("bad content-length", head + b'{"x"' + hidden)
    for claimed in (b"-1", b"0x5", b"5 ;", b"FFFFFFFFFFFFFFFFF", b"zz", b"", b"5\n", b"1" * 40):
        body = claimed + b"\r\nhello\r\n0\r\n\r\n" + hidden
        yield Case("bad chunk", request("POST", EMBED, f"{JSON}Transfer-Encoding: chunked\r\n", body, length=False))
    for _ in range(60):
        body = bytes(rng.choices(b"0123456789abcdef\r\n;= \t", k=rng.randint(1, 80))) + b"g\r\n" + hidden
        yield Case("noise in chunks", request("POST", EMBED, f"{JSON}Transfer-Encoding: chunked\r\n", b"zz" + body, length=False))


def oversized(rng: random.Random) -> Iterator[Case]:
    """More than is taken, said at once or not."""
    for size in (4 * 2**20 + 1, 2**31, 2**40, 2**62):
        yield Case("oversized by its length", request("POST", EMBED, f"{JSON}Content-Length: {size}\r\n", b"{", length=False))
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    yield Case("oversized in chunks", request("POST", EMBED, f"{JSON}Transfer-Encoding: chunked\r\n", chunk * 70, length=False))
    yield Case("oversized body", request("POST", EMBED, JSON, b'{"texts": ["' + b"a" * (4 * 2**20) + b'"]}'))
    for size in (40_000, 100_000, 1_000_000):
        yield Case("oversized header", request("GET", "/v1/status", f"X-Large: {'a' * size}\r\n"))
        yield Case("oversized target", request("GET", "/v1/" + "a" * size))
        yield Case("oversized query", request("GET", "/v1/status?q=" + "a" * size))
        yield Case("oversized method", request("A" * size, "/v1/status"))
    for count in (2_000, 10_000):
        yield Case("header flood", request("GET", "/v1/status", "".join(f"X-{i}: {rng.random()}\r\n" for i in range(count))))
        yield Case("header flood", request("GET", "/v1/status", "Cookie: a=b; c=d; e=f\r\n" * count))


def slow(_: random.Random) -> Iterator[Case]:
    """Senders that never end. The gateway's own timeouts end them: short ones are set where this is run in tests."""
    for _unused in range(12):
        yield Case("slow headers", b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nX-A: b\r\n")
        yield Case("slow headers", b"GET /v1/sta")
        yield Case("slow body", request("POST", EMBED, f"{JSON}Content-Length: 100\r\n", b'{"te', length=False))
        yield Case("slow chunks", request("POST", EMBED, f"{JSON}Transfer-Encoding: chunked\r\n", b'5\r\n{"tex\r\n', length=False))
    yield Case("drop by drop", b"GET /v1/absent HTTP/1.1\r\nHost: localhost\r\n\r\n", piece=3, pause_s=0.01)


def bodies(rng: random.Random) -> Iterator[Case]:
    """JSON that is none, of other types, too deep, or not text."""
    depths = [b"[" * 200_000, b'{"a":' * 100_000, b'{"texts":' + b"[" * 50_000 + b"]" * 50_000 + b"}"]
    wrong = [
        b"{",
        b"}",
        b"[]",
        b"null",
        b"1",
        b'"text"',
        b"nul",
        b"{} {}",
        b"{}{",
        b"\x00",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}x",
        b'{"texts": 1}',
        b'{"texts": [1]}',
        b'{"texts": [null]}',
        b'{"texts": {"a": 1}}',
        b'{"texts": ["\xff\xfe"]}',
        b'{"texts": ["\\ud800"]}',
        b'{"texts": ["a"], "texts": ["b"]}',
        b'{"model": 7}',
        b'{"model": []}',
        b'{"model": {"name": 1}}',
        b'{"__proto__": {}}',
        b'{"texts": ["a"],}',
        b"{'texts': []}",
        b'{"texts": [' + b"1e999," * 100 + b"1]}",
        b'{"dimensions": 1e400}',
        b'{"dimensions": 99999999999999999999}',
        b'{"dimensions": "0x1"}',
        b'{"priority": "NOT_ONE"}',
        b'{"@type": "type.googleapis.com/x"}',
        b"<xml/>",
        b"a=b&c=d",
        b"%PDF-1.4",
        b"\x1f\x8b\x08\x00",
        *depths,
    ]
    targets = [
        EMBED,
        "/v1/inference:generate",
        "/v1/inference:run",
        "/v1/feedback",
        "/v1/trainingJobs",
        "/v1/chat/completions",
        "/v1/embeddings",
    ]
    for target in targets:
        for body in wrong:
            yield Case("bad body", request("POST", target, JSON, body))
    for kind in (
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "application/xml",
        "a/b/c",
        ";",
        "application/grpc",
    ):
        yield Case("wrong type", request("POST", EMBED, f"Content-Type: {kind}\r\n", b'{"texts": ["a"]}'))
    for _ in range(150):
        body = bytes(rng.randrange(256) for _ in range(rng.randint(1, 300)))
        yield Case("noise as body", request("POST", rng.choice(targets), JSON, b"{" + body))


def paths(rng: random.Random) -> Iterator[Case]:
    """Paths that mean one thing to one reader and another to the next."""
    tricks = [
        "/v1/..%2fstatus",
        "/v1/%2e%2e/status",
        "/v1/../v1/status",
        "/../../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/v1//status",
        "//v1/status",
        "/v1/status/",
        "/v1/%00",
        "/v1/status%00.html",
        "/v1/./status",
        "/v1/%5c..%5cstatus",
        "/v1\\status",
        "/v1/status;a=b",
        "/%2e%2e%2f",
        "/v1/%c0%ae%c0%ae/",
        "/v1/%ff",
        "/v1/%",
        "/v1/%zz",
        "/v1/%u002e",
        "/%0d%0aX-Injected:%201",
        "/v1/status?a=%zz",
        "/v1/status?%ff=1",
        "/v1/interactions?pageSize=x",
        "/docs/../v1/x",
        "/console/..%2f..%2fmain.go",
        "/console/%2e%2e/%2e%2e/etc/passwd",
        "/.env",
        "/.git/config",
        "/debug/pprof/",
        "/debug/vars",
        "/metrics",
        "/admin",
        "/v1",
        "/v1/models/%2e%2e/versions/1",
        "/v1/models/a%0ab/versions/1",
        "/v1/skills/..",
        "http://127.0.0.1:50051/v1/status",
        "http://gateway/v1/status",
        "https://evil.example/",
        "ftp://a/b",
        "v1/status",
        "?",
        "#",
        "*",
        "/v1/status#x\x01",
        "gateway:80",
        "@evil.example/",
        "/v1/interactions?pageToken=%ff",
    ]
    for trick in tricks:
        yield Case("path trick", request("GET", trick))
        yield Case("path trick", request("POST", trick, JSON, b"{}"))
    for _ in range(120):
        noise = "".join(
            rng.choice(["..", ".", "%2e", "%2f", "/", "%00", "%5c", "%", "\\", "a", "%ff", ";", "~"]) for _ in range(rng.randint(2, 12))
        )
        yield Case("noise as path", request("GET", "/v1/zz/" + noise))


def headers(rng: random.Random) -> Iterator[Case]:
    """Headers that are none, or that claim what is not so."""
    lines = [
        "No colon here",
        ": empty name",
        "Bad Name: x",
        "X-Null: a\x00b",
        "X-Cr: a\rb",
        "X-(): a",
        "\x7f: a",
        "Host: other",
        "X: \x01",
        "Host: a b",
        "\tX: folded",
    ]
    for line in lines:
        yield Case("bad header", request("GET", "/v1/absent", line + "\r\n"))
    named = [
        "Grpc-Timeout: soon",
        "Grpc-Timeout: 99999999999H",
        "X-Timeout-Ms: -1",
        "X-Timeout-Ms: 1e9",
        "Grpc-Timeout: \xff",
        "X-Timeout-Ms: 99999999999999999999",
        "Content-Encoding: gzip",
        "Expect: 200-maybe",
        "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
        "Upgrade: websocket\r\nConnection: Upgrade",
        "Authorization: Bearer \xff\xfe",
        "Grpc-Metadata-Authorization: x",
        "X-HTTP-Method-Override: DELETE",
        "Range: bytes=0-,0-,0-",
        "Accept: " + "a/b," * 3000,
        "Cookie: " + "a=b;" * 3000,
        "X-Request-Id: " + "\x08" * 10,
        'Forwarded: for="_gazonk"',
    ]
    for line in named:
        yield Case("false header", request("GET", "/v1/absent", line + "\r\n"))
        yield Case("false header", request("POST", EMBED, f"{JSON}{line}\r\n", b'{"nonsense": 1}'))
    yield Case("no host", b"GET /v1/absent HTTP/1.1\r\n\r\n")
    yield Case("two hosts", b"GET /v1/absent HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
    for _ in range(80):
        noise = "".join(chr(rng.randrange(1, 256)) for _ in range(rng.randint(1, 60)))
        yield Case("noise as header", request("GET", "/v1/absent", f"X-Noise{noise}\r\n"))


def methods(rng: random.Random) -> Iterator[Case]:
    """Methods that nothing is served with."""
    for method in (
        "TRACE",
        "CONNECT",
        "PROPFIND",
        "get",
        "G E T",
        "",
        "GET\x00",
        "PURGE",
        "DEBUG",
        "PATCH",
        "LOCK",
        "M-SEARCH",
        "OPTIONS",
        "(GET)",
        "PRI",
    ):
        for target in ("/v1/status", "/", EMBED, "/healthz"):
            yield Case("bad method", request(method, target))
    for _ in range(40):
        method = "".join(rng.choice("ABCXYZ!#$%&'*+-.^_`|~(){}<>@,;:\\\"[]?=") for _ in range(rng.randint(1, 20)))
        yield Case("noise as method", request(method, "/v1/status"))


def protocols(rng: random.Random) -> Iterator[Case]:
    """What is not HTTP/1.1 at all, and pipelines of wrong requests."""
    starts = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
        b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
        b"GET / HTTP/3\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/0.9\r\n\r\n",
        b"GET / HTTP/1.1.1\r\n\r\n",
        b"GET / http/1.1\r\n\r\n",
        b"GET / HTTP/9999999999\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"SSH-2.0-x\r\n",
        b"\x00" * 100,
        b"\r\n\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"*1\r\n$4\r\nPING\r\n",
        b"\x80\x80\x01\x03\x01",
        b"GET  /v1/status  HTTP/1.1\r\n\r\n",
        b"GET\t/v1/status\tHTTP/1.1\r\nHost: a\r\n\r\n",
    ]
    for start in starts:
        yield Case("other protocol", start)
    for _ in range(120):
        yield Case("noise", bytes(rng.randrange(256) for _ in range(rng.randint(1, 400))) + b"\r\n\r\n")
    wrong = request("POST", EMBED, JSON, b'{"nonsense": 1}')
    for count in (2, 10, 100):
        for _ in range(5):
            yield Case("pipeline", wrong * count + request("GET", "/v1/absent", "Connection: close\r\n"))
