"""What stands around every request: limits, CORS, health, metrics, the access log, the way to the server, and a graceful end."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.conftest import StartServer
from tests.gateway.conftest import StartGateway
from tests.gateway_process import GatewayProcess
from tests.server_process import ServerProcess

EMBED = {"model": {"name": "embedder"}, "texts": ["my card is lost"]}


def story(tokens: int) -> dict[str, object]:
    """A generation of so many tokens."""
    return {"model": {"name": "scripted"}, "prompt": "tell", "sampling": {"temperature": 0, "maxTokens": tokens}}


def reason(response: httpx.Response) -> str:
    return str(response.json()["error"]["reason"])


class Stream:
    """A generation that has begun: its lines are read by hand."""

    def __init__(self, gateway: GatewayProcess, tokens: int = 2000) -> None:
        self._client = httpx.Client(base_url=gateway.url, timeout=60)
        self._context = self._client.stream("POST", "/v1/inference:generate", json=story(tokens))
        self.response = self._context.__enter__()
        assert self.response.status_code == 200
        self.lines = self.response.iter_lines()
        assert "result" in json.loads(next(self.lines))

    def close(self) -> None:
        self._context.__exit__(None, None, None)
        self._client.close()


@pytest.fixture
def http(gateway: GatewayProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, timeout=30) as client:
        yield client


def test_health_and_readiness(http: httpx.Client) -> None:
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json() == {"status": "serving"}


def test_without_a_server_it_lives_but_is_not_ready(start_gateway: StartGateway) -> None:
    with socket.socket() as taken:  # bound, not listening: nobody answers there
        taken.bind(("127.0.0.1", 0))
        gateway = start_gateway(f"127.0.0.1:{taken.getsockname()[1]}")
        assert httpx.get(f"{gateway.url}/healthz").status_code == 200
        assert httpx.get(f"{gateway.url}/readyz").status_code == 503
        refused = httpx.get(f"{gateway.url}/v1/status")
    assert refused.status_code == 503
    assert reason(refused) == "SERVER_NOT_REACHABLE"
    assert int(refused.headers["retry-after"]) >= 1
    assert "127.0.0.1" not in refused.text  # where the server stands is nobody's business


def test_readiness_follows_the_server(start_gateway: StartGateway, start_server: StartServer) -> None:
    server = start_server('[models]\nload = ["embedder"]\n')
    gateway = start_gateway(server.address)
    assert httpx.get(f"{gateway.url}/readyz").status_code == 200
    server.stop()
    with httpx.Client(base_url=gateway.url) as client:
        while client.get("/readyz").status_code == 200:  # the answer is kept for a second
            pass
        assert client.get("/healthz").status_code == 200


def test_bodies_have_a_limit_however_they_are_sent(start_gateway: StartGateway, server: ServerProcess) -> None:
    gateway = start_gateway(server.address, "--max-body-bytes=1000")
    kind = {"content-type": "application/json"}
    large = json.dumps({**EMBED, "texts": ["a" * 1000]}).encode()
    for content in (large, iter([large[:600], large[600:]])):  # with its length; in chunks
        refused = httpx.post(f"{gateway.url}/v1/inference:embed", content=content, headers=kind)
        assert refused.status_code == 413
        assert reason(refused) == "REQUEST_TOO_LARGE"
    small = json.dumps(EMBED).encode()
    for content in (small, iter([small[:10], small[10:]])):
        assert httpx.post(f"{gateway.url}/v1/inference:embed", content=content, headers=kind).status_code == 200


def test_headers_have_a_limit(gateway: GatewayProcess) -> None:
    refused = httpx.get(f"{gateway.url}/v1/status", headers={"x-large": "a" * 60_000})
    assert refused.status_code == 431
    assert refused.json()["error"]["reason"] == "HEADERS_TOO_LARGE"


def test_slow_senders_are_ended(start_gateway: StartGateway, server: ServerProcess) -> None:
    gateway = start_gateway(server.address, "--header-timeout=200ms", "--body-timeout=200ms")
    host, _, port = gateway.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\n")
        assert slow.recv(1000) == b""
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(b"POST /v1/inference:embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
        while slow.recv(1000):
            pass  # and the connection ends


def test_more_requests_than_may_run_are_refused(start_gateway: StartGateway, server: ServerProcess) -> None:
    gateway = start_gateway(server.address, "--max-requests=1")
    running = Stream(gateway)
    refused = httpx.get(f"{gateway.url}/v1/status")
    assert refused.status_code == 503
    assert reason(refused) == "OVERLOADED"
    assert refused.headers["retry-after"] == "1"
    assert httpx.get(f"{gateway.url}/healthz").status_code == 200  # probes are not counted
    running.close()
    gateway.wait_event("request", route="/v1/inference:generate")
    assert httpx.get(f"{gateway.url}/v1/status").status_code == 200


def test_cors_is_off_unless_configured(start_gateway: StartGateway, server: ServerProcess, http: httpx.Client) -> None:
    page = {"origin": "https://app.example"}
    asks = {**page, "access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    assert "access-control-allow-origin" not in http.get("/v1/status", headers=page).headers
    assert http.options("/v1/status", headers=asks).status_code == 405
    gateway = start_gateway(server.address, "--cors-origins=https://app.example, https://other.example")
    allowed = httpx.options(f"{gateway.url}/v1/inference:embed", headers=asks)
    assert allowed.status_code == 204
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert allowed.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "access-control-allow-credentials" not in allowed.headers
    answer = httpx.get(f"{gateway.url}/v1/absent", headers=page)
    assert answer.headers["access-control-allow-origin"] == "https://app.example"  # errors too, or pages could not read them
    assert "X-Understudy-Route" in answer.headers["access-control-expose-headers"]
    foreign = {**asks, "origin": "https://evil.example"}
    assert httpx.options(f"{gateway.url}/v1/status", headers=foreign).status_code == 403
    assert "access-control-allow-origin" not in httpx.get(f"{gateway.url}/v1/status", headers=foreign).headers


CROSS = ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}, {"origin": "null"})
OWN = ({}, {"sec-fetch-site": "same-origin"}, {"origin": "https://app.example"}, {"sec-fetch-site": "none"})


def test_pages_of_other_origins_change_nothing(start_gateway: StartGateway, server: ServerProcess) -> None:
    """A browser sends what a foreign page wants sent, without asking first where it looks like a form's; it needs no answer to do harm."""
    gateway = start_gateway(server.address, "--cors-origins=https://app.example")
    for headers in CROSS:
        for path in ("/v1/inference:embed", "/models/load", "/v1/chat/completions", "/v1/skills/x/rollout:rollback"):
            refused = httpx.post(f"{gateway.url}{path}", content=json.dumps(EMBED), headers=headers)
            assert refused.status_code == 403 and "FOREIGN_ORIGIN" in refused.text, (headers, path, refused.text)
        assert httpx.get(f"{gateway.url}/v1/status", headers=headers).status_code == 200  # reads, whose answer the page does not get
    for headers in (*OWN, {"origin": gateway.url}):
        assert httpx.post(f"{gateway.url}/v1/inference:embed", json=EMBED, headers=headers).status_code == 200, headers


