"""Every architecture against transformers itself: the reference, the graph over pages, and greedy text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from server.runtime.graphs.decoder.build import build_decoder
from server.runtime.graphs.decoder.checkpoint import DecoderCheckpoint
from server.runtime.graphs.decoder.parity import Runner
from server.runtime.graphs.decoder.reference import Sequences, forward, logits
from tests.runtime.graphs_decoder.random_decoders import CONFIGS, VOCABULARY, answers, greedy, random_decoder

LENGTHS = [1, 2, 17, 40]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_text(name: str, tmp_path: Path) -> None:
    source, out = tmp_path / "hf", tmp_path / "onnx"
    out.mkdir()
    model = random_decoder(source, name)
    rng = np.random.default_rng(3)
    sequences = [rng.integers(3, VOCABULARY, n).tolist() for n in LENGTHS]
    want = answers(model, sequences)
    scale = np.abs(want).max()

    checkpoint = DecoderCheckpoint.open(source)
    batch = Sequences.of(sequences)
    assert np.abs(logits(checkpoint, forward(checkpoint, batch)) - want).max() <= 1e-4 * scale

    built = build_decoder(source, out, forms=["float32"])
    decoder = built.manifest["decoder"]
    assert decoder.layers == checkpoint.config.layers and decoder.stop_token_ids == [2] and decoder.kv_dtype == "float32"
    runner = Runner(built.model, checkpoint, sequences=len(sequences) + 1, length=64, kv_dtype="float32")
    assert np.abs(runner.run(range(len(sequences)), sequences) - want).max() <= 1e-4 * scale
    prompt, spoken = sequences[2], []
    tokens = [prompt]
    for _ in range(20):
        row = runner.run([len(sequences)], tokens)[-1]
        row[2] = -np.inf  # transformers, told to go on, does not say its stop token either
        spoken.append(int(row.argmax()))
        tokens = [spoken[-1:]]
    runner.close()
    assert spoken == greedy(model, prompt, 20)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3"])
def test_sharded_half_precision(name: str, tmp_path: Path) -> None:
    import torch
    import transformers

    source, out = tmp_path / "hf", tmp_path / "onnx"
    out.mkdir()
    model = random_decoder(tmp_path / "whole", name).to(torch.bfloat16)
    model.save_pretrained(source, max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    built = build_decoder(source, out, forms=["float32"])
    assert (out / "embedding.onnx.data").stat().st_size < 4 * VOCABULARY * 48 + (1 << 17)
    sequences = [[5, 6, 7, 8, 9]]
    runner = Runner(built.model, DecoderCheckpoint.open(source), sequences=1, length=64, kv_dtype="float32")
    want = answers(transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), sequences)
    assert np.abs(runner.run([0], sequences) - want).max() <= 1e-4 * np.abs(want).max()
    runner.close()


def test_only_the_rows_asked_for(tmp_path: Path) -> None:
    source, out = tmp_path / "hf", tmp_path / "onnx"
    out.mkdir()
    model = random_decoder(source, "llama")
    built = build_decoder(source, out, forms=["float32"])
    sequences = [[5, 6, 7], [8, 9, 10, 11]]
    want = answers(model, sequences)[[2, 3, 6]]
    runner = Runner(built.model, DecoderCheckpoint.open(source), sequences=2, length=64, kv_dtype="float32")
    got = runner.run([0, 1], sequences, [2, 3, 6])
    runner.close()
    assert got.shape == (3, VOCABULARY) and np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
