"""Writes the Go stubs of all protos: `python protos/generate_go.py TOOLS` makes clients/go/gen (messages, gRPC) and gateway/internal/pb
(grpc-gateway's handlers) with the protoc plugins that lie in TOOLS.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from generate_python import PROTOS, _google_protos, _run

ROOT = PROTOS.parent
MODULE = "understudy.dev/gen"


def generate(tools: Path) -> None:
    """Raises SystemExit with protoc's own message when a proto is wrong."""
    out, gateway = ROOT / "clients" / "go" / "gen", ROOT / "gateway" / "internal" / "pb"
    go = [f"--go_out={out}", f"--go_opt=module={MODULE}", f"--go-grpc_out={out}", f"--go-grpc_opt=module={MODULE}"]
    rest = [f"--grpc-gateway_out={gateway}", f"--grpc-gateway_opt=module={MODULE}/understudy/v1", "--grpc-gateway_opt=standalone=true"]
    for old in (out / "understudy", out / "inference", gateway):
        shutil.rmtree(old, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    gateway.mkdir(parents=True, exist_ok=True)
    include = [f"-I{path}" for path in [str(PROTOS), *_google_protos()]]
    plugins = [f"--plugin={name}={tools / name}" for name in ("protoc-gen-go", "protoc-gen-go-grpc", "protoc-gen-grpc-gateway")]
    sources = sorted(str(path) for path in PROTOS.rglob("*.proto"))
    ours = [path for path in sources if "/understudy/" in path and path.endswith("_service.proto")]
    _run(["protoc", *include, *plugins, *go, *sources])
    _run(["protoc", *include, *plugins, *rest, *ours])


if __name__ == "__main__":
    generate(Path(sys.argv[1]).resolve())
