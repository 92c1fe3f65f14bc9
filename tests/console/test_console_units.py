"""The console's own tests, which need no browser."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.made import ROOT


def test_the_parts_that_need_no_browser(console_gateway: Path) -> None:
    found = {**os.environ, "PATH": f"{os.environ['PATH']}:{ROOT / '.venv' / 'bin'}"}  # npm may be PyPI's
    done = subprocess.run(["npm", "test", "--silent", "--prefix", "console"], cwd=ROOT, env=found, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
