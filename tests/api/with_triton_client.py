"""The server through the real client of the Open Inference Protocol. Run by test_open_inference.py in a process of its own:

two descriptions of one protobuf package cannot live in one process. UNDERSTUDY_TEST_ADDRESS names the server.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import uuid
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as pb_grpc
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

ADDRESS = os.environ["UNDERSTUDY_TEST_ADDRESS"]
NUMBERS = ["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64"]


@pytest.fixture(scope="module")
def client() -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(ADDRESS) as found:
        yield found


@pytest.fixture(scope="module")
def stub() -> Iterator[pb_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(ADDRESS) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)


def tensor(name: str, array: np.ndarray, datatype: str = "FP32") -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def adder(x: np.ndarray, y: np.ndarray) -> list[triton.InferInput]:
    return [tensor("x", x), tensor("y", y)]


def text(name: str, *values: str) -> triton.InferInput:
    return tensor(name, np.array([value.encode() for value in values], np.object_), "BYTES")


def refused(code: str, says: str, call, *args, **kwargs) -> None:
    with pytest.raises(InferenceServerException, match=says) as caught:
        call(*args, **kwargs)
    assert caught.value.status() == f"StatusCode.{code}", caught.value


ONES = np.ones((2, 3), np.float32)


def test_health(client) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("adder")
    assert client.is_model_ready("adder", "2")
    assert not client.is_model_ready("adder", "99")
    assert not client.is_model_ready("nothing")


def test_server_metadata(client) -> None:
    found = client.get_server_metadata()
    assert found.name == "understudy"
    assert "binary_tensor_data" in found.extensions


def test_metadata_names_the_graphs_tensors_and_the_text_form(client) -> None:
    found = client.get_model_metadata("embedder", as_json=True)
    inputs = {t["name"]: (t["datatype"], t["shape"]) for t in found["inputs"]}
    assert inputs["text"] == ("BYTES", ["-1"])
    assert inputs["input_ids"][0] == "INT64"
    assert {t["name"]: t["shape"] for t in found["outputs"]}["embedding"] == ["-1", "32"]
    assert found["versions"] == ["1"]
    raw = client.get_model_metadata("types")
    assert {t.name[3:]: t.datatype for t in raw.inputs} == {name: name for name in [*NUMBERS, "BYTES"]}


def test_config(client) -> None:
    config = client.get_model_config("adder").config
    assert config.max_batch_size > 1
    assert [list(t.dims) for t in config.input] == [[3], [3]]
    assert config.HasField("dynamic_batching")
    fixed = client.get_model_config("fixed").config
    assert fixed.max_batch_size == 0
    assert [list(t.dims) for t in fixed.input] == [[2, 2]]
    assert client.get_model_config("classifier").config.parameters["task"].string_value == "text-classification"


def test_infer_echoes_the_id_and_names_the_version(client) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    result = client.infer("adder", adder(x, ONES), request_id="order-7", priority=1, timeout=5_000_000)
    np.testing.assert_array_equal(result.as_numpy("sum"), x + 1)
    np.testing.assert_array_equal(result.as_numpy("product"), x)
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("order-7", "adder", "2")


def test_outputs_come_as_asked(client) -> None:
    result = client.infer("adder", adder(ONES, ONES), outputs=[triton.InferRequestedOutput("product")])
    assert [output.name for output in result.get_response().outputs] == ["product"]
    best = client.infer(
        "adder", adder(np.array([[1, 3, 2]], np.float32), ONES[:1]), outputs=[triton.InferRequestedOutput("sum", class_count=2)]
    )
    assert best.as_numpy("sum").tolist() == [[b"4.000000:1", b"3.000000:2"]]


def random_array(datatype: str, rows: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(len(datatype))
    dtype = np.dtype(triton_to_np_dtype(datatype))
    if dtype.kind == "b":
        return rng.random((rows, width)) < 0.5
    if dtype.kind == "f":
        return rng.standard_normal((rows, width)).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, (rows, width), dtype, endpoint=True)


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_every_datatype_comes_back_unchanged(client, rows: int) -> None:
    arrays = {name: random_array(name, rows, 3) for name in NUMBERS}
    words = [b"", "naïve ∂".encode(), b"x" * 500]
    arrays["BYTES"] = np.array([words] * rows, np.object_).reshape(rows, 3)
    result = client.infer("types", [tensor(f"in_{name}", array, name) for name, array in arrays.items()])
    for name, array in arrays.items():
        np.testing.assert_array_equal(result.as_numpy(f"out_{name}"), array, err_msg=name)


def test_nan_and_infinity_are_data(client) -> None:
    x = np.array([[np.nan, np.inf, -np.inf]], np.float32)
    np.testing.assert_array_equal(client.infer("adder", adder(x, np.zeros_like(x))).as_numpy("sum"), x)


def typed(name: str, datatype: str, shape: list[int], **contents) -> pb.ModelInferRequest.InferInputTensor:
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape, contents=pb.InferTensorContents(**contents))


def test_typed_contents(stub) -> None:
    values = {
        "BOOL": {"bool_contents": [True, False]},
        "UINT8": {"uint_contents": [0, 255]},
        "UINT16": {"uint_contents": [0, 65535]},
        "UINT32": {"uint_contents": [0, 2**32 - 1]},
        "UINT64": {"uint64_contents": [0, 2**64 - 1]},
        "INT8": {"int_contents": [-128, 127]},
        "INT16": {"int_contents": [-32768, 32767]},
        "INT32": {"int_contents": [-(2**31), 2**31 - 1]},
        "INT64": {"int64_contents": [-(2**63), 2**63 - 1]},
        "FP32": {"fp32_contents": [1.5, -2.0]},
        "FP64": {"fp64_contents": [1e300, -1e-300]},
        "BYTES": {"bytes_contents": [b"a", b""]},
    }
    request = pb.ModelInferRequest(model_name="types", inputs=[typed(f"in_{t}", t, [2, 1], **c) for t, c in values.items()])
    with pytest.raises(grpc.RpcError, match="in_FP16"):  # it has no typed contents, and is missing
        stub.ModelInfer(request, timeout=10)
    request = pb.ModelInferRequest(
        model_name="adder",
        inputs=[typed("x", "FP32", [1, 3], fp32_contents=[1, 2, 3]), typed("y", "FP32", [1, 3], fp32_contents=[1, 1, 1])],
    )
    response = stub.ModelInfer(request, timeout=10)
    assert np.frombuffer(response.raw_output_contents[0], np.float32).tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (typed("x", "FP32", [1, 3], fp64_contents=[1, 2, 3]), "fp32_contents"),
        (typed("x", "FP32", [1, 3], fp32_contents=[1, 2]), "2 elements"),
        (typed("x", "FP16", [1, 3], fp32_contents=[1, 2, 3]), "raw_input_contents"),
        (typed("x", "INT8", [1, 3], int_contents=[1, 200, 3]), "outside of INT8"),
        (typed("x", "BF16", [1, 3], fp32_contents=[1, 2, 3]), "convert it to FP32"),
        (typed("x", "FP31", [1, 3], fp32_contents=[1, 2, 3]), "FP32"),
        (typed("x", "FP32", [-1, 3], fp32_contents=[]), "axes have 0"),
        (typed("x", "FP32", [2**62, 4], fp32_contents=[1]), "axes have 0"),
        (typed("x", "FP32", [2**30, 2**30], fp32_contents=[1]), "more than"),
        (typed("x", "FP32", [0, 2**30, 2**30], fp32_contents=[]), "more than"),
        (typed("x", "FP32", [1] * 40, fp32_contents=[1]), "40 axes"),
        (typed("z", "FP32", [1, 3], fp32_contents=[1, 2, 3]), "z"),
        (typed("y", "FP32", [1, 3], fp32_contents=[1, 2, 3]), "given twice"),
        (typed("x", "FP32", [1, 4], fp32_contents=[1, 2, 3, 4]), "x"),
        (typed("x", "FP32", [3], fp32_contents=[1, 2, 3]), "x"),
        (typed("x", "FP64", [1, 3], fp64_contents=[1, 2, 3]), "x"),
        (typed("x", "FP32", [2, 3], fp32_contents=[1, 2, 3, 4, 5, 6]), "first axis"),
    ],
)
def test_tensors_that_do_not_fit_are_invalid(stub, wrong: pb.ModelInferRequest.InferInputTensor, says: str) -> None:
    request = pb.ModelInferRequest(model_name="adder", inputs=[wrong, typed("y", "FP32", [1, 3], fp32_contents=[1, 1, 1])])
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert says in caught.value.details()


def test_raw_bytes_that_do_not_fit_are_invalid(stub) -> None:
    names = [pb.ModelInferRequest.InferInputTensor(name=name, datatype="FP32", shape=[1, 3]) for name in ("x", "y")]
    for raw, says in [
        ([b"\0" * 12], "1 entries"),
        ([b"\0" * 12, b"\0" * 11], "11 raw bytes"),
        ([b"\0" * 12] * 3, "3 entries"),
        ([], "contents"),
    ]:
        with pytest.raises(grpc.RpcError, match=says) as caught:
            stub.ModelInfer(pb.ModelInferRequest(model_name="adder", inputs=names, raw_input_contents=raw), timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    word = pb.ModelInferRequest.InferInputTensor(name="text", datatype="BYTES", shape=[2])
    for raw_text in (b"", b"\x01\0\0\0a", b"\xff\xff\xff\xffa", b"\x01\0\0\0a\x01\0\0\0b?"):
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(pb.ModelInferRequest(model_name="embedder", inputs=[word], raw_input_contents=[raw_text]), timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_large_raw_contents_are_read_where_they_lie(client) -> None:
    x = np.random.default_rng(0).standard_normal((200_000, 3)).astype(np.float32)
    np.testing.assert_array_equal(client.infer("adder", adder(x, x)).as_numpy("sum"), x + x)


def test_text_becomes_vectors(client) -> None:
    texts = ["where is my card?", "the transfer is late", "a"]
    together = client.infer("embedder", [text("text", *texts)]).as_numpy("embedding")
    assert together.shape == (3, 32)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for i, one in enumerate(texts):
        column = tensor("text", np.array([[one.encode()]], np.object_), "BYTES")
        np.testing.assert_allclose(client.infer("embedder", [column]).as_numpy("embedding")[0], together[i], atol=1e-6)


def test_the_encoders_graph_is_reachable_as_raw_tensors(client) -> None:
    ids = np.array([2, 5, 6, 3], np.int64)
    inputs = [
        tensor("input_ids", ids, "INT64"),
        tensor("position_ids", np.arange(4), "INT64"),
        tensor("token_type_ids", np.zeros(4, np.int64), "INT64"),
        tensor("cu_seqlens", np.array([0, 4], np.int32), "INT32"),
    ]
    assert client.infer("embedder", inputs).as_numpy("hidden").shape == (4, 32)


def test_each_task_answers_text(client) -> None:
    classified = client.infer("classifier", [text("text", "my card is lost", "transfer")])
    scores, labels = classified.as_numpy("scores"), classified.as_numpy("labels")
    assert scores.shape == labels.shape == (2, 3)
    assert (np.diff(scores, axis=1) <= 0).all()
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)
    assert set(labels[0]) == {b"card", b"transfer", b"password"}
    ranked = client.infer("ranker", [text("query", "lost card"), text("text", "where is my card?", "money")]).as_numpy("scores")
    assert ranked.shape == (2,)
    tagged = client.infer("tagger", [text("text", "Ada lived in London")]).as_numpy("entities")
    for entity in json.loads(tagged[0]):
        assert "Ada lived in London"[entity["start"] : entity["end"]] == entity["text"]
    read = client.infer("reader", [text("question", "who lived in london?"), text("context", "Ada lived in London")])
    start, end = read.as_numpy("start")[0], read.as_numpy("end")[0]
    assert "Ada lived in London"[start:end].encode() == read.as_numpy("answer")[0]


def test_long_text_is_refused_unless_truncation_is_asked_for(client) -> None:
    long = "card " * 200
    refused("INVALID_ARGUMENT", "64", client.infer, "embedder", [text("text", long)])
    assert client.infer("embedder", [text("text", long)], parameters={"truncate": True}).as_numpy("embedding").shape == (1, 32)


def test_errors_name_what_is_wrong(client) -> None:
    refused("NOT_FOUND", "did you mean 'adder'", client.infer, "addr", adder(ONES, ONES))
    refused("NOT_FOUND", "no version 9", client.infer, "adder", adder(ONES, ONES), "9")
    refused("FAILED_PRECONDITION", "not loaded", client.infer, "adder", adder(ONES, ONES), "1")
    refused("INVALID_ARGUMENT", "'y'", client.infer, "adder", adder(ONES, ONES)[:1])
    refused("INVALID_ARGUMENT", "sum, product", client.infer, "adder", adder(ONES, ONES), outputs=[triton.InferRequestedOutput("total")])
    refused("INVALID_ARGUMENT", "sequence", client.infer, "adder", adder(ONES, ONES), sequence_id=4)
    refused("INVALID_ARGUMENT", "priority", client.infer, "adder", adder(ONES, ONES), priority=9)
    refused("INVALID_ARGUMENT", "colour", client.infer, "adder", adder(ONES, ONES), parameters={"colour": "red"})
    refused("INVALID_ARGUMENT", "model name", client.infer, "../adder", adder(ONES, ONES))
    refused("INVALID_ARGUMENT", "alone", client.infer, "embedder", [text("text", "a"), tensor("input_ids", np.zeros(1, np.int64), "INT64")])
    refused("INVALID_ARGUMENT", "UTF-8", client.infer, "embedder", [tensor("text", np.array([b"\xff"], np.object_), "BYTES")])
    shared = triton.InferInput("x", [2, 3], "FP32")
    shared.set_shared_memory("region", 24)
    refused("UNIMPLEMENTED", "shared memory", client.infer, "adder", [shared, tensor("y", ONES)])


def test_what_is_left_out_says_so(client) -> None:
    for call in (
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        client.get_trace_settings,
        client.get_log_settings,
        client.unregister_system_shared_memory,
    ):
        refused("UNIMPLEMENTED", "not offered", call)


def test_a_deadline_that_passed_is_named(client) -> None:
    refused("DEADLINE_EXCEEDED", "deadline", client.infer, "adder", adder(ONES, ONES), timeout=1)


def test_ids_out_of_range_harm_nobody(client) -> None:
    good = np.array([1, 9], np.int64)
    pending = []
    for _ in range(20):
        for ids in (good, np.array([10_000_000], np.int64)):
            done: queue.Queue = queue.Queue()
            client.async_infer("lookup", [tensor("ids", ids, "INT64")], lambda result, error, done=done: done.put((result, error)))
            pending.append((ids is good, done))
    for is_good, done in pending:
        result, error = done.get(timeout=20)
        if is_good:
            assert error is None, error
            np.testing.assert_array_equal(result.as_numpy("rows")[:, 0], [4, 36])
        else:
            assert error.status() == "StatusCode.INVALID_ARGUMENT", error


def test_hostile_sequence_tables_do_not_reach_memory(client) -> None:
    ids = np.array([2, 5, 6, 3], np.int64)
    for table in ([0, 400], [-7, 4], [4, 0], [0, 2**31 - 1], [3], []):
        for position in (np.arange(4), np.full(4, 10**6), np.full(4, -(10**6))):
            inputs = [
                tensor("input_ids", ids, "INT64"),
                tensor("position_ids", position.astype(np.int64), "INT64"),
                tensor("token_type_ids", np.zeros(4, np.int64), "INT64"),
                tensor("cu_seqlens", np.array(table, np.int32), "INT32"),
            ]
            try:
                client.infer("embedder", inputs)
            except InferenceServerException as error:
                assert error.status() == "StatusCode.INVALID_ARGUMENT", error
            assert client.is_server_live()
    assert client.infer("embedder", [text("text", "a card")]).as_numpy("embedding").shape == (1, 32)


def test_async_infer(client) -> None:
    done: queue.Queue = queue.Queue()
    for i in range(50):
        client.async_infer("adder", adder(ONES * i, ONES), lambda result, error: done.put((result, error)), request_id=str(i))
    for _ in range(50):
        result, error = done.get(timeout=20)
        assert error is None
        np.testing.assert_array_equal(result.as_numpy("sum"), ONES * int(result.get_response().id) + 1)


def test_stream_keeps_order_and_survives_errors(client) -> None:
    done: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: done.put((result, error)))
    try:
        for i in range(100):
            client.async_stream_infer(
                "nothing" if i % 10 == 3 else "adder", adder(ONES * i, ONES), request_id=str(i), enable_empty_final_response=True
            )
        for i in range(100):
            result, error = done.get(timeout=20)
            if i % 10 == 3:
                assert "MODEL_NOT_FOUND" in str(error)
            else:
                response = result.get_response()
                assert response.id == str(i)
                assert response.parameters["triton_final_response"].bool_param
                np.testing.assert_array_equal(result.as_numpy("sum"), ONES * i + 1)
    finally:
        client.stop_stream()


def test_statistics_count(client) -> None:
    before = client.get_inference_statistics("lookup", as_json=True)["model_stats"][0]
    client.infer("lookup", [tensor("ids", np.array([1, 2, 3], np.int64), "INT64")])
    after = client.get_inference_statistics("lookup", as_json=True)["model_stats"][0]
    assert int(after["inference_count"]) - int(before.get("inference_count", 0)) == 3
    assert int(after["inference_stats"]["success"]["count"]) - int(before["inference_stats"]["success"].get("count", 0)) == 1
    assert int(after["inference_stats"]["compute_infer"]["ns"]) > 0
    assert {one["name"] for one in client.get_inference_statistics(as_json=True)["model_stats"]} >= {"adder", "lookup"}


def test_repository(client) -> None:
    def index() -> dict[tuple[str, str], str]:
        return {(one.name, one.version): one.state for one in client.get_model_repository_index().models}

    assert index()["adder", "2"] == "READY"
    assert index()["adder", "1"] == "UNAVAILABLE"
    client.unload_model("fixed")
    assert index()["fixed", "1"] == "UNAVAILABLE"
    assert not client.is_model_ready("fixed")
    refused("FAILED_PRECONDITION", "not loaded", client.infer, "fixed", [tensor("x", np.eye(2, dtype=np.float32))])
    client.load_model("fixed")
    x = np.array([[1, 2], [3, 4]], np.float32)
    np.testing.assert_array_equal(client.infer("fixed", [tensor("x", x)]).as_numpy("y"), x.T)
    refused("NOT_FOUND", "nothing", client.load_model, "nothing")
    refused("INVALID_ARGUMENT", "config", client.load_model, "adder", config='{"max_batch_size": 8}')
    refused("INVALID_ARGUMENT", "model name", client.load_model, "../../etc")


async def test_aio() -> None:
    async with triton_aio.InferenceServerClient(ADDRESS) as client:
        assert await client.is_server_ready()
        assert (await client.get_model_metadata("adder")).platform == "onnxruntime_onnx"
        found = await asyncio.gather(*(client.infer("adder", adder(ONES * i, ONES)) for i in range(100)))
        for i, result in enumerate(found):
            np.testing.assert_array_equal(result.as_numpy("sum"), ONES * i + 1)

        async def requests():
            for i in range(30):
                yield {"model_name": "embedder", "inputs": [text("text", f"card {i}")], "request_id": str(i)}

        seen = []
        async for result, error in client.stream_infer(requests()):
            assert error is None
            seen.append(result.get_response().id)
        assert seen == [str(i) for i in range(30)]
        with pytest.raises(InferenceServerException, match="NOT_FOUND"):
            await client.infer(f"no-{uuid.uuid4().hex}", adder(ONES, ONES))
