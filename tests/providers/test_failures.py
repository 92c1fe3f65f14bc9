"""Every exception of both libraries, and of the HTTP client below them, has its place in our tree; none passes as it is."""

from __future__ import annotations

import importlib
import json
from typing import Any

import httpx2
import pytest

from server.errors import ProviderUnavailable, UnderstudyError
from server.providers.failures import Refusal, details, refusal_of, stream_refusal
from tests.providers.provider_clients import KEY

REQUEST = httpx2.Request("POST", "http://x/v1", headers={"authorization": f"Bearer {KEY}"})
BODY = {"error": {"type": "some_error", "code": KEY, "message": f"{KEY} and the user's text"}}
UNUSED = "library of"  # the message of parts of the libraries that are not used here: credentials, webhooks, sockets


def below(root: type[BaseException]) -> list[type[BaseException]]:
    return [root] + [found for child in root.__subclasses__() for found in below(child)]


def instance(kind: type[BaseException]) -> BaseException:
    """One of the class, as the library would make it, whatever its constructor wants."""
    status = getattr(kind, "status_code", 418)
    response = httpx2.Response(status if isinstance(status, int) else 418, request=REQUEST, headers={"x-request-id": "req-7"}, json=BODY)
    error = kind.__new__(kind)
    Exception.__init__(error, f"{KEY} and the user's text")
    vars(error).update(request=REQUEST, response=response, body=BODY, status_code=response.status_code, message=KEY)
    return error


def classes() -> list[Any]:
    found = []
    for name in ("openai", "anthropic"):
        sdk = importlib.import_module(name)
        importlib.import_module(f"{name}._exceptions")
        root = sdk.OpenAIError if name == "openai" else sdk.AnthropicError
        found += [pytest.param(name, kind, id=f"{name}-{kind.__name__}") for kind in dict.fromkeys(below(root))]
        for other in (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL):
            found += [pytest.param(name, kind, id=f"{name}-{kind.__name__}") for kind in dict.fromkeys(below(other))]
    return found


@pytest.mark.parametrize(("library", "kind"), classes())
def test_no_exception_is_unmapped(library: str, kind: type[BaseException]) -> None:
    sdk = importlib.import_module(library)
    refusal = refusal_of(instance(kind), sdk, "loop/m", KEY)
    assert isinstance(refusal, Refusal) and isinstance(refusal.error, ProviderUnavailable)
    shown = refusal.error.message + repr(refusal.error.metadata)
    assert KEY not in shown and "user's text" not in shown
    if issubclass(kind, sdk.APIError) or issubclass(kind, (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL)):
        assert UNUSED not in refusal.error.message, "it can happen here, and has a message of its own"
    if issubclass(kind, sdk.APIStatusError):
        status = int(refusal.error.metadata["status"])
        assert refusal.error.metadata["vendor_type"] == "some_error" and refusal.error.metadata["vendor_request_id"] == "req-7"
        assert refusal.repeatable == (status >= 500 or status in (408, 409, 429)) and not refusal.charged
        assert refusal.blame == (status >= 500)


def test_only_a_connection_that_never_came_about_is_free_and_repeated() -> None:
    sdk = importlib.import_module("openai")
    for kind in below(httpx2.TransportError):
        cause = instance(kind)
        error = sdk.APIConnectionError(request=REQUEST)
        error.__cause__ = cause
        refusal = refusal_of(error, sdk, "loop/m", KEY)
        never_sent = kind.__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol")
        assert refusal.charged == (not never_sent) and refusal.blame
        assert not (refusal.repeatable and refusal.charged)


def test_our_own_errors_pass() -> None:
    sdk = importlib.import_module("openai")
    ours = UnderstudyError("x")
    assert refusal_of(ours, sdk, "loop/m", KEY).error is ours
    refusal = Refusal(ours)
    assert refusal_of(refusal, sdk, "loop/m", KEY) is refusal
    assert UNUSED in refusal_of(RuntimeError("?"), sdk, "loop/m", KEY).error.message


@pytest.mark.parametrize(
    ("body", "status", "repeatable"),
    [
        ({"type": "error", "error": {"type": "overloaded_error", "message": "x"}}, "529", True),
        ({"error": {"type": "rate_limit_error"}}, "429", True),
        ({"error": {"code": 503, "message": "x"}}, "503", True),
        ({"error": {"code": "502"}}, "502", True),
        ({"error": {"type": "invalid_request_error"}}, "400", False),
        ({"error": {"type": "odd"}}, None, False),
        ({"error": "text"}, None, False),
        ({}, None, False),
    ],
)
def test_errors_inside_streams_have_the_status_they_stand_for(body: object, status: str | None, repeatable: bool) -> None:
    refusal = stream_refusal("loop/m", body, KEY)
    assert refusal.error.metadata.get("status") == status and refusal.repeatable == repeatable


def test_details_are_plain_words_that_hold_no_key() -> None:
    headers = {"x-request-id": f"req-{KEY}"}
    body = json.dumps({"error": {"type": "a b", "code": "x" * 100, "message": KEY}})
    assert details(headers, body, KEY) == {}
    assert details({"request-id": "req_1"}, {"error": {"type": "t", "code": 7}}, KEY) == {
        "vendor_type": "t",
        "vendor_code": "7",
        "vendor_request_id": "req_1",
    }
    assert details({}, b"\xff", KEY) == details({}, [], KEY) == details({}, None, "") == {}
