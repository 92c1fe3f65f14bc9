"""int8 and int4 of decoders: outlier channels and massive tokens survive, both forms keep what they promise, adapters are added."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.shapes import write_shape
from native.kernels.twins_products import from_bfloat16, int4_gemm, to_bfloat16
from server.errors import ModelRejected
from server.runtime.graphs.build import Built
from server.runtime.graphs.decoder.build import build_decoder
from server.runtime.graphs.decoder.checkpoint import DecoderCheckpoint, Part, Product
from server.runtime.graphs.decoder.forms import Int4, Int8
from server.runtime.graphs.decoder.int4 import quantize_int4, round_blocks
from server.runtime.graphs.decoder.int8 import EFFORTS, Rows, Weights, quantize_int8
from server.runtime.graphs.decoder.parity import Runner
from server.runtime.graphs.decoder.reference import Sequences, exact, forward, logits
from server.runtime.graphs.tensors import Tensors
from tests.runtime.graphs_decoder.stories import stories_folder


def weights_of(weight: np.ndarray) -> Weights:
    return Weights(Product("p", weight.shape[0], (Part("p", weight.shape[1]),), Tensors({})), weight)


def int8_result(form: Int8, x: np.ndarray) -> np.ndarray:
    """What GatedActQ and the like make of x, times the weights."""
    scaled = x * form.mult
    scale = np.abs(scaled).max(axis=1, keepdims=True) / 127 if form.row else np.float32(1)
    q = np.clip(np.rint(scaled / scale) + form.zero_point, 0, 255) - form.zero_point
    return (q @ form.weight.astype(np.float32)) * form.weight_scale * (scale * np.float32(form.scale))


def relative(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    return np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)


@pytest.mark.parametrize("effort", ["fast", "normal"])
def test_outlier_channels_survive(effort: str) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((600, 96), np.float32), rng.standard_normal((96, 80), np.float32) / 10
    x[:, [3, 40, 77]] *= np.array([64, 100, 30], np.float32)
    weight[[3, 40, 77]] /= np.array([[64], [100], [30]], np.float32)
    choice = quantize_int8(Rows(x, 256), weights_of(weight), EFFORTS[effort], np.array)
    assert isinstance(choice.product, Int8)
    assert relative(int8_result(choice.product, x), x @ weight).mean() < (0.04 if effort == "fast" else 0.02)
    # Pairs of weights must not saturate 16 bits where a processor adds them so.
    pairs = choice.product.weight.astype(int).reshape(48, 2, 80)
    assert np.abs(np.where(pairs[:, 0] * pairs[:, 1] > 0, pairs.sum(axis=1), 0)).max() <= 128


def test_a_massive_token_neither_breaks_the_others_nor_itself() -> None:
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((600, 96), np.float32), rng.standard_normal((96, 80), np.float32)
    x[0] = 0.5 * x[0]
    x[0, [5, 60]] = [4000, -2500]
    choice = quantize_int8(Rows(x, 256), weights_of(weight), EFFORTS["normal"], np.array)
    assert isinstance(choice.product, Int8) and choice.form == "row"
    error = relative(int8_result(choice.product, x), x @ weight)
    assert error[0] < 0.02 and error[1:].mean() < 0.03


@pytest.mark.parametrize("effort", ["fast", "normal"])
def test_int4_is_what_its_packed_bytes_say(effort: str) -> None:
    rng = np.random.default_rng(2)
    x, weight = rng.standard_normal((300, 100), np.float32), rng.standard_normal((100, 90), np.float32)
    weight[32:64] = 0  # a block without a scale
    choice = quantize_int4(Rows(x, 200), weights_of(weight), EFFORTS[effort], np.array)
    form = choice.product
    assert isinstance(form, Int4) and choice.form == f"int4-{form.block}"
    got = int4_gemm(x, form.data, form.scale, depth=100, cols=90, block=form.block)
    assert relative(got, x @ weight).mean() < 0.12
    assert choice.error == pytest.approx(float((relative(got, x @ weight) ** 2).mean()), rel=0.3)


def test_scales_of_blocks_are_bfloat16_and_signed() -> None:
    weight = np.random.default_rng(3).standard_normal((70, 8)).astype(np.float32)
    weight[0, 0], weight[1, 1] = 5, -5
    q, scale = round_blocks(weight, np.ones(70, np.float32), 32, (1.0,))
    assert scale.shape == (3, 8) and q.max() <= 15
    assert np.array_equal(scale, from_bfloat16(to_bfloat16(scale)))
    assert scale[0, 0] < 0 < scale[0, 1] and q[0, 0] == q[1, 1] == 0


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Built]:
    source = stories_folder(tmp_path_factory.mktemp("stories"))
    return source, build_decoder(source, tmp_path_factory.mktemp("graphs"), forms=["int4", "int8"])


def test_stories_keep_their_opinion(stories: tuple[Path, Built]) -> None:
    figures = stories[1].parity
    assert figures["top1"] >= 0.98 and figures["kl"] <= 0.01 and figures["int4_kl"] <= 0.3
    layers = stories[1].manifest["quantization"].layers
    assert sum(form != "fp32" for name, form in layers.items() if not name.startswith("int4/")) > 10
    assert {path.name for path in stories[1].files} >= {"model.onnx", "model.int4.onnx", "embedding.onnx.data"}
    assert not list(stories[1].model.parent.glob(".*")) and not (stories[1].model.parent / "probe.onnx").exists()


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_no_form_depends_on_chunks_or_neighbours(form: str, stories: tuple[Path, Built]) -> None:
    source, built = stories
    decoder = built.manifest["decoder"]
    path = built.model.parent / decoder.graphs[form]
    runner = Runner(path, DecoderCheckpoint.open(source), sequences=3, length=96, kv_dtype=decoder.kv_dtype)
    a, b = (np.random.default_rng(4).integers(3, 512, n).tolist() for n in (60, 21))
    whole = runner.run([0], [a])
    parts = [runner.run([1], [a[:3]]), runner.run([2, 1], [b, a[3:40]])[21:], runner.run([1], [a[40:41]]), runner.run([1], [a[41:]])]
    runner.close()
    assert np.array_equal(whole, np.concatenate(parts))


def test_answers_out_of_tolerance_leave_no_file(tmp_path: Path) -> None:
    source, out = write_shape("tiny", tmp_path / "tiny"), tmp_path / "out"
    out.mkdir()
    (out / "kept.txt").write_text("not ours")
    with pytest.raises(ModelRejected, match="int4") as refused:
        build_decoder(source, out, forms=["int4"], effort="fast", limits={"int4": {"kl": (1e-12, False)}})
    assert "kl=" in refused.value.metadata["figures"]
    assert [path.name for path in out.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_each_token_gets_its_own_adapter(form: str, tmp_path: Path) -> None:
    source, out = write_shape("tiny", tmp_path / "tiny"), tmp_path / "out"
    out.mkdir()
    built = build_decoder(source, out, forms=[form], effort="fast")  # type: ignore[list-item]
    model, decoder = DecoderCheckpoint.open(source), built.manifest["decoder"]
    rng = np.random.default_rng(5)
    slots, rank = 3, 4
    bank = (rng.standard_normal((slots, rank, decoder.lora.width)) * 0.12).astype(np.float32)
    ranks = rng.integers(0, rank + 1, (slots, len(decoder.lora.targets))).astype(np.int32)
    if decoder.lora.dtype == "bfloat16":
        bank = from_bfloat16(to_bfloat16(bank))
    targets = {target.name: target for target in decoder.lora.targets}

    def adapted(slot: int):  # type: ignore[no-untyped-def]
        def multiply(product: Product, x: np.ndarray) -> np.ndarray:
            y, column = exact(product, x), 0
            for part in product.parts:
                target = targets[part.module]
                r = ranks[slot, target.index]
                a = bank[slot, :r, target.a : target.a + target.inputs]
                b = bank[slot, :r, target.b : target.b + target.outputs]
                y[:, column : column + part.outputs] += (x @ a.T) @ b
                column += part.outputs
            return y

        return multiply

    sequences = [rng.integers(3, 1024, n).tolist() for n in (9, 14, 5, 20)]
    chosen = [2, -1, 0, 1]
    want = []
    for ids, slot in zip(sequences, chosen, strict=True):
        batch = Sequences.of([ids])
        want.append(logits(model, forward(model, batch, adapted(slot) if slot >= 0 else exact)))
    runner = Runner(built.model, model, sequences=4, length=32, kv_dtype=decoder.kv_dtype)
    runner.adapters = {"lora_bank": to_bfloat16(bank) if decoder.lora.dtype == "bfloat16" else bank, "lora_ranks": ranks}
    got = runner.run(range(4), sequences, slots=np.repeat(chosen, [len(ids) for ids in sequences]))
    base = runner_base(built, model, sequences, decoder.kv_dtype)
    runner.close()
    expected = np.concatenate(want)
    # int8 is as far from the reference with adapters as it is without them.
    limit = 1e-4 if form == "float32" else 1.5 * relative(base[9:23], expected[9:23]).mean()
    assert relative(got, expected).mean() <= limit
    assert relative(base[:9], expected[:9]).min() > 2 * limit  # the adapters matter
    assert np.array_equal(got[9:23], base[9:23])  # and tokens without one do not notice


def runner_base(built: Built, model: DecoderCheckpoint, sequences: list[list[int]], kv_dtype: str) -> np.ndarray:
    runner = Runner(built.model, model, sequences=4, length=32, kv_dtype=kv_dtype)
    try:
        return runner.run(range(4), sequences)
    finally:
        runner.close()
