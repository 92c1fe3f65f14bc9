"""Linear heads: what is written is what answers; what was changed, is foreign or belongs to another base is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

from server.errors import AlreadyExists, InvalidArgument, ManifestInvalid, ModelRejected
from server.runtime.heads import Base, Features, HeadSpec, LinearHead, reference, write_linear_head
from server.runtime.verify import entry_of

SIZE = 64
BASE = "a" * 64
RNG = np.random.default_rng(7)
WEIGHT = RNG.standard_normal((3, SIZE)).astype(np.float32)
BIAS = RNG.standard_normal(3).astype(np.float32)


def spec(**changes: Any) -> HeadSpec:
    fields: dict[str, Any] = {
        "name": "support-intent",
        "version": "1",
        "base": Base(name="mini", version="1", sha256=BASE),
        "features": Features(pooling="mean", normalize=True, size=SIZE),
        "labels": ["card", "transfer", "rate"],
        "temperature": 0.5,
        "metrics": {"accuracy": 0.9},
        "lineage": {"rows": 100},
    }
    return HeadSpec(**fields | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_linear_head(tmp_path / "1", spec(), WEIGHT, BIAS)
    return tmp_path / "1"


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 500])
def test_the_file_answers_as_the_weights_say(tmp_path: Path, multi_label: bool, rows: int) -> None:
    written = write_linear_head(tmp_path / "1", spec(multi_label=multi_label), WEIGHT, BIAS)
    head = LinearHead.load(tmp_path / "1", base_sha256=BASE)
    assert head.manifest == written and head.manifest.metrics == {"accuracy": 0.9}
    vectors = RNG.standard_normal((rows, SIZE)).astype(np.float32)
    logits = (vectors.astype(np.float64) @ WEIGHT.T + BIAS) / 0.5
    expected = 1 / (1 + np.exp(-logits)) if multi_label else np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(head.predict(vectors), expected, atol=1e-5)
    np.testing.assert_allclose(reference(written, WEIGHT, BIAS, vectors), expected, atol=1e-5)


def test_versions_are_written_once_and_whole(folder: Path) -> None:
    with pytest.raises(AlreadyExists):
        write_linear_head(folder, spec(), WEIGHT, BIAS)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["1"]
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.safetensors", "head.onnx", "manifest.json"]


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (WEIGHT[:2], BIAS),
        (WEIGHT[:, :10], BIAS),
        (WEIGHT.astype(np.float64), BIAS),
        (WEIGHT, BIAS[:1]),
        (np.full_like(WEIGHT, np.nan), BIAS),
        (WEIGHT, np.full_like(BIAS, np.inf)),
    ],
)
def test_weights_that_are_not_of_the_spec_are_not_written(tmp_path: Path, weight: Any, bias: Any) -> None:
    with pytest.raises(InvalidArgument):
        write_linear_head(tmp_path / "1", spec(), weight, bias)
    assert not list(tmp_path.iterdir())


def test_another_base_is_refused_with_both_hashes(folder: Path) -> None:
    with pytest.raises(ModelRejected) as refused:
        LinearHead.load(folder, base_sha256="b" * 64)
    assert BASE in str(refused.value) and "b" * 64 in str(refused.value)


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


def _sign(folder: Path) -> None:
    """Makes the manifest agree with whatever the files now are, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: entry_of(folder / name).model_dump() for name in ("adapter.safetensors", "head.onnx")}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "adapter.safetensors")
        save_file(change(tensors) or tensors, folder / "adapter.safetensors")
        _sign(folder)

    return spoil


def _graph(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        model = onnx.load(folder / "head.onnx")
        change(model)
        (folder / "head.onnx").write_bytes(model.SerializeToString())
        _sign(folder)

    return spoil


def _other_weights(model: Any) -> None:
    tensor = next(one for one in model.graph.initializer if one.name == "bias")
    tensor.raw_data = np.zeros(3, dtype=np.float32).tobytes()


def _other_operator(model: Any) -> None:
    model.graph.node.append(helper.make_node("Abs", ["raw"], ["unused"]))


def _other_output(model: Any) -> None:
    model.graph.output.append(helper.make_tensor_value_info("raw", TensorProto.FLOAT, None))


def _replace(name: str, content: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content)
        _sign(folder)

    return spoil


def _link(folder: Path) -> None:
    target = folder.parent / "elsewhere"
    os.rename(folder / "head.onnx", target)
    (folder / "head.onnx").symlink_to(target)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: _flip(folder / "head.onnx"),
        lambda folder: _flip(folder / "adapter.safetensors"),
        lambda folder: (folder / "head.onnx").unlink(),
        lambda folder: (folder / "model.pkl").write_bytes(b"x"),
        _link,
        _replace("adapter.safetensors", b""),
        _replace("adapter.safetensors", b"\xff" * 8 + b"{}"),
        _replace("adapter.safetensors", b"x" * (1 << 21)),
        _replace("head.onnx", b"no model"),
        _weights(lambda tensors: {"weight": tensors["weight"]}),
        _weights(lambda tensors: tensors | {"weight": tensors["weight"][:2]}),
        _weights(lambda tensors: tensors | {"bias": tensors["bias"] * np.float32(np.nan)}),
        _weights(lambda tensors: tensors | {"bias": tensors["bias"] + np.float32(1.0) * np.arange(3, dtype=np.float32)}),
        _graph(_other_weights),
        _graph(_other_operator),
        _graph(_other_output),
    ],
)
def test_broken_and_hostile_heads_are_refused(folder: Path, spoil: Callable[[Path], Any]) -> None:
    spoil(folder)
    with pytest.raises(ModelRejected) as refused:
        LinearHead.load(folder, base_sha256=BASE)
    assert len(str(refused.value)) > 40


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ["a", "a", "b"]},
        {"labels": []},
        {"labels": ["a"]},
        {"temperature": 0.0},
        {"temperature": "warm"},
        {"kind": "lora"},
        {"surprise": 1},
        {"name": "../escape"},
        {"base": {"name": "mini", "version": "1", "sha256": "short"}},
        {"files": {}},
        {"files": {"../head.onnx": {"sha256": BASE, "size": 1}}},
        {"features": {"pooling": "max", "normalize": True, "size": SIZE}},
    ],
)
def test_hostile_manifests_are_refused(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ManifestInvalid):
        LinearHead.load(folder, base_sha256=BASE)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"[" * 200_000, b" " * (2 << 20)])
def test_a_manifest_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ManifestInvalid):
        LinearHead.load(folder, base_sha256=BASE)
