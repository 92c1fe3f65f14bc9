"""Text generation through Triton's own client, by the conventions of its vLLM backend. Run by test_generate_open_inference.py."""

from __future__ import annotations

import json
import os
import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

NAME = "scripted"
TOLD = " me a story about Greta."
GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture
def triton() -> Iterator[Any]:
    with grpcclient.InferenceServerClient(os.environ["UNDERSTUDY_TEST_ADDRESS"]) as client:
        yield client


def text(value: str) -> Any:
    return np.array([value.encode()], np.object_)


def inputs(prompt: str, parameters: dict[str, Any] | None = None, **flags: bool) -> list[Any]:
    found = []
    values: dict[str, Any] = {"text_input": text(prompt)}
    if parameters is not None:
        values["sampling_parameters"] = text(json.dumps(parameters))
    values |= {name: np.array([value]) for name, value in flags.items()}
    for name, value in values.items():
        one = grpcclient.InferInput(name, [1], "BOOL" if value.dtype == bool else "BYTES")
        one.set_data_from_numpy(value)
        found.append(one)
    return found


def texts(result: Any, name: str = "text_output") -> list[str]:
    return [one.decode() for one in result.as_numpy(name)]


def test_one_response(triton: Any) -> None:
    result = triton.infer(NAME, inputs("tell", GREEDY, exclude_input_in_output=True))
    assert texts(result) == [TOLD]
    assert texts(triton.infer(NAME, inputs("tell", GREEDY))) == ["tell" + TOLD]
    more = inputs("tell", {**GREEDY, "n": 2}, return_finish_reason=True, return_num_input_tokens=True, return_num_output_tokens=True)
    result = triton.infer(NAME, more)
    assert texts(result, "finish_reason") == ["length", "length"]
    assert result.as_numpy("num_output_tokens").tolist() == [8, 8]
    assert result.as_numpy("num_input_tokens").tolist() == [2, 2]
    default = triton.infer(NAME, inputs("tell", None, return_num_output_tokens=True))
    assert default.as_numpy("num_output_tokens").tolist() == [16]


def stream(triton: Any, requests: list[list[Any]], final: bool = False) -> list[tuple[Any, Any]]:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    triton.start_stream(lambda result, error: answers.put((result, error)))
    for index, one in enumerate(requests):
        triton.async_stream_infer(NAME, one, request_id=str(index), enable_empty_final_response=final)
    triton.stop_stream()
    return [answers.get_nowait() for _ in range(answers.qsize())]


def test_streams_give_pieces(triton: Any) -> None:
    asked = [inputs("tell", {**GREEDY, "max_tokens": 40}, stream=True), inputs("tell", GREEDY, stream=True)]
    found = stream(triton, asked, final=True)
    said = {"0": "", "1": ""}
    finals: dict[str, int] = {}
    for result, error in found:
        assert error is None
        response = result.get_response()
        last = response.parameters["triton_final_response"].bool_param if "triton_final_response" in response.parameters else False
        finals[response.id] = finals.get(response.id, 0) + last
        if not last:
            said[response.id] += texts(result)[0]
    assert said["1"] == TOLD
    assert said["0"].startswith(TOLD + "tell" + TOLD)
    assert finals == {"0": 1, "1": 1}


def test_errors_of_one_request_leave_the_stream_open(triton: Any) -> None:
    found = stream(triton, [inputs("tell", {"top_p": 3}, stream=True), inputs("tell", GREEDY, stream=True)])
    errors = [str(error) for _, error in found if error is not None]
    assert len(errors) == 1
    assert "sampling.top_p" in errors[0]
    assert "".join(texts(result)[0] for result, error in found if error is None) == TOLD


def test_refusals(triton: Any) -> None:
    for bad, says in (
        (inputs("tell", GREEDY, stream=True), "ModelStreamInfer"),
        (inputs("tell", {"temprature": 1}), "temprature"),
        (inputs("tell", {"max_tokens": "many"}), "max_tokens"),
        (inputs("tell")[:0], "text_input"),
    ):
        with pytest.raises(InferenceServerException, match=says):
            triton.infer(NAME, bad)


def test_the_model_shows_its_text_form(triton: Any) -> None:
    found = triton.get_model_metadata(NAME)
    assert {("text_input", "BYTES"), ("stream", "BOOL"), ("sampling_parameters", "BYTES")} <= {
        (one.name, one.datatype) for one in found.inputs
    }
    assert "text_output" in {one.name for one in found.outputs}
    assert triton.get_model_config(NAME).config.model_transaction_policy.decoupled
