"""The Python client against the running server, sync and aio."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.harness import Server
from tests.small_models import HIDDEN, LABELS, serve_small
from understudy import errors
from understudy.aio import AsyncClient
from understudy.client import Client, RetryPolicy

ROOT = Path(__file__).resolve().parents[3]
TEXTS = ["where is my card?", "the transfer is late", "i lost it"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve_small(tmp_path_factory.mktemp("client")) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.address) as made:
        yield made


def test_embed_gives_one_row_a_text(client: Client) -> None:
    vectors = client.embed(TEXTS)
    assert vectors.shape == (3, HIDDEN)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(client.embed([text])[0], vector, atol=1e-6)


def test_embed_each_tells_the_rest(client: Client) -> None:
    found = client.embed_each(["card", "card " * 200], truncate=True, priority="bulk")
    assert (found.model, found.version) == ("embedder", "1")
    assert found.usage.input_tokens == 3 + 64
    assert found.timings.run > 0
    assert [one.truncated for one in found] == [False, True]
    np.testing.assert_array_equal(client.embed(["card"])[0], found[0].vector)


def test_items_that_fail_raise_or_stay_in_the_results(client: Client) -> None:
    with pytest.raises(errors.ItemErrors, match="2 of 4 items failed; item 1") as caught:
        client.embed(["a", "", "b", "card " * 200])
    assert caught.value.code == "INVALID_ARGUMENT"
    assert caught.value.errors[3].reason == "INPUT_TOO_LONG"
    found = client.embed_each(["a", "", "b"], return_errors=True)
    assert list(found.errors) == [1]
    assert found.errors[1].field == "texts[1]"
    assert found[2].vector.shape == (HIDDEN,)
    with pytest.raises(errors.InvalidArgument):
        found[1]
    with pytest.raises(errors.InvalidArgument):
        list(found)


def test_the_other_tasks(client: Client) -> None:
    classified = client.classify(["lost card", ("a", "pair")], model="classifier")
    assert {label.name for label in classified[0].labels} == set(LABELS)
    assert classified[0].best == max(classified[0].labels, key=lambda label: label.score)
    assert len(client.classify(["lost card"], model="classifier", top_k=1)[0].labels) == 1
    zero = client.classify(["lost card"], model="embedder", candidate_labels=["card", "money"])
    assert {label.name for label in zero[0].labels} == {"card", "money"}
    ranked = client.rerank("lost card", TEXTS, model="ranker", return_documents=True, top_n=2)
    assert len(ranked) == 2
    assert ranked[0].score >= ranked[1].score
    assert all(one.document == TEXTS[one.index] for one in ranked)
    sentence = "Ada lived in London"
    for entity in client.extract_entities([sentence], aggregation="first")[0]:
        assert sentence[entity.start : entity.end] == entity.text
    answer = client.answer_question("who lived in london?", sentence)
    assert sentence[answer.start : answer.end] == answer.text
    assert len(client.answer_questions([("who?", sentence)], top_k=3)[0]) == 3


def test_errors_carry_reason_metadata_and_request_id(client: Client) -> None:
    with pytest.raises(errors.NotFound, match="did you mean 'embedder'") as caught:
        client.embed(["a"], model="embeder", request_id="my-id-1")
    error = caught.value
    assert (error.code, error.reason, error.request_id) == ("NOT_FOUND", "MODEL_NOT_FOUND", "my-id-1")
    assert error.metadata["model"] == "embeder"
    with pytest.raises(errors.FailedPrecondition) as wrong_task:
        client.embed(["a"], model="classifier")
    assert wrong_task.value.reason == "TASK_NOT_SUPPORTED"
    with pytest.raises(errors.InvalidArgument) as empty:
        client.embed([])
    assert empty.value.field == "texts"
    with pytest.raises(errors.NotFound) as no_skill:
        client.run("support-intent", ["hello"])
    assert no_skill.value.reason == "SKILL_NOT_FOUND"
    with pytest.raises(errors.NotFound):
        client.feedback("nothing", thumb="up")


def test_slips_of_the_caller_are_caught_before_anything_is_sent(client: Client) -> None:
    with pytest.raises(TypeError, match="put it into a list"):
        client.embed("one text")
    with pytest.raises(TypeError, match="put it into a list"):
        client.classify("one text")
    with pytest.raises(ValueError, match="'mean'"):
        client.embed(["a"], pooling="median")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'modle'"):
        client.embed(["a"], modle="x")  # type: ignore[call-arg]


def test_deadline(client: Client) -> None:
    with pytest.raises(errors.DeadlineExceeded):
        client.embed(TEXTS * 100, timeout_s=1e-4)


def test_models_and_status(client: Client) -> None:
    names = {(one.name, one.version): one for one in client.models.list()}
    assert names["adder", "1"].state == "unloaded"
    assert names["embedder", "1"].current
    assert names["embedder", "1"].hidden_size == HIDDEN
    assert ("adder", "1") not in {(one.name, one.version) for one in client.models.list(loaded_only=True)}
    assert [one.name for one in client.models.list(task="token-classification")] == ["tagger"]
    loaded = client.models.load("adder", "1")
    assert (loaded.version, loaded.state, loaded.current) == ("1", "ready", True)
    assert loaded.load_time is not None
    assert client.models.get("adder").version == "1"
    with pytest.raises(errors.FailedPrecondition) as in_use:
        client.models.delete("adder", "1")
    assert in_use.value.reason == "MODEL_IN_USE"
    assert [one.version for one in client.models.unload("adder", "1", grace_s=5)] == ["1"]
    client.models.delete("adder", "1")
    with pytest.raises(errors.NotFound):
        client.models.get("adder", "1")
    status = client.status()
    assert status.resident_bytes > 1 << 20
    assert {one.model.name for one in status.models} >= {"embedder", "tagger"}
    assert not status.draining
    assert "translation" in {skill.name for skill in client.skills.list()}
    with pytest.raises(errors.NotFound):
        client.skills.get("support-intent")


async def test_aio_gives_what_sync_gives(server: Server, client: Client) -> None:
    async with AsyncClient(server.address) as other:
        many = await asyncio.gather(*(other.embed([text]) for text in TEXTS * 20))
        np.testing.assert_allclose(np.concatenate(many[:3]), client.embed(TEXTS), atol=1e-6)
        assert (await other.classify(TEXTS, model="classifier"))[0] == client.classify(TEXTS, model="classifier")[0]
        assert list(await other.rerank("card", TEXTS)) == list(client.rerank("card", TEXTS))
        assert await other.extract_entities(["Ada"]) is not None
        assert (await other.answer_question("who?", "Ada lived")).text == client.answer_question("who?", "Ada lived").text
        assert {one.name for one in await other.models.list()} == {one.name for one in client.models.list()}
        assert (await other.models.get("tagger")).task == "token-classification"
        assert (await other.status()).server_version == client.status().server_version
        assert await other.skills.list() == client.skills.list()
        for call in (
            other.embed(["a"], model="none-such"),
            other.run("none-such", ["a"]),
            other.skills.get("x"),
            other.feedback("x", rating=1),
        ):
            with pytest.raises(errors.NotFound):
                await call
        with pytest.raises(errors.ItemErrors):
            await other.embed(["a", ""])


def test_nobody_there() -> None:
    with (
        Client("127.0.0.1:1", retry=RetryPolicy(attempts=2, initial_s=0.01)) as client,
        pytest.raises(errors.Unavailable) as caught,
    ):
        client.embed(["a"])
    assert caught.value.reason == ""


def test_the_readmes_lines_work(server: Server, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "clients" / "python" / "README.md").read_text(), re.S)
    assert len(blocks) >= 3
    for block in blocks:
        script = tmp_path / "block.py"
        script.write_text(block.replace("127.0.0.1:50051", server.address))
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
        assert done.returncode == 0, block + done.stderr
        assert done.stdout