def test_a_page_whose_name_came_to_mean_this_machine_gets_nothing(start_gateway: StartGateway, server: ServerProcess) -> None:
    gateway = start_gateway(server.address, "--hosts=gateway.example")
    port = gateway.url.rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", "gateway.example"):
        assert httpx.get(f"{gateway.url}/v1/status", headers={"host": host}).status_code == 200, host
    end = time.monotonic() + 30
    while (refused := httpx.get(f"{gateway.url}/v1/status", headers={"host": f"evil.example:{port}"})).status_code == 503:
        assert time.monotonic() < end, "it never learnt that the server asks for no keys"
    assert refused.status_code == 421 and reason(refused) == "HOST_NOT_KNOWN"
    assert httpx.get(f"{gateway.url}/healthz", headers={"host": "evil.example"}).status_code == 200


def test_metrics_have_no_labels_that_callers_make_up(start_gateway: StartGateway, server: ServerProcess) -> None:
    gateway = start_gateway(server.address)
    httpx.post(f"{gateway.url}/v1/inference:embed", json=EMBED)
    for path in ("/v1/models/label-a/versions/1", "/v1/models/label-b/versions/1", "/label-c", "/v1/label-d"):
        httpx.get(f"{gateway.url}{path}")
    httpx.request("LABEL-E", f"{gateway.url}/v1/status")
    text = httpx.get(f"http://{gateway.metrics}/metrics").text
    assert "label-" not in text.lower()
    assert 'understudy_gateway_requests_total{code="200",method="POST",route="/v1/inference:embed"} 1' in text
    assert 'understudy_gateway_requests_total{code="404",method="GET",route="/v1/{name=models/*/versions/*}"} 2' in text
    assert re.search(r"^understudy_gateway_received_bytes_total [1-9]", text, flags=re.MULTILINE)
    running = Stream(gateway)
    text = httpx.get(f"http://{gateway.metrics}/metrics").text
    assert "understudy_gateway_streams 1" in text and "understudy_gateway_in_flight 1" in text
    running.close()
    gateway.wait_event("request", route="/v1/inference:generate", stream=True)
    assert "understudy_gateway_streams 0" in httpx.get(f"http://{gateway.metrics}/metrics").text
    assert httpx.get(f"{gateway.url}/metrics").status_code == 404  # not where strangers ask


