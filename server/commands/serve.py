"""`understudy serve`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from server import logs
from server.config import load_config


def serve(file: str | None, flags: Mapping[str, object]) -> int:
    """Runs the server until a signal; returns its exit code. Raises InvalidArgument for a configuration that cannot be used."""
    config = load_config(file, flags=flags)
    logs.configure(config.log)
    from server.app import App

    async def run() -> int:
        return await App(config).run()

    return asyncio.run(run())
