"""The life of the server: health, deadlines, cancellation, overload, limits, drain, logs, metrics, traces."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import urllib.request
from collections import Counter
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.metrics import NAMES
from tests.conftest import StartServer
from tests.server_process import ServerProcess
from understudy.v1 import inference_service_pb2 as pb
from understudy.v1 import inference_service_pb2_grpc as stubs
from understudy.v1 import model_service_pb2 as models
from understudy.v1 import model_service_pb2_grpc as model_stubs
from understudy.v1 import stats_service_pb2, stats_service_pb2_grpc

EMBED = "/understudy.v1.InferenceService/Embed"
# Work for a while.
LARGE = pb.EmbedRequest(texts=["where is my lost card ?"] * 2048)
SMALL = pb.EmbedRequest(texts=["money"])


def details_of(error: grpc.RpcError, kind: type) -> Any:
    for key, value in error.trailing_metadata():
        if key == "grpc-status-details-bin":
            for one in status_pb2.Status.FromString(value).details:
                message = kind()
                if one.Unpack(message):
                    return message
    return None


def until_busy(channel: grpc.Channel) -> None:
    """Asks until the engine of the embedder has work that waits."""
    stub = stats_service_pb2_grpc.StatsServiceStub(channel)
    while True:
        status = stub.GetStatus(stats_service_pb2.GetStatusRequest(), timeout=30)
        if any(one.queued_sequences for one in status.models if one.model.model_id == "embedder"):
            return


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_service_serves_once_it_has_a_model(start_server: StartServer) -> None:
    running = start_server("[models]\nload = []")
    with grpc.insecure_channel(running.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def check(service: str) -> int:
            return int(health.Check(health_pb2.HealthCheckRequest(service=service)).status)

        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        inference = "understudy.v1.InferenceService"
        assert [check(one) for one in ("", inference, "inference.GRPCInferenceService")] == [not_serving] * 3
        assert check("understudy.v1.ModelService") == serving
        with pytest.raises(grpc.RpcError) as caught:
            check("nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = health.Watch(health_pb2.HealthCheckRequest(service=f"{inference}/feature-extraction"))
        assert next(watch).status == not_serving
        stub = model_stubs.ModelServiceStub(channel)
        stub.LoadModel(models.LoadModelRequest(name="models/embedder"))
        assert next(watch).status == serving
        assert [check(one) for one in ("", inference, f"{inference}/question-answering")] == [serving, serving, not_serving]
        stub.UnloadModel(models.UnloadModelRequest(name="models/embedder"))
        assert next(watch).status == not_serving
        stub.LoadModel(models.LoadModelRequest(name="models/embedder"))
        assert next(watch).status == serving
        running.signal()
        assert [one.status for one in watch] == [not_serving], "drain tells watchers, then ends their streams"
    assert running.wait() == 0


def test_a_late_call_says_at_which_stage(start_server: StartServer) -> None:
    running = start_server()
    with grpc.insecure_channel(running.address) as channel:
        stub = stubs.InferenceServiceStub(channel)
        stub.Embed(SMALL)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Embed(LARGE, timeout=0.03)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        (line,) = running.wait_event("call", code="DEADLINE_EXCEEDED")
        assert line["stage"] in ("tokenize", "queue", "run") and line["reason"] == "DEADLINE_EXCEEDED"
        assert stub.Embed(SMALL, timeout=30).results[0].embedding
    running.stop()


def test_a_caller_that_leaves_frees_the_engine(start_server: StartServer) -> None:
    running = start_server()
    with grpc.insecure_channel(running.address) as channel:
        stub = stubs.InferenceServiceStub(channel)
        leaving = [stub.Embed.future(LARGE) for _ in range(3)]  # one runs, the others wait
        until_busy(channel)
        for one in leaving:
            one.cancel()
        assert running.wait_event("call", code="CANCELLED")
        assert stub.Embed(SMALL, timeout=30).results[0].embedding
    running.stop()


def test_a_full_queue_refuses_and_says_when_to_return(start_server: StartServer) -> None:
    running = start_server("[runtime]\nqueue_sequences = 256\n")
    request = pb.EmbedRequest(texts=["where is my lost card ? " * 8] * 256)
    with grpc.insecure_channel(running.address) as channel:
        stub = stubs.InferenceServiceStub(channel)
        outcomes: Counter[str] = Counter()
        for call in [stub.Embed.future(request) for _ in range(24)]:
            error = call.exception()
            outcomes["OK" if error is None else error.code().name] += 1
            if error is not None:
                assert details_of(error, error_details_pb2.ErrorInfo).reason == "OVERLOADED"
                assert details_of(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
        assert set(outcomes) == {"OK", "RESOURCE_EXHAUSTED"}, outcomes
    running.stop()


def test_more_calls_than_allowed_are_refused(start_server: StartServer) -> None:
    running = start_server("[server]\nmax_concurrent_calls = 1\n")
    with grpc.insecure_channel(running.address) as channel:
        stub = stubs.InferenceServiceStub(channel)
        calls = [stub.Embed.future(LARGE) for _ in range(8)]
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())  # probes are never refused
        refused = [error for call in calls if (error := call.exception()) is not None]
        assert 0 < len(refused) < len(calls)
        for error in refused:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert details_of(error, error_details_pb2.RetryInfo) is not None
    running.stop()


def test_messages_above_the_limit_are_refused(start_server: StartServer) -> None:
    running = start_server("[server]\nmax_message_bytes = 65536\n")
    with grpc.insecure_channel(running.address) as channel:
        stub = stubs.InferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Embed(pb.EmbedRequest(texts=["a" * 100_000]))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert stub.Embed(SMALL).results[0].embedding
    running.stop()


def test_no_accepted_call_fails_while_the_server_drains(start_server: StartServer) -> None:
    running = start_server("[server]\ngrace_s = 30\n")

    async def load() -> Counter[str]:
        outcomes: Counter[str] = Counter()
        enough = asyncio.Event()

        async def caller(request: pb.EmbedRequest) -> None:
            async with grpc.aio.insecure_channel(running.address) as channel:
                stub = stubs.InferenceServiceStub(channel)
                while True:
                    try:
                        response = await stub.Embed(request)
                    except grpc.aio.AioRpcError as error:
                        outcomes[error.code().name] += 1
                        return
                    assert len(response.results) == len(request.texts)
                    outcomes["OK"] += 1
                    if outcomes["OK"] > 200:
                        enough.set()

        callers = [asyncio.create_task(caller(request)) for request in [SMALL] * 16 + [LARGE] * 2]
        await enough.wait()
        running.signal()
        await asyncio.gather(*callers)
        return outcomes

    outcomes = asyncio.run(load())
    assert running.wait() == 0
    assert set(outcomes) == {"OK", "UNAVAILABLE"}, outcomes
    accepted = Counter((one["code"], one.get("reason")) for one in running.events("call"))
    assert set(accepted) <= {("OK", None), ("UNAVAILABLE", "DRAINING")}, accepted


def test_a_second_signal_ends_it_at_once(start_server: StartServer) -> None:
    running = start_server("[server]\ngrace_s = 600\n")
    with grpc.insecure_channel(running.address) as channel:
        stub = stubs.InferenceServiceStub(channel)
        calls = [stub.Embed.future(LARGE) for _ in range(2)]
        until_busy(channel)
        running.signal()
        running.wait_event("draining")
        running.signal(signal.SIGINT)
        assert running.wait(30) in (0, 1)
        outcomes = Counter("OK" if (error := call.exception()) is None else error.code().name for call in calls)
        assert set(outcomes) <= {"OK", "UNAVAILABLE", "CANCELLED"}, outcomes


def test_open_streams_do_not_hold_up_the_drain(start_server: StartServer) -> None:
    running = start_server("[server]\ngrace_s = 600\n")
    with grpc.insecure_channel(running.address) as channel:
        endless = threading.Event()

        def requests() -> Any:
            endless.wait()
            yield b""

        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(requests())
        health = health_pb2_grpc.HealthStub(channel)
        health.Check(health_pb2.HealthCheckRequest())
        running.signal()
        assert list(stream) == []
        assert running.wait(30) == 0
        endless.set()


def test_logs_and_answers_carry_the_request_id_and_no_text(start_server: StartServer) -> None:
    running = start_server('[log]\nlevel = "debug"\n')
    marker = "zebracrossing"
    with grpc.insecure_channel(running.address) as channel:
        call = channel.unary_unary(EMBED)
        good = pb.EmbedRequest(texts=[marker, marker * 1000]).SerializeToString()
        _, state = call.with_call(good, metadata=(("x-request-id", "mine-1"),))
        assert dict(state.trailing_metadata())["x-request-id"] == "mine-1"
        _, state = call.with_call(good, metadata=(("x-request-id", 'no good"id'),))
        made = dict(state.trailing_metadata())["x-request-id"]
        assert made and made != 'no good"id'
        with pytest.raises(grpc.RpcError):
            call(pb.EmbedRequest(texts=[marker], dimensions=-1).SerializeToString(), metadata=(("x-request-id", "mine-2"),))
        (line,) = running.wait_event("call", request_id="mine-1")
        assert (line["code"], line["items"], line["failed_items"], line["model"]) == ("OK", 2, 1, "embedder@1")
        (line,) = running.wait_event("call", request_id="mine-2")
        assert (line["code"], line["reason"]) == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")
    running.stop()
    assert marker not in "".join(running.lines)


def test_every_documented_metric_is_exposed(start_server: StartServer) -> None:
    port = free_port()
    running = start_server(f"[server]\nmetrics_port = {port}\n")
    with grpc.insecure_channel(running.address) as channel:
        stubs.InferenceServiceStub(channel).Embed(SMALL)
        with pytest.raises(grpc.RpcError):
            stubs.InferenceServiceStub(channel).Embed(pb.EmbedRequest())
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        text = page.read().decode()
    declared = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE understudy_")}
    assert {name for name in declared if not name.endswith("_created")} == set(NAMES)
    for sample in (
        f'understudy_calls_total{{code="OK",method="{EMBED}"}} 1.0',
        f'understudy_errors_total{{method="{EMBED}",reason="INVALID_ARGUMENT"}} 1.0',
        'understudy_model_ready{model="embedder",version="1"} 1.0',
        'understudy_batch_sequences_count{model="embedder",version="1"}',
        'understudy_queue_wait_seconds_count{model="embedder",version="1"}',
        'understudy_queue_depth{model="embedder"} 0.0',
    ):
        assert sample in text, sample
    assert "process_resident_memory_bytes" in text
    running.stop()


def test_a_port_that_is_taken_is_a_readable_error(server: ServerProcess, tmp_path: Path) -> None:
    port = server.address.rpartition(":")[2]
    second = ServerProcess(tmp_path, f'[models]\nload = []\n[log]\nformat = "json"\n[server]\nmetrics_port = {port}\n')
    assert second.wait() == 1
    text = "".join(second.lines)
    assert "server.metrics_port" in text and "Traceback" not in text


def test_spans_reach_a_collector_with_the_caller_s_trace(start_server: StartServer) -> None:
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as collector_stubs

    spans: list[Any] = []

    class Collector(collector_stubs.TraceServiceServicer):
        def Export(self, request: Any, _context: Any) -> Any:
            spans.extend(span for one in request.resource_spans for scope in one.scope_spans for span in scope.spans)
            return collector.ExportTraceServiceResponse()

    receiver = grpc.server(futures.ThreadPoolExecutor(1))
    collector_stubs.add_TraceServiceServicer_to_server(Collector(), receiver)
    port = receiver.add_insecure_port("127.0.0.1:0")
    receiver.start()
    try:
        running = start_server(f'[telemetry]\notlp_endpoint = "http://127.0.0.1:{port}"\n')
        trace = "0af7651916cd43dd8448eb211c80319c"
        with grpc.insecure_channel(running.address) as channel:
            stub = stubs.InferenceServiceStub(channel)
            stub.Embed(SMALL, metadata=(("traceparent", f"00-{trace}-b7ad6b7169203331-01"),))
        running.stop()
    finally:
        receiver.stop(0).wait()
    call = next(span for span in spans if span.name == EMBED[1:])
    assert call.trace_id.hex() == trace
    assert {"tokenize", "queue", "run", "post"} >= {span.name for span in spans if span.parent_span_id == call.span_id} >= {"run"}
