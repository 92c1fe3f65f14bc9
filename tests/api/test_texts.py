"""Translate and Summarize through the real server: a tiny T5, exported for each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.core import Task
from server.runtime.repository import Repository
from tests.seq2seq_models import build
from tests.server_process import ServerProcess
from trainer.export.seq2seq import export_seq2seq
from understudy import errors
from understudy.client import Client

TEXTS = ["Where is my card?", "The dog plays in the park. It rains.", "No"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("texts")
    build("t5", root / "t5")
    repository = Repository(root / "models")
    for task in (Task.TRANSLATION, Task.SUMMARIZATION):
        out = root / task.value
        export_seq2seq(root / "t5", out, task)
        fields = json.loads((out / "manifest.json").read_text())
        with repository.staging() as staged:
            for path in out.iterdir():
                if path.name != "manifest.json":
                    shutil.copyfile(path, staged / path.name)
            repository.publish(staged, f"t5-{task.value}", fields)
    running = ServerProcess(root / "server", models=Path(repository.root))
    running.wait_ready()
    yield running
    running.stop(allow_errors=True)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as one:
        yield one


def test_translations(client: Client) -> None:
    together = client.translate(TEXTS, source_language="en", target_language="de", max_tokens=12)
    assert (together.model, together.version) == ("t5-translation", "1")
    assert together.usage.input_tokens > 0 < together.usage.output_tokens
    alone = [client.translate([text], source_language="en", target_language="de", max_tokens=12)[0] for text in TEXTS]
    assert [one.text for one in together] == [one.text for one in alone]
    french = client.translate(TEXTS, source_language="en", target_language="fr", max_tokens=12)
    assert [one.text for one in french] != [one.text for one in together]


def test_summaries(client: Client) -> None:
    one = client.summarize(TEXTS, num_beams=2, max_tokens=8, length_penalty=0.5, no_repeat_ngram_size=2)
    assert len(one) == len(TEXTS)
    assert all(item.score <= 0 for item in one)


def test_refusals_name_the_field(client: Client) -> None:
    with pytest.raises(errors.InvalidArgument, match="de") as language:
        client.translate(TEXTS, source_language="en", target_language="xx")
    assert language.value.field == "target_language"
    for options, field in (
        ({"num_beams": 17}, "search.num_beams"),
        ({"max_tokens": -1}, "search.max_tokens"),
        ({"no_repeat_ngram_size": -1}, "search.no_repeat_ngram_size"),
        ({"length_penalty": float("nan")}, "search.length_penalty"),
    ):
        with pytest.raises(errors.InvalidArgument) as caught:
            client.summarize(TEXTS, **options)  # type: ignore[arg-type]
        assert caught.value.field == field
    with pytest.raises(errors.InvalidArgument) as empty:
        client.summarize([])
    assert empty.value.field == "texts"
    with pytest.raises(errors.ItemErrors) as items:
        client.summarize(["fine", " "])
    assert items.value.errors[1].field == "texts[1]"
    with pytest.raises(errors.FailedPrecondition):
        client.embed(["a"], model="t5-summarization")
    with pytest.raises(errors.FailedPrecondition):
        client.translate(["a"], model="t5-summarization")
    with pytest.raises(errors.FailedPrecondition):
        client.generate_text("a", model="t5-summarization")
