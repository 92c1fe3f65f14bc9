"""`python -m server.lake.convert LAKE`: turns the sealed log segments of a lake into Parquet, once, and ends.

A process of its own: pyarrow and deltalake take 60 MB, and their work takes the interpreter lock that the serving process needs.
With `-` in place of LAKE the sections lake and registry of a configuration are read from standard input, as one JSON object; `--compact`
joins small files instead. Prints one JSON object: rows committed by table, and in "crowded" the tables that want to be compacted.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from server.errors import UnderstudyError
from server.lake import maintenance, schema
from server.lake.keyring import drop_idle_log_keys
from server.lake.place import Place
from server.lake.segments import Converter
from server.settings import LakeConfig, RegistryConfig


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0, 1 where something does not answer, 2 for a wrong command line."""
    if not arguments or set(arguments[1:]) - {"--compact"}:
        sys.stderr.write("usage: python -m server.lake.convert LAKE|- [--compact]\n")
        return 2
    os.nice(10)
    lake, registry = LakeConfig(path=arguments[0]), None
    if arguments[0] == "-":
        given = json.load(sys.stdin)
        lake, registry = LakeConfig(**given["lake"]), RegistryConfig(**given["registry"])
    place = Place.of(lake)
    if "--compact" in arguments:
        done = [maintenance.compact(place, name, retention_days=lake.retention_days).as_dict() for name in schema.TABLES]
        print(json.dumps(done))
        return 0
    try:
        print(json.dumps(convert(place, lake.encrypt, registry)))
    except UnderstudyError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def convert(place: Place, encrypt: bool, config: RegistryConfig | None) -> dict[str, object]:
    """Converts every table's log."""
    from server.registry.keys import UserKeys
    from server.registry.registry import Registry

    keys = UserKeys(Registry(config)) if config is not None else None
    converter = Converter(place, keys, encrypt)
    done: dict[str, object] = {name: converter.run(name) for name in schema.TABLES}
    if keys is not None:
        drop_idle_log_keys(Path(place.path), keys)
    done["crowded"] = [name for name in schema.TABLES if done[name] and maintenance.crowded(place, name)]
    return done


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # what the libraries' threads still do is nothing that matters any more
