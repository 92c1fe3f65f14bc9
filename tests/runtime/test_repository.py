"""The repository on a real disk: what is written, what is found, what is refused."""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from server.errors import InvalidArgument, ManifestInvalid, ModelNotFound, ModelRejected, UnderstudyError, VersionNotFound
from server.runtime.manifest import Manifest
from server.runtime.onnx_scan import scan_onnx
from server.runtime.repository import Repository
from server.runtime.verify import MANIFEST, check_name, check_tokenizer, parse_manifest, sha256_of

RAW = {"task": "tensor", "form": "tensor"}


def graph(*, factor: float = 2.0, rows: int = 3) -> onnx.ModelProto:
    """y = factor * x, with a weight matrix so that there is something to break."""
    weight = numpy_helper.from_array(np.full((rows,), factor, np.float32), "w")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", rows]) for name in ("x", "y")]
    return helper.make_model(helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "g", [value[0]], [value[1]], [weight]))


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "models")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    onnx.save(graph(), folder / "model.onnx")
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.unlink()
    path.write_text(json.dumps(content))


def replace(folder: Path, name: str, data: bytes, *, honest: bool = True) -> None:
    """Overwrites a file of a version; an `honest` manifest is given the new hash."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(data)
    if honest:
        edit(folder, lambda m: m["files"].__setitem__(name, {"sha256": sha256_of(folder / name), "size": len(data)}))


def test_versions_count_up_and_are_never_used_twice(repository: Repository, source: Path) -> None:
    assert repository.names() == []
    for expected in ("1", "2", "3"):
        assert repository.add(source, "twice", fields=RAW).manifest.version == expected
    assert (repository.versions("twice"), repository.latest("twice")) == (["1", "2", "3"], "3")
    repository.remove("twice", "3")
    assert repository.latest("twice") == "2"
    assert repository.add(source, "twice", fields=RAW).manifest.version == "4"
    assert repository.remove("twice") == ["1", "2", "4"]
    assert repository.names() == []
    assert repository.add(source, "twice", fields=RAW).manifest.version == "5"


def test_a_version_can_be_added_again_and_keeps_what_it_says(repository: Repository, source: Path) -> None:
    first = repository.add(source, "one", fields={**RAW, "license": "mit", "max_tokens": 77})
    second = repository.add(first.folder, "two", fields={"license": "apache-2.0"})
    assert (second.manifest.max_tokens, second.manifest.license, second.manifest.name) == (77, "apache-2.0", "two")
    assert second.model.read_bytes() == first.model.read_bytes()
    assert [(e.name, e.version, e.size) for e in repository.entries()] == [("one", "1", first.size), ("two", "1", first.size)]


def test_files_are_readable_by_others_and_writable_by_nobody(repository: Repository, source: Path) -> None:
    files = repository.add(source, "m", fields=RAW)
    assert files.folder.stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o222 == 0 for path in files.folder.iterdir())


def test_writers_at_once_each_get_a_number_of_their_own(repository: Repository, source: Path) -> None:
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(repository.add(source, "m", fields=RAW).manifest.version)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made, key=int) == [str(n) for n in range(1, 9)] == repository.versions("m")
    for version in made:
        assert repository.verify("m", version).manifest.version == version


def test_a_failed_write_leaves_nothing(repository: Repository, source: Path) -> None:
    (source / "weights.bin").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ModelRejected, match=r"weights\.bin"):
        repository.add(source, "m", fields=RAW)
    (source / "weights.bin").unlink()
    with pytest.raises(ManifestInvalid, match="contradict"):
        repository.add(source, "m", fields={"task": "tensor", "form": "packed"})
    with pytest.raises(RuntimeError, match="writer"), repository.staging() as folder:
        (folder / "model.onnx").write_bytes(b"half")
        raise RuntimeError("writer died")
    assert [path for path in repository.root.rglob("*") if path.is_file()] == []
    assert repository.names() == []


def test_what_is_absent_is_named_with_its_neighbours(repository: Repository, source: Path) -> None:
    repository.add(source, "all-minilm", fields=RAW)
    with pytest.raises(ModelNotFound, match="did you mean 'all-minilm'"):
        repository.open("all-minilmm")
    with pytest.raises(VersionNotFound, match="'1'") as caught:
        repository.open("all-minilm", "9")
    assert caught.value.metadata == {"model": "all-minilm", "version": "9", "versions": "1"}
    with pytest.raises(VersionNotFound):
        repository.remove("all-minilm", "9")


@pytest.mark.parametrize(
    "name", ["", "../x", "/etc", "a/b", "a\0b", ".hidden", "UPPER", "x" * 129, "x" * 1_000_000, "ünder", "a\n", "adapters", None, 7]
)
def test_names_that_are_none_never_reach_the_disk(tmp_path: Path, name: Any) -> None:
    repository = Repository(tmp_path / "absent")
    for call in (repository.open, repository.remove, repository.versions, repository.verify):
        with pytest.raises(InvalidArgument) as caught:
            call(name)
        assert caught.value.metadata["field"] == "name"
        assert len(caught.value.message) < 400
    assert not repository.root.exists()


@given(st.text())
def test_a_name_is_one_part_of_a_path_or_refused(name: str) -> None:
    try:
        assert check_name(name) == name
    except InvalidArgument:
        return
    assert os.path.basename(name) == name and name not in (".", "..") and name.isascii()


@pytest.mark.parametrize("version", ["", "0", "-1", "1.0", "../1", "x", "1" * 10, " 1", "\u0661", None])
def test_versions_that_are_none_are_refused(repository: Repository, source: Path, version: Any) -> None:
    repository.add(source, "m", fields=RAW)
    if version is None:
        return
    with pytest.raises(InvalidArgument):
        repository.open("m", version)


def test_altered_missing_and_foreign_files_are_refused(repository: Repository, source: Path) -> None:
    folder = repository.add(source, "m", fields=RAW).folder
    good = (folder / "model.onnx").read_bytes()
    replace(folder, "model.onnx", good[:-1] + b"\x00", honest=False)
    with pytest.raises(ModelRejected, match="SHA-256"):
        repository.open("m")
    replace(folder, "model.onnx", good + b"\x00", honest=False)
    with pytest.raises(ModelRejected, match=f"{len(good) + 1} bytes"):
        repository.open("m")
    (folder / "model.onnx").unlink()
    with pytest.raises(ModelRejected, match="not in the folder"):
        repository.open("m")
    replace(folder, "model.onnx", good)
    repository.open("m")
    (folder / "notes.txt").write_text("x")
    with pytest.raises(ModelRejected, match=r"notes\.txt is not in the manifest"):
        repository.open("m")


def test_links_folders_and_pipes_are_refused(repository: Repository, source: Path, tmp_path: Path) -> None:
    folder = repository.add(source, "m", fields=RAW).folder
    outside = tmp_path / "outside.onnx"
    outside.write_bytes((folder / "model.onnx").read_bytes())
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(outside)
    with pytest.raises(ModelRejected, match="a link"):
        repository.open("m")
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").mkdir()
    with pytest.raises(ModelRejected, match="a folder"):
        repository.open("m")
    (folder / "model.onnx").rmdir()
    os.mkfifo(folder / "model.onnx")
    with pytest.raises(ModelRejected, match="no regular file"):
        repository.open("m")
    (repository.root / "linked").symlink_to(folder.parent)
    assert repository.names() == ["m"]


def test_the_manifest_must_agree_with_its_folder(repository: Repository, source: Path) -> None:
    folder = repository.add(source, "m", fields=RAW).folder
    edit(folder, lambda m: m.update(name="other"))
    with pytest.raises(ManifestInvalid, match="'other'"):
        repository.open("m")
    assert repository.entries()[0].manifest is None and "other" in repository.entries()[0].error


HOSTILE_MANIFESTS = {
    "empty": (b"", "EOF"),
    "no object": (b"[1]", "object"),
    "not utf-8": (b"\xff\xfe", "Invalid JSON"),
    "deep": (b'{"extra":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
    "large": (b" " * (1 << 21), "at most"),
    "cut": (b'{"schema_version": 1, "na', "EOF"),
}


@pytest.mark.parametrize("kind", HOSTILE_MANIFESTS)
def test_hostile_manifests(kind: str) -> None:
    text, says = HOSTILE_MANIFESTS[kind]
    with pytest.raises(ManifestInvalid, match=says) as caught:
        parse_manifest(text, "m/1/manifest.json")
    assert caught.value.message.startswith("m/1/manifest.json") and len(caught.value.message) < 600


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"poolin": "mean"}, "did you mean 'pooling'"),
        ({"max_tokens": "512"}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"task": "poetry"}, "task"),
        ({"schema_version": 2}, "schema_version"),
        ({"files": {}}, r"model\.onnx"),
        ({"files": {"../model.onnx": {"sha256": "0" * 64, "size": 1}}}, "files"),
        ({"files": {"model.onnx": {"sha256": "zz", "size": 1}}}, "sha256"),
        ({"files": {"model.onnx": {"sha256": "0" * 64, "size": 1, "mode": 7}}}, "files.model.onnx.mode"),
        ({"files": {"model.onnx": {"sha256": "0" * 64, "size": 1}, "model.pkl": {"sha256": "0" * 64, "size": 1}}}, "pickled"),
        ({"task": "feature-extraction", "form": "packed"}, r"tokenizer\.json"),
        ({"labels": ["a", "a"]}, "twice"),
        ({"dimensions": [64], "hidden_size": 32}, "dimensions"),
    ],
)
def test_manifests_that_contradict_say_which_key(change: dict[str, Any], says: str) -> None:
    base = {"name": "m", "version": "1", **RAW, "files": {"model.onnx": {"sha256": "0" * 64, "size": 1}}}
    with pytest.raises(ManifestInvalid, match=says):
        parse_manifest(json.dumps(base | change).encode(), "m/1/manifest.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*Manifest.model_fields, "nonsense"]), JSON, max_size=6))
def test_manifests_of_any_shape_are_taken_or_refused(change: dict[str, Any]) -> None:
    base = {"name": "m", "version": "1", **RAW, "files": {"model.onnx": {"sha256": "0" * 64, "size": 1}}}
    try:
        parse_manifest(json.dumps(base | change).encode(), "m/1/manifest.json")
    except ManifestInvalid as error:
        assert error.message.startswith("m/1/manifest.json") and len(error.message) < 800


def save(tmp_path: Path, model: onnx.ModelProto) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_a_sound_graph_is_summed_up(tmp_path: Path) -> None:
    summary = scan_onnx(save(tmp_path, graph()))
    assert (summary.inputs, summary.outputs, summary.operators, summary.tensors) == (["x"], ["y"], {("", "Mul")}, 1)


def outside(model: onnx.ModelProto, location: str) -> onnx.ModelProto:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return model


@pytest.mark.parametrize("location", ["../secret.txt", "/etc/passwd", "", "..", "sub/data", "a\\b", "missing.onnx_data", "file:x", "."])
def test_external_data_stays_in_the_folder(tmp_path: Path, location: str) -> None:
    (tmp_path.parent / "secret.txt").write_bytes(b"0" * 12)
    with pytest.raises(ModelRejected, match="takes its data from"):
        scan_onnx(save(tmp_path, outside(graph(), location)))


def test_external_data_in_the_folder_is_listed_and_measured(repository: Repository, source: Path) -> None:
    (source / "model.onnx_data").write_bytes(np.full(3, 2.0, np.float32).tobytes())
    save(source, outside(graph(), "model.onnx_data"))
    files = repository.add(source, "m", fields=RAW)
    assert set(files.manifest.files) == {"model.onnx", "model.onnx_data"}
    (source / "model.onnx_data").write_bytes(b"short")
    with pytest.raises(ModelRejected, match="needs 12 bytes at 0"):
        repository.add(source, "m", fields=RAW)
    (source / "model.onnx_data").unlink()
    (source / "model.onnx_data").symlink_to("/etc/hostname")
    with pytest.raises(ModelRejected):
        repository.add(source, "m", fields=RAW)


def custom(domain: str, operator: str) -> onnx.ModelProto:
    model = graph()
    model.graph.node[0].domain, model.graph.node[0].op_type = domain, operator
    return model


def giant() -> onnx.ModelProto:
    model = graph()
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend([1 << 40, 1 << 20])
    return model


def negative() -> onnx.ModelProto:
    model = graph()
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend([-3])
    return model


def unbacked() -> onnx.ModelProto:
    model = graph()
    model.graph.initializer[0].dims[0] = 1000
    return model


def test_graphs_within_graphs_without_end(tmp_path: Path) -> None:
    def wrap(number: int, inner: bytes) -> bytes:
        size, length = len(inner), b""
        while size >= 0x80:
            length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + inner

    inner = b""
    for _ in range(60):  # graph.node.attribute.g; protobuf's own writer refuses to go so deep
        inner = wrap(1, wrap(5, wrap(6, inner)))
    path = tmp_path / "model.onnx"
    path.write_bytes(wrap(7, inner))
    with pytest.raises(ModelRejected, match="nested"):
        scan_onnx(path)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (custom("evil.ops", "Shell"), "custom library"),
        (custom("com.microsoft", "EPContext"), "reaches outside"),
        (custom("com.microsoft", "PyOp"), "reaches outside"),
        (giant(), "claims more than"),
        (negative(), "not negative"),
        (unbacked(), "12 bytes where its dimensions need 4000"),
        (onnx.ModelProto(ir_version=10), "0 graphs"),
    ],
)
def test_hostile_graphs(tmp_path: Path, model: onnx.ModelProto, says: str) -> None:
    with pytest.raises(ModelRejected, match=says):
        scan_onnx(save(tmp_path, model))


def test_functions_of_the_model_itself_are_no_custom_library(tmp_path: Path) -> None:
    model = custom("local", "Twice")
    model.functions.append(
        helper.make_function(
            "local", "Twice", ["a", "b"], ["c"], [helper.make_node("Mul", ["a", "b"], ["c"])], [helper.make_opsetid("", 20)]
        )
    )
    assert ("local", "Twice") in scan_onnx(save(tmp_path, model)).functions


@pytest.mark.parametrize("data", [b"", b"\x00", b"MZ\x90" * 99, b"\x80\x04\x95pickle", b"\xff" * 64, b"\x3a\xff\xff\xff\xff\x0f", b"{}"])
def test_what_is_no_graph(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelRejected):
        scan_onnx(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_broken_bytes_are_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    """Cut or flipped anywhere, a graph is either refused by our class or still a graph to the scan: never another exception."""
    good = bytearray(graph().SerializeToString())
    for _ in range(data.draw(st.integers(0, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.onnx"
    path.write_bytes(bytes(good[: data.draw(st.integers(0, len(good)))]))
    try:
        scan_onnx(path)
    except ModelRejected as error:
        assert error.message.startswith("model.onnx")


def header(content: dict[str, Any], payload: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + payload


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 9) + b"not json!",
        header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}}, b"\0" * 8),
        header({"w": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}}, b"\0" * 8),
        header(
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
            b"\0" * 12,
        ),
        header({"w": {"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    ],
)
def test_hostile_safetensors(repository: Repository, source: Path, data: bytes) -> None:
    (source / "extra.safetensors").write_bytes(data)
    with pytest.raises(ModelRejected, match=r"extra\.safetensors"):
        repository.add(source, "m", fields=RAW)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[" * 200_000, b'{"version":"1.0","model":{"type":"Nope"}}', b"\xff\xff", b"null", b'"' + b"x" * 1000]
)
def test_hostile_tokenizers(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(ModelRejected, match="tokenizer") as caught:
        check_tokenizer(path)
    assert len(caught.value.message) < 500


def test_every_refusal_is_of_our_tree(repository: Repository, source: Path) -> None:
    folder = repository.add(source, "m", fields=RAW).folder
    for name, data in {"model.onnx": b"\0" * 100, "manifest.json": b"{}", "a.json": b"[" * 100_000, "b.json": b"\xff"}.items():
        with pytest.raises(UnderstudyError):
            replace(folder, name, data, honest=name != MANIFEST)
            repository.verify("m")
        (folder / name).unlink()
        repository.remove("m") if repository.exists("m") else None
        folder = repository.add(source, "m", fields=RAW).folder
