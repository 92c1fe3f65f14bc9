"""The products as ONNX Runtime runs them: shapes, statuses, threads, weights in a file of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from native.kernels import twins_products as products
from native.kernels.twins_products import Lora
from server.runtime import kernels, ort
from server.runtime.kernels_products import lora_feeds
from tests.native import sanitize
from tests.native.test_products import bank, floats, int4_case, int8_case

Feeds = dict[str, Any]
ROWS, DEPTH, COLS = 90, 132, 200


def float_feeds(random: np.random.Generator) -> Feeds:
    return {"a": floats(random, ROWS, DEPTH), "b": floats(random, DEPTH, COLS)}


def int4_feeds(random: np.random.Generator) -> Feeds:
    data, scale = int4_case(random, DEPTH, COLS, 64)
    return {"a": floats(random, ROWS, DEPTH), "b": data, "scale": scale}


def int8_feeds(random: np.random.Generator) -> Feeds:
    case = int8_case(random, ROWS, DEPTH, COLS)
    scalars = {"a_scale": np.asarray(case["a_scale"]), "b_scale": case["b_scale"], "a_zero": np.full((), case["a_zero"], np.uint8)}
    return {"a": case["a"], "b": case["b"], **scalars}


PRODUCTS = {
    "FloatGemm": (float_feeds, {}, ["b"]),
    "Int4Gemm": (int4_feeds, {"depth": DEPTH, "cols": COLS, "block": 64}, ["b", "scale"]),
    "Int8Gemm": (int8_feeds, {}, ["b"]),
}


@pytest.mark.parametrize("op", PRODUCTS)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_threads_change_no_bit(op: str, bfloat16: bool) -> None:
    make, attributes, constants = PRODUCTS[op]
    random = np.random.default_rng(21)
    lora = bank(random, (ROWS, DEPTH, COLS), bfloat16=bfloat16)
    feeds = {**make(random), **lora_feeds(lora)}
    if op == "Int8Gemm":
        feeds |= {"mult": np.abs(floats(random, DEPTH)) + 1, "row_scale": np.abs(floats(random, ROWS)) + 1}
    one, two, three = (kernels.run_op(op, feeds, ["y"], attributes, n, [*constants, "lora_layout"])[0] for n in (1, 2, 3))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, three)
    assert np.isfinite(one).all()


@pytest.mark.parametrize("op", PRODUCTS)
def test_no_tokens_give_no_rows_with_and_without_adapters(op: str) -> None:
    make, attributes, constants = PRODUCTS[op]
    random = np.random.default_rng(22)
    feeds = make(random)
    feeds["a"] = feeds["a"][:0]
    assert kernels.run_op(op, feeds, ["y"], attributes, 2, constants)[0].shape == (0, COLS)
    feeds |= lora_feeds(bank(random, (0, DEPTH, COLS)))
    assert kernels.run_op(op, feeds, ["y"], attributes, 2, constants)[0].shape == (0, COLS)


LORA = Lora(np.zeros(2, np.int32), np.zeros((3, 4, 64), np.float32), np.zeros((3, 1), np.int32), np.array([(0, 32, 0, 8, 0, 16)], np.int64))
FLOAT: Feeds = {"a": np.ones((2, 16), np.float32), "b": np.ones((16, 8), np.float32), **lora_feeds(LORA)}
NIBBLES: Feeds = {"a": np.ones((2, 16), np.float32), "b": np.zeros((1, 8, 32), np.uint8), "scale": np.zeros((1, 1, 16), np.uint16)}
SHAPE = {"depth": 16, "cols": 8, "block": 32}


@pytest.mark.parametrize(
    ("op", "changed", "attributes", "why"),
    [
        ("FloatGemm", {"a": np.ones((2, 17), np.float32)}, {}, r"FloatGemm: a has shape \[2, 17\]"),
        ("FloatGemm", {"b": np.ones((0, 8), np.float32)}, {}, "b must be a matrix with at least one element"),
        ("FloatGemm", {"adapter_ids": np.zeros(3, np.int32)}, {}, r"adapter_ids has shape \[3\]"),
        ("FloatGemm", {"adapter_ids": np.full(2, 3, np.int32)}, {}, r"adapter_ids\[0\] is 3, not within -1\.\.2"),
        ("FloatGemm", {"lora_bank": None}, {}, "adapter_ids needs lora_bank, lora_ranks and lora_layout"),
        ("FloatGemm", {"lora_bank": np.zeros((3, 4, 64), np.float64)}, {}, "lora_bank has element type 11"),
        ("FloatGemm", {"lora_bank": np.zeros((3, 4), np.float32)}, {}, "lora_bank has shape"),
        ("FloatGemm", {"lora_ranks": np.zeros((2, 1), np.int32)}, {}, r"lora_ranks has shape \[2, 1\]"),
        ("FloatGemm", {"lora_layout": np.zeros((1, 5), np.int64)}, {}, r"lora_layout has shape \[1, 5\]"),
        ("Int4Gemm", {}, {**SHAPE, "block": 16}, "the attribute block is 16; expected 32, 64 or 128"),
        ("Int4Gemm", {}, {**SHAPE, "block": 128}, r"b does not have the shape \[1, 32, 32\]"),
        ("Int4Gemm", {}, {**SHAPE, "cols": 17}, r"b does not have the shape \[2, 8, 32\]"),
        ("Int4Gemm", {}, {**SHAPE, "depth": 0}, "the attributes depth and cols are 0 and 8"),
        ("Int4Gemm", {}, {**SHAPE, "depth": 2**40}, "the attributes depth and cols"),
        ("Int4Gemm", {"scale": np.zeros((1, 2, 16), np.uint16)}, SHAPE, r"scale does not have the shape \[1, 1, 16\]"),
        ("Int4Gemm", {"a": np.ones((2, 15), np.float32)}, SHAPE, r"Int4Gemm: a has shape \[2, 15\]"),
    ],
)
def test_wrong_inputs_end_in_a_status_that_names_them(op: str, changed: Feeds, attributes: dict[str, float], why: str) -> None:
    feeds, constants = (FLOAT, ["b"]) if op == "FloatGemm" else (NIBBLES, ["b", "scale"])
    with pytest.raises(Exception, match=why):
        kernels.run_op(op, {**feeds, **changed}, ["y"], attributes, 1, constants)


def test_weights_must_be_initializers() -> None:
    with pytest.raises(Exception, match="FloatGemm: b must be an initializer"):
        kernels.run_op("FloatGemm", FLOAT, ["y"], {})
    with pytest.raises(Exception, match="Int4Gemm: scale must be an initializer"):
        kernels.run_op("Int4Gemm", NIBBLES, ["y"], SHAPE, 1, ["b"])


def test_weights_may_lie_in_a_file_of_their_own(tmp_path: Path) -> None:
    random = np.random.default_rng(23)
    feeds = int4_feeds(random)
    attributes = {"depth": DEPTH, "cols": COLS, "block": 64}
    expected = products.int4_gemm(feeds["a"], feeds["b"], feeds["scale"], depth=DEPTH, cols=COLS, block=64)
    model = onnx.load_model_from_string(kernels.single_op_model("Int4Gemm", feeds, ["y"], attributes, ["b", "scale"]))
    path = tmp_path / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    onnxruntime = ort.import_ort()
    options = onnxruntime.SessionOptions()
    kernels.register(options)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(["y"], {"a": feeds["a"]})[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the code is for AVX-512 VNNI")
@pytest.mark.parametrize("width", ["16 lanes", "the dot instruction by hand"])
def test_the_code_for_wider_processors_is_right_on_any(width: str) -> None:
    library = sanitize.build(f"{width.replace(' ', '-')}.so", [], ["-O1", "-fPIC", "-shared", *sanitize.WIDTHS[width]])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/native/test_products.py", "-k", "base"]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "UNDERSTUDY_TEST_KERNELS": str(library), "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
