"""Fields that requests of several services share: pages of a list, and how long to wait."""

from __future__ import annotations

import base64
import binascii

from google.protobuf.duration_pb2 import Duration

from server.errors import InvalidArgument

DEFAULT_PAGE, LARGEST_PAGE = 100, 1000
MAX_GRACE_S = 3600.0


def read_page(size: int, token: str) -> tuple[int, tuple[str, int] | None]:
    """(how many, after which name and version). 0 means 100, more than 1000 means 1000."""
    if size < 0:
        raise InvalidArgument(f"page_size is {size}; expected 0 or more.", field="page_size", limit=LARGEST_PAGE)
    if not token:
        return min(size or DEFAULT_PAGE, LARGEST_PAGE), None
    try:
        name, _, version = base64.urlsafe_b64decode(token.encode()).decode().partition("\n")
        return min(size or DEFAULT_PAGE, LARGEST_PAGE), (name, int(version))
    except (binascii.Error, ValueError):
        raise InvalidArgument("page_token is none of ours; expected next_page_token of the page before.", field="page_token") from None


def page_token(name: str, version: int) -> str:
    """The token that `read_page` understands."""
    return base64.urlsafe_b64encode(f"{name}\n{version}".encode()).decode()


def seconds(grace: Duration) -> float:
    """The field `grace`; raises InvalidArgument outside of 0 to an hour."""
    seconds = float(grace.seconds + grace.nanos / 1e9)
    if not 0 <= seconds <= MAX_GRACE_S:
        raise InvalidArgument(f"grace is {seconds:g} s; expected 0 to {MAX_GRACE_S:g} s.", field="grace", limit=f"{MAX_GRACE_S:g}")
    return seconds
