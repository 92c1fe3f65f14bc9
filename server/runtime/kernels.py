"""The kernel library inside ONNX Runtime: where it lies, how a session gets it, and the proof at start that it computes what it should.

`register` must be called on the options of every session whose graph holds operators of the domain "understudy".
`self_test` runs every operator in a tiny session against its NumPy twin; the server calls it once and refuses to start if it fails.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from native.kernels import twins
from server.errors import FailedPrecondition

if TYPE_CHECKING:
    import onnxruntime

DOMAIN = "understudy"
OPSET = 1
Feeds = dict[str, NDArray[Any]]


def library_path() -> Path:
    """The compiled library; FailedPrecondition when it was not built."""
    path = Path(twins.__file__).with_name("libunderstudy_kernels.so")
    if not path.is_file():
        raise FailedPrecondition(
            f"the kernel library {path.name} is not beside {path.parent.name}/twins.py; expected it to be compiled; "
            "install the package again or run `make setup`",
            library=path.name,
        )
    return path


@functools.cache
def isa_name() -> str:
    """The build that runs here: avx512vnni, avx2 or base; FailedPrecondition when UNDERSTUDY_KERNEL_ISA asks for one that cannot."""
    library = ctypes.CDLL(str(library_path()))
    library.us_isa_name.restype = ctypes.c_char_p
    name = str(library.us_isa_name().decode())
    if not name:
        raise FailedPrecondition(
            "UNDERSTUDY_KERNEL_ISA names an instruction set that this build or this processor lacks; unset it, or set it to 'base'"
        )
    return name


def share_threads(threads: int) -> None:
    """Tells the operators how many threads the pool of all sessions has; runs that go on at the same time then divide them."""
    ctypes.CDLL(str(library_path())).us_share_threads(ctypes.c_int(threads))


def has_fast_product() -> bool:
    """Whether Int8Gemm is faster here than ONNX Runtime's MatMulIntegerToFloat: on AVX2 without VNNI it is, by about 1.2 times."""
    return isa_name() == "avx2"


def register(options: onnxruntime.SessionOptions) -> None:
    """Makes the operators known to sessions created with `options`; FailedPrecondition when ONNX Runtime is too old for them."""
    path = library_path()
    isa_name()
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # onnxruntime's classes for a failed status share no base but Exception
        raise FailedPrecondition(f"ONNX Runtime did not take the kernel library: {error}", library=path.name) from error


def describe() -> dict[str, str]:
    """What runs here, for logs and `GetStatus`: isa, path, ort (its version)."""
    from server.runtime import ort

    return {"isa": isa_name(), "path": str(library_path()), "ort": str(ort.import_ort().__version__)}


