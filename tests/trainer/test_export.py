"""`python -m trainer.export` on an architecture that we write no graph for, and as the maker of the benchmarks' baseline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from server.runtime.ort import import_ort
from tests.runtime.graphs.random_models import VOCABULARY, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def electra(folder: Path) -> transformers.PreTrainedModel:
    config = transformers.ElectraConfig(
        vocab_size=VOCABULARY,
        embedding_size=24,
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=96,
        num_labels=3,
    )
    torch.manual_seed(3)
    model = transformers.ElectraForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "LayerNorm.weight" in name else 0.2 * noise)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ElectraTokenizerFast", "model_max_length": 512}))
    return model


def export(source: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer.export", str(source), str(out), "--task", "text-classification", *more]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("more", "tolerance", "operator"), [((), 1e-3, "MatMul"), (("--dtype", "int8"), 0.1, "MatMulNBits")])
def test_an_unknown_architecture_is_exported_and_answers_alike(
    more: tuple[str, ...], tolerance: float, operator: str, tmp_path: Path
) -> None:
    model = electra(tmp_path / "source")
    done = export(tmp_path / "source", tmp_path / "out", *more)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["form"] == "padded"
    assert manifest["architecture"] == "electra"
    assert manifest["parity"]["error"] <= tolerance
    assert (tmp_path / "out" / "tokenizer.json").is_file()

    import onnx

    graph = onnx.load(str(tmp_path / "out" / "model.onnx")).graph
    assert operator in {node.op_type for node in graph.node}
    session = import_ort().InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(5, VOCABULARY, (3, 20))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    got = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})[0]
    with torch.no_grad():
        want = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max() * 2


def test_what_cannot_be_exported_is_said_in_one_paragraph(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "pytorch_model.bin").write_bytes(b"")
    done = export(source, tmp_path / "out")
    assert done.returncode == 1
    assert "safetensors" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "model.onnx").exists()
