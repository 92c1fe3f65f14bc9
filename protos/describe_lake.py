"""Writes the tables of columns in docs/lake.md from the comments of interaction.proto: `python protos/describe_lake.py`."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROTO = ROOT / "protos" / "understudy" / "v1" / "interaction.proto"
PAGE = ROOT / "docs" / "lake.md"
BEGIN, END = "<!-- columns: begin -->", "<!-- columns: end -->"
TABLES = {"Interaction": "interactions", "FeedbackRow": "feedback", "Shadow": "shadows"}
_TYPES = {"string": "string", "int64": "int64", "double": "double", "float": "float", "bool": "boolean"}


def columns() -> dict[str, list[tuple[str, str, str]]]:
    """By table: each column's name, type and meaning."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    table, words = "", []
    for raw in PROTO.read_text(encoding="utf-8").splitlines():
        line = raw.strip()
        if match := re.match(r"message (\w+) \{", line):
            table, words = TABLES[match[1]], []
            found[table] = []
        elif line.startswith("//"):
            words.append(line.removeprefix("//").strip())
        elif match := re.match(r"(optional |repeated )?([\w.]+) (\w+) = \d+;", line):
            kind = "timestamp, microseconds, UTC" if match[2].endswith("Timestamp") else _TYPES[match[2]]
            found[table].append((match[3], f"list of {kind}" if match[1] == "repeated " else kind, " ".join(words)))
            words = []
    return found


def described() -> str:
    """The tables as Markdown."""
    parts = []
    for table, rows in columns().items():
        lines = [f"| `{name}` | {kind} | {meaning.replace('|', chr(92) + '|')} |" for name, kind, meaning in rows]
        parts.append("\n".join([f"#### {table}", "", "| column | type | meaning and unit |", "|---|---|---|", *lines]))
    return "\n\n".join(parts)


def page(text: str) -> str:
    """The page with today's tables."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{described()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
