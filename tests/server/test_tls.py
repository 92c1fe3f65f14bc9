"""TLS and mutual TLS from files, renewed while the server runs."""

from __future__ import annotations

import datetime
import shutil
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.conftest import StartServer


@dataclass
class Authority:
    """A certificate authority of the test's own."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def make(cls, name: str) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        return cls(key, certificate(name, key.public_key(), name, key, authority=True))

    def issue(self, name: str) -> tuple[bytes, bytes]:
        """(key, certificate) in PEM, valid for localhost."""
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = self.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
        signed = certificate(name, key.public_key(), str(issuer), self.key)
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return private, signed.public_bytes(serialization.Encoding.PEM)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def certificate(
    name: str, key: ec.EllipticCurvePublicKey, issuer: str, issuer_key: ec.EllipticCurvePrivateKey, *, authority: bool = False
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )


def answers(address: str, credentials: grpc.ChannelCredentials) -> bool:
    """Whether a fresh connection is served."""
    options = (("grpc.ssl_target_name_override", "localhost"), ("grpc.use_local_subchannel_pool", 1))
    with grpc.secure_channel(address, credentials, options) as channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error
            return False
        return True


def install(folder: Path, pair: tuple[bytes, bytes]) -> None:
    """Puts a renewed pair in place, each file by a rename, as renewal tools do."""
    for name, content in zip(("tls.key", "tls.crt"), pair, strict=True):
        fresh = folder / f"{name}.new"
        fresh.write_bytes(content)
        fresh.rename(folder / name)


def test_renewed_files_are_taken_over_and_broken_ones_refused(start_server: StartServer, tmp_path: Path) -> None:
    old, new = Authority.make("old"), Authority.make("new")
    install(tmp_path, old.issue("server"))
    tls = f'[server.tls]\ncert_file = "{tmp_path}/tls.crt"\nkey_file = "{tmp_path}/tls.key"\nreload_s = 0.001\n'
    running = start_server(tls + "[models]\nload = []\n")
    trust_old, trust_new = grpc.ssl_channel_credentials(old.pem), grpc.ssl_channel_credentials(new.pem)
    assert answers(running.address, trust_old) and not answers(running.address, trust_new)
    shutil.copy(tmp_path / "tls.key", tmp_path / "good.key")
    (tmp_path / "tls.key").write_bytes(b"no key at all")
    assert answers(running.address, trust_old), "the old pair stays while the new one is broken"
    running.wait_event("new TLS files refused; the old ones stay")
    install(tmp_path, new.issue("server"))
    assert answers(running.address, trust_new) and not answers(running.address, trust_old)
    running.wait_event("TLS files renewed")
    running.stop(allow_errors=True)


def test_mutual_tls_lets_only_known_clients_in(start_server: StartServer, tmp_path: Path) -> None:
    authority, stranger = Authority.make("ours"), Authority.make("theirs")
    install(tmp_path, authority.issue("server"))
    (tmp_path / "clients.crt").write_bytes(authority.pem)
    running = start_server(
        f'[server.tls]\ncert_file = "{tmp_path}/tls.crt"\nkey_file = "{tmp_path}/tls.key"\nclient_ca_file = "{tmp_path}/clients.crt"\n'
        "[models]\nload = []\n"
    )
    assert answers(running.address, grpc.ssl_channel_credentials(authority.pem, *authority.issue("client")))
    assert not answers(running.address, grpc.ssl_channel_credentials(authority.pem))
    assert not answers(running.address, grpc.ssl_channel_credentials(authority.pem, *stranger.issue("client")))
    running.stop()


def test_a_key_that_does_not_fit_keeps_the_server_from_starting(start_server: StartServer, tmp_path: Path) -> None:
    authority = Authority.make("ours")
    (key, _), (_, other) = authority.issue("a"), authority.issue("b")
    install(tmp_path, (key, other))
    tls = f'[server.tls]\ncert_file = "{tmp_path}/tls.crt"\nkey_file = "{tmp_path}/tls.key"\n[models]\nload = []\n'
    running = start_server(tls, ready=False)
    assert running.wait() == 1
    text = "".join(running.lines)
    assert "server.tls" in text and "Traceback" not in text


@pytest.mark.parametrize("absent", ["cert_file", "key_file"])
def test_a_file_that_is_missing_is_named(start_server: StartServer, tmp_path: Path, absent: str) -> None:
    install(tmp_path, Authority.make("ours").issue("server"))
    places = {"cert_file": tmp_path / "tls.crt", "key_file": tmp_path / "tls.key"}
    places[absent].unlink()
    running = start_server("[server.tls]\n" + "".join(f'{key} = "{path}"\n' for key, path in places.items()), ready=False)
    assert running.wait() == 1
    assert str(places[absent]) in "".join(running.lines)
