"""Where a lake is: its log in a folder of this machine, its tables under a folder or in an object store."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from server.errors import InvalidArgument
from server.settings import LakeConfig


@dataclass(slots=True, frozen=True)
class Place:
    """`path`: folder of the log and the id key; `uri`: what the tables' names are appended to; `options`: the store's, secrets too."""

    path: Path
    uri: str
    options: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def at(cls, where: Path | Place) -> Place:
        """A folder that holds everything, as a place."""
        return where if isinstance(where, Place) else cls(where, str(where))

    @classmethod
    def of(cls, config: LakeConfig) -> Place:
        """What the configuration says. Raises InvalidArgument where an option's environment variable is not set."""
        missing = sorted(name for name in config.store_options_env.values() if name not in os.environ)
        if missing:
            message = f"lake.store_options_env names {', '.join(missing)}, which the environment does not have; set it or drop the option."
            raise InvalidArgument(message, field="lake.store_options_env")
        options = {key: os.environ[name] for key, name in config.store_options_env.items()}
        store = config.store.rstrip("/")
        return cls(Path(config.path), store.removeprefix("file://") if store else config.path, options)

    @property
    def local(self) -> bool:
        """Whether the tables are files that this machine opens by their paths."""
        return "://" not in self.uri

    def table(self, name: str) -> str:
        """Path or URI of a table."""
        return f"{self.uri}/{name}"

    def log(self, table: str) -> Path:
        """Folder of a table's log segments."""
        return self.path / "log" / table
