"""Prometheus metrics. `Metrics` is the engines' observer too: its methods are called from engine threads and do not block.

Names are documented by NAMES, which a test compares with what a running server exposes.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Thread
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from server.errors import InvalidArgument
from server.runtime.observer import BatchReport, StepReport
from server.stats import ItemReport, Stats

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)
_FILL = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_MODEL = ("model", "version")

NAMES = {
    "understudy_calls_total": "Calls answered, by method and gRPC code.",
    "understudy_errors_total": "Calls that failed, by method and reason.",
    "understudy_call_seconds": "Time from a call's arrival to its answer, by method.",
    "understudy_calls_active": "Calls that run now.",
    "understudy_queue_depth": "Sequences that wait for a batch.",
    "understudy_queue_wait_seconds": "Time that a sequence waited for its batch.",
    "understudy_batch_sequences": "Sequences in a batch.",
    "understudy_batch_tokens": "Tokens in a batch.",
    "understudy_batch_fill": "Tokens in a batch as a share of the token budget.",
    "understudy_run_seconds": "Time of one run of the graph.",
    "understudy_post_seconds": "Time after the graph: pooling and delivery.",
    "understudy_tokens_total": "Tokens run.",
    "understudy_sequences_total": "Sequences run.",
    "understudy_rejections_total": "Requests refused before they ran, by reason; model is empty where none was found yet.",
    "understudy_skips_total": "Sequences dropped while a batch was built: their caller had left, or their deadline had passed.",
    "understudy_run_failures_total": "Runs of a graph that failed, by reason.",
    "understudy_generation_running": "Answers that run now.",
    "understudy_generation_pages": "Pages of K and V that answers and stored prefixes hold.",
    "understudy_generation_pages_capacity": "Pages of K and V that there are.",
    "understudy_generation_prompt_tokens_total": "Prompt tokens of admitted requests: looked up in the prefix cache.",
    "understudy_generation_prefix_hit_tokens_total": "Of them, those that the prefix cache had.",
    "understudy_generation_tokens_total": "Tokens generated.",
    "understudy_generation_pages_copied_total": "Pages whose content was copied: a prompt that ends within a shared page, a fork.",
    "understudy_generation_preemptions_total": "Answers that were interrupted because pages were short, and go on later.",
    "understudy_generation_step_seconds": "Time of one step of a decoder, by the form of its weights.",
    "understudy_generation_first_token_seconds": "Time from a request's arrival to its first token.",
    "understudy_generation_inter_token_seconds": "Time between two tokens of an answer.",
    "understudy_skill_items_total": "Items of skills, by who answered: local, provider, nobody.",
    "understudy_skill_cost_usd_total": "What providers cost, in US dollars, by skill.",
    "understudy_skill_seconds": "Time from an item's arrival to its answer, by skill and who answered.",
    "understudy_skill_escalations_total": "Items that one candidate could not answer well enough, and another was asked, by skill.",
    "understudy_budget_used_ratio": "Share of a budget's limit that is spent, over all servers, by scope and window.",
    "understudy_lake_records": "Records for the lake's log: appended; held in memory, because the disk refuses them; lost.",
    "understudy_lake_refusals": "Times that the file system refused the lake's log; it grows while a disk is full.",
    "understudy_lake_set_aside": "Files of the lake's log that a person should look at: damaged segments, files of rejected records.",
    "understudy_budget_refusals_total": "Paid calls refused for want of budget, by scope and window.",
    "understudy_rollout_percent": "Share of a skill's requests that its newest student may answer, in percent.",
    "understudy_rollout_steps_total": "Steps of rollouts, by skill and where they led.",
    "understudy_model_ready": "1 while a model version answers.",
}


class Counts(NamedTuple):
    """A model version's own counts since it was first loaded; `queued` is of all versions."""

    queued: int
    sequences: int
    batches: int


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._calls = self._counter("understudy_calls_total", ("method", "code"))
        self._errors = self._counter("understudy_errors_total", ("method", "reason"))
        self._call_seconds = self._histogram("understudy_call_seconds", ("method",), _SECONDS)
        self.calls_active = self._gauge("understudy_calls_active", ())
        self._queue_depth = self._gauge("understudy_queue_depth", ("model",))
        self._queue_wait = self._histogram("understudy_queue_wait_seconds", _MODEL, _SECONDS)
        self._batch_sequences = self._histogram("understudy_batch_sequences", _MODEL, _COUNTS)
        self._batch_tokens = self._histogram("understudy_batch_tokens", _MODEL, _TOKENS)
        self._batch_fill = self._histogram("understudy_batch_fill", _MODEL, _FILL)
        self._run = self._histogram("understudy_run_seconds", _MODEL, _SECONDS)
        self._post = self._histogram("understudy_post_seconds", _MODEL, _SECONDS)
        self._tokens = self._counter("understudy_tokens_total", _MODEL)
        self._sequences = self._counter("understudy_sequences_total", _MODEL)
        self._rejections = self._counter("understudy_rejections_total", ("model", "reason"))
        self._skips = self._counter("understudy_skips_total", ("model", "reason"))
        self._ready = self._gauge("understudy_model_ready", _MODEL)
        self._run_failures = self._counter("understudy_run_failures_total", ("model", "reason"))
        self._generation_running = self._gauge("understudy_generation_running", _MODEL)
        self._generation_pages = self._gauge("understudy_generation_pages", _MODEL)
        self._generation_pages_capacity = self._gauge("understudy_generation_pages_capacity", _MODEL)
        self._generation_prompt = self._counter("understudy_generation_prompt_tokens_total", _MODEL)
        self._generation_hits = self._counter("understudy_generation_prefix_hit_tokens_total", _MODEL)
        self._generation_tokens = self._counter("understudy_generation_tokens_total", _MODEL)
        self._generation_copied = self._counter("understudy_generation_pages_copied_total", _MODEL)
        self._generation_preemptions = self._counter("understudy_generation_preemptions_total", _MODEL)
        self._generation_step = self._histogram("understudy_generation_step_seconds", (*_MODEL, "form"), _SECONDS)
        self._generation_first = self._histogram("understudy_generation_first_token_seconds", _MODEL, _SECONDS)
        self._generation_inter = self._histogram("understudy_generation_inter_token_seconds", _MODEL, _SECONDS)
        self._done: dict[tuple[str, str], tuple[int, int]] = {}  # sequences and batches; one engine thread writes an entry
        self._skill_items = self._counter("understudy_skill_items_total", ("skill", "answered_by"))
        self._skill_cost = self._counter("understudy_skill_cost_usd_total", ("skill",))
        self._skill_seconds = self._histogram("understudy_skill_seconds", ("skill", "answered_by"), _SECONDS)
        self._skill_escalations = self._counter("understudy_skill_escalations_total", ("skill",))
        self._budget_used = self._gauge("understudy_budget_used_ratio", ("scope", "window"))
        self._budget_refusals = self._counter("understudy_budget_refusals_total", ("scope", "window"))
        self._rollout_percent = self._gauge("understudy_rollout_percent", ("skill",))
        self._rollout_steps = self._counter("understudy_rollout_steps_total", ("skill", "to"))
        self._lake_records = self._gauge("understudy_lake_records", ("state",))
        self._lake_refusals = self._gauge("understudy_lake_refusals", ())
        self._lake_set_aside = self._gauge("understudy_lake_set_aside", ("kind",))
        self.stats = Stats()
        self._waiting: dict[str, int] = {}
        self._children: dict[tuple[object, ...], Any] = {}

    def _counter(self, name: str, labels: Sequence[str]) -> Counter:
        return Counter(name, NAMES[name], labels, registry=self.registry)

    def _gauge(self, name: str, labels: Sequence[str]) -> Gauge:
        return Gauge(name, NAMES[name], labels, registry=self.registry)

    def _histogram(self, name: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(name, NAMES[name], labels, buckets=buckets, registry=self.registry)

    def _child(self, metric: Any, *labels: str) -> Any:
        """`metric.labels(...)`, looked up once: it takes a lock and builds a tuple of strings at every call."""
        key = (id(metric), *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child

    def call_done(self, method: str, code: str, seconds: float) -> None:
        """A call has been answered. `method` comes from the contracts, never from the wire."""
        self._child(self._calls, method, code).inc()
        self._child(self._call_seconds, method).observe(seconds)

    def call_failed(self, method: str, reason: str) -> None:
        """A call got an error, with this value of ErrorReason."""
        self._child(self._errors, method, reason).inc()

    def item(self, skill: str, report: ItemReport) -> None:
        """An item of a skill is finished. On the event loop alone."""
        self.stats.add(skill, report)
        self._child(self._skill_items, skill, report.answered_by).inc()
        self._child(self._skill_seconds, skill, report.answered_by).observe(report.seconds)
        if report.cost_micro_usd:
            self._child(self._skill_cost, skill).inc(report.cost_micro_usd / 1e6)
        if report.escalated:
            self._child(self._skill_escalations, skill).inc()

    def rollout(self, skill: str, percent: int, step: str) -> None:
        """A skill's rollout took a step: shadow, canary 10, ..., full, rolled_back."""
        self._child(self._rollout_percent, skill).set(percent)
        self._child(self._rollout_steps, skill, step).inc()

    def lake_written(self, *, appended: int, held: int, lost: int, refusals: int) -> None:
        """See server.lake.lake.LakeCounters."""
        for state, number in (("appended", appended), ("held", held), ("lost", lost)):
            self._child(self._lake_records, state).set(number)
        self._lake_refusals.set(refusals)

    def lake_set_aside(self, damaged: int, rejected: int) -> None:
        """Files of the log that are in nobody's way and that somebody should look at."""
        self._child(self._lake_set_aside, "damaged").set(damaged)
        self._child(self._lake_set_aside, "rejected").set(rejected)

    def budget_used(self, scope: str, window: str, ratio: float) -> None:
        """The share of a limit that is spent."""
        self._child(self._budget_used, scope, window).set(ratio)

    def budget_refused(self, scope: str, window: str) -> None:
        """A paid call found no room in a budget."""
        self._child(self._budget_refusals, scope, window).inc()

    def counts(self, model: str, version: str) -> Counts:
        """What GetStatus shows of a model version."""
        return Counts(self._waiting.get(model, 0), *self._done.get((model, version), (0, 0)))

    def batch_done(self, batch: BatchReport) -> None:
        """A batch has run."""
        labels = (batch.model, batch.version)
        self._child(self._batch_sequences, *labels).observe(batch.sequences)
        self._child(self._batch_tokens, *labels).observe(batch.tokens)
        self._child(self._batch_fill, *labels).observe(batch.fill)
        self._child(self._run, *labels).observe(batch.run_s)
        self._child(self._post, *labels).observe(batch.post_s)
        self._child(self._tokens, *labels).inc(batch.tokens)
        self._child(self._sequences, *labels).inc(batch.sequences)
        wait = self._child(self._queue_wait, *labels)
        for seconds in batch.queue_waits_s:
            wait.observe(seconds)
        before = self._done.get(labels, (0, 0))
        self._done[labels] = (before[0] + batch.sequences, before[1] + 1)

    def answers_running(self, model: str, version: str, running: int, pages_used: int) -> None:
        """How many answers of a decoder run now, and the pages that are held."""
        self._child(self._generation_running, model, version).set(running)
        self._child(self._generation_pages, model, version).set(pages_used)

    def step_done(self, step: StepReport) -> None:
        """A decoder has made a step."""
        labels = (step.model, step.version)
        child = self._child
        self.answers_running(step.model, step.version, step.running, step.pages_used)
        child(self._generation_step, *labels, step.form).observe(step.run_s)
        child(self._generation_tokens, *labels).inc(step.generated)
        child(self._tokens, *labels).inc(step.tokens)
        child(self._generation_pages_capacity, *labels).set(step.pages)
        if step.looked_up:
            child(self._generation_prompt, *labels).inc(step.looked_up)
            child(self._generation_hits, *labels).inc(step.hits)
        if step.copied:
            child(self._generation_copied, *labels).inc(step.copied)
        if step.preempted:
            child(self._generation_preemptions, *labels).inc(step.preempted)
        for metric, times in (
            (self._queue_wait, step.queue_waits_s),
            (self._generation_first, step.first_token_s),
            (self._generation_inter, step.inter_token_s),
        ):
            if times:
                observe = child(metric, *labels).observe
                for seconds in times:
                    observe(seconds)
        if step.queue_waits_s:
            self.queue_depth(step.model, step.waiting)
        before = self._done.get(labels, (0, 0))
        self._done[labels] = (before[0] + step.finished, before[1] + 1)

    def rejected(self, model: str, reason: str) -> None:
        """A request was refused before it ran."""
        self._child(self._rejections, model, reason).inc()

    def skipped(self, model: str, reason: str, count: int) -> None:
        """Sequences left the queue without being run."""
        self._child(self._skips, model, reason).inc(count)

    def run_failed(self, model: str, reason: str) -> None:
        """A run of the graph failed."""
        self._child(self._run_failures, model, reason).inc()

    def queue_depth(self, model: str, waiting: int) -> None:
        """Sequences that wait now."""
        self._waiting[model] = waiting
        self._child(self._queue_depth, model).set(waiting)

    def model_ready(self, model: str, version: str, ready: bool) -> None:
        """A model version began or ceased to answer."""
        self._child(self._ready, model, version).set(1 if ready else 0)

    def serve(self, host: str, port: int) -> tuple[Any, Thread]:
        """Starts the HTTP page /metrics on a thread; `server.shutdown()` ends it. Raises InvalidArgument where the port is taken."""
        try:
            return start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            message = f"the metrics page cannot listen on {host}:{port}: {error}. Set server.metrics_port to a free port, or to 0 for none."
            raise InvalidArgument(message, field="server.metrics_port") from error