def test_the_access_log_keeps_secrets(start_gateway: StartGateway, server: ServerProcess) -> None:
    gateway = start_gateway(server.address)
    key = "und_abc123_s3cr3tsecret"
    headers = {"authorization": f"Bearer {key}", "x-request-id": "r-1"}
    httpx.get(f"{gateway.url}/v1/status?api_key={key}", headers=headers)
    httpx.get(f"{gateway.url}/v1/models/{key}/versions/1")
    (line,) = gateway.wait_event("request", request_id="r-1")
    assert line["path"] == "/v1/status" and line["method"] == "GET"
    gateway.wait_event("request", 2)
    assert "s3cr3t" not in "".join(gateway.lines)


def test_keys_reach_the_server_in_either_header(start_gateway: StartGateway, start_server: StartServer) -> None:
    server = start_server('[auth]\nkeys = "required"\n[models]\nload = ["embedder"]\n')
    gateway = start_gateway(server.address)
    refused = httpx.get(f"{gateway.url}/v1/status")
    assert refused.status_code == 401
    assert reason(refused) == "UNAUTHENTICATED"
    assert refused.headers["www-authenticate"].startswith("Bearer")
    for headers in ({"authorization": "Bearer und_no_such"}, {"x-api-key": "und_no_such"}):
        unknown = httpx.get(f"{gateway.url}/v1/status", headers=headers)
        assert unknown.status_code == 401
        assert unknown.json()["error"]["message"] != refused.json()["error"]["message"]  # it was seen
    assert httpx.get(f"{gateway.url}/readyz").status_code == 200


def test_a_client_that_leaves_cancels_the_call(start_gateway: StartGateway, start_server: StartServer) -> None:
    server = start_server('[models]\nload = ["scripted"]\n')
    gateway = start_gateway(server.address)
    Stream(gateway).close()
    server.wait_event("call", method="/understudy.v1.InferenceService/Generate", code="CANCELLED")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{gateway.url}/v1/inference:generateText", json=story(2000), timeout=httpx.Timeout(10, read=0.05))
    server.wait_event("call", method="/understudy.v1.InferenceService/GenerateText", code="CANCELLED")


