"""`python -m trainer.export` and `pull` on encoder-decoders: what comes out, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from server.core import Task
from server.errors import InvalidArgument, ModelRejected
from server.runtime.pull import pull
from server.runtime.repository import Repository
from tests.seq2seq_models import build
from trainer.export.seq2seq import export_seq2seq
from trainer.export.seq2seq_tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    base = tmp_path_factory.mktemp("sources")

    def source(family: str) -> Path:
        if not (base / family).exists():
            build(family, base / family)
        return base / family

    return source


def changed(source: Path, target: Path, file: str, **values: Any) -> Path:
    """A copy of `source` (by links) with other values in one of its JSON files."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != file:
            (target / path.name).symlink_to(path)
    content = json.loads((source / file).read_text()) if (source / file).is_file() else {}
    (target / file).write_text(json.dumps({**content, **values}))
    return target


def test_the_command_writes_a_version(sources: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer.export", str(sources("marian")), str(tmp_path / "out"), "--task", "translation"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "encoder_error" in done.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "encoder_model.onnx",
        "decoder_model.onnx",
        "weights.onnx_data",
        "tokenizer.json",
        "target_tokenizer.json",
        "manifest.json",
    }
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["form"] == "seq2seq"
    assert manifest["parity"]["error"] <= 1e-4
    assert manifest["parity"]["tokenizer"] == 1.0
    assert manifest["seq2seq"]["generation"]["num_beams"] == 4
    # The embeddings, which both graphs and the head need, are written once.
    vocabulary, hidden = manifest["seq2seq"]["vocabulary"], manifest["hidden_size"]
    assert (tmp_path / "out" / "weights.onnx_data").stat().st_size < 4 * (2 * vocabulary * hidden + 90_000) + 80 * 4096


@pytest.mark.parametrize("family", ["marian", "m2m_100"])
def test_the_written_tokenizer_splits_and_joins_as_the_original(family: str, sources: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    export_seq2seq(sources(family), tmp_path / "out", Task.TRANSLATION)
    fast, reader = (Tokenizer.from_file(str(tmp_path / "out" / name)) for name in ("tokenizer.json", "target_tokenizer.json"))
    original = load_tokenizer(sources(family))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())["seq2seq"]
    texts = ["a", "  two  blanks  ", "Tabs\tand\nlines", "Ünïcödé — “quotes”", "日本語 mixed", "ﬁne ½ №", "... !!! ???", "x" * 50, "don't"]
    for text in texts:
        ids = [i if i < manifest["source_vocabulary"] else manifest["unknown_token_id"] for i in fast.encode(text).ids]
        assert ids == original(text, add_special_tokens=False).input_ids, text
    for start in range(0, manifest["vocabulary"] - 40, 37):
        ids = [i for i in range(start, start + 30) if i not in manifest["languages"].values() and i not in original.all_special_ids]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert reader.decode(ids, skip_special_tokens=True).strip() == original.decode(ids).strip()


def test_a_target_that_takes_part_in_a_text_is_no_language_mark(sources: Any, tmp_path: Path) -> None:
    """Names of special tokens in a text are text, for the tokenizers that are made here."""
    from tokenizers import Tokenizer

    export_seq2seq(sources("marian"), tmp_path / "out", Task.TRANSLATION)
    ids = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("a </s> >>fra<< <pad>").ids
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())["seq2seq"]
    assert not {*manifest["eos_token_ids"], manifest["pad_token_id"], *manifest["languages"].values()} & set(ids)


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("generation_config.json", {"encoder_repetition_penalty": 1.5}, "encoder_repetition_penalty"),
        ("generation_config.json", {"num_beams": 99}, "num_beams"),
        ("config.json", {"model_type": "led"}, "bart, m2m_100"),
        ("config.json", {"d_model": 33}, "d_model"),
        ("config.json", {"activation_function": "quick_gelu"}, "activation_function"),
        ("config.json", {"vocab_size": 7}, "config.json asks for"),
        # A model that computes something else than its files say.
        ("config.json", {"scale_embedding": True}, None),
    ],
)
def test_what_cannot_be_served_is_refused(file: str, values: dict[str, Any], says: str | None, sources: Any, tmp_path: Path) -> None:
    folder = changed(sources("bart"), tmp_path / "source", file, **values)
    if says is None:
        assert export_seq2seq(folder, tmp_path / "out", Task.SUMMARIZATION)["error"] <= 1e-4
        return
    with pytest.raises(ModelRejected, match=says):
        export_seq2seq(folder, tmp_path / "out", Task.SUMMARIZATION)
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelRejected, match="safetensors"):
        export_seq2seq(tmp_path / "source", tmp_path / "out", Task.TRANSLATION)


def test_pull_makes_a_version_that_verifies(sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    repository = Repository(tmp_path / "models")
    files = pull(str(sources("m2m_100")), repository, name="m2m")
    assert files.manifest.task is Task.TRANSLATION
    assert files.manifest.source is not None
    again = repository.verify("m2m")
    assert again.manifest.form == "seq2seq"
    assert again.manifest.seq2seq is not None
    assert {again.manifest.seq2seq.encoder, again.manifest.seq2seq.decoder} <= again.paths.keys()
    with pytest.raises(InvalidArgument):
        pull(str(sources("m2m_100")), repository, name="m2m", graph="own")
    with pytest.raises(InvalidArgument, match="--task"):
        pull(str(sources("t5")), repository, name="t5")
