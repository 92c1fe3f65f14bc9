"""Broken, foreign and hostile checkpoints are refused with the class, the file or tensor to blame, and a way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from server.core import Task
from server.errors import InvalidArgument, ModelRejected, TaskNotSupported, UnderstudyError
from server.runtime.graphs import parity
from server.runtime.graphs.architecture import HeadKind
from server.runtime.graphs.build import build, read_config, supported_architectures
from tests.checkpoints import checkpoint
from tests.runtime.graphs.random_models import edit_config

Spoil = Callable[[Path], None]


def config(**changes: object) -> Spoil:
    return lambda folder: edit_config(folder, **changes)


def tensors(change: Callable[[dict[str, np.ndarray]], None]) -> Spoil:
    def spoil(folder: Path) -> None:
        values = load_file(folder / "model.safetensors")
        change(values)
        save_file(values, folder / "model.safetensors")

    return spoil


def bytes_of(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content) and None  # type: ignore[func-returns-value]


def set_nan(values: dict[str, np.ndarray]) -> None:
    values["encoder.layer.0.output.dense.weight"][1, 1] = np.nan


def drop(values: dict[str, np.ndarray]) -> None:
    del values["encoder.layer.0.attention.self.key.bias"]


def reshape(values: dict[str, np.ndarray]) -> None:
    values["embeddings.word_embeddings.weight"] = values["embeddings.word_embeddings.weight"][:-1]


def whole_numbers(values: dict[str, np.ndarray]) -> None:
    values["embeddings.LayerNorm.bias"] = np.zeros(32, np.int64)


def header(entry: dict[str, object], data: bytes = b"\0" * 16) -> bytes:
    text = json.dumps({"embeddings.word_embeddings.weight": entry}).encode()
    return len(text).to_bytes(8, "little") + text + data


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def shard_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (config(model_type="gpt2"), "one of bert, camembert, distilbert, mpnet, roberta, xlm-roberta"),
        (config(model_type=["bert"]), "model_type"),
        (config(hidden_size=0), "hidden_size"),
        (config(hidden_size="384"), "hidden_size"),
        (config(hidden_size=True), "hidden_size"),
        (config(hidden_size=10**12), "hidden_size"),
        (config(num_attention_heads=5), "divisor"),
        (config(num_hidden_layers=None), "num_hidden_layers"),
        (config(hidden_act="relu"), "hidden_act"),
        (config(layer_norm_eps="small"), "layer_norm_eps"),
        (config(position_embedding_type="relative_key"), "absolute"),
        (config(is_decoder=True), "encoder"),
        (config(id2label={"0": "a", "2": "b"}), "without a gap"),
        (config(id2label=7), "id2label"),
        (config(architectures={"a": 1}), "architectures"),
        (config(vocab_size=41), "config.json asks for"),
        (bytes_of("config.json", b"{"), "not JSON"),
        (bytes_of("config.json", b"[" * 100_000), "not JSON"),
        (bytes_of("config.json", b"[]"), "JSON object"),
        (bytes_of("config.json", b" " * (5 << 20)), "at most"),
        (lambda folder: (folder / "config.json").unlink(), "There is no config.json"),
        (tensors(set_nan), "NaN"),
        (tensors(drop), "key.bias"),
        (tensors(reshape), "shape"),
        (tensors(whole_numbers), "I64"),
        (pickled, "save_pretrained"),
        (shard_outside, "no safetensors file beside it"),
        (lambda folder: (folder / "model.safetensors").unlink(), "There is no model.safetensors"),
        (bytes_of("model.safetensors", b""), "damaged"),
        (bytes_of("model.safetensors", b"\xff" * 64), "damaged"),
        (bytes_of("model.safetensors", (2).to_bytes(8, "little") + b"[]"), "damaged"),
        (bytes_of("model.safetensors", header({"dtype": "F32"})), "lacks its type"),
        (bytes_of("model.safetensors", header({"dtype": "F32", "shape": [2], "data_offsets": [0, 99]})), "outside the file"),
        (bytes_of("model.safetensors", header({"dtype": "F32", "shape": [2], "data_offsets": [-8, 8]})), "lacks its type"),
        (bytes_of("model.safetensors", header({"dtype": "F32", "shape": [9], "data_offsets": [0, 8]})), "8 bytes"),
    ],
)
def test_a_bad_checkpoint_is_refused(spoil: Spoil, says: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    spoil(folder)
    with pytest.raises(ModelRejected) as caught:
        build(folder, tmp_path, task=Task.FEATURE_EXTRACTION, form="float32")
    assert says in caught.value.message
    assert caught.value.metadata
    assert not (tmp_path / "model.onnx").exists()


def test_another_tasks_head_is_refused_by_name(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "BertForSequenceClassification", id2label={"0": "a", "1": "b"})
    with pytest.raises(TaskNotSupported, match="text-classification"):
        build(folder, tmp_path, task=Task.TOKEN_CLASSIFICATION, form="float32")
    with pytest.raises(TaskNotSupported, match="tensor"):
        build(folder, tmp_path, task=Task.TENSOR, form="float32")


def test_a_bare_encoder_has_no_head(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    edit_config(folder, architectures=["BertForMaskedLM"])
    with pytest.raises(ModelRejected, match="no head for this task"):
        build(folder, tmp_path, task=Task.QUESTION_ANSWERING, form="float32")


@pytest.mark.parametrize(
    ("calibration", "tokenizer", "kind"),
    [
        (["one text"], None, InvalidArgument),
        (None, None, ModelRejected),
        (None, b"{}", ModelRejected),
        (
            None,
            json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 99, "?": 98}, "unk_token": "?"}}).encode(),
            ModelRejected,
        ),
    ],
)
def test_int8_needs_texts_and_the_right_tokenizer(
    calibration: list[str] | None, tokenizer: bytes | None, kind: type[UnderstudyError], tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "model")
    if tokenizer is not None:
        (folder / "tokenizer.json").write_bytes(tokenizer)
    with pytest.raises(kind) as caught:
        build(folder, tmp_path, task=Task.FEATURE_EXTRACTION, form="int8", calibration=calibration)
    assert caught.value.metadata["field"] in ("calibration", "tokenizer.json")


def test_parity_fails_above_its_tolerance_and_on_nan() -> None:
    want = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    cu = np.array([0, 2, 6], np.int32)
    for form, noise, passes in (
        ("float32", 1e-6, True),
        ("float32", 1e-2, False),
        ("int8", 1e-2, True),
        ("int8", 0.5, False),
        ("int8", np.nan, False),
    ):
        got = want + np.float32(noise) * np.random.default_rng(1).standard_normal(want.shape).astype(np.float32)
        figures = parity.measure(HeadKind.HIDDEN, got, want, cu)
        assert bool(parity.failures(figures, parity.tolerances(HeadKind.HIDDEN, form, 40))) is not passes
    with pytest.raises(ModelRejected, match="cosine_mean"):
        parity.require(figures, parity.INT8_HIDDEN, "")


def test_one_row_of_few_is_no_evidence_and_two_are() -> None:
    want = np.eye(4, dtype=np.float32)[np.arange(20) % 4] * 10
    for wrong, passes in ((0, True), (1, True), (2, False)):
        got = want + np.float32(0.3) * np.random.default_rng(1).standard_normal(want.shape).astype(np.float32)
        got[:wrong] = np.roll(got[:wrong], 1, axis=1)
        agreement = {"agreement": parity.tolerances(HeadKind.SEQUENCE, "int8", len(want))["agreement"]}
        figures = {"agreement": float((got.argmax(axis=1) == want.argmax(axis=1)).mean())}
        assert bool(parity.failures(figures, agreement)) is not passes
    assert parity.tolerances(HeadKind.SEQUENCE, "int8", 400)["agreement"][0] == 0.97


def test_known_architectures(tmp_path: Path) -> None:
    assert {"bert", "distilbert", "mpnet", "roberta", "xlm-roberta"} <= set(supported_architectures())
    assert read_config(checkpoint(tmp_path / "model")).max_tokens == 64
