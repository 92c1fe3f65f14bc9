"""A real trained LLaMA of 260K parameters as a Hugging Face folder; where the data is absent, tests that need it are skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.runtime.graphs.decoder import llama2c

OPENING = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
_ROOT = Path(__file__).resolve().parents[3]


def stories_source() -> Path:
    """The folder of stories260K.bin and tok512.bin."""
    folder = Path(os.environ.get("UNDERSTUDY_SHARED", _ROOT.parent / "shared")) / "data" / "tiny_weights" / "stories260K"
    if not (folder / "stories260K.bin").is_file():
        pytest.skip("stories260K is not here")
    return folder


def stories_folder(folder: Path) -> Path:
    """Writes the checkpoint to `folder` and returns it."""
    source = stories_source()
    folder.mkdir(parents=True, exist_ok=True)
    llama2c.convert(source / "stories260K.bin", source / "tok512.bin", folder)
    return folder
