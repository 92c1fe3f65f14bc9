"""What the commands on the repository share: options, tables, and the repository itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from server.runtime.repository import Repository

ModelsOption = Annotated[Path | None, typer.Option("--models", help="The repository; else models.path of the configuration.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def open_repository(models: Path | None) -> Repository:
    """The repository at `models`, else the configuration's."""
    from server.config import load_config
    from server.runtime.repository import Repository

    return Repository(models if models is not None else Path(load_config().models.path))


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
