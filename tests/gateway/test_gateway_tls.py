"""TLS on both sides: HTTPS to callers, mutual TLS to the server, renewed without a restart."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest

from tests.conftest import StartServer
from tests.gateway.conftest import StartGateway
from tests.server.test_tls import Authority, install
from tests.server_process import ServerProcess


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=authority.pem.decode())


def localhost(url: str) -> str:
    return url.replace("127.0.0.1", "localhost")


def test_https_with_a_certificate_that_is_renewed(start_gateway: StartGateway, server: ServerProcess, tmp_path: Path) -> None:
    old, new = Authority.make("old"), Authority.make("new")
    install(tmp_path, old.issue("gateway"))
    gateway = start_gateway(server.address, f"--tls-cert={tmp_path}/tls.crt", f"--tls-key={tmp_path}/tls.key")
    assert gateway.url.startswith("https://")
    with httpx.Client(verify=trusting(old), http2=False) as client:
        assert client.get(f"{localhost(gateway.url)}/v1/status").status_code == 200
    (tmp_path / "tls.key").write_bytes(b"no key at all")

    def served(authority: Authority) -> bool:
        try:
            with httpx.Client(verify=trusting(authority)) as client:
                return client.get(f"{localhost(gateway.url)}/healthz").status_code == 200
        except httpx.ConnectError:
            return False

    while not gateway.events("new certificate refused; the old one stays"):  # files are looked at once a second, when someone connects
        assert served(old)
    install(tmp_path, new.issue("gateway"))
    while not gateway.events("certificate renewed"):
        served(new)
    assert served(new) and not served(old)


def test_clients_show_a_certificate_where_it_is_asked(start_gateway: StartGateway, server: ServerProcess, tmp_path: Path) -> None:
    authority, stranger = Authority.make("ours"), Authority.make("theirs")
    install(tmp_path, authority.issue("gateway"))
    (tmp_path / "clients.crt").write_bytes(authority.pem)
    gateway = start_gateway(
        server.address, f"--tls-cert={tmp_path}/tls.crt", f"--tls-key={tmp_path}/tls.key", f"--tls-client-ca={tmp_path}/clients.crt"
    )
    for issuer, let_in in ((authority, True), (stranger, False), (None, False)):
        context = trusting(authority)
        if issuer is not None:
            key, certificate = issuer.issue("client")
            (tmp_path / "client.pem").write_bytes(key + certificate)
            context.load_cert_chain(tmp_path / "client.pem")
        with httpx.Client(verify=context) as client:
            if let_in:
                assert client.get(f"{localhost(gateway.url)}/healthz").status_code == 200
            else:
                with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
                    client.get(f"{localhost(gateway.url)}/healthz")


def test_mutual_tls_to_the_server(start_gateway: StartGateway, start_server: StartServer, tmp_path: Path) -> None:
    authority, stranger = Authority.make("ours"), Authority.make("theirs")
    install(tmp_path, authority.issue("server"))
    (tmp_path / "ca.crt").write_bytes(authority.pem)
    key, certificate = authority.issue("gateway")
    (tmp_path / "own.key").write_bytes(key)
    (tmp_path / "own.crt").write_bytes(certificate)
    (tmp_path / "strange.crt").write_bytes(stranger.pem)
    server = start_server(
        f'[server.tls]\ncert_file = "{tmp_path}/tls.crt"\nkey_file = "{tmp_path}/tls.key"\nclient_ca_file = "{tmp_path}/ca.crt"\n'
        "[models]\nload = []\n"
    )
    own = [f"--server-cert={tmp_path}/own.crt", f"--server-key={tmp_path}/own.key", "--server-name=localhost"]
    for flags, code in (
        ([f"--server-ca={tmp_path}/ca.crt", *own], 200),
        ([f"--server-ca={tmp_path}/ca.crt", "--server-name=localhost"], 503),
        ([f"--server-ca={tmp_path}/strange.crt", *own], 503),
        ([], 503),
    ):
        gateway = start_gateway(server.address, *flags)
        assert httpx.get(f"{gateway.url}/v1/status", timeout=30).status_code == code, flags
