"""What `mkdocs build` does besides: writes the two reference pages, and points to files of the repository where a page does."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import api_reference
import config_reference

_outward = re.compile(r"\[[^\]]*\]\(\.\./([^)]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made of something."""
    from mkdocs.structure.files import File

    for name, made in (("reference_api.md", api_reference.page), ("reference_config.md", config_reference.page)):
        files.append(File.generated(config, name, content=made()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link out of docs/ is a path of the repository, which the site does not hold."""
    return _outward.sub(r"`\1`", markdown)
