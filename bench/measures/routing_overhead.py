"""Bar `overhead`: what the whole path adds to a vendor's own latency, and what LiteLLM's proxy takes for the same.

The path is a skill of text generation whose teacher is the loopback vendor (bench/upstream.py): edge, routing, the vendor's client, the
answer's quality, its price, the row in the lake's log; once without a budget and once with limits for the day and the month in two scopes
on SQLite. Both gateways get the same texts and the same vendor, and keep their usual logs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.harness import Asked, Row, Server, median, part, row_of, serve, short_texts
from bench.peers.gateway import Gateway, litellm

OVERHEAD = (
    "added at 200 requests/s on two cores: p50 <= 3 ms, p99 <= 12 ms; against LiteLLM's proxy: requests/s at 64 in flight >= 6 x, "
    "p50 at 1 in flight <= 1/4"
)
RATE = 200
LATENCY_MS = 20
ROUNDS = 9
INSTRUCTION = "You answer the customers of a bank. Be brief and kind."
PRICES = {"input_per_million_usd": 0.15, "output_per_million_usd": 0.6}


@dataclass
class Bench:
    """Everything that runs: the vendor, our server with and without a budget, LiteLLM, the load."""

    vendor: Asked
    port: int
    plain: Server
    budget: Server
    peer: Gateway
    load: Asked
    texts: Sequence[str] = field(default_factory=lambda: short_texts(2000))

    def run(self, target: dict[str, Any], cpu_s: Callable[[], float] | None = None, **how: Any) -> dict[str, Any]:
        """One stretch of load; latencies in seconds, sorted. Raises SystemExit for answers that are none."""
        before = cpu_s() if cpu_s else 0.0
        seen: dict[str, Any] = self.load.ask(**target, **how, texts=self.texts, system=INSTRUCTION)
        if seen["errors"]:
            raise SystemExit(f"{seen['errors']} requests to {target} failed: {seen['first_error']}")
        seen["latencies"].sort()
        seen["cpu_ms"] = ((cpu_s() if cpu_s else 0.0) - before) * 1e3 / len(seen["latencies"])
        seen["per_s"] = len(seen["latencies"]) / seen["seconds"]
        return seen

    def straight(self, ms: int) -> dict[str, Any]:
        """The vendor itself."""
        return {"to": "http", "port": self.port, "path": f"/{ms}/v1/chat/completions", "model": "mock"}

    def other(self, ms: int) -> dict[str, Any]:
        """The vendor through LiteLLM."""
        return {"to": "http", "port": self.peer.port, "path": "/v1/chat/completions", "model": f"after-{ms}"}


def ours(server: Server, ms: int) -> dict[str, Any]:
    """The vendor through us."""
    return {"to": "grpc", "address": server.address, "skill": f"after-{ms}"}


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """Starts it all, and warms every path."""
    with contextlib.ExitStack() as stack:
        vendor = Asked([sys.executable, "-m", "bench.upstream"])
        stack.callback(vendor.close)
        port = int(vendor.first["port"])
        urls = {f"after-{ms}": f"http://127.0.0.1:{port}/{ms}/v1" for ms in (0, LATENCY_MS)}
        plain = stack.enter_context(serve(extra={"log.access": True}, config=config(urls)))
        limited = stack.enter_context(serve(extra={"log.access": True}, config=config(urls) + BUDGET))
        prices = {"input_cost_per_token": 0.15e-6, "output_cost_per_token": 0.6e-6}
        peer = stack.enter_context(litellm(urls, prices))
        load = Asked([sys.executable, "-m", "bench.routing_load"])
        stack.callback(load.close)
        made = Bench(vendor, port, plain, limited, peer, load)
        for target in (ours(plain, 0), ours(limited, 0), made.other(0), made.straight(0)):
            made.run(target, in_flight=16, seconds=2)
        yield made


def config(urls: dict[str, str]) -> str:
    """A provider and a skill for each address."""
    text = ""
    for name, url in urls.items():
        prices = ", ".join(f"{key} = {value}" for key, value in PRICES.items())
        text += f'[providers.{name}]\nkind = "compatible"\nbase_url = "{url}"\nmax_concurrent = 256\nprices."mock" = {{ {prices} }}\n'
        text += f'[skills.{name}]\ntask = "text-generation"\ninstruction = "{INSTRUCTION}"\nmax_tokens = 64\nteacher = "{name}/mock"\n'
    return text


BUDGET = "".join(
    f"[budget.{scope}]\nday_usd = 1000000\nmonth_usd = 10000000\n" for scope in ("total", "skills.after-0", f"skills.after-{LATENCY_MS}")
)


def overhead() -> Row:
    """The bar."""
    with bench() as made:
        return row_of("overhead", OVERHEAD, [*added(made), *against(made), conditions(made)])


def added(made: Bench) -> list[dict[str, Any]]:
    """Open loop, straight and through us in turns: a latency through us less the median straight one of its round."""
    seen: dict[str, list[dict[str, float]]] = {"without a budget": [], "with a budget": []}
    straight: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        base = made.run(made.straight(LATENCY_MS), rate=RATE, seconds=2)["latencies"]
        straight.append({"p50": at(base, 0.5) * 1e3, "p99": at(base, 0.99) * 1e3})
        for name, server in (("without a budget", made.plain), ("with a budget", made.budget)):
            one = made.run(ours(server, LATENCY_MS), server.cpu_s, rate=RATE, seconds=5)
            more = {f"p{share * 100:g}": (at(one["latencies"], share) - at(base, 0.5)) * 1e3 for share in (0.5, 0.95, 0.99)}
            seen[name].append({**more, "cpu": one["cpu_ms"]})
    vendor = {name: rounded(median([one[name] for one in straight])) for name in ("p50", "p99")}
    parts = []
    for name, rounds in seen.items():
        middle = {key: rounded(median([one[key] for one in rounds])) for key in rounds[0]}
        fine = middle["p50"] <= 3 and middle["p99"] <= 12
        parts.append(
            part(
                f"added ms at {RATE}/s, {name}",
                "p50 <= 3, p99 <= 12",
                {key: middle[key] for key in ("p50", "p95", "p99")},
                fine,
                cpu_ms_each=middle["cpu"],
                straight_ms=vendor,
                least={key: rounded(min(one[key] for one in rounds)) for key in rounds[0]},
                rounds=[{key: rounded(value) for key, value in one.items()} for one in rounds],
            )
        )
    return parts


def against(made: Bench) -> list[dict[str, Any]]:
    """Closed loop, ours and LiteLLM in turns, in front of a vendor that answers at once, and of the usual one."""
    parts = []
    for ms in (0, LATENCY_MS):
        busy = _turns(made, ms, in_flight=64, seconds=6)
        one = _turns(made, ms, in_flight=1, seconds=4)
        rates = {name: rounded(median([seen["per_s"] for seen in busy[name]])) for name in busy}
        p50 = {name: rounded(median([at(seen["latencies"], 0.5) * 1e3 for seen in one[name]])) for name in one}
        cpu = {name: rounded(median([seen["cpu_ms"] for seen in busy[name]])) for name in busy}
        more, less = rates["ours"] / rates["litellm"], p50["ours"] / p50["litellm"]
        about = f"vendor's latency {ms} ms"
        # With a latency of the vendor's in both, the quotient of the medians says little of the gateways: it is told, not held.
        held = ms == 0
        parts.append(
            part(
                f"requests/s at 64, {about}",
                ">= 6 x LiteLLM" if held else "reported",
                rounded(more),
                more >= 6 or not held,
                **rates,
                cpu_ms_each=cpu,
            )
        )
        parts.append(
            part(f"p50 ms at 1, {about}", "<= 1/4 of LiteLLM" if held else "reported", rounded(less), less <= 0.25 or not held, **p50)
        )
    return parts


def _turns(made: Bench, ms: int, **how: Any) -> dict[str, list[dict[str, Any]]]:
    seen: dict[str, list[dict[str, Any]]] = {"ours": [], "litellm": []}
    for _ in range(3):
        seen["ours"].append(made.run(ours(made.plain, ms), made.plain.cpu_s, **how))
        seen["litellm"].append(made.run(made.other(ms), made.peer.cpu_s, **how))
    return seen


def conditions(made: Bench) -> dict[str, Any]:
    """What the vendor and the load take themselves, and what all is made of."""
    from importlib.metadata import version

    before = made.vendor.ask(cpu=True)
    seen = made.run(made.straight(0), in_flight=64, seconds=3)
    vendor = (made.vendor.ask(cpu=True) - before) / len(seen["latencies"])
    own = {name: version(name) for name in ("openai", "grpcio", "protobuf")}
    about = {"peer": dict(made.peer.versions), "versions": own, "vendor_cpu_us_each": round(vendor * 1e6), "vendor_ms": LATENCY_MS}
    load = round(seen["cpu"] / len(seen["latencies"]) * 1e6)
    return part("the vendor alone at 64 in flight, requests/s", "reported", rounded(seen["per_s"]), True, load_cpu_us_each=load, **about)


def at(values: Sequence[float], share: float) -> float:
    """A quantile of sorted values."""
    return values[min(int(share * len(values)), len(values) - 1)]


def rounded(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")