def test_stopping_lets_running_requests_end(start_gateway: StartGateway, server: ServerProcess) -> None:
    gateway = start_gateway(server.address, "--drain-delay=300ms")
    running = Stream(gateway, tokens=600)
    gateway.signal(signal.SIGTERM)
    gateway.wait_event("stopping")
    draining = httpx.get(f"{gateway.url}/readyz")  # still listening: load balancers need a while to turn away
    assert (draining.status_code, draining.json()) == (503, {"status": "draining"})
    deltas = [delta for line in running.lines for delta in json.loads(line)["result"]["deltas"]]
    assert deltas[-1]["finishReason"] == "FINISH_REASON_LENGTH"
    running.close()
    assert gateway.wait() == 0
    assert gateway.events("stopped")[0]["clean"] is True


def test_after_its_grace_time_it_ends_streams_with_a_word(start_gateway: StartGateway, server: ServerProcess) -> None:
    gateway = start_gateway(server.address, "--grace=100ms")
    running = Stream(gateway)
    gateway.signal(signal.SIGTERM)
    last = [json.loads(line) for line in running.lines][-1]
    assert last["error"]["reason"] == "DRAINING"
    running.close()
    assert gateway.wait() == 0


def test_a_second_signal_ends_it_at_once(start_gateway: StartGateway, server: ServerProcess) -> None:
    gateway = start_gateway(server.address, "--grace=60s", "--drain-delay=60s")
    gateway.signal(signal.SIGINT)
    gateway.wait_event("stopping")
    gateway.signal(signal.SIGTERM)
    assert gateway.wait(10) == 1


def test_many_at_once_are_all_answered(gateway: GatewayProcess) -> None:
    with httpx.Client(base_url=gateway.url, timeout=60) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: client.post("/v1/inference:embed", json=EMBED), range(200)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text.partition('"model"')[0].replace(" ", "") for answer in answers}) == 1
    assert len({answer.headers["x-request-id"] for answer in answers}) == 200


def test_headers_of_a_stream_come_before_its_first_message(start_gateway: StartGateway) -> None:
    with socket.socket() as silent:  # accepts, and never answers: the call waits for its connection
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        gateway = start_gateway(f"127.0.0.1:{silent.getsockname()[1]}", "--stream-header-delay=50ms")
        with httpx.stream("POST", f"{gateway.url}/v1/inference:generate", json=story(5), headers={"x-timeout-ms": "1500"}) as response:
            assert response.status_code == 200
            (line,) = list(response.iter_lines())
    assert json.loads(line)["error"]["reason"] in ("DEADLINE_EXCEEDED", "SERVER_NOT_REACHABLE")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-body-bytes=0"], "--max-body-bytes"),
        (["--tls-cert=absent.pem"], "--tls-cert and --tls-key"),
        (["--no-such-flag"], "no-such-flag"),
        (["serve"], "unexpected argument"),
        (["--listen=256.0.0.1:1"], "--listen"),
        (["--server-ca=absent.pem"], "absent.pem"),
    ],
)
def test_a_wrong_configuration_is_named(gateway: GatewayProcess, flags: list[str], words: str) -> None:
    done = subprocess.run([*gateway.command[:1], "--metrics-listen=", *flags], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert words in done.stderr


def test_settings_come_from_the_environment_too(start_gateway: StartGateway, server: ServerProcess) -> None:
    gateway = start_gateway(server.address, env={"UNDERSTUDY_GATEWAY_MAX_BODY_BYTES": "10"})
    assert httpx.post(f"{gateway.url}/v1/inference:embed", json=EMBED).status_code == 413
    gateway = start_gateway(server.address, "--max-body-bytes=100000", env={"UNDERSTUDY_GATEWAY_MAX_BODY_BYTES": "10"})
    assert httpx.post(f"{gateway.url}/v1/inference:embed", json=EMBED).status_code == 200
