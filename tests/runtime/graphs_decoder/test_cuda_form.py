"""The form for CUDA without a GPU: ONNX Runtime's schemas accept it, and its operators in NumPy give the float32 form's answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from server.errors import InvalidArgument, ModelRejected
from server.runtime.graphs.decoder.build import build_decoder
from server.runtime.graphs.decoder.checkpoint import DecoderCheckpoint
from server.runtime.graphs.decoder.parity import Runner
from tests.runtime.graphs_decoder.contrib import OPERATORS, register_schemas
from tests.runtime.graphs_decoder.random_decoders import VOCABULARY, random_decoder

PAGES, PAGE, WIDTH = 24, 16, 6
CASES = {
    "llama": {"head_dim": 16},
    "llama-tied-bias": {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh"},
    "llama-linear": {"head_dim": 32},
    "mistral": {"head_dim": 16},
    "qwen2": {"hidden_size": 96},
}


class Device:
    """The CUDA form over pages of its own, and what is in them of each sequence."""

    def __init__(self, path: Path, sequences: int) -> None:
        self.graph = ReferenceEvaluator(onnx.load(str(path)), new_ops=OPERATORS)  # type: ignore[arg-type]
        model = onnx.load(str(path), load_external_data=False).graph
        self.caches = {}
        for value in model.input:
            if "_cache." in value.name:
                sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim][2:]
                # What no sequence wrote must not matter.
                self.caches[value.name] = np.full((PAGES, PAGE, *sizes), 7, np.float16)
        self.tables = np.random.default_rng(0).permutation(PAGES)[: sequences * WIDTH].reshape(sequences, WIDTH).astype(np.int32)
        self.past = np.zeros(sequences, np.int32)

    def run(self, chosen: list[int], tokens: list[list[int]]) -> np.ndarray:
        counts = np.array([len(ids) for ids in tokens])
        cu = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        past = self.past[chosen]
        feeds = {
            "input_ids": np.concatenate(tokens).astype(np.int64),
            "cu_seqlens": cu,
            "past_lens": past,
            "block_table": self.tables[chosen],
            "logit_rows": np.arange(cu[-1], dtype=np.int64),
            "attention_metadata": np.array([counts.max(), (past + counts).max()], np.int32),
            **self.caches,
        }
        logits, *caches = self.graph.run(None, feeds)
        self.caches = dict(zip(self.caches, caches, strict=True))
        self.past[chosen] += counts.astype(np.int32)
        return np.asarray(logits)


def built(name: str, tmp_path: Path, **changes: object) -> tuple[Path, Path]:
    source, out = tmp_path / "hf", tmp_path / "onnx"
    out.mkdir()
    random_decoder(source, name, **(CASES.get(name, {}) | changes))
    build = build_decoder(source, out, forms=["cuda", "float32"])
    assert build.manifest["decoder"].graphs == {"float32": "model.onnx", "cuda": "model.cuda.onnx"}
    assert {path.name for path in build.files} >= {"model.cuda.onnx", "model.cuda.onnx.data", "copy.cuda.onnx"}
    return source, out


@pytest.mark.parametrize("name", CASES)
def test_answers_as_the_float32_form(name: str, tmp_path: Path) -> None:
    source, out = built(name, tmp_path)
    rng = np.random.default_rng(1)
    steps = [([0], [33]), ([0, 1], [1, 20]), ([1, 2, 0], [1, 5, 1]), ([2, 0, 1], [40, 1, 1]), ([0, 1, 2], [1, 1, 1])]
    exact = Runner(out / "model.onnx", DecoderCheckpoint.open(source), sequences=3, length=WIDTH * PAGE, kv_dtype="float32")
    device = Device(out / "model.cuda.onnx", 3)
    for chosen, counts in steps:
        tokens = [rng.integers(3, VOCABULARY, count).tolist() for count in counts]
        want, got = exact.run(chosen, tokens), device.run(chosen, tokens)
        assert got.dtype == np.float32 and got.shape == want.shape
        assert np.abs(got - want).max() <= 0.02 * np.abs(want).max()
        clear = np.diff(np.sort(want)[:, -2:])[:, 0] > 0.04 * np.abs(want).max()
        assert (got.argmax(axis=1) == want.argmax(axis=1))[clear].all()
    exact.close()


def context(model: onnx.ModelProto) -> onnx.checker.C.CheckerContext:
    made = onnx.checker.C.CheckerContext()
    made.ir_version = model.ir_version
    made.opset_imports = {one.domain: one.version for one in model.opset_import}
    return made


@pytest.mark.parametrize("name", ["llama-tied-bias", "qwen2"])
def test_onnx_runtimes_own_schemas_accept_it(name: str, tmp_path: Path) -> None:
    _, out = built(name, tmp_path)
    register_schemas()
    for file in ("model.cuda.onnx", "copy.cuda.onnx"):
        onnx.checker.check_model(str(out / file), full_check=file.startswith("copy"))
    model = onnx.load(str(out / "model.cuda.onnx"), load_external_data=False)
    attention = next(node for node in model.graph.node if node.op_type == "PagedAttention")
    attention.attribute[0].name = "no_such_attribute"
    with pytest.raises(onnx.checker.ValidationError, match="no_such_attribute"):
        onnx.checker.check_node(attention, context(model))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Without a GPU it goes no further than to the operator that processors lack: names, attributes and types were checked before.
    with pytest.raises(Exception, match=r"implementation for PagedAttention|InsertedPrecisionFreeCast"):
        onnxruntime.InferenceSession(str(out / "model.cuda.onnx"), options, providers=["CPUExecutionProvider"])


def test_a_page_is_copied_in_all_layers(tmp_path: Path) -> None:
    _, out = built("llama", tmp_path)
    graph = ReferenceEvaluator(str(out / "copy.cuda.onnx"))
    caches = {name: np.random.default_rng(i).random((4, 16, 2, 16)).astype(np.float16) for i, name in enumerate(graph.input_names[2:])}
    assert len(caches) == 6
    results = graph.run(None, {"source": np.array([1]), "target": np.array([[3]]), **caches})
    for before, after in zip(caches.values(), results, strict=True):
        assert np.array_equal(after, before[[0, 1, 2, 1]])


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [("gemma2", {}, "gemma2"), ("qwen3", {}, "qwen3"), ("llama", {"head_dim": 10}, "multiples of 16")],
)
def test_others_are_refused_before_anything_is_written(name: str, changes: dict[str, int], reason: str, tmp_path: Path) -> None:
    source, out = tmp_path / "hf", tmp_path / "onnx"
    out.mkdir()
    random_decoder(source, name, **changes)
    with pytest.raises(ModelRejected, match=reason):
        build_decoder(source, out, forms=["float32", "cuda"])
    assert not list(out.iterdir())


def test_it_does_not_stand_alone(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="beside"):
        build_decoder(tmp_path, tmp_path, forms=["cuda"])


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    import torch

    source, out = tmp_path / "hf", tmp_path / "onnx"
    out.mkdir()
    model = random_decoder(source, "llama", head_dim=16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 1e5
    model.save_pretrained(source)
    with pytest.raises(ModelRejected, match="float16"):
        build_decoder(source, out, forms=["float32", "cuda"], limits={"float32": {}})
    assert not list(out.iterdir())
