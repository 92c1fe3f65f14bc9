"""A gRPC server that fails on demand, for what the real one does only when it is stopping or full: it speaks the real wire to every client.

Embed answers by its first text, "<what>:<name>"; calls are counted by name:
  ok       the authorization that came as the model's name, the request id as its version, milliseconds left as usage.input_tokens
  again    UNAVAILABLE with RetryInfo twice, then ok
  full     RESOURCE_EXHAUSTED with RetryInfo once, then ok
  plain    UNAVAILABLE without RetryInfo
  paid     UNAVAILABLE with RetryInfo, because of providers
  later    UNAVAILABLE with a RetryInfo of an hour
Each ok has the number of calls of that name as its vector's only value. CreateFeedback gives the request id as the feedback's id.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from understudy.v1 import inference_service_pb2 as pb
from understudy.v1.feedback_service_pb2 import CreateFeedbackRequest, CreateFeedbackResponse

_EMBED = "/understudy.v1.InferenceService/Embed"
_FEEDBACK = "/understudy.v1.FeedbackService/CreateFeedback"
# What -> code, reason, seconds of RetryInfo (None: none), how many times.
_FAILURES: dict[str, tuple[grpc.StatusCode, str, float | None, float]] = {
    "again": (grpc.StatusCode.UNAVAILABLE, "DRAINING", 0.01, 2),
    "full": (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", 0.01, 1),
    "plain": (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", None, float("inf")),
    "paid": (grpc.StatusCode.UNAVAILABLE, "PROVIDER_UNAVAILABLE", 0.01, float("inf")),
    "later": (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", 3600.0, float("inf")),
}


@dataclass(frozen=True)
class Scripted:
    """Where it listens: without and with encryption; `ca_file` vouches for it."""

    address: str
    tls_address: str
    ca_file: Path


class _Script(grpc.GenericRpcHandler):
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method == _EMBED:
            return grpc.unary_unary_rpc_method_handler(self._embed, pb.EmbedRequest.FromString, pb.EmbedResponse.SerializeToString)
        if details.method == _FEEDBACK:
            return grpc.unary_unary_rpc_method_handler(
                self._feedback, CreateFeedbackRequest.FromString, CreateFeedbackResponse.SerializeToString
            )
        return None

    def _embed(self, request: pb.EmbedRequest, context: grpc.ServicerContext) -> pb.EmbedResponse:
        what, _, name = request.texts[0].partition(":")
        self.counts[name] += 1
        code, reason, delay, times = _FAILURES.get(what, (grpc.StatusCode.OK, "", None, 0))
        if self.counts[name] <= times:
            _refuse(context, code, reason, delay)
        metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        response = pb.EmbedResponse()
        response.results.add().embedding.append(self.counts[name])
        response.model.name, response.model.version = metadata.get("authorization", ""), metadata.get("x-request-id", "")
        response.usage.input_tokens = int(min(context.time_remaining() or 0.0, 1e9) * 1000)
        return response

    def _feedback(self, request: CreateFeedbackRequest, context: grpc.ServicerContext) -> CreateFeedbackResponse:
        self.counts["feedback"] += 1
        if self.counts["feedback"] % 2:
            _refuse(context, grpc.StatusCode.UNAVAILABLE, "DRAINING", 0.01)
        response = CreateFeedbackResponse(feedback=request.feedback)
        response.feedback.feedback_id = request.request_id
        return response


def _refuse(context: grpc.ServicerContext, code: grpc.StatusCode, reason: str, delay_s: float | None) -> None:
    status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=f"scripted {reason}")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="understudy.dev", metadata={"model": "scripted"}))
    if delay_s is not None:
        retry = duration_pb2.Duration()
        retry.FromMilliseconds(int(delay_s * 1000))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=retry))
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, status.message)


@contextmanager
def scripted_server(folder: Path) -> Iterator[Scripted]:
    """The server, on two free ports; `folder` gets the authority's certificate."""
    key, certificate = _certificate()
    ca_file = folder / "scripted-ca.pem"
    ca_file.write_bytes(certificate)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((_Script(),))
    plain = server.add_insecure_port("127.0.0.1:0")
    tls = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    try:
        yield Scripted(f"127.0.0.1:{plain}", f"127.0.0.1:{tls}", ca_file)
    finally:
        server.stop(None).wait()


def _certificate() -> tuple[bytes, bytes]:
    """Key and certificate of 127.0.0.1 and localhost, in PEM; the certificate is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "understudy test")])
    now = datetime.datetime.now(datetime.UTC)
    hosts = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(hosts, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return pem, made.public_bytes(serialization.Encoding.PEM)
