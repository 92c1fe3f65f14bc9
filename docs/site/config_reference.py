"""The page reference_config.md: each setting with its type, bounds and default from the schema, its meaning from the example."""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

HEAD = """# Configuration reference

Written from the schema (`server/config.py`, `server/settings.py`) when this site is built. The file is `understudy.toml` in the working
directory, or the one that `--config` or `UNDERSTUDY_CONFIG` names; `understudy.example.toml` shows every setting in its place.

A flag (`--set server.port=50052`) goes before the environment (`UNDERSTUDY_SERVER__PORT=50052`), that before the file, that before the
default. Unknown keys are errors that name the nearest known one. Secrets are never values: `…_env` names a variable, `…_file` a file that
holds one. Times end in `_s` and are seconds, sizes end in `_bytes`. `<name>` stands for a name of your own.
"""


def page() -> str:
    """The page as Markdown."""
    from server.config import Config

    comments = example_comments((ROOT / "understudy.example.toml").read_text(encoding="utf-8"))
    return "\n".join([HEAD, *_section(Config, "", comments)])


def example_comments(text: str) -> dict[str, str]:
    """By key, as "server.port", what the example says of it. Names of one's own in it stand for all: "providers.*.kind"."""
    found: dict[str, str] = {}
    section = ""
    for line in text.splitlines():
        if match := re.match(r"#?\s?\[([^\]]+)\]\s*(?:#\s*(.*))?$", line):
            section = _general(match[1].replace('"', ""))
            if match[2]:
                found.setdefault(section, match[2].strip())
        elif (match := re.match(r'(?:#\s?)?"?([a-z][a-z0-9_-]*)"? = .*?(?:\s#\s(.*))?$', line)) and match[2]:
            found.setdefault(f"{section}.{match[1]}", match[2].strip())
    return found


def _general(section: str) -> str:
    """The section's key, with names of one's own as "*"."""
    return re.sub(r"^(skills|providers|budget\.(?:providers|skills|keys))\.[^.]+(?:\.prices\..*)?$", _starred, section)


def _starred(match: re.Match[str]) -> str:
    return f"{match[1]}.*.prices.*" if ".prices." in match[0] else f"{match[1]}.*"


def _section(model: Any, key: str, comments: dict[str, str]) -> Iterator[str]:
    """A table of the section's own keys, then its sections."""
    from pydantic import BaseModel

    plain, deeper = [], []
    for name, field in model.model_fields.items():
        below, mapped = _inner(field.annotation, BaseModel)
        (plain if below is None else deeper).append((name, field, below, mapped))
    if key:
        yield f"## {_shown(key)}\n"
        if doc := inspect.cleandoc(model.__doc__ or ""):
            yield _words(doc) + "\n"
    if plain:
        yield "| key | type | default | meaning |\n|---|---|---|---|"
        trailing = _trailing(model)
        for name, field, _, _ in plain:
            meaning = comments.get(f"{key}.{name}") or trailing.get(name, "")
            yield f"| `{name}` | {_cell(_type(field))} | {_cell(_default(field))} | {_cell(meaning)} |"
        yield ""
    for name, _, below, mapped in deeper:
        yield from _section(below, ".".join(part for part in (key, name, "*" if mapped else "") if part), comments)


def _inner(annotation: Any, base: Any) -> tuple[Any, bool]:
    """The section that a field holds, and whether one for each name; None where it holds a value or a list."""
    if isinstance(annotation, type) and issubclass(annotation, base):
        return annotation, False
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is dict:
        return _inner(arguments[1], base)[0], True
    if origin in (Union, types.UnionType):
        for one in arguments:
            if (found := _inner(one, base))[0] is not None:
                return found
    return None, False


def _trailing(model: Any) -> dict[str, str]:
    """Comments behind the fields in the source."""
    lines = inspect.getsource(model).splitlines()
    matches = (re.match(r"    (\w+): .*?  # (.*)$", line) for line in lines)
    return {match[1]: match[2] for match in matches if match}


def _type(field: Any) -> str:
    bounds = []
    for one in field.metadata:
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            if (value := getattr(one, name, None)) is not None:
                bounds.append(f"{sign} {value:,}" if isinstance(value, int) else f"{sign} {value}")
    return ", ".join([_name(field.annotation), *bounds])


def _name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (str, Path) or (origin is None and getattr(annotation, "__name__", "") == "Path"):
        return "string"
    if origin is Literal:
        return " or ".join(f"`{one}`" for one in arguments)
    if origin in (list, tuple):
        return f"list of {_name(arguments[0])}"
    if origin in (dict,) or getattr(origin, "__name__", "") == "Mapping":
        return f"table of {_name(arguments[1])}"
    if origin in (Union, types.UnionType):
        return _name(next(one for one in arguments if one is not type(None)))
    if hasattr(annotation, "__metadata__"):
        return _name(annotation.__origin__)
    if hasattr(annotation, "__members__"):
        return " or ".join(f"`{one.value}`" for one in annotation)
    names = {"int": "whole number", "float": "number", "Decimal": "number", "bool": "`true` or `false`"}
    return names.get(getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation)))


def _default(field: Any) -> str:
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    plain = value.value if hasattr(value, "value") else value
    return f"`{json.dumps(plain, default=str, ensure_ascii=False)}`"


def _shown(key: str) -> str:
    return f"`[{key.replace('*', '<name>')}]`"


def _words(doc: str) -> str:
    return re.sub(r"(?<![`\\])([<\[{])", r"\\\1", doc)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
