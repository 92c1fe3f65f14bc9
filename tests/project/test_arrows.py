"""The import arrows of ARCHITECTURE.md: which package may know of which."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"server", "native", "trainer", "understudy", "bench", "tests"}
NOUNS = {"server.core", "server.errors"}
# Unit -> the units that it may import besides itself and the nouns. The longest matching prefix names a file's unit.
ALLOWED = {
    "server.core": set(),
    "server.errors": set(),
    "server.settings": set(),
    "server.config": {"server.settings"},
    "server.logs": {"server.config"},
    "server.tracing": {"server.config"},
    "server.stats": set(),
    "server.metrics": {"server.config", "server.runtime", "server.stats"},
    "server.api": {
        "server.config", "server.settings", "server.logs", "server.metrics", "server.tracing", "server.routing", "server.runtime",
        "server.quality",
        "server.lake", "server.registry", "server.stats", "understudy",
    },
    "server.routing": {
        "server.config", "server.settings", "native", "server.runtime", "server.providers", "server.quality", "server.lake",
        "server.registry", "server.stats",
    },
    "server.providers": {"server.config", "server.settings"},
    "server.quality": {"native"},
    "server.runtime": {"native", "server.config", "server.settings"},
    "server.lake": {"server.config", "server.settings", "server.registry"},
    "server.registry": {"server.config", "server.settings"},
    "server": {  # app.py, parts.py, cli.py and commands wire everything
        "server.config", "server.settings", "server.logs", "server.metrics", "server.tracing", "server.api", "server.routing",
        "server.providers",
        "server.quality", "server.runtime", "server.lake", "server.registry", "server.stats", "native", "understudy",
    },
    "native": set(),
    "trainer": {
        "server.config", "server.settings", "server.logs", "server.runtime", "server.quality", "server.lake", "server.registry",
        "server.providers", "server.routing", "native",
    },
    "understudy": set(),
}  # fmt: skip
HEAVY = {"torch", "transformers", "optimum", "sentence_transformers", "datasets"}


def unit_of(module: str) -> str:
    return max((unit for unit in ALLOWED if module == unit or module.startswith(unit + ".")), key=len)


def modules() -> list[tuple[str, Path]]:
    found = []
    for package, base in [("server", ROOT), ("native", ROOT), ("trainer", ROOT), ("understudy", ROOT / "clients" / "python")]:
        for path in sorted((base / package).rglob("*.py")):
            if "_pb2" not in path.name:
                found.append((".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"), path))
    return found


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; imports are absolute here"
            assert node.module
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in modules()])
def test_imports_follow_the_arrows(module: str, path: Path) -> None:
    unit = unit_of(module)
    for name in imports_of(path):
        if name.split(".")[0] not in OURS:
            if unit != "trainer":
                assert name.split(".")[0] not in HEAVY, f"{module} imports {name}: only trainer may"
            continue
        assert name.split(".")[0] not in {"bench", "tests"}, f"{module} imports {name}"
        target = unit_of(name)
        assert target == unit or target in NOUNS or target in ALLOWED[unit], f"{module} ({unit}) may not import {name} ({target})"


def test_every_package_has_a_rule() -> None:
    folders = {f"server.{p.name}" for p in (ROOT / "server").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders - {"server.commands"} <= set(ALLOWED), "give the new package a rule, and a line in ARCHITECTURE.md"


def test_init_files_hold_no_logic() -> None:
    for module, path in modules():
        if path.name == "__init__.py" and not module.startswith("understudy"):
            assert not path.read_text().strip(), f"{module}: __init__ files stay empty"


def test_standard_library_is_not_shadowed() -> None:
    assert not {m.split(".")[0] for m, _ in modules()} & sys.stdlib_module_names
