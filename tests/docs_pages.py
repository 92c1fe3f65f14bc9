"""The commands that docs/*.md show, as they stand there, and how to run them.

A block of commands is a fence of sh, bash, console or python, or an indented block that begins with a command. Right above it stands one of

    <!-- run -->                     it is run against a real server, in a folder that is its working directory, and has to succeed
    <!-- run: until=WORDS -->         the same, for a command that goes on: it is ended once its output has these words
    <!-- not run: why -->

or `<!-- commands: run -->`, `<!-- commands: not run: why -->` at the page's head says it for all blocks that say nothing themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
_FENCE = re.compile(r"^```\s*(\w*)\s*$")
_SHELLS = ("sh", "bash", "console")
_COMMAND = re.compile(r"^(understudy|grpcurl|grpcui|make|python3?|curl|docker|kubectl|helm|pip|accelerate|cp|go|npm|npx|mvn|cargo) ")
_MARK = re.compile(r"^<!-- (run|not run)(?:: (.+?))? -->$")
_PAGE_MARK = re.compile(r"^<!-- commands: (run|not run)(?:: (.+?))? -->$")


@dataclass(frozen=True, slots=True)
class Block:
    """`line` counts from 1; `kind`: sh or python; `mark`: run, not run, or empty where nothing says; `more`: why, or until=WORDS."""

    page: str
    line: int
    kind: str
    text: str
    mark: str
    more: str

    @property
    def until(self) -> str:
        """What a command that goes on says once it works; empty for others."""
        return self.more.removeprefix("until=") if self.mark == "run" and self.more.startswith("until=") else ""


def pages() -> list[Path]:
    """All pages, in the order of the site's navigation, others after them."""
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8").split("nav:")[1]
    order = re.findall(r"([a-z_]+\.md)", navigation)
    return sorted(DOCS.glob("*.md"), key=lambda page: (order.index(page.name) if page.name in order else len(order), page.name))


def blocks(page: Path) -> list[Block]:
    """A page's blocks of commands, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    default = next((found for line in lines if (found := _PAGE_MARK.match(line))), None)
    found: list[Block] = []
    for at, kind, text in _code(lines):
        above = next((line for line in reversed(lines[: at - 1]) if line.strip()), "")
        mark = _MARK.match(above) or default
        found.append(Block(page.name, at, kind, text, mark[1] if mark else "", (mark[2] or "") if mark else ""))
    return found


def _code(lines: list[str]) -> Iterator[tuple[int, str, str]]:
    """(line from 1, kind, text) of each block of commands."""
    at = 0
    while at < len(lines):
        begin = at
        if fence := _FENCE.match(lines[at]):
            at += 1
            while not lines[at].startswith("```"):
                at += 1
            if fence[1] in (*_SHELLS, "python"):
                yield begin + 1, "python" if fence[1] == "python" else "sh", "\n".join(lines[begin + 1 : at])
        elif lines[at].startswith("    ") and _COMMAND.match(lines[at][4:]) and (at == 0 or not lines[at - 1].strip()):
            while at < len(lines) and lines[at].startswith("    "):
                at += 1
            yield begin + 1, "sh", "\n".join(line[4:] for line in lines[begin:at])
        at += 1
