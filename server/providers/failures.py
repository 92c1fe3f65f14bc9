"""Everything that a vendor's library can raise, mapped into our tree in one place.

The vendor's own words are left out: they may repeat the key or the user's text. What is kept is the status, its error's type and code
and the request's id, each a single plain word, for those who look into the vendor's dashboard.
"""

from __future__ import annotations

import email.utils
import json
import random
import re
import time
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from server.core import Usage
from server.errors import ProviderUnavailable, UnderstudyError

_FIRST_DELAY_S = 0.25
_LONGEST_DELAY_S = 8.0
_LONGEST_RETRY_AFTER_S = 86_400.0
_WORD = re.compile(r"[A-Za-z0-9_.:-]{1,80}")
_HINTS = {
    400: "Look at the model's name, its limits and what it supports.",
    401: "Look at the key that api_key_env or api_key_file names.",
    402: "Look at the account's credit.",
    403: "Look at what the key is allowed to do.",
    404: "Look at the model's name and at base_url.",
    413: "Send less, or ask a model that takes more.",
    422: "Look at the model's name, its limits and what it supports.",
    429: "Ask for a higher rate limit, or set requests_per_minute and tokens_per_minute to the one you have.",
}
# Refused before any work: nothing was charged. 408, 409 and every 5xx (529: Anthropic's overload) are the vendor's own failures.
_REPEATABLE = frozenset({408, 409, 429})
# Errors inside a stream have a type and no status of their own.
_STREAM_STATUS = {
    "overloaded_error": 529,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "server_error": 500,
    "internal_server_error": 500,
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "billing_error": 402,
}


class Refusal(Exception):
    """Why one request came to nothing.

    `repeatable`: another may follow, after `delay_s` (None: our own choice), because nothing was charged. `blame`: the vendor failed,
    rather than refused this one request. `charged`: the vendor may have charged for it, `usage` tokens where that is known.
    """

    def __init__(
        self, error: UnderstudyError, *, repeatable: bool = False, delay_s: float | None = None, blame: bool = True, charged: bool = False
    ) -> None:
        super().__init__(error.message)
        self.error = error
        self.repeatable = repeatable
        self.delay_s = delay_s
        self.blame = blame
        self.charged = charged
        self.usage: Usage | None = None


def refusal_of(error: BaseException, sdk: ModuleType, who: str, key: str) -> Refusal:
    """Any exception of `sdk` (openai or anthropic), of the HTTP client below it, or of reading what came back.

    `who` is "provider/model" for the message; `key` is the secret that no detail may repeat.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UnderstudyError):
        return Refusal(error, blame=False)
    if isinstance(error, sdk.APIResponseValidationError):
        return garbage(who, error)
    if isinstance(error, sdk.APIStatusError):
        return status_refusal(who, error.status_code, error.response.headers, error.body, key)
    if isinstance(error, sdk.APIConnectionError):
        cause = error.__cause__
        return connection_refusal(who, cause if isinstance(cause, Exception) else error)
    if isinstance(error, _http_errors()):
        return connection_refusal(who, error)
    if isinstance(error, (sdk.APIError, ValueError, TypeError, AttributeError, LookupError, RecursionError)):
        return garbage(who, error)
    # Credentials, webhooks, sockets: parts of the libraries that are not used here.
    message = f"The library of {who} failed ({type(error).__name__}). Try again, and report it if it stays."
    return Refusal(ProviderUnavailable(message, cause=type(error).__name__))


def status_refusal(who: str, status: int, headers: Mapping[str, str], body: object, key: str) -> Refusal:
    """An HTTP status that is no success."""
    delay = retry_after_s(headers)
    failed = status >= 500
    if 300 <= status < 400:
        message = f"{who} sent the request elsewhere with HTTP status {status}, which is not followed. Look at its base_url."
    elif failed:
        message = f"{who} failed with HTTP status {status}. Try again later."
    else:
        message = f"{who} refused the request with HTTP status {status}. {_HINTS.get(status, 'Try again later.')}"
    error = ProviderUnavailable(message, retry_after_s=delay)
    error.metadata = {"status": str(status)} | details(headers, body, key)
    return Refusal(error, repeatable=failed or status in _REPEATABLE, delay_s=delay, blame=failed)


def stream_refusal(who: str, body: object, key: str) -> Refusal:
    """An error that came inside a stream."""
    found = details({}, body, key)
    status = _STREAM_STATUS.get(found.get("vendor_type", ""), 0)
    if not status and found.get("vendor_code", "").isdigit():  # some servers put the status there
        status = int(found["vendor_code"])
    if 400 <= status < 600:
        refusal = status_refusal(who, status, {}, body, key)
    else:
        error = ProviderUnavailable(f"{who} ended its answer with an error. Try again later.")
        error.metadata = found
        refusal = Refusal(error, charged=True)
    return refusal


def connection_refusal(who: str, error: BaseException) -> Refusal:
    """The network's failures. Only a connection that never came about has certainly cost nothing."""
    name = type(error).__name__
    if name in ("ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol"):
        message = f"{who} cannot be reached at its base_url ({name}). Look at the address and at the network."
        return Refusal(ProviderUnavailable(message, cause=name), repeatable=name in ("ConnectError", "ConnectTimeout", "PoolTimeout"))
    message = f"{who} broke the connection off ({name}). Try again later."
    return Refusal(ProviderUnavailable(message, cause=name), charged=True)


def garbage(who: str, error: BaseException) -> Refusal:
    """A success by its status that is no answer."""
    name = type(error).__name__
    message = f"{who} answered something that is no completion ({name}). Look at its base_url."
    return Refusal(ProviderUnavailable(message, cause=name), charged=True)


def details(headers: Mapping[str, str], body: object, key: str) -> dict[str, str]:
    """The vendor's error type and code and the request's id, where each is a plain word that does not hold the key."""
    if isinstance(body, (str, bytes)):
        try:
            body = json.loads(body)
        except (ValueError, RecursionError):
            body = None
    inner: Any = body.get("error", body) if isinstance(body, dict) else None
    inner = inner if isinstance(inner, dict) else {}
    found = {
        "vendor_type": inner.get("type"),
        "vendor_code": inner.get("code"),
        "vendor_request_id": headers.get("x-request-id") or headers.get("request-id"),
    }
    return {name: str(value) for name, value in found.items() if _plain(value, key)}


def _plain(value: object, key: str) -> bool:
    text = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    return bool(_WORD.fullmatch(text)) and not (key and (key in text or (len(text) > 5 and text in key)))


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the vendor asks to wait: retry-after-ms, or Retry-After in seconds or as an HTTP date (RFC 9110, 10.2.3)."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            delay = float(value) * scale
        except ValueError:
            try:
                delay = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                continue
            delay = max(delay, 0.0)
        if 0 <= delay <= _LONGEST_RETRY_AFTER_S:
            return delay
    return None


def backoff_s(attempt: int) -> float:
    """Jitter over an interval that doubles: callers that were refused together do not come back together."""
    return random.uniform(0.5, 1.0) * min(_FIRST_DELAY_S * 2.0 ** (attempt - 1), _LONGEST_DELAY_S)


def _http_errors() -> tuple[type[BaseException], ...]:
    """What the HTTP client below both libraries raises; it is loaded by then, because they import it."""
    import httpx2

    return (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, OSError, EOFError)
