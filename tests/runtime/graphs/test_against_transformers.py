"""Packed graphs answer as transformers does, for each architecture and each head, in float32 to 1e-4 and in int8 to their tolerance."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from server.core import Task
from server.errors import ModelRejected
from server.runtime.graphs import writer
from server.runtime.graphs.build import Built, build, finish_int8
from server.runtime.graphs.calibrate import choose_forms, default_texts, encode
from server.runtime.graphs.checkpoint import read_checkpoint
from server.runtime.graphs.quantize import Choice
from server.runtime.graphs.reference import Packed
from server.runtime.ort import import_ort, session_options
from tests.runtime.graphs.random_models import (
    CONFIGS,
    LABELS,
    Sequences,
    answers,
    edit_config,
    random_model,
    random_sequences,
    write_tokenizer,
)

TASKS = (
    Task.FEATURE_EXTRACTION,
    Task.TEXT_CLASSIFICATION,
    Task.TEXT_RANKING,
    Task.TOKEN_CLASSIFICATION,
    Task.QUESTION_ANSWERING,
)
LENGTHS = [1, 2, 17, 64, 3, 33]
# Their token type tables have two rows in these tests.
TYPED = {"bert"}


def packed_answers(built: Built, sequences: Sequences) -> list[np.ndarray]:
    session = import_ort().InferenceSession(str(built.model), session_options(2))
    batch = Packed.of(sequences)
    output = session.run(None, batch.feed(built.manifest["token_types"]))[0]
    if built.manifest["task"] in (Task.TEXT_CLASSIFICATION, Task.TEXT_RANKING):
        return list(output)
    return [output[start:end] for start, end in itertools.pairwise(batch.cu)]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_float32_equals_transformers(architecture: str, task: Task, tmp_path: Path) -> None:
    model = random_model(tmp_path, architecture, task)
    built = build(tmp_path, tmp_path, task=task, form="float32")
    typed = architecture in TYPED
    sequences = random_sequences(LENGTHS, 2 if typed else 1)
    for got, want in zip(packed_answers(built, sequences), answers(model, sequences, types=typed), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)
    manifest = built.manifest
    assert manifest["token_types"] is typed
    assert manifest["hidden_size"] == 48
    labels = {
        Task.TEXT_CLASSIFICATION: list(LABELS.values()),
        Task.TOKEN_CLASSIFICATION: list(LABELS.values()),
        Task.TEXT_RANKING: ["relevance"],
    }
    assert manifest["labels"] == labels.get(task, [])


@pytest.mark.parametrize("architecture", ["bert", "roberta", "mpnet"])
def test_the_longest_input_reaches_the_last_position(architecture: str, tmp_path: Path) -> None:
    """Far pairs of tokens share MPNet's last bucket, and RoBERTa's table ends two rows later than its input may."""
    model = random_model(tmp_path, architecture, Task.FEATURE_EXTRACTION, positions=300)
    built = build(tmp_path, tmp_path, task=Task.FEATURE_EXTRACTION, form="float32")
    longest = 300 if architecture == "bert" else 298
    assert built.manifest["max_tokens"] == longest
    sequences = random_sequences([longest], 1)
    np.testing.assert_allclose(packed_answers(built, sequences)[0], answers(model, sequences, types=False)[0], atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"])
def test_each_gelu_is_its_own(activation: str, tmp_path: Path) -> None:
    model = random_model(tmp_path, "bert", Task.FEATURE_EXTRACTION, hidden_act=activation)
    built = build(tmp_path, tmp_path, task=Task.FEATURE_EXTRACTION, form="float32")
    sequences = random_sequences([40], 2)
    np.testing.assert_allclose(packed_answers(built, sequences)[0], answers(model, sequences, types=True)[0], atol=1e-4)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "shards", "tensorflow-names", "no-prefix"])
def test_forms_of_checkpoints(kind: str, tmp_path: Path) -> None:
    model = random_model(tmp_path, "bert", Task.TEXT_CLASSIFICATION)
    file = tmp_path / "model.safetensors"
    if kind in ("float16", "bfloat16"):
        dtype = torch.float16 if kind == "float16" else torch.bfloat16
        model = model.to(dtype)
        model.save_pretrained(tmp_path)
        model = model.float()
    elif kind == "shards":
        file.unlink()
        model.save_pretrained(tmp_path, max_shard_size="40KB")
        assert not file.exists()
    elif kind == "tensorflow-names":
        renamed = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in load_file(file).items()
        }
        save_file(renamed, file)
    else:
        model.bert.save_pretrained(tmp_path)
        model = model.bert
    task = Task.FEATURE_EXTRACTION if kind == "no-prefix" else Task.TEXT_CLASSIFICATION
    built = build(tmp_path, tmp_path, task=task, form="float32")
    sequences = random_sequences(LENGTHS, 2)
    for got, want in zip(packed_answers(built, sequences), answers(model, sequences, types=True), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_the_encoder_of_a_classifier_gives_embeddings(tmp_path: Path) -> None:
    model = random_model(tmp_path, "roberta", Task.TEXT_CLASSIFICATION)
    built = build(tmp_path, tmp_path, task=Task.FEATURE_EXTRACTION, form="float32")
    sequences = random_sequences([20], 1)
    np.testing.assert_allclose(packed_answers(built, sequences)[0], answers(model.roberta, sequences, types=False)[0], atol=1e-4)
    assert built.manifest["labels"] == []


@pytest.mark.parametrize("task", [Task.FEATURE_EXTRACTION, Task.TEXT_CLASSIFICATION, Task.QUESTION_ANSWERING])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "mpnet"])
def test_int8_is_near_and_does_not_know_its_neighbours(architecture: str, task: Task, tmp_path: Path) -> None:
    model = random_model(tmp_path, architecture, task)
    write_tokenizer(tmp_path)
    stages: list[tuple[str, float]] = []
    built = build(
        tmp_path,
        tmp_path,
        task=task,
        form="int8",
        calibration=default_texts()[:120],
        progress=lambda stage, share: stages.append((stage, share)),
    )
    typed = architecture in TYPED
    sequences = random_sequences([9, 1, 30, 14, 78, 5], 2 if typed else 1, seed=3)
    together = packed_answers(built, sequences)
    want = np.concatenate([w.reshape(-1) for w in answers(model, sequences, types=typed)])
    got = np.concatenate([g.reshape(-1) for g in together])
    assert float(np.corrcoef(got, want)[0, 1]) > 0.98
    for row, sequence in zip(together, sequences, strict=True):
        np.testing.assert_array_equal(packed_answers(built, [sequence])[0], row)
    layers = built.manifest["quantization"].layers
    assert set(layers.values()) <= {"static", "row", "fp32"}
    assert len(layers) == 8
    assert [s for s in stages if s[0] == "quantize"][-1] == ("quantize", 1.0)
    assert stages[-1] == ("check", 1.0)


def test_num_labels_without_names(tmp_path: Path) -> None:
    random_model(tmp_path, "bert", Task.TEXT_CLASSIFICATION, id2label={0: "a", 1: "b"})
    edit_config(tmp_path, id2label=None, problem_type="multi_label_classification")
    built = build(tmp_path, tmp_path, task=Task.TEXT_CLASSIFICATION, form="float32")
    assert built.manifest["labels"] == ["LABEL_0", "LABEL_1"]
    assert built.manifest["multi_label"] is True


def test_a_product_that_int8_spoils_goes_back_to_float32(tmp_path: Path) -> None:
    random_model(tmp_path, "bert", Task.FEATURE_EXTRACTION)
    write_tokenizer(tmp_path)
    checkpoint = read_checkpoint(tmp_path, Task.FEATURE_EXTRACTION)
    used, held = encode(tmp_path, default_texts(), Task.FEATURE_EXTRACTION, 64)
    chosen = choose_forms(checkpoint, used, lambda stage, share: None)
    good = chosen["layer1.out"].product
    chosen["layer1.out"] = Choice("static", 1.0, replace(good, weight=np.roll(good.weight, 1, axis=1)))
    built = finish_int8(checkpoint, tmp_path, Task.FEATURE_EXTRACTION, chosen, held, lambda stage, share: None)
    layers = built.manifest["quantization"].layers
    assert [name for name, form in layers.items() if form == "fp32"] == ["layer1.out"]
    assert built.parity["cosine_mean"] >= 0.9975


def test_weights_beyond_a_protobuf_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_EMBEDDED_BYTES", 10_000)
    model = random_model(tmp_path, "bert", Task.FEATURE_EXTRACTION)
    sizes = []
    for _ in range(2):  # the second build replaces the first's weights
        built = build(tmp_path, tmp_path, task=Task.FEATURE_EXTRACTION, form="float32")
        assert [file.name for file in built.files] == ["model.onnx", "model.onnx.data"]
        sizes.append(built.files[1].stat().st_size)
    assert sizes[0] == sizes[1]
    sequences = random_sequences([20], 2)
    np.testing.assert_allclose(packed_answers(built, sequences)[0], answers(model, sequences, types=True)[0], atol=1e-4)


def test_nothing_is_left_of_a_graph_that_fails_its_check(tmp_path: Path) -> None:
    random_model(tmp_path, "bert", Task.FEATURE_EXTRACTION)
    write_tokenizer(tmp_path)
    checkpoint = read_checkpoint(tmp_path, Task.FEATURE_EXTRACTION)
    used, held = encode(tmp_path, default_texts(), Task.FEATURE_EXTRACTION, 64)
    chosen = choose_forms(checkpoint, used, lambda stage, share: None)
    spoiled = {n: replace(c, product=replace(c.product, weight=np.roll(c.product.weight, 1, axis=1))) for n, c in chosen.items()}
    with pytest.raises(ModelRejected, match="does not answer as the original") as caught:
        finish_int8(checkpoint, tmp_path, Task.FEATURE_EXTRACTION, spoiled, held, lambda stage, share: None)
    assert "cosine_mean=" in caught.value.metadata["figures"]
    assert not (tmp_path / "model.onnx").exists()
