"""Bad model folders, manifests, tensors and paths for the repository: each must be refused as one of our errors, with its reason."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.hostile_case import HOSTILE_NAMES
from server.errors import UnderstudyError
from server.runtime.repository import Repository

REJECTED = frozenset({"MODEL_REJECTED", "MANIFEST_INVALID"})
NAMES = frozenset({"INVALID_ARGUMENT", "MODEL_NOT_FOUND", "VERSION_NOT_FOUND"})
Spoil = Callable[[random.Random, Path], None]


def run(folder: Path, count: int, seed: int) -> tuple[list[str], int]:
    """Makes `count` of them under `folder`. Returns (what was answered wrongly, how many were made)."""
    rng = random.Random(seed)
    repository, good = make_good(folder)
    spoilers = [*SPOILERS.values()]
    wrong: list[str] = []
    for index in range(count):
        if index % 4 == 3:
            name, version = rng.choice(HOSTILE_NAMES), rng.choice([None, "1", "../1", "0", "-1", "9" * 40, "1\0"])
            wrong += _expect("names", NAMES, lambda name=name, version=version: repository.open(name, version))  # type: ignore[misc]
            continue
        spoil = spoilers[index % len(spoilers)]
        spoiled = folder / "models" / "spoiled" / "1"
        shutil.rmtree(spoiled, ignore_errors=True)
        shutil.copytree(good, spoiled)
        for path in (spoiled, *spoiled.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        _edit(spoiled, name="spoiled")
        spoil(rng, spoiled)
        wrong += _expect(spoil.__name__, REJECTED, lambda: repository.verify("spoiled", "1"))
    shutil.rmtree(folder / "models" / "spoiled", ignore_errors=True)
    repository.verify("good", "1")  # and the good one still is
    return wrong, count


def _expect(what: str, reasons: frozenset[str], call: Callable[[], object]) -> list[str]:
    try:
        call()
    except UnderstudyError as error:
        return [] if error.reason in reasons else [f"files {what}: {error.reason}: {error.message[:200]}"]
    except Exception as error:
        return [f"files {what}: {type(error).__name__}: {str(error)[:200]}"]
    return [f"files {what}: was taken"]


def make_good(folder: Path) -> tuple[Repository, Path]:
    """A repository with one small good version, and its folder."""
    from onnx import TensorProto, helper, numpy_helper, save

    repository = Repository(folder / "models")
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    value = helper.make_tensor_value_info
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    shapes = [value(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", shapes[:1], shapes[1:], [weight])
    with repository.staging() as staged:
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(staged / "model.onnx"))
        (staged / "notes.txt").write_text("small")
        repository.publish(staged, "good", {"task": "tensor", "form": "tensor"})
    return repository, folder / "models" / "good" / "1"


def _edit(folder: Path, **fields: Any) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.update(fields)
    path.write_text(json.dumps(manifest))


def _entry(folder: Path, file: str) -> dict[str, Any]:
    from server.runtime.verify import entry_of

    entry = entry_of(folder / file)
    return {"sha256": entry.sha256, "size": entry.size}


def _files(folder: Path, **entries: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    _edit(folder, files={**manifest["files"], **entries})


def no_manifest_json(rng: random.Random, folder: Path) -> None:
    text = rng.choice([b"", b"{", b"[]", b"null", b"\xff\xfe", b'"x"', b"[" * 100_000, b"{" * 5000, b"1e999", rng.randbytes(200)])
    (folder / "manifest.json").write_bytes(text)


def huge_manifest(rng: random.Random, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b'{"name": "' + b"a" * rng.choice([2 << 20, 5 << 20]) + b'"}')


def deep_manifest(rng: random.Random, folder: Path) -> None:
    depth = rng.choice([500, 5000, 100_000])
    (folder / "manifest.json").write_bytes(b'{"extra": {"a": ' + b"[" * depth + b"]" * depth + b"}}")


def unknown_key(rng: random.Random, folder: Path) -> None:
    _edit(folder, **{rng.choice(["nmae", "__class__", "file", "custom_ops", "x" * 5000]): 1})


def wrong_value(rng: random.Random, folder: Path) -> None:
    key, value = rng.choice(
        [
            ("schema_version", 2),
            ("schema_version", "1"),
            ("name", "other"),
            ("name", "../spoiled"),
            ("name", None),
            ("version", "2"),
            ("version", 1),
            ("task", "no-such-task"),
            ("form", "pickle"),
            ("max_tokens", -1),
            ("max_tokens", 10**9),
            ("max_tokens", True),
            ("max_tokens", 1e308),
            ("hidden_size", -5),
            ("labels", "abc"),
            ("labels", [1, 2]),
            ("normalize", "yes"),
            ("files", {}),
            ("files", []),
            ("files", None),
            ("dtype", "float8"),
            ("quantization", {"method": 3}),
            ("source", {"kind": "hub"}),
            ("parity", {"a": "b"}),
        ]
    )
    _edit(folder, **{key: value})


def hostile_file_name(rng: random.Random, folder: Path) -> None:
    entry = _entry(folder, "model.onnx")
    names = [
        "../../good/1/model.onnx",
        "/etc/passwd",
        "a/b.json",
        "..",
        ".",
        "",
        ".hidden.json",
        "model.pkl",
        "x" * 200 + ".json",
        "a\0.json",
        "manifest.json",
    ]
    _files(folder, **{rng.choice(names): entry})


def wrong_hash(rng: random.Random, folder: Path) -> None:
    entry = _entry(folder, "model.onnx")
    changes = [
        {"sha256": "0" * 64},
        {"sha256": "x"},
        {"sha256": entry["sha256"].upper()},
        {"size": entry["size"] + 1},
        {"size": -1},
        {"size": "1"},
    ]
    _files(folder, **{"model.onnx": {**entry, **rng.choice(changes)}})


def changed_file(rng: random.Random, folder: Path) -> None:
    data = bytearray((folder / "model.onnx").read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (folder / "model.onnx").write_bytes(data)


def cut_file(rng: random.Random, folder: Path) -> None:
    data = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(data[: rng.randrange(len(data))])


def missing_file(rng: random.Random, folder: Path) -> None:
    (folder / rng.choice(["model.onnx", "notes.txt"])).unlink()


def extra_file(rng: random.Random, folder: Path) -> None:
    (folder / rng.choice(["extra.json", "weights.bin", "model.pkl", ".hidden", "ops.so", "code.py"])).write_bytes(b"x")


def link(rng: random.Random, folder: Path) -> None:
    (folder / "notes.txt").unlink()
    os.symlink(rng.choice(["/etc/passwd", "../../good/1/notes.txt", "/dev/zero", "notes.txt"]), folder / "notes.txt")


def odd_kind(rng: random.Random, folder: Path) -> None:
    (folder / "notes.txt").unlink()
    if rng.random() < 0.5:
        os.mkfifo(folder / "notes.txt")
    else:
        (folder / "notes.txt").mkdir()


def pickle_file(_rng: random.Random, folder: Path) -> None:
    (folder / "weights.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    _files(folder, **{"weights.pkl": _entry(folder, "weights.pkl")})


def _rewrite(folder: Path, change: Callable[[Any], None]) -> None:
    """Changes the graph, and makes the manifest agree: only the insides are to blame."""
    import onnx

    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    _files(folder, **{"model.onnx": _entry(folder, "model.onnx")})


def external_data(rng: random.Random, folder: Path) -> None:
    place = rng.choice(
        ["../../good/1/model.onnx", "/etc/passwd", "..", "absent.onnx_data", "model.onnx/../../x", "a\\..\\b", "notes.txt\0", ""]
    )

    def change(model: Any) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = 1
        tensor.external_data.add(key="location", value=place)
        if rng.random() < 0.5:
            tensor.external_data.add(key="offset", value=rng.choice(["-1", "99999999999", "x"]))

    _rewrite(folder, change)


def foreign_operator(rng: random.Random, folder: Path) -> None:
    domain = rng.choice(["evil.ops", "ai.onnx.contrib", "PythonOp", "../x", "com.example"])

    def change(model: Any) -> None:
        model.graph.node[0].domain = domain
        model.opset_import.add(domain=domain, version=1)

    _rewrite(folder, change)


def no_graph(rng: random.Random, folder: Path) -> None:
    (folder / "model.onnx").write_bytes(
        rng.choice([b"", b"\xff" * 50, b"not a model", rng.randbytes(5000), b"\x08\x09", b"\x3a" + b"\xff" * 9 + b"\x01"])
    )
    _files(folder, **{"model.onnx": _entry(folder, "model.onnx")})


def giant_tensor(rng: random.Random, folder: Path) -> None:
    def change(model: Any) -> None:
        tensor = model.graph.initializer[0]
        del tensor.dims[:]
        tensor.dims.extend(rng.choice([[2**40, 2**20], [2**62, 4], [-1, 4], [2**31, 2**31]]))

    _rewrite(folder, change)


def hostile_tokenizer(rng: random.Random, folder: Path) -> None:
    texts = [
        b"",
        b"{}",
        b"[]",
        b"{",
        b"\xff",
        b'{"version": "9.9", "model": {"type": "Nothing"}}',
        b"[" * 50_000,
        b'{"model": 3}',
        rng.randbytes(300),
    ]
    (folder / "tokenizer.json").write_bytes(rng.choice(texts))
    _files(folder, **{"tokenizer.json": _entry(folder, "tokenizer.json")})


def hostile_safetensors(rng: random.Random, folder: Path) -> None:
    header = rng.choice(
        [
            b"{",
            b'{"w": {"dtype": "F32", "shape": [1000000], "data_offsets": [0, 4]}}',
            b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
            b'{"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
            b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        ]
    )
    size = rng.choice([len(header), 2**63 - 1, 2**40, 0])
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + b"\0\0\0\0")
    _files(folder, **{"model.safetensors": _entry(folder, "model.safetensors")})


SPOILERS: dict[str, Spoil] = {
    spoil.__name__: spoil
    for spoil in (
        no_manifest_json,
        huge_manifest,
        deep_manifest,
        unknown_key,
        wrong_value,
        hostile_file_name,
        wrong_hash,
        changed_file,
        cut_file,
        missing_file,
        extra_file,
        link,
        odd_kind,
        pickle_file,
        external_data,
        foreign_operator,
        no_graph,
        giant_tensor,
        hostile_tokenizer,
        hostile_safetensors,
    )
}
