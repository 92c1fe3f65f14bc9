"""Whatever fails, the key is in no log (the libraries' own at DEBUG included), error, chain of errors, traceback or repr."""

from __future__ import annotations

import io
import logging
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from server.providers.make import make_providers
from server.settings import ProviderConfig
from tests.providers.loopback import Reply, Script, nobody_there
from tests.providers.provider_clients import KEY, PROMPT, client, collect, within

LOGGERS = ("", "openai", "anthropic", "httpx", "httpx2", "httpcore", "httpcore2", "asyncio")
ECHO = {"x-request-id": KEY, "x-echo": f"Bearer {KEY}", "server": KEY}
REPLIES: list[Reply | str | None] = [
    Reply(401, headers=ECHO),
    Reply(429, headers={"retry-after": "100", **ECHO}),
    Reply(500, headers=ECHO),
    Reply(302, headers={"location": f"http://127.0.0.1:9/{KEY}"}),
    Reply(body=f"no JSON but {KEY}", headers=ECHO),
    Reply(body=f'{{"choices": [{{"message": "{KEY}"}}], "content": "{KEY}"}}'),
    Reply(body=f'{{"error": {{"type": "{KEY}", "code": "{KEY}", "message": "{KEY}"}}}}', status=400),
    Reply(raw=f"data: {KEY}\n\n".encode()),
    Reply("a b", error_after=0, error_type=KEY),
    Reply("a b", error_after=1, error_type=KEY),
    Reply("a b", cut_after=1),
    Reply("", finish="stop"),
    Reply("late", hold=True),
    Reply(drop=True),
    "fine",
    None,  # nobody listens
]


@pytest.fixture
def logs() -> Iterator[io.StringIO]:
    """Everything that is logged at DEBUG, formatted with its tracebacks."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))
    before = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.DEBUG)
    logging.getLogger().addHandler(handler)
    yield written
    logging.getLogger().removeHandler(handler)
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("reply", REPLIES, ids=range(len(REPLIES)))
async def test_the_key_is_nowhere_but_in_the_request(
    kind: str, vendor: Callable[[Script], Any], logs: io.StringIO, reply: Reply | str | None
) -> None:
    server = vendor(lambda number, text: reply or "")
    address = server.base_url if reply is not None else nobody_there()
    provider = client(kind, address, max_retries=1, timeout_s=0.4, first_token_timeout_s=0.4)
    found = [repr(provider), repr(provider._config), repr(provider.health()), provider.open_circuit()]
    for call in (lambda: provider.complete("m", PROMPT, within(5)), lambda: collect(provider.stream("m", PROMPT, within(5)))):
        try:
            found.append(repr(await call()))
        except Exception as error:
            found += [repr(vars(one)) + repr(one) + str(one) for one in chain(error)]
            found.append("".join(traceback.format_exception(error)))
            assert all(type(one).__module__.startswith("server.") for one in chain(error)), "a library's exception holds the request"
    await provider.close()
    for name in LOGGERS:
        logging.getLogger(name).debug("awake")
    assert logs.getvalue().count("awake") == len(LOGGERS)
    assert KEY not in logs.getvalue()
    for text in found:
        assert KEY not in text
    if reply is not None:
        assert all(KEY in headers.get("authorization", "") + headers.get("x-api-key", "") for headers in server.headers)
        assert all(KEY not in str(body) for body in server.requests)


async def test_by_default_the_libraries_keep_still(kind: str, vendor: Callable[[Script], Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    provider = client(kind, vendor(lambda number, text: "fine").base_url)
    await provider.complete("m", PROMPT, within(5))
    await provider.close()
    assert not [record for record in caplog.records if record.name.partition(".")[0] in LOGGERS[1:7]]


def test_keys_are_read_from_files_too(tmp_path: Any) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    config = ProviderConfig(base_url="http://127.0.0.1:1/v1", api_key_file=str(tmp_path / "key"))
    provider = make_providers({"x": config}, environ={})["x"]
    assert KEY not in repr(provider) + repr(config)
