"""TLS and mutual TLS from files. Renewed files are taken over by the next handshake; broken ones are refused and the old ones stay."""

from __future__ import annotations

import ssl
import threading
import time
from pathlib import Path
from typing import Any, cast

import grpc

from server.config import TlsConfig
from server.errors import InvalidArgument
from server.logs import get


class _Files:
    """The certificate files, looked at again when `reload_s` have passed. Called from gRPC's handshake threads."""

    def __init__(self, config: TlsConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._seen = self._stamps()
        self._checked = time.monotonic()

    def read(self) -> grpc.ServerCertificateConfiguration:
        """The files as they are. Raises InvalidArgument where they cannot serve."""
        config = self._config
        try:
            # gRPC takes anything and fails at the handshake; OpenSSL says at once that a key does not fit its certificate.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(config.cert_file, config.key_file)
            if config.client_ca_file:
                context.load_verify_locations(config.client_ca_file)
            pair = (Path(config.key_file).read_bytes(), Path(config.cert_file).read_bytes())
            authority = Path(config.client_ca_file).read_bytes() if config.client_ca_file else None
        except (OSError, ssl.SSLError) as error:
            raise InvalidArgument(
                f"the TLS files cannot be used: {error}. Expected PEM files, the key without a pass phrase and fitting the certificate; "
                "see server.tls.cert_file, key_file and client_ca_file.",
                field="server.tls",
            ) from error
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=authority)

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """New files since the last call, or None."""
        with self._lock:
            now = time.monotonic()
            if now - self._checked < self._config.reload_s:
                return None
            self._checked = now
            try:
                stamps = self._stamps()
                if stamps == self._seen:
                    return None
                fresh = self.read()
            except (OSError, InvalidArgument) as error:
                get("tls").error("new TLS files refused; the old ones stay", error=str(error))
                return None
            self._seen = stamps
            get("tls").info("TLS files renewed")
            return fresh

    def _stamps(self) -> tuple[tuple[int, int], ...]:
        names = (self._config.cert_file, self._config.key_file, self._config.client_ca_file)
        stats = [Path(name).stat() for name in names if name]
        return tuple((one.st_mtime_ns, one.st_ino) for one in stats)


def credentials(config: TlsConfig) -> grpc.ServerCredentials | None:
    """None where TLS is off. Raises InvalidArgument where the files cannot be used."""
    if not config.cert_file:
        return None
    try:
        files = _Files(config)
    except OSError as error:
        raise InvalidArgument(f"a TLS file cannot be read: {error}. Give the path of a PEM file.", field="server.tls") from error
    # The stubs leave out that the fetcher may answer None for "as before".
    mutual = bool(config.client_ca_file)
    return grpc.dynamic_ssl_server_credentials(files.read(), cast(Any, files.fetch), require_client_authentication=mutual)
