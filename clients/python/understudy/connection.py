"""How a client reaches its server: address, TLS, key, limits. Shared by the two clients."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

API_KEY_VARIABLE = "UNDERSTUDY_API_KEY"
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", -1),  # answers are as large as the caller asked for
    ("grpc.max_send_message_length", -1),  # the server has the limit, and says it
    ("grpc.enable_retries", 0),  # ours know the reasons
]


@dataclass(frozen=True, slots=True)
class Tls:
    """Encryption. Empty `ca_file`: the system's authorities. With `cert_file` and `key_file` the client shows who it is (mutual TLS).

    `server_name` overrides the name that the server's certificate must have, for tests and tunnels.
    """

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    server_name: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files. Raises OSError when one cannot be read, ValueError when one of the pair is missing."""
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("mutual TLS needs cert_file and key_file; give both or neither")

        def read(path: str) -> bytes | None:
            return Path(path).read_bytes() if path else None

        return grpc.ssl_channel_credentials(read(self.ca_file), read(self.key_file), read(self.cert_file))


def channel_options(tls: Tls | None) -> list[tuple[str, Any]]:
    """Options of the channel."""
    named = [("grpc.ssl_target_name_override", tls.server_name)] if tls is not None and tls.server_name else []
    return [*_OPTIONS, *named]


def call_metadata(api_key: str | None, metadata: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Metadata of every call: the caller's own, and the key as a bearer token.

    `api_key` None: the environment's UNDERSTUDY_API_KEY, unless the metadata has an authorization already; "": none.
    """
    if api_key is None:
        given = any(name == "authorization" for name, _ in metadata)
        api_key = "" if given else os.environ.get(API_KEY_VARIABLE, "")
    return (*metadata, *([("authorization", f"Bearer {api_key}")] if api_key else []))


def with_request_id(metadata: tuple[tuple[str, str], ...], request_id: str) -> tuple[tuple[str, str], ...]:
    """Metadata of one call."""
    return (*metadata, ("x-request-id", request_id)) if request_id else metadata
