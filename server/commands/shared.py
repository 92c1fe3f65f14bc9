"""What the commands on the repository share: options, tables, and the repository itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import grpc

    from server.runtime.repository import Repository

ModelsOption = Annotated[Path | None, typer.Option("--models", help="The repository; else models.path of the configuration.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def open_repository(models: Path | None) -> Repository:
    """The repository at `models`, else the configuration's."""
    from server.config import load_config
    from server.runtime.repository import Repository

    return Repository(models if models is not None else Path(load_config().models.path))


@contextmanager
def open_channel(address: str) -> Iterator[grpc.Channel]:
    """A channel to a running server, whose calls carry the key of UNDERSTUDY_API_KEY where there is one."""
    import grpc

    from understudy.connection import call_metadata

    metadata = call_metadata(None, ())

    class WithKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[misc]
        def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
            return continuation(details._replace(metadata=[*(details.metadata or ()), *metadata]), request)

        def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
            return self.intercept_unary_unary(continuation, details, request)

    with grpc.insecure_channel(address) as channel:
        yield grpc.intercept_channel(channel, WithKey()) if metadata else channel


def new_table(*columns: str) -> Any:
    """An empty table for `show`."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def show(table: Any) -> None:
    """Prints a table on standard output."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # whoever reads a pipe wants whole lines
        console = Console(width=200)
    console.print(table)
