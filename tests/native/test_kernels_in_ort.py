"""The operators as ONNX Runtime runs them: registration, shapes, statuses, threads, and two releases of the runtime."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from server.errors import FailedPrecondition
from server.runtime import kernels, ort
from tests.native import sanitize

ROOT = Path(__file__).resolve().parents[2]
OLDER = "1.24.1"


def floats(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_the_compiled_library_is_loaded() -> None:
    described = kernels.describe()
    assert described["isa"] in ("avx512vnni", "avx2", "base")
    path = Path(described["path"])
    kernels.run_op("BiasGelu", {"x": floats(2, 8), "row_scale": None, "bias": None}, ["y"], {})
    assert str(path) in Path("/proc/self/maps").read_text()


def test_the_self_test_passes() -> None:
    kernels.self_test()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", **environment}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(ROOT)]))
    return subprocess.run([sys.executable, "-c", code], env=inherited, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_a_lower_instruction_set_can_be_forced(isa: str) -> None:
    code = "from server.runtime import kernels as k; k.self_test(); print(k.describe()['isa'])"
    done = run_python(code, UNDERSTUDY_KERNEL_ISA=isa)
    assert done.stdout.strip() == isa, done.stderr


def test_an_unknown_instruction_set_is_refused_with_a_reason() -> None:
    code = "from server.runtime import kernels as k; k.self_test()"
    done = run_python(code, UNDERSTUDY_KERNEL_ISA="avx9")
    assert done.returncode and "UNDERSTUDY_KERNEL_ISA names an instruction set" in done.stderr


def test_the_self_test_passes_on_an_older_onnx_runtime() -> None:
    folder = ROOT / "build" / f"ort-{OLDER}"
    if not (folder / "onnxruntime").is_dir():
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), f"onnxruntime=={OLDER}"]
        subprocess.run(install, check=True, timeout=300)
    code = "from server.runtime import kernels as k; k.self_test(); print(k.describe()['ort'])"
    done = run_python(code, PYTHONPATH=str(folder))
    assert done.stdout.strip() == OLDER, done.stderr


def test_the_kernels_are_right_with_the_widest_vectors_on_any_processor() -> None:
    wide = sanitize.build("wide.so", [], ["-O2", "-fPIC", "-shared", *sanitize.WIDTHS["16 lanes"]])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/native/test_kernels.py", "-k", "base"]
    environment = {**os.environ, "UNDERSTUDY_TEST_KERNELS": str(wide), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


def test_the_sanitizers_find_nothing() -> None:
    sanitize.main(rounds=25, widths={"8 lanes": sanitize.WIDTHS["8 lanes"]})


# An OrtApiBase as ONNX Runtime 1.16 has it: version 17 is unknown, version 1 can make a status.
OLD_BASE = """
import ctypes
from server.runtime import kernels
made = []
CREATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
create = CREATE(lambda code, text: made.append(text.decode()) or 4096)
api = (ctypes.c_void_p * 400)(ctypes.cast(create, ctypes.c_void_p).value)
get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda version: ctypes.addressof(api) if version <= 16 else None)
name = ctypes.CFUNCTYPE(ctypes.c_char_p)(lambda: b"1.16.3")
base = (ctypes.c_void_p * 2)(ctypes.cast(get, ctypes.c_void_p).value, ctypes.cast(name, ctypes.c_void_p).value)
register = ctypes.CDLL(str(kernels.library_path())).RegisterCustomOps
register.restype = ctypes.c_void_p
assert register(None, ctypes.c_void_p(ctypes.addressof(base))) == 4096
print(made[0])
"""


def test_an_onnx_runtime_without_our_api_is_refused_with_its_version() -> None:
    done = run_python(OLD_BASE)
    assert done.stdout.strip() == "understudy kernels need ONNX Runtime 1.17 or newer, this is 1.16.3", done.stderr


def attention(lengths: list[int], threads: int, op: str = "PackedAttention", **attributes: float) -> list[np.ndarray[Any, Any]]:
    tokens = sum(lengths)
    feeds: dict[str, Any] = {
        "qkv": floats(tokens, 288),
        "cu": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        "row_scale": None,
        "bias": floats(288),
        "rel_bias": None,
    }
    outputs = ["y"]
    if op.endswith("Q"):
        feeds["mult"] = np.full(96, 30, np.float32)
        outputs = ["q", "out_scale"] if attributes.get("per_row") else ["q"]
    return kernels.run_op(op, feeds, outputs, {"num_heads": 3, **attributes}, threads)


@pytest.mark.parametrize("lengths", [[1], [512], [3] * 500, [1, 400, 2, 0, 77, 5, 300]])
@pytest.mark.parametrize(("op", "attributes"), [("PackedAttention", {}), ("PackedAttentionQ", {}), ("PackedAttentionQ", {"per_row": 1})])
def test_threads_change_no_bit_of_attention(lengths: list[int], op: str, attributes: dict[str, float]) -> None:
    for one, two, three in zip(*(attention(lengths, n, op, **attributes) for n in (1, 2, 3)), strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize(
    ("op", "outputs", "attributes"),
    [
        ("AddNorm", ["y"], {}),
        ("AddNormQ", ["y", "q"], {"zero_point": 100}),
        ("AddNormQ", ["y", "q", "out_scale"], {"per_row": 1, "rms": 1}),
        ("BiasGelu", ["y"], {"approximate": 1}),
        ("BiasGeluQ", ["q", "out_scale"], {"per_row": 1}),
    ],
)
def test_threads_and_neighbours_change_no_bit_of_a_row(op: str, outputs: list[str], attributes: dict[str, float]) -> None:
    x, row_scale, bias, gamma = floats(700, 384), abs(floats(700)), floats(384), floats(384)
    mult = {"mult": abs(floats(384)) * 40} if op.endswith("Q") else {}

    def run(rows: slice, threads: int) -> list[np.ndarray[Any, Any]]:
        feeds: dict[str, Any] = {"x": x[rows], "row_scale": row_scale[rows], "bias": bias}
        if op.startswith("AddNorm"):
            feeds |= {"residual": x[rows] * 0.5, "gamma": gamma, "beta": bias}
        return kernels.run_op(op, {**feeds, **mult}, outputs, attributes, threads)

    whole = run(slice(None), 1)
    for one, two, alone, part in zip(whole, run(slice(None), 2), run(slice(77, 78), 1), run(slice(300, 450), 2), strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one[77:78], alone)
        np.testing.assert_array_equal(one[300:450], part)


GELU = {"x": floats(4, 8), "row_scale": None, "bias": None}
NORM = {"x": floats(4, 8), "row_scale": None, "bias": None, "residual": None, "gamma": floats(8), "beta": None}
ATTEND = {"qkv": floats(4, 24), "cu": np.array([0, 4], np.int32), "row_scale": None, "bias": None, "rel_bias": None}
EMBED = {
    **{name: np.zeros(3, np.int64) for name in ("ids", "positions", "types")},
    "word": floats(5, 8),
    "position": floats(6, 8),
    "type": floats(2, 8),
    "gamma": floats(8),
    "beta": None,
}


@pytest.mark.parametrize(
    ("op", "feeds", "changed", "attributes", "why"),
    [
        ("BiasGelu", GELU, {"bias": floats(9)}, {}, r"BiasGelu: bias has shape \[9\]"),
        ("BiasGelu", GELU, {"x": floats(4, 8, 2)}, {}, r"x has shape rank 3"),
        ("BiasGelu", GELU, {"row_scale": floats(8)}, {}, r"row_scale has shape \[8\]"),
        ("AddNorm", NORM, {"residual": floats(5, 8)}, {}, r"residual has shape \[5, 8\]"),
        ("AddNorm", NORM, {"gamma": floats(0)}, {}, r"gamma has shape \[0\]"),
        ("PackedAttention", ATTEND, {"cu": np.array([0, 9], np.int32)}, {"num_heads": 2}, r"cu_seqlens runs from 0 to 9"),
        ("PackedAttention", ATTEND, {"cu": np.zeros(0, np.int32)}, {"num_heads": 2}, r"cu_seqlens is empty"),
        ("PackedAttention", ATTEND, {"rel_bias": floats(2, 4)}, {"num_heads": 2}, r"rel_bias has 4 columns"),
        ("PackedAttention", ATTEND, {"rel_bias": floats(3, 5)}, {"num_heads": 2}, r"rel_bias has shape \[3, 5\]"),
        ("PackedAttention", ATTEND, {"qkv": floats(4, 25)}, {"num_heads": 2}, r"qkv has 25 columns"),
        ("PackedAttention", ATTEND, {}, {"num_heads": 3}, r"num_heads is 3 for 8 columns"),
        ("PackedAttention", ATTEND, {}, {}, r"num_heads must be at least 1"),
        ("EmbedNorm", EMBED, {"ids": np.array([0, 5, 0])}, {}, r"EmbedNorm: input_ids\[1\] is 5, not within 0\.\.4"),
        ("EmbedNorm", EMBED, {"positions": np.array([0, 0, -1])}, {}, r"position_ids\[2\] is -1"),
        ("EmbedNorm", EMBED, {"types": np.array([2, 0, 0])}, {}, r"token_type_ids\[0\] is 2"),
    ],
)
def test_wrong_inputs_end_in_a_status_that_names_them(
    op: str, feeds: dict[str, Any], changed: dict[str, Any], attributes: dict[str, float], why: str
) -> None:
    with pytest.raises(Exception, match=why):
        kernels.run_op(op, {**feeds, **changed}, ["y"], attributes)


def test_a_quantized_operator_names_what_it_misses() -> None:
    feeds = {**GELU, "mult": floats(8)}
    with pytest.raises(Exception, match="per_row = 1 needs the output out_scale"):
        kernels.run_op("BiasGeluQ", feeds, ["q"], {"per_row": 1})
    with pytest.raises(Exception, match="per_row = 1 needs 128"):
        kernels.run_op("BiasGeluQ", feeds, ["q", "out_scale"], {"per_row": 1, "zero_point": 3})
    with pytest.raises(Exception, match=r"zero_point must be within 0\.\.255"):
        kernels.run_op("BiasGeluQ", feeds, ["q"], {"zero_point": 256})


@pytest.mark.parametrize(("op", "feeds"), [("BiasGelu", GELU), ("AddNorm", NORM), ("PackedAttention", ATTEND)])
def test_no_tokens_give_no_rows(op: str, feeds: dict[str, Any]) -> None:
    first = next(iter(feeds))
    empty = {**feeds, first: feeds[first][:0]}
    if "cu" in feeds:
        empty["cu"] = np.zeros(1, np.int32)
    out = kernels.run_op(op, empty, ["y"], {"num_heads": 2} if "cu" in feeds else {})[0]
    assert out.shape == (0, 8)


def test_the_self_test_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.twins.bias_gelu
    monkeypatch.setattr(kernels.twins, "bias_gelu", lambda *args, **options: right(*args, **options) + 1e-3)
    with pytest.raises(FailedPrecondition, match="the kernel BiasGelu is off by"):
        kernels.self_test()


def product(rows: int, depth: int, cols: int) -> dict[str, Any]:
    random = np.random.default_rng(rows)
    return {
        "a": random.integers(0, 256, (rows, depth)).astype(np.uint8),
        "b": np.clip(np.rint(random.standard_normal((depth, cols)) * 21), -63, 63).astype(np.int8),
        "a_scale": np.full((), 0.0173, np.float32),
        "b_scale": abs(floats(cols)),
        "a_zero": np.full((), 121, np.uint8),
    }


@pytest.mark.parametrize("shape", [(1, 384, 1152), (70, 384, 384), (333, 1536, 384), (9, 30, 50)])
def test_our_product_gives_the_very_bits_of_onnx_runtimes(shape: tuple[int, int, int]) -> None:
    feeds = product(*shape)
    ours = kernels.run_op("Int8Gemm", feeds, ["y"], {}, 2, ["b"])[0]
    theirs = run_graph("MatMulIntegerToFloat", "com.microsoft", feeds)
    np.testing.assert_array_equal(ours, theirs)


def run_graph(op: str, domain: str, feeds: dict[str, Any]) -> np.ndarray[Any, Any]:
    onnxruntime = ort.import_ort()
    inputs = [helper.make_tensor_value_info("a", TensorProto.UINT8, [None, None])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])]
    constants = [numpy_helper.from_array(value, name) for name, value in feeds.items() if name != "a"]
    graph = helper.make_graph([helper.make_node(op, list(feeds), ["y"], domain=domain)], op, inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"a": feeds["a"]})[0])


def test_our_product_refuses_weights_that_are_no_initializer_and_rows_of_another_length() -> None:
    feeds = product(3, 16, 16)
    with pytest.raises(Exception, match="Int8Gemm: b must be an initializer"):
        kernels.run_op("Int8Gemm", feeds, ["y"], {})
    with pytest.raises(Exception, match=r"Int8Gemm: a has shape \[3, 15\]"):
        kernels.run_op("Int8Gemm", {**feeds, "a": feeds["a"][:, :15]}, ["y"], {}, 1, ["b"])
    with pytest.raises(Exception, match="must be scalars"):
        kernels.run_op("Int8Gemm", {**feeds, "a_scale": floats(3)}, ["y"], {}, 1, ["b"])
