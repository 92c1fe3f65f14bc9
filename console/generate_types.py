"""Writes the types of the API's JSON for TypeScript: `python console/generate_types.py` makes console/src/gen by protoc-gen-es."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "protos"))

from generate_python import PROTOS, _google_protos, _run  # noqa: E402  (the folder is no package)


def generate() -> None:
    """Raises SystemExit with protoc's own message when a proto is wrong."""
    out = HERE / "src" / "gen"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    plugin = HERE / "node_modules" / ".bin" / "protoc-gen-es"
    include = [f"-I{path}" for path in [str(PROTOS), *_google_protos()]]
    sources = sorted(str(path) for path in (PROTOS / "understudy").rglob("*.proto"))
    options = [f"--plugin=protoc-gen-es={plugin}", f"--es_out={out}", "--es_opt=target=dts,json_types=true"]
    _run(["protoc", *include, *options, *sources, "google/rpc/status.proto"])


if __name__ == "__main__":
    generate()
