"""Models that the measures of generation share: random weights in known shapes, made once under build/bench."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.harness import BUILD, ROOT


@dataclass(frozen=True)
class Shape:
    """A model as a Hugging Face folder (`checkpoint`) and in a repository of its own (`models`)."""

    name: str
    checkpoint: Path
    models: Path

    @property
    def vocabulary(self) -> int:
        return int(json.loads((self.checkpoint / "config.json").read_text())["vocab_size"])


def shape(name: str, dtype: str = "int8") -> Shape:
    """A shape of bench.shapes, pulled in `dtype` (int8: W8A8 and int4 forms)."""
    from bench.shapes import write_shape

    checkpoint = BUILD / "shapes" / name
    if not (checkpoint / "config.json").is_file():
        write_shape(name, checkpoint)
    return pulled(name, checkpoint, dtype, "--effort", "fast")


def pulled(name: str, checkpoint: Path, dtype: str, *options: str) -> Shape:
    """The checkpoint in a repository under build/bench; pulled once."""
    models = BUILD / f"models-{name}-{dtype}"
    if not (models / name).is_dir():
        command = [sys.executable, "-m", "server.cli", "models", "pull", str(checkpoint), "--task", "text-generation", "--dtype", dtype]
        done = subprocess.run([*command, "--name", name, "--models", str(models), *options], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} could not be pulled: {(done.stdout + done.stderr)[-1500:]}")
    return Shape(name, checkpoint, models)
