"""docs/auth.md says each method's role, and what the audit log keeps; no line of it is stale."""

from __future__ import annotations

import re

from server.api.auth_roles import rule_of
from server.core import Role
from tests.api.auth_calls import methods, path_of
from tests.server_process import ROOT


def test_the_table_of_roles_is_complete_and_true() -> None:
    page = (ROOT / "docs" / "auth.md").read_text(encoding="utf-8")
    said: dict[tuple[str, str], tuple[str, bool]] = {}
    for role, cell in re.findall(r"^\| (viewer|user|operator|admin) \| (.+) \|$", page, flags=re.MULTILINE):
        for part in cell.split("; "):
            service, _, names = part.partition(": ")
            for name, star in re.findall(r"`(\w+)(\*?)`", names):
                assert (service, name) not in said
                said[service, name] = (role, bool(star))
    rules = {(method.containing_service.name, method.name): rule_of(path_of(method)) for method in methods()}
    assert said == {key: (rule.role.name.lower(), rule.audited) for key, rule in rules.items()}
    assert {role for role, _ in said.values()} == {role.name.lower() for role in Role}
