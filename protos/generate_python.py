"""Writes the Python stubs of all protos: `python protos/generate_python.py OUT` makes OUT/understudy/{v1,oip}/*_pb2*.py(i).

The Open Inference Protocol's file keeps its own wire package, `inference`; its Python module lives in `understudy.oip`, so that no
top-level
package called `inference` appears on a user's path.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent


def _google_protos() -> list[str]:
    """Folders that hold google/protobuf, google/api and google/rpc."""
    from importlib.resources import files

    import google.rpc.status_pb2 as status

    googleapis = Path(status.__file__).resolve().parents[2]
    return [str(files("grpc_tools") / "_proto"), str(googleapis)]


def generate(out: Path) -> list[Path]:
    """Returns the files written. Raises SystemExit with protoc's own message when a proto is wrong."""
    include = [f"-I{path}" for path in [str(PROTOS), *_google_protos()]]
    sources = sorted(str(p) for p in (PROTOS / "understudy").rglob("*.proto"))
    _run(["protoc", *include, f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}", *sources])
    (out / "understudy" / "v1" / "__init__.py").touch()
    oip = sorted((PROTOS / "inference").glob("*.proto"))
    if oip:
        target = out / "understudy" / "oip"
        target.mkdir(parents=True, exist_ok=True)
        (target / "__init__.py").touch()
        include = [f"-I{PROTOS / 'inference'}", *include[1:]]
        _run(["protoc", *include, f"--python_out={target}", f"--pyi_out={target}", f"--grpc_python_out={target}", *map(str, oip)])
        for stub in target.glob("*_pb2_grpc.py"):
            text = stub.read_text()
            stub.write_text(text.replace("\nimport open_inference_pb2", "\nfrom understudy.oip import open_inference_pb2"))
    return sorted(out.glob("understudy/*/*_pb2*.py"))


def _run(arguments: list[str]) -> None:
    if protoc.main(arguments) != 0:
        raise SystemExit("the protos could not be compiled; see the messages above")


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
