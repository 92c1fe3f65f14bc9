"""stories260K through llama2.c's format, our graphs and pages: it tells the story that it is known for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from server.runtime.graphs.decoder.build import build_decoder
from server.runtime.graphs.decoder.checkpoint import DecoderCheckpoint
from server.runtime.graphs.decoder.parity import Runner
from server.runtime.graphs.decoder.reference import Sequences, forward, logits
from tests.runtime.graphs_decoder.stories import OPENING, stories_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stories_folder(tmp_path_factory.mktemp("stories"))


@pytest.fixture(scope="module")
def graphs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("graphs")
    build_decoder(source, out, forms=["float32"])
    return out


def greedy(runner: Runner, sequence: int, prompt: list[int], tokens: int) -> list[int]:
    ids = [int(runner.run([sequence], [prompt])[-1].argmax())]
    while len(ids) < tokens:
        ids.append(int(runner.run([sequence], [ids[-1:]])[0].argmax()))
    return ids


def test_it_tells_its_story(source: Path, graphs: Path) -> None:
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    runner = Runner(graphs / "model.onnx", DecoderCheckpoint.open(source), sequences=2, length=128, kv_dtype="float32")
    assert tokenizer.decode(greedy(runner, 0, [1], 60)).startswith(OPENING)
    start = tokenizer.encode(OPENING[:29]).ids
    assert tokenizer.decode(start + greedy(runner, 1, start, 30)).startswith(OPENING[:60])
    runner.close()


def test_chunks_and_neighbours_change_no_bit(source: Path, graphs: Path) -> None:
    model = DecoderCheckpoint.open(source)
    rng = np.random.default_rng(1)
    a, b = rng.integers(3, 512, 75).tolist(), rng.integers(3, 512, 40).tolist()
    runner = Runner(graphs / "model.onnx", model, sequences=3, length=128, kv_dtype="float32")
    whole = runner.run([0], [a])
    parts = [runner.run([1], [a[:7]]), runner.run([2, 1], [b, a[7:8]])[-1:], runner.run([1], [a[8:]])]
    assert np.array_equal(whole, np.concatenate(parts))
    runner.close()
    want = logits(model, forward(model, Sequences.of([a])))
    assert np.abs(whole - want).max() <= 2e-4 * np.abs(want).max()


def test_words_become_the_tokens_of_llama2c(source: Path) -> None:
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    text = "Once upon a time, Zoë had a 犬.\n"
    encoded = tokenizer.encode(text)
    assert encoded.tokens[:5] == ["<s>", "▁Once", "▁upon", "▁a", "▁time"]
    assert "<0xE7>" in encoded.tokens  # a character that the vocabulary lacks goes in bytes
    assert tokenizer.decode(encoded.ids) == text