def single_op_model(
    op: str,
    feeds: Mapping[str, NDArray[Any] | None],
    outputs: list[str],
    attributes: Mapping[str, float],
    constants: Collection[str] = (),
) -> bytes:
    """A model of one operator.

    Its inputs are `feeds` in order (None: absent), those named in `constants` as initializers. An output named "q" is u8, "ids"
    int64, one named "" is not wanted, all others are float32.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    present = {name: value for name, value in feeds.items() if value is not None}
    node = helper.make_node(op, [name if name in present else "" for name in feeds], outputs, domain=DOMAIN, **attributes)
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
        for name, value in present.items()
        if name not in constants
    ]
    initializers = [numpy_helper.from_array(np.ascontiguousarray(present[name]), name) for name in constants]
    results = [
        helper.make_tensor_value_info(name, {"q": TensorProto.UINT8, "ids": TensorProto.INT64}.get(name, TensorProto.FLOAT), None)
        for name in outputs
        if name
    ]
    graph = helper.make_graph([node], op, inputs, results, initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, OPSET)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return bytes(model.SerializeToString())


def run_op(
    op: str,
    feeds: Mapping[str, NDArray[Any] | None],
    outputs: list[str],
    attributes: Mapping[str, float],
    threads: int = 1,
    constants: Collection[str] = (),
) -> list[NDArray[Any]]:
    """Runs one operator in a session of its own and returns `outputs` in order, without those named ""."""
    from server.runtime import ort

    onnxruntime = ort.import_ort()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    register(options)
    model = single_op_model(op, feeds, outputs, attributes, constants)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    fed = {name: value for name, value in feeds.items() if value is not None and name not in constants}
    return list(session.run([name for name in outputs if name], fed))


def expect_close(op: str, got: NDArray[Any], expected: NDArray[np.float64], tolerance: float) -> None:
    """FailedPrecondition where an element is off by more than tolerance * (1 + its size)."""
    error = float(np.max(np.abs(got - expected) / (1.0 + np.abs(expected)), initial=0.0))
    if got.shape != expected.shape or not error <= tolerance:
        raise FailedPrecondition(
            f"the kernel {op} is off by {error:.3g}, expected at most {tolerance:g}; this build does not suit this machine: "
            "set UNDERSTUDY_KERNEL_ISA=base, or build the package here",
            op=op,
            error=f"{error:.3g}",
        )


def expect_quantized(op: str, got: list[NDArray[Any]], expected: twins.Quantized) -> None:
    """FailedPrecondition where [q] or [q, scale] differs by more than the rounding of an exact half."""
    expect_close(op, got[0].astype(np.float64), np.clip(expected.exact, 0, 255), 0.51)
    if expected.scale is not None:
        expect_close(op, got[1] / expected.scale, np.ones_like(expected.scale, dtype=np.float64), 1e-5)


def self_test() -> None:
    """Runs each operator, plain, static and per row, against its twin; FailedPrecondition names the first that is wrong. About 0.1 s."""
    random = np.random.default_rng(7)
    cu = np.array([0, 1, 1, 20, 45], np.int32)
    tokens, columns, heads = int(cu[-1]), 72, 3

    def floats(*shape: int) -> twins.Floats:
        return random.standard_normal(shape).astype(np.float32)

    x, residual, qkv = floats(tokens, columns), floats(tokens, columns), floats(tokens, 3 * columns)
    row_scale, bias, wide, gamma, beta = abs(floats(tokens)) + 0.5, floats(columns), floats(3 * columns), floats(columns), floats(columns)
    rel_bias, word, position, kind = floats(heads, 9), floats(11, columns), floats(30, columns), floats(2, columns)
    ids, positions, kinds = (random.integers(0, high, tokens) for high in (11, 30, 2))
    cases: list[tuple[str, Feeds, dict[str, float], Callable[[], NDArray[np.float64]]]] = [
        (
            "PackedAttention",
            {"x": qkv, "cu": cu, "row_scale": row_scale, "bias": wide, "rel_bias": rel_bias},
            {"num_heads": heads},
            lambda: twins.packed_attention(qkv, cu, row_scale, wide, rel_bias, num_heads=heads),
        ),
        (
            "AddNorm",
            {"x": x, "row_scale": row_scale, "bias": bias, "residual": residual, "gamma": gamma, "beta": beta},
            {"epsilon": 1e-6},
            lambda: twins.add_norm(x, gamma, beta, row_scale, bias, residual, epsilon=1e-6),
        ),
        ("BiasGelu", {"x": x, "row_scale": row_scale, "bias": bias}, {}, lambda: twins.bias_gelu(x, row_scale, bias)),
        (
            "EmbedNorm",
            {"ids": ids, "positions": positions, "kinds": kinds, "w": word, "p": position, "t": kind, "gamma": gamma, "beta": beta},
            {},
            lambda: twins.embed_norm(ids, positions, kinds, word, position, kind, gamma, beta),
        ),
    ]
    mult = (abs(floats(columns)) + 0.5) * 30
    for op, feeds, attributes, twin in cases:
        expected = twin()
        expect_close(op, run_op(op, feeds, ["y"], attributes)[0], expected, 5e-6)
        leading = ["y"] if op in ("AddNorm", "EmbedNorm") else []
        quantized = {**feeds, "mult": mult}
        static = run_op(op + "Q", quantized, [*leading, "q"], {**attributes, "zero_point": 120})
        expect_quantized(op + "Q", static[len(leading) :], twins.quantize(expected, mult, 120))
        per_row = run_op(op + "Q", quantized, [*leading, "q", "out_scale"], {**attributes, "per_row": 1})
        expect_quantized(op + "Q", per_row[len(leading) :], twins.quantize(expected, mult, per_row=True))
    product: Feeds = {
        "a": random.integers(0, 256, (tokens, 90)).astype(np.uint8),
        "b": random.integers(-127, 128, (90, columns)).astype(np.int8),
        "a_scale": np.full((), 0.01, np.float32),
        "b_scale": abs(gamma),
        "a_zero": np.full((), 117, np.uint8),
    }
    expect_close("Int8Gemm", run_op("Int8Gemm", product, ["y"], {}, constants=["b"])[0], twins.int8_gemm(**product), 5e-6)
    from server.runtime import kernels_beam, kernels_decoder, kernels_products

    kernels_beam.self_test()
    kernels_decoder.self_test()
    kernels_products.self_test()
