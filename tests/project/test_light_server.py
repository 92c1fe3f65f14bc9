"""The serving process stays light: what only training needs is never imported by it, and nothing phones home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROBE = """
import json, os, sys
os.environ.pop("ORT_DISABLE_TELEMETRY", None)
import server.app, server.cli
import server.runtime.ort as ort
ort.import_ort()
print(json.dumps({"modules": sorted({m.split(".")[0] for m in sys.modules}), "telemetry": os.environ.get("ORT_DISABLE_TELEMETRY")}))
"""


def test_serving_imports_no_training_library(tmp_path: Path) -> None:
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'clients' / 'python'}"}
    out = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=env, cwd=tmp_path, check=True)
    seen = json.loads(out.stdout.splitlines()[-1])
    assert not {"torch", "transformers", "optimum", "sentence_transformers", "sklearn", "pandas"} & set(seen["modules"])
    assert seen["telemetry"] == "1"
    assert not list(tmp_path.rglob("onnxruntime.db")), "ONNX Runtime wrote its telemetry store"
