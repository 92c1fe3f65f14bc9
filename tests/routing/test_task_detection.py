"""Tasks are found in plain words, or abstained from; the phrases and the requests that measure them stay apart."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from bench.harness import ROOT, STARTER
from bench.measures.routing_tasks import Request, read_requests
from server.config import RuntimeConfig
from server.core import Call
from server.errors import InvalidArgument, ModelNotFound, ModelNotLoaded, TaskNotSupported
from server.routing import task_head
from server.routing.task_detection import Phrase, PhraseBook, TaskDetector, default_phrases
from server.routing.task_request import clean, parts_of
from server.runtime.loader import make_loader
from server.runtime.observer import NullObserver
from server.runtime.pull import pull
from server.runtime.repository import Repository
from server.runtime.runtime import Runtime
from tests.small_models import VOCABULARY

WORDS = sorted(word for word in VOCABULARY if word.isalpha() and len(word) > 1)
SMALL = PhraseBook.of(
    "test",
    {"translation": {"general": WORDS[:6]}, "summarization": {"general": WORDS[6:9], "news": WORDS[9:12]}},
    WORDS[12:18],
)
CALL = Call("test")


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the starter model: the checkout's own where it is there."""
    if (ROOT / "models" / STARTER).is_dir():
        return ROOT / "models"
    root = tmp_path_factory.mktemp("models")
    pull("starter", Repository(root), effort="fast")
    return root


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the fit over the starter is kept between tests."""
    return tmp_path_factory.mktemp("fits")


@pytest_asyncio.fixture
async def detector(starter: Path, kept: Path) -> AsyncIterator[TaskDetector]:
    """With the real phrases and the real embedder."""
    runtime = Runtime(Repository(starter), make_loader(RuntimeConfig(threads=2), NullObserver()))
    await runtime.load(STARTER)
    yield TaskDetector(runtime, STARTER, cache=kept)
    await runtime.close()


def words_of(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def test_the_phrases_cover_their_tasks() -> None:
    book = default_phrases()
    counts = {task: sum(phrase.task == task for phrase in book.phrases) for task in book.tasks}
    assert len(book.tasks) >= 25 and min(counts.values()) >= 12 and book.version
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", task) for task in book.tasks)
    assert sum(phrase.task == "" for phrase in book.phrases) >= 100
    assert {"sentiment", "spam", "toxicity"} <= {phrase.family for phrase in book.phrases}


def test_no_phrase_stands_for_two_tasks_or_twice() -> None:
    seen: dict[str, Phrase] = {}
    for phrase in default_phrases().phrases:
        assert phrase.text == phrase.text.strip() and phrase.text
        key = " ".join(re.findall(r"[\w<>\[\]]+|\S", phrase.text.lower()))
        assert key not in seen, (phrase, seen[key])
        seen[key] = phrase


def test_the_requests_are_enough_and_none_of_them_is_a_phrase() -> None:
    requests = read_requests()
    test = [request for request in requests if request.language == "en" and not request.dev]
    assert len(test) >= 300 and sum(request.task is None for request in test) >= 0.2 * len(test)
    assert len({request.text for request in requests}) == len(requests)
    assert {request.task for request in test} - {None} == set(default_phrases().tasks)
    assert all(sum(request.language == language for request in requests) >= 20 for language in ("fr", "es", "de"))
    clauses: dict[str, list[frozenset[str]]] = {}
    for request in requests:
        clauses.setdefault(request.task or "", []).extend(words_of(part.text) for part in parts_of(clean(request.text)))
    for phrase in default_phrases().phrases:
        words = words_of(phrase.text)
        for other in clauses.get(phrase.task, []) if words else []:
            assert len(words & other) < 0.6 * len(words | other), f"{phrase} is too near to a request that measures it: {sorted(other)}"


async def test_requests_are_understood(detector: TaskDetector) -> None:
    requests = [request for request in read_requests() if request.dev and request.language == "en"]
    found = [(request, await detector.detect(request.text, CALL)) for request in requests]
    assert sum(detection.task == request.task for request, detection in found) >= 0.92 * len(found)
    idle = [(request, detection) for request, detection in found if request.task is None]
    assert sum(detection.task is None for _, detection in idle) >= 0.85 * len(idle)
    for _, detection in found:
        scores = [candidate.score for candidate in detection.candidates]
        assert scores == sorted(scores, reverse=True) and len(scores) == 5 and all(0 <= score <= 1 for score in scores)
        assert all(candidate.phrase and candidate.similarity <= 1.001 for candidate in detection.candidates)
        if detection.task is not None:
            assert detection.candidates[0].task == detection.task and detection.candidates[0].score == detection.score
            assert Phrase(detection.phrase, detection.task, detection.parameters.aspect) in detector.book.phrases
            assert detection.margin > 0 and detection.instruction


@pytest.mark.parametrize("text", ["", "   \n\t ", "?", "…", "😀", "asdf qwer zxcv", "0" * 4000, "\x00", "\u200b", "a" * 100_000, "1,2,3,4"])
async def test_garbage_is_abstained_from_with_candidates(detector: TaskDetector, text: str) -> None:
    detection = await detector.detect(text, CALL)
    assert detection.task is None and detection.instruction == "" and detection.content == ""
    assert bool(detection.candidates) == bool(text.strip())


async def test_the_instruction_and_its_content_are_told_apart(detector: TaskDetector) -> None:
    before = await detector.detect("Translate to French: the cat sat", CALL)
    assert (before.task, before.content, before.parameters.target_language) == ("translation", "the cat sat", "fr")
    page = "The mill stands by the river and has been empty for years. " * 40
    after = await detector.detect(f"{page}\n\nGive me a summary in two sentences", CALL)
    assert (after.task, after.content, after.parameters.max_sentences) == ("summarization", page.strip(), 2)
    quoted = await detector.detect("is this review positive or negative: 'I would buy it again'", CALL)
    assert (quoted.task, quoted.content, quoted.parameters.aspect) == ("text-classification", "I would buy it again", "sentiment")


async def test_company_changes_nothing(detector: TaskDetector) -> None:
    texts = [request.text for request in read_requests()[:200:8]]
    alone = [await detector.detect(text, CALL) for text in texts]
    together = await asyncio.gather(*(detector.detect(text, CALL) for text in texts))
    assert alone == together


async def test_a_text_that_no_encoding_carries_is_refused(detector: TaskDetector) -> None:
    with pytest.raises(InvalidArgument, match="surrogate"):
        await detector.detect("translate \ud800", CALL)


async def test_an_unknown_embedder_is_named(runtime: Runtime) -> None:
    with pytest.raises(ModelNotFound, match="nothing-of-the-kind"):
        await TaskDetector(runtime, "nothing-of-the-kind", SMALL).detect("translate this", CALL)


async def test_a_model_that_embeds_nothing_is_refused_and_one_that_is_not_loaded_named(runtime: Runtime) -> None:
    detector = TaskDetector(runtime, "classifier", SMALL)
    with pytest.raises(ModelNotLoaded, match="classifier"):
        await detector.detect("translate this", CALL)
    await runtime.load("classifier")
    with pytest.raises(TaskNotSupported, match="classifier"):
        await detector.detect("translate this", CALL)


async def test_the_first_calls_share_one_fit_and_a_caller_that_leaves_does_not_stop_it(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = count_fits(monkeypatch)
    detector = TaskDetector(runtime, "embedder", SMALL)
    calls = [asyncio.ensure_future(detector.detect(text, CALL)) for text in WORDS[:8]]
    await asyncio.sleep(0)
    calls[0].cancel()
    found = await asyncio.gather(*calls[1:])
    assert len(fits) == 1 and all(detection.candidates for detection in found)
    assert [detection.task for detection in found[:5]] == ["translation"] * 5, "phrases themselves come out right"


async def test_a_fit_is_kept_for_the_next_start_and_a_broken_one_made_again(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = count_solved(monkeypatch)
    first = await TaskDetector(runtime, "embedder", SMALL, tmp_path / "fits").detect(WORDS[7], CALL)
    second = await TaskDetector(runtime, "embedder", SMALL, tmp_path / "fits").detect(WORDS[7], CALL)
    assert first == second and len(solved) == 1
    (file,) = (tmp_path / "fits").iterdir()
    for broken in (b"", b"\xff" * 100, file.read_bytes()[:-200]):
        file.write_bytes(broken)
        assert await TaskDetector(runtime, "embedder", SMALL, tmp_path / "fits").detect(WORDS[7], CALL) == first
    assert len(solved) == 4
    other = PhraseBook.of("test", {"translation": {"general": WORDS[:6]}}, WORDS[6:12])
    await TaskDetector(runtime, "embedder", other, tmp_path / "fits").warm()
    assert len(solved) == 5 and len(list((tmp_path / "fits").iterdir())) == 2


async def test_a_folder_that_cannot_be_written_costs_nothing_but_time(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert (await TaskDetector(runtime, "embedder", SMALL, tmp_path / "file").detect(WORDS[7], CALL)).candidates


def test_the_head_learns_what_it_is_shown() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((90, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    classes = np.arange(90) % 3
    texts = [f"word{i} of class {chr(97 + i % 3)}" for i in range(90)]
    head = task_head.fit(texts, vectors, classes, 3)
    near = head.cosines(vectors)
    votes = head.votes_for(texts, near)
    assert near.shape == (90, 90) and votes.argmax(axis=1).tolist() == classes.tolist()
    assert [head.nearest(near[i], int(classes[i]))[0] for i in range(90)] == list(range(90))
    unseen = head.votes_for(["class b"], head.cosines(np.zeros((1, 16), np.float32)))
    assert int(unseen[0].argmax()) == 1, "words alone tell, where the vector says nothing"
    scores = task_head.scores_of(votes[0])
    assert abs(float(scores.sum()) - 1) < 1e-5 and (scores >= 0).all()


def test_the_request_file_has_what_the_measure_reads() -> None:
    assert all(isinstance(request, Request) and request.text.strip() for request in read_requests())


def count_fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return _counted(monkeypatch, "fit")


def count_solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return _counted(monkeypatch, "_solve")


def _counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    calls: list[int] = []
    original: Callable[..., object] = getattr(task_head, name)

    def counted(*args: object) -> object:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(task_head, name, counted)
    return calls
