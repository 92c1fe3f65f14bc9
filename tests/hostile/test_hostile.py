"""A running server under bad requests and bad model versions: right codes and reasons, alive and correct after."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench import hostile_files
from bench.harness import Server
from bench.hostile import PROBES, measure
from bench.hostile_case import Target
from bench.hostile_requests import cases
from server.runtime.verify import entry_of
from tests.small_models import serve_small
from understudy.client import Client
from understudy.errors import FailedPrecondition, UnderstudyError
from understudy.oip import open_inference_pb2 as oip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    with serve_small(root) as running:
        yield running
        assert running.popen.poll() is None
    assert running.popen.returncode == 0


def test_bad_requests_get_the_right_answers(server: Server) -> None:
    figures = measure(server.address, count=1500, seed=20261121)
    assert figures["wrong"] == 0, "\n".join(figures["wrong_shown"])
    assert figures["internal_or_unknown"] == 0
    assert figures["sent"] == 1500
    assert figures["correct_after"]
    assert set(figures["codes"]) >= {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "OK"}


def test_the_same_seed_makes_the_same_requests() -> None:
    ids = oip.ModelMetadataResponse.TensorMetadata(name="ids", datatype="INT64", shape=[-1])
    target = Target("m", 64, {"lookup": oip.ModelMetadataResponse(name="lookup", inputs=[ids])})
    assert list(cases(99, 1, target)) == list(cases(99, 1, target)) != list(cases(99, 2, target))


def place(root: Path, source: str, name: str) -> Path:
    """Copies version 1 of a model of the server's repository under another name; the manifest agrees."""
    folder = root / "models" / name / "1"
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(root / "models" / source / "1", folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    rewrite(folder, name=name)
    return folder


def rewrite(folder: Path, **fields: object) -> None:
    """Changes the manifest, and makes its hashes right."""
    manifest = json.loads((folder / "manifest.json").read_text()) | fields
    for file in manifest["files"]:
        entry = entry_of(folder / file)
        manifest["files"][file] = {"sha256": entry.sha256, "size": entry.size}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_bad_versions_are_refused_and_what_runs_stays(server: Server, root: Path) -> None:
    rng = random.Random(5)
    with Client(server.address) as client:
        before = client.embed(PROBES, model="embedder")
        for spoil in hostile_files.SPOILERS.values():
            folder = place(root, "lookup", "spoiled")
            (folder / "notes.txt").write_text("x")
            manifest = json.loads((folder / "manifest.json").read_text())
            rewrite(folder, files={**manifest["files"], "notes.txt": {}})
            spoil(rng, folder)
            with pytest.raises(UnderstudyError) as caught:
                client.models.load("spoiled")
            assert caught.value.code in ("FAILED_PRECONDITION", "NOT_FOUND"), (spoil.__name__, caught.value)
            assert caught.value.reason in ("MODEL_REJECTED", "MANIFEST_INVALID", "MODEL_NOT_FOUND"), (spoil.__name__, caught.value)
        shutil.rmtree(root / "models" / "spoiled")
        np.testing.assert_array_equal(client.embed(PROBES, model="embedder"), before)


@pytest.mark.parametrize("source", ["lookup", "embedder", "classifier"])
def test_graphs_with_flipped_bits_harm_nobody(server: Server, root: Path, source: str) -> None:
    """The hashes are right and the graph is not: it is refused, or it answers; the server and its other models live on."""
    rng = random.Random(source)
    refused = 0
    with Client(server.address) as client:
        before = client.embed(PROBES, model="embedder")
        for _ in range(40):
            folder = place(root, source, "flipped")
            data = bytearray((folder / "model.onnx").read_bytes())
            for _ in range(rng.choice([1, 3, 20])):
                # Names, attributes and shapes lie outside of the weights: half of the flips go to the last part of the file.
                where = rng.randrange(len(data)) if rng.random() < 0.5 else len(data) - 1 - rng.randrange(min(len(data), 1500))
                data[where] ^= 1 << rng.randrange(8)
            (folder / "model.onnx").write_bytes(data)
            rewrite(folder)
            try:
                client.models.load("flipped")
                if source == "embedder":
                    client.embed_each(["a card is lost"], model="flipped", return_errors=True)
                client.models.unload("flipped")
            except FailedPrecondition as error:
                assert error.reason == "MODEL_REJECTED", error
                refused += 1
            except UnderstudyError as error:
                assert error.code not in ("INTERNAL", "UNKNOWN", "UNAVAILABLE"), error
        np.testing.assert_array_equal(client.embed(PROBES, model="embedder"), before)
    shutil.rmtree(root / "models" / "flipped")
    assert refused > 5
