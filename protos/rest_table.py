"""The table of all paths in docs/rest.md, from the OpenAPI document: `python protos/rest_table.py` writes it between its two marks."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "rest.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def table() -> str:
    """One table a group, in the document's order."""
    document = json.loads((ROOT / "gateway" / "openapi" / "openapi.json").read_text(encoding="utf-8"))
    lines: list[str] = []
    for tag in document["tags"]:
        lines += [f"### {tag['name']}", "", "| method and path | what it does | role |", "|---|---|---|"]
        for path, item in document["paths"].items():
            for verb, operation in item.items():
                if operation["tags"][0] == tag["name"]:
                    lines.append(f"| `{verb.upper()} {path}` | {operation['summary']} | {operation.get('x-required-role', 'no key')} |")
        lines.append("")
    return "\n".join(lines)


def page() -> str:
    """The page with the table as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
