"""Builds the parts of the serving process, starts them, drains them.

Start: listen first (health NOT_SERVING), then load: a probe always finds the server, and a service turns SERVING with its first model.
Stop: health NOT_SERVING -> a moment for watchers -> new calls get UNAVAILABLE, accepted ones finish within `grace_s` -> connections ->
engines -> lake -> exit.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from server.api import auth, stats, tls, wire
from server.api.admin import AdminServicer
from server.api.auth_audit import AuditWriter
from server.api.guard import Guard
from server.api.health import HealthServicer
from server.api.inference import InferenceServicer
from server.api.models import ModelServicer
from server.api.open_inference import SERVICE as OPEN_INFERENCE
from server.api.open_inference import OpenInferenceServicer
from server.api.selection import Selection
from server.api.training import TrainingServicer
from server.api.training_desk import TrainingDesk
from server.config import Config, ServerConfig
from server.core import Task
from server.errors import InvalidArgument, UnderstudyError
from server.logs import AccessLog, get
from server.metrics import Metrics
from server.parts import build_skills
from server.runtime.repository import Repository
from server.runtime.runtime import ModelState, ModelStatus, Runtime
from server.tracing import make_tracer

if TYPE_CHECKING:
    from server.registry.registry import Registry

# Between NOT_SERVING and the end of acceptance: time for health watchers and load balancers to look elsewhere.
LAME_DUCK_S = 0.25
# For so long at least, new calls are refused by us before gRPC closes the connections: it cuts calls that arrive at that very moment
# with CANCELLED, which clients do not repeat, while ours say UNAVAILABLE, which they do.
REFUSE_S = 0.25
_EXAMPLES = {
    Task.FEATURE_EXTRACTION: ("Embed", {"texts": ["Where is my card?"]}),
    Task.TEXT_CLASSIFICATION: ("Classify", {"inputs": [{"text": "Where is my card?"}], "top_k": 3}),
    Task.ZERO_SHOT_CLASSIFICATION: ("Classify", {"inputs": [{"text": "Where is my card?"}], "candidate_labels": ["card", "loan"]}),
    Task.TEXT_RANKING: ("Rerank", {"query": "lost card", "documents": ["Where is my card?", "I want a loan"]}),
    Task.TOKEN_CLASSIFICATION: ("ExtractEntities", {"texts": ["Ada Lovelace lived in London."]}),
    Task.TEXT_GENERATION: ("Generate", {"prompt": "Once upon a time", "sampling": {"max_tokens": 32}}),
    Task.TRANSLATION: ("Translate", {"texts": ["Where is my card?"]}),
    Task.SUMMARIZATION: ("Summarize", {"texts": ["A long text about a lost card ..."]}),
    Task.QUESTION_ANSWERING: ("AnswerQuestion", {"inputs": [{"question": "Where?", "context": "Ada lived in London."}]}),
}
Closer = Callable[[], Awaitable[None]]


class App:
    """One serving process. `start`, then `drain` once; `run` does both around the signals."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.address = ""
        self._began = time.monotonic()
        self._log = get("app")
        self._metrics = Metrics()
        self._access = AccessLog(config.log)
        self._tracer = make_tracer(config.telemetry)
        self._guard = Guard(self._metrics, self._access, max_calls=config.server.max_concurrent_calls, tracer=self._tracer)
        self._operators = Guard(self._metrics, self._access, operator=True)
        self._metrics.calls_active.set_function(lambda: self._guard.active)
        self._health = HealthServicer([])
        self._server = grpc.aio.server(options=channel_options(config.server))
        self._closers: list[Closer] = []  # in the order of closing
        self._metrics_page: Any = None
        self.runtime = self._make_runtime()

    async def start(self) -> None:
        """Listens, then loads what the configuration names. Raises InvalidArgument where an address or a file cannot be used."""
        from server.runtime import kernels

        await asyncio.to_thread(kernels.self_test)
        await self._register()
        self._listen()
        await self._server.start()
        self._serve_metrics()
        self._log.info("listening", address=self.address, tls=bool(self.config.server.tls.cert_file), **kernels.describe())
        await self._load_models()
        gc.collect()
        gc.freeze()  # what lives as long as the process is not walked again at every collection
        self._log.info("ready", seconds=round(time.monotonic() - self._began, 3), resident_mb=stats.resident_bytes() >> 20)
        self._say_what_to_call()

    async def drain(self, grace_s: float) -> None:
        """Stops in order; accepted calls finish within `grace_s` seconds."""
        began = time.monotonic()
        self._health.drain()
        self._log.info("draining", active=self._guard.active, grace_s=grace_s)
        if grace_s:
            await asyncio.sleep(min(LAME_DUCK_S, grace_s))
        self._guard.drain()
        self._operators.drain()
        if grace_s:
            refused_until = time.monotonic() + min(REFUSE_S, grace_s)
            await self._guard.wait_idle(grace_s)
            await asyncio.sleep(max(0.0, refused_until - time.monotonic()))
        self._health.close()
        await self._server.stop(max(0.0, began + grace_s - time.monotonic()))
        await self._close()

    async def run(self) -> int:
        """Serves until SIGTERM or SIGINT; a second one ends it at once. Returns the exit code: 0, or 1 where calls were cut off."""
        loop = asyncio.get_running_loop()
        stop, fast = asyncio.Event(), asyncio.Event()

        def on_signal() -> None:
            (fast if stop.is_set() else stop).set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        starting = asyncio.create_task(self.start())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        if not starting.cancelled() and (error := starting.exception()) is not None:
            stopping.cancel()
            await self._server.stop(0)
            await self._close()
            raise error
        await stopping
        draining = asyncio.create_task(self.drain(self.config.server.grace_s))
        hurry = asyncio.create_task(fast.wait())
        await asyncio.wait((draining, hurry), return_when=asyncio.FIRST_COMPLETED)
        cut = not draining.done() and self._guard.active
        if not draining.done():
            await self._server.stop(0)
        hurry.cancel()
        await draining
        return 1 if cut else 0

    def _make_runtime(self) -> Runtime:
        from server.runtime.loader import make_loader

        config = self.config
        loader = make_loader(config.runtime, self._metrics, config.generation)
        return Runtime(Repository(Path(config.models.path)), loader, on_change=self._on_change, drain_s=config.server.grace_s)

    async def _register(self) -> None:
        """Puts every servicer behind its guard."""
        from grpc_health.v1 import health_pb2
        from grpc_reflection.v1alpha import reflection, reflection_pb2

        from server.registry.api_keys import ApiKeys
        from server.registry.audit import AuditLog

        config, runtime = self.config, self.runtime
        selection = Selection(runtime, config.models.default)
        skills = await asyncio.to_thread(build_skills, config, runtime, selection, self._metrics)
        self._closers.append(skills.close)
        keys, audit = skills.keys, AuditLog(skills.registry)
        self._guard.gate = gate = auth.Gate(keys, AuditWriter(audit, keep_days=config.auth.audit_keep_days))
        self._closers.insert(0, gate.close)
        if keys is not None:
            await asyncio.to_thread(keys.start)
        auth.check_listening(config, keys)
        await skills.start()
        inference = InferenceServicer(runtime, selection, config.server.max_items, skills.run, skills.generation)
        open_inference = OpenInferenceServicer(
            runtime,
            version=stats.server_version(),
            max_items=config.server.max_items,
            ready=lambda: not self._guard.draining.is_set(),
        )
        servicers: list[tuple[ServiceDescriptor, object]] = [
            (_service("inference_service", "InferenceService"), inference),
            (_service("skill_service", "SkillService"), skills.skills),
            (_service("feedback_service", "FeedbackService"), skills.feedback),
            (_service("ensemble_service", "EnsembleService"), skills.ensembles),
            (_service("training_service", "TrainingService"), TrainingServicer(await self._desk(skills.registry), self._guard.draining)),
            (_service("model_service", "ModelService"), ModelServicer(runtime)),
            (
                _service("stats_service", "StatsService"),
                stats.StatsServicer(
                    runtime,
                    self._metrics,
                    self._guard,
                    budget=skills.budget,
                    providers=skills.providers,
                    interactions=skills.interactions,
                ),
            ),
            (_service("admin_service", "AdminService"), AdminServicer(ApiKeys(skills.registry), audit, keys)),
            (OPEN_INFERENCE, open_inference),
        ]
        names = [descriptor.full_name for descriptor, _ in servicers]
        self._health = HealthServicer(names)
        self._health.update(runtime, skills=bool(config.skills))
        operators: list[tuple[ServiceDescriptor, object]] = [(health_pb2.DESCRIPTOR.services_by_name["Health"], self._health)]
        if config.server.reflection:
            shown = [*names, "grpc.health.v1.Health", reflection.SERVICE_NAME]
            operators.append((reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"], reflection.aio.ReflectionServicer(shown)))
        handlers = [wire.handlers(descriptor, servicer, self._guard) for descriptor, servicer in servicers]
        handlers += [wire.handlers(descriptor, servicer, self._operators) for descriptor, servicer in operators]
        self._server.add_generic_rpc_handlers(tuple(handlers))

    async def _desk(self, registry: Registry) -> TrainingDesk:
        from server.lake.counting import rows_to_learn_from
        from server.lake.reading import LakeReader

        reader = LakeReader(self.config, registry)
        desk = TrainingDesk(self.config, registry, lambda skill: rows_to_learn_from(self.config, reader, skill))
        await asyncio.to_thread(desk.announce)
        return desk

    def _listen(self) -> None:
        config = self.config.server
        wanted = f"{f'[{config.host}]' if ':' in config.host else config.host}:{config.port}"
        credentials = tls.credentials(config.tls)
        try:
            port = self._server.add_secure_port(wanted, credentials) if credentials else self._server.add_insecure_port(wanted)
        except RuntimeError as error:
            raise InvalidArgument(
                f"the server cannot listen on {wanted}: {error}. Choose a free port with --port, or 0 for any.", field="server.port"
            ) from error
        self.address = f"{wanted.rpartition(':')[0]}:{port}"

    def _serve_metrics(self) -> None:
        """A port that was asked for must be had; the default one may be another server's on the same machine."""
        config = self.config.server
        if not config.metrics_port:
            return
        try:
            self._metrics_page, _ = self._metrics.serve(config.metrics_host, config.metrics_port)
        except InvalidArgument as error:
            if "metrics_port" in config.model_fields_set:
                raise
            self._log.warning("no metrics page", error=error.message)

    async def _load_models(self) -> None:
        """A model that cannot be loaded keeps no other from serving; the log and GetModel say why."""
        for name, version in await asyncio.to_thread(lambda: list(self._wanted_models())):
            try:
                await self.runtime.load(name, version)
            except UnderstudyError as error:
                self._log.error("model not loaded", model=name, version=version or "latest", reason=error.reason, error=error.message)
        if not any(one.state is ModelState.READY for one in self.runtime.loaded()):
            hint = "`understudy models pull starter` fetches a first one; then LoadModel or a restart"
            self._log.warning("no model is loaded", hint=hint)

    def _wanted_models(self) -> Iterator[tuple[str, str | None]]:
        for entry in self.config.models.load:
            name, _, version = entry.partition("@")
            if name == "*":
                yield from ((found, None) for found in self.runtime.repository.names())
            else:
                yield name, version or None

    def _on_change(self, status: ModelStatus) -> None:
        self._metrics.model_ready(status.name, status.version, status.state is ModelState.READY)
        self._health.update(self.runtime, skills=bool(self.config.skills))
        self._log.info("model", model=status.name, version=status.version, state=status.state.value, default=status.default)

    def _say_what_to_call(self) -> None:
        task = next((task for task in _EXAMPLES if self.runtime.models_for(task)), None)
        if task is None:
            return
        method, body = _EXAMPLES[task]
        secure = self.config.server.tls
        flags = f"-cacert {secure.cert_file}" if secure.cert_file else "-plaintext"
        where = self.address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")
        print(f"Try: grpcurl {flags} -d '{json.dumps(body)}' {where} understudy.v1.InferenceService/{method}", file=sys.stdout, flush=True)

    async def _close(self) -> None:
        await self.runtime.close()
        for close in self._closers:
            try:
                await close()
            except Exception:
                self._log.exception("closing a part failed")
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        if self._metrics_page is not None:
            await asyncio.to_thread(self._metrics_page.shutdown)
            self._metrics_page.server_close()
        self._log.info("stopped")
        self._access.flush()


def channel_options(config: ServerConfig) -> list[tuple[str, int]]:
    """Arguments of gRPC's core; see https://grpc.github.io/grpc/core/group__grpc__arg__keys.html."""
    keep = config.keepalive
    options = [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.so_reuseport", int(config.reuse_port)),
        ("grpc.keepalive_time_ms", int(keep.time_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(keep.timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", int(keep.client_interval_s * 1000)),
        ("grpc.http2.max_ping_strikes", 2),
    ]
    if keep.max_connection_idle_s:
        options.append(("grpc.max_connection_idle_ms", int(keep.max_connection_idle_s * 1000)))
    if keep.max_connection_age_s:
        options.append(("grpc.max_connection_age_ms", int(keep.max_connection_age_s * 1000)))
        options.append(("grpc.max_connection_age_grace_ms", int(config.grace_s * 1000)))
    return options


def _service(module: str, name: str) -> ServiceDescriptor:
    from importlib import import_module

    descriptor: ServiceDescriptor = import_module(f"understudy.v1.{module}_pb2").DESCRIPTOR.services_by_name[name]
    return descriptor
