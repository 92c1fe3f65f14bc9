"""Running the server's asynchronous code from plain code that may itself be running in a loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def in_own_loop(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The coroutine's result, run in a thread with a loop of its own; its error is raised here."""
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(asyncio.run(work()))
        except BaseException as error:  # carried to the caller's thread
            failures.append(error)

    thread = threading.Thread(target=run, name="curation")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]
