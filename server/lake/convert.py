"""`python -m server.lake.convert <lake>`: turns the sealed log segments of a lake into Parquet, once, and ends.

A process of its own: pyarrow and deltalake take 60 MB, and their work takes the interpreter lock that the serving process needs.
Prints one JSON object: rows committed, by table.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from server.lake import schema, table


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0, or 2 for a wrong command line."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m server.lake.convert LAKE\n")
        return 2
    os.nice(10)
    lake = Path(arguments[0])
    print(json.dumps({name: table.convert(lake, name) for name in schema.TABLES}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
