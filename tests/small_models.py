"""Small models for tests that start the real server: raw graphs, and one random BERT for each task. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper, save
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from bench.harness import Server, serve
from server.core import Task
from server.runtime.graphs.build import build
from server.runtime.repository import Repository
from tests import generation_models

TEXT = "the a card is lost where my password reset money transfer late how do i who found it ada london lived in ? . ##s ##ed ##ing"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = list(dict.fromkeys([*SPECIAL, *TEXT.split(), *LETTERS, *(f"##{c}" for c in LETTERS)]))
HIDDEN, INNER, LAYERS, POSITIONS = 32, 64, 2, 64
LABELS = ["card", "transfer", "password"]
ENTITY_LABELS = ["O", "B-PER", "I-PER", "B-LOC"]
ENCODERS: dict[str, tuple[Task, list[str]]] = {
    "embedder": (Task.FEATURE_EXTRACTION, []),
    "classifier": (Task.TEXT_CLASSIFICATION, LABELS),
    "ranker": (Task.TEXT_RANKING, ["relevance"]),
    "tagger": (Task.TOKEN_CLASSIFICATION, ENTITY_LABELS),
    "reader": (Task.QUESTION_ANSWERING, ["start", "end"]),
}
# Datatype of the protocol -> ONNX element type; the graph "types" hands every one of them through.
TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}


def build_repository(root: Path) -> Repository:
    """Writes all of them under `root`: `ENCODERS`, the decoder of tests/generation_models.py, and the raw graphs "adder" (two versions),

    "types", "lookup", "fixed".
    """
    repository = Repository(root / "models")
    for name, (task, labels) in ENCODERS.items():
        folder = root / "checkpoints" / name
        write_bert(folder, task, labels)
        with repository.staging() as staged:
            built = build(folder, staged, task=task, form="float32")
            (staged / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
            fields: dict[str, Any] = {**built.manifest, "task": task.value, "form": "packed"}
            if task is Task.FEATURE_EXTRACTION:
                fields |= {"pooling": "mean", "normalize": True}
            repository.publish(staged, name, fields)
    generation_models.publish(repository, root / "checkpoints")
    for name, write in (("adder", _adder), ("adder", _adder), ("types", _types), ("lookup", _lookup), ("fixed", _fixed)):
        with repository.staging() as staged:
            save(_checked(write()), str(staged / "model.onnx"))
            repository.publish(staged, name, {"task": "tensor", "form": "tensor"})
    return repository


def write_bert(folder: Path, task: Task, labels: list[str]) -> None:
    """A checkpoint as Hugging Face writes it: config.json, model.safetensors, tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    heads = {
        Task.FEATURE_EXTRACTION: "BertModel",
        Task.TEXT_CLASSIFICATION: "BertForSequenceClassification",
        Task.TEXT_RANKING: "BertForSequenceClassification",
        Task.TOKEN_CLASSIFICATION: "BertForTokenClassification",
        Task.QUESTION_ANSWERING: "BertForQuestionAnswering",
    }
    config = {
        "model_type": "bert",
        "architectures": [heads[task]],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "vocab_size": len(VOCABULARY),
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "id2label": {str(i): label for i, label in enumerate(labels or LABELS)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(task, len(labels)), folder / "model.safetensors")
    _tokenizer().save(str(folder / "tokenizer.json"))


def _weights(task: Task, labels: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    found: dict[str, np.ndarray] = {}

    def dense(name: str, inputs: int, outputs: int) -> None:
        found[f"{name}.weight"] = (rng.standard_normal((outputs, inputs)) * 0.3).astype(np.float32)
        found[f"{name}.bias"] = (rng.standard_normal(outputs) * 0.1).astype(np.float32)

    def norm(name: str) -> None:
        found[f"{name}.weight"] = (1 + 0.1 * rng.standard_normal(HIDDEN)).astype(np.float32)
        found[f"{name}.bias"] = (0.1 * rng.standard_normal(HIDDEN)).astype(np.float32)

    bert = "" if task is Task.FEATURE_EXTRACTION else "bert."
    for name, rows in (("word", len(VOCABULARY)), ("position", POSITIONS), ("token_type", 2)):
        found[f"{bert}embeddings.{name}_embeddings.weight"] = rng.standard_normal((rows, HIDDEN)).astype(np.float32)
    norm(f"{bert}embeddings.LayerNorm")
    for i in range(LAYERS):
        layer = f"{bert}encoder.layer.{i}"
        for name in ("query", "key", "value"):
            dense(f"{layer}.attention.self.{name}", HIDDEN, HIDDEN)
        dense(f"{layer}.attention.output.dense", HIDDEN, HIDDEN)
        norm(f"{layer}.attention.output.LayerNorm")
        dense(f"{layer}.intermediate.dense", HIDDEN, INNER)
        dense(f"{layer}.output.dense", INNER, HIDDEN)
        norm(f"{layer}.output.LayerNorm")
    if task in (Task.TEXT_CLASSIFICATION, Task.TEXT_RANKING):
        dense("bert.pooler.dense", HIDDEN, HIDDEN)
    if task is Task.QUESTION_ANSWERING:
        dense("qa_outputs", HIDDEN, 2)
    elif task is not Task.FEATURE_EXTRACTION:
        dense("classifier", HIDDEN, labels)
    return found


def _tokenizer() -> Tokenizer:
    tokens = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", tokens["[SEP]"]), ("[CLS]", tokens["[CLS]"]))
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def _adder() -> Any:
    """x, y FP32 [n, 3] -> sum, product."""
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Add", ["x", "y"], ["sum"]), helper.make_node("Mul", ["x", "y"], ["product"])]
    shape = ["n", 3]
    inputs = [value(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    return helper.make_graph(nodes, "adder", inputs, [value(name, TensorProto.FLOAT, shape) for name in ("sum", "product")])


def _types() -> Any:
    """in_<TYPE> [n, k] -> out_<TYPE>, unchanged."""
    nodes = [helper.make_node("Identity", [f"in_{name}"], [f"out_{name}"]) for name in TYPES]
    inputs = [helper.make_tensor_value_info(f"in_{name}", kind, ["n", f"k{kind}"]) for name, kind in TYPES.items()]
    outputs = [helper.make_tensor_value_info(f"out_{name}", kind, ["n", f"k{kind}"]) for name, kind in TYPES.items()]
    return helper.make_graph(nodes, "types", inputs, outputs)


def _lookup() -> Any:
    """ids INT64 [n] -> rows FP32 [n, 4]; an id from 10 has no row."""
    table = numpy_helper.from_array(np.arange(40, dtype=np.float32).reshape(10, 4), "table")
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])]
    outputs = [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", 4])]
    return helper.make_graph([helper.make_node("Gather", ["table", "ids"], ["rows"])], "lookup", inputs, outputs, [table])


def _fixed() -> Any:
    """x FP32 [2, 2] -> y = x transposed: no batch axis."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])]
    return helper.make_graph([helper.make_node("Transpose", ["x"], ["y"])], "fixed", inputs, outputs)


def _checked(graph: Any) -> Any:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    checker.check_model(model)
    return model


@contextmanager
def serve_small(root: Path) -> Iterator[Server]:
    """The real server over a new repository of small models under `root`."""
    repository = build_repository(root)
    with serve(repository.root) as server:
        yield server
