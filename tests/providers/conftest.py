from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.providers.loopback import Loopback, Reply


@pytest.fixture
def loopback() -> Iterator[Callable[[Callable[[int, str], Reply | str]], Loopback]]:
    """Starts providers: `loopback(script)`."""
    started: list[Loopback] = []

    def start(script: Callable[[int, str], Reply | str]) -> Loopback:
        started.append(Loopback(script))
        return started[-1]

    yield start
    for one in started:
        one.close()
