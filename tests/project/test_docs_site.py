"""The documentation's site builds without a warning, loads nothing from elsewhere, and its reference pages have all that there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs_pages import DOCS, pages

ROOT = DOCS.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(built)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "default"})
    assert done.returncode == 0, done.stderr
    return built


def test_every_page_is_in_the_navigation(site: Path) -> None:
    """A strict build refuses pages that the navigation leaves out, dead links and dead anchors; here is what it made of the rest."""
    for page in pages():
        assert (site / page.name).with_suffix(".html").exists()
    assert not (site / "site").exists(), "the generators are no pages"


def test_it_loads_nothing_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r'<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)="([^"]+)"')
    for page in site.rglob("*.html"):
        for address in loaded.findall(page.read_text(encoding="utf-8")):
            assert not re.match(r"(https?:)?//", address), f"{page.name} loads {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_the_api_reference_has_every_rpc_message_and_value(site: Path) -> None:
    page = (site / "reference_api.html").read_text(encoding="utf-8")
    for proto in sorted((ROOT / "protos" / "understudy" / "v1").glob("*.proto")):
        text = proto.read_text(encoding="utf-8")
        for name in re.findall(r"^\s*(?:rpc|message|enum) (\w+)", text, flags=re.MULTILINE):
            assert re.search(rf"[>.]{name}<", page), f"{proto.name}: {name}"
    assert "GET /v1/timeline" in page and "role: operator" in page
    assert "Mean calibrated quality of the delivered answers" in page, "comments are its words"


def test_the_configuration_reference_has_every_setting(site: Path) -> None:
    from server.config import known_keys

    page = (site / "reference_config.html").read_text(encoding="utf-8")
    for key in known_keys():
        assert f"<code>{key.rpartition('.')[2]}</code>" in page or f".{key.rpartition('.')[2]}" in page or f"[{key}" in page, key
    assert "how often the log is forced to the disk" in page, "the example's comments are its words"
    assert "RolloutConfig" not in re.sub(r"see RolloutConfig", "", page), "classes of the code are no settings"
