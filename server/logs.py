"""Logs: structlog for events, and one line a call written by hand, since it is paid for in every call. Neither ever holds request text."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from typing import Any, TextIO, cast

import structlog

from server.config import LogConfig

_FLUSH_S = 0.05
_FLUSH_LINES = 512


def configure(config: LogConfig, stream: TextIO | None = None) -> None:
    """Sets structlog up for the process, and sends the standard library's warnings the same way."""
    out = stream or sys.stderr
    level = logging.getLevelNamesMapping()[config.level.upper()]
    last: Any = structlog.processors.JSONRenderer() if is_json(config, out) else structlog.dev.ConsoleRenderer(colors=out.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(out)
    foreign = [structlog.stdlib.ExtraAdder(), *shared]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=foreign, processor=last))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))
    for ours in ("server", "native"):
        logging.getLogger(ours).setLevel(level)


def get(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines carry `part=name`."""
    return cast(structlog.typing.FilteringBoundLogger, structlog.get_logger(part=name))


def is_json(config: LogConfig, out: TextIO) -> bool:
    """Whether lines are for machines."""
    return config.format == "json" or (config.format == "auto" and not out.isatty())


class AccessLog:
    """One line a call. Lines wait at most 50 ms for one write together; used on the event loop alone."""

    def __init__(self, config: LogConfig, stream: TextIO | None = None) -> None:
        self._out = stream or sys.stderr
        self._json = is_json(config, self._out)
        self._on = config.access and config.level in ("debug", "info")
        self._lines: list[str] = []
        self._second = 0
        self._stamp = ""

    def write(self, method: str, code: str, request_id: str, seconds: float, **more: str | int | float) -> None:
        """`more` holds model, items, tokens, reason and the like; keys and values must need no escaping but what JSON's strings do."""
        if not self._on:
            return
        now = time.time()
        if int(now) != self._second:
            self._second = int(now)
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        stamp = f"{self._stamp}.{int(now % 1 * 1000):03d}Z"
        if self._json:
            rest = "".join(f', "{key}": {json.dumps(value) if isinstance(value, str) else value}' for key, value in more.items())
            self._lines.append(
                f'{{"timestamp": "{stamp}", "level": "info", "event": "call", "method": "{method}", "code": "{code}", '
                f'"request_id": "{request_id}", "ms": {seconds * 1e3:.2f}{rest}}}\n'
            )
        else:
            rest = "".join(f" {key}={value}" for key, value in more.items())
            self._lines.append(f"{stamp} [info] call {method} {code} {seconds * 1e3:.2f} ms request_id={request_id}{rest}\n")
        if len(self._lines) == 1:
            asyncio.get_running_loop().call_later(_FLUSH_S, self.flush)
        elif len(self._lines) >= _FLUSH_LINES:
            self.flush()

    def flush(self) -> None:
        """Writes what waits. A reader that has gone away ends the log, not the server."""
        lines, self._lines = self._lines, []
        if not lines:
            return
        try:
            self._out.write("".join(lines))
            self._out.flush()
        except (OSError, ValueError):
            self._on = False
