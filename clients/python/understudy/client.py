"""The client for programs that block. `understudy.aio` has the same for asyncio."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack

import grpc

from understudy import calls, convert, ensembles, feedback, generation, routing
from understudy.adapters import Adapters
from understudy.calls import Prepared
from understudy.connection import Tls as Tls
from understudy.connection import call_metadata, channel_options, with_request_id
from understudy.ensembles import EnsembleAnswer, EnsembleOptions
from understudy.ensembles import Member as Member
from understudy.errors import UnderstudyError, from_rpc_error
from understudy.feedback import Feedback as Feedback
from understudy.generation import Messages
from understudy.jobs import Jobs
from understudy.many import run_many
from understudy.options import (
    AnswerOptions,
    CallOptions,
    ClassifyOptions,
    EmbedOptions,
    EntityOptions,
    GenerateOptions,
    RerankOptions,
    RunOptions,
    SummarizeOptions,
    TranslateOptions,
)
from understudy.results import (
    Answer,
    Classification,
    Embedding,
    Entity,
    FloatArray,
    GeneratedTexts,
    Model,
    RankedDocument,
    Results,
    Route,
    RunAnswer,
    Skill,
    Status,
    TextResult,
)
from understudy.retry import RetryPolicy as RetryPolicy
from understudy.routing import RunReply as RunReply
from understudy.routing import RunRequest as RunRequest
from understudy.streams import TextStream

T = TypeVar("T")


class Client:
    """One connection to one server. Safe to use from several threads; `close` it, or use it in a `with` block.

    Every call raises the classes of `understudy.errors`, DeadlineExceeded after `timeout_s` seconds, all attempts together. `tls` turns
    encryption on; `api_key`, or UNDERSTUDY_API_KEY of the environment, is sent as a bearer token; `metadata` goes with every call.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        tls: Tls | None = None,
        api_key: str | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        timeout_s: float = 60.0,
        retry: RetryPolicy | None = None,
    ) -> None:
        options = channel_options(tls)
        if tls is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, tls.credentials(), options)
        self._metadata = call_metadata(api_key, metadata)
        self._timeout_s = timeout_s
        self._retry = retry or RetryPolicy()
        self._closed = threading.Event()
        self.models = Models(self)
        self.adapters = Adapters(self)
        self.skills = Skills(self)
        self.jobs = Jobs(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and the calls on it. May be called twice."""
        self._closed.set()
        self._channel.close()

    def embed(self, texts: Sequence[str], **options: Unpack[EmbedOptions]) -> FloatArray:
        """Vectors of texts as float32 [n, D], row i for texts[i]. Raises ItemErrors when one has none."""
        return convert.matrix(self.embed_each(texts, **options))

    def embed_each(self, texts: Sequence[str], **options: Unpack[EmbedOptions]) -> Results[Embedding]:
        """As `embed`, with what else is known: model, tokens, timings, truncation, and with `return_errors` each text's error.

        Vectors are read-only views of the response: copy one to keep it longer than the rest.
        """
        return self._send(calls.embed(texts, dict(options)))

    def classify(self, inputs: Sequence[str | tuple[str, str]], **options: Unpack[ClassifyOptions]) -> Results[Classification]:
        """Classes of texts, or of (text, pair) tuples, best first."""
        return self._send(calls.classify(inputs, dict(options)))

    def rerank(self, query: str, documents: Sequence[str], **options: Unpack[RerankOptions]) -> Results[RankedDocument]:
        """Documents by their relevance to the query, best first; those that failed come last."""
        return self._send(calls.rerank(query, documents, dict(options)))

    def extract_entities(self, texts: Sequence[str], **options: Unpack[EntityOptions]) -> Results[tuple[Entity, ...]]:
        """Named things in texts, in order of appearance."""
        return self._send(calls.extract_entities(texts, dict(options)))

    def answer_questions(self, pairs: Sequence[tuple[str, str]], **options: Unpack[AnswerOptions]) -> Results[tuple[Answer, ...]]:
        """Answers to (question, context) pairs, best first for each."""
        return self._send(calls.answer_questions(pairs, dict(options)))

    def answer_question(self, question: str, context: str, **options: Unpack[AnswerOptions]) -> Answer:
        """The best answer to one question."""
        return self._send(calls.answer_questions([(question, context)], dict(options)))[0][0]

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> TextStream:
        """Goes on with a prompt, or answers {"role", "content"} messages, piece by piece:

            for delta in client.generate("Once upon a time", max_tokens=50):
                print(delta.text, end="", flush=True)

        Leaving the loop ends the work. Nothing is sent before the first step of the loop.
        """
        prepared = generation.generate(prompt, messages, token_ids, dict(options))
        metadata = with_request_id(self._metadata, prepared.request_id)
        method: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(prepared.method)

        def start(timeout_s: float) -> Any:
            return method(prepared.request, timeout=timeout_s, metadata=metadata)

        timeout_s = self._timeout_s if prepared.timeout_s is None else prepared.timeout_s
        return TextStream(prepared, start, timeout_s, self._retry)

    def generate_text(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GeneratedTexts:
        """As `generate`, with the whole answers at once; takes `best_of` too."""
        return self._send(generation.generate_text(prompt, messages, token_ids, dict(options)))

    def translate(self, texts: Sequence[str], **options: Unpack[TranslateOptions]) -> Results[TextResult]:
        """Translations of texts."""
        return self._send(generation.translate(texts, dict(options)))

    def summarize(self, texts: Sequence[str], **options: Unpack[SummarizeOptions]) -> Results[TextResult]:
        """Summaries of texts."""
        return self._send(generation.summarize(texts, dict(options)))

    def run(self, skill: str = "", inputs: Sequence[convert.RunInput] = (), **options: Unpack[RunOptions]) -> Results[RunAnswer]:
        """Runs a skill on texts, (text, pair) tuples, or lists of {"role", "content"} messages.

        With `instruction` in place of a skill the task is found from plain words; without inputs they are the whole request.
        """
        return self._send(routing.run(skill, inputs, dict(options)))

    def run_many(self, requests: Iterable[RunRequest], **options: Unpack[CallOptions]) -> Iterator[RunReply]:
        """Runs requests as they come, and gives replies as they are ready, in any order:

            for reply in client.run_many(RunRequest(str(n), [text], "support-intent") for n, text in enumerate(texts)):
                print(reply.id, reply.answers[0].text)

        The server takes so many at a time; nothing is sent again. Leaving the loop ends the call. `timeout_s`: of the whole stream;
        without it there is none.
        """
        metadata = with_request_id(self._metadata, options.get("request_id", ""))
        method: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(routing.RUN_MANY)
        return run_many(requests, lambda messages: method(messages, timeout=options.get("timeout_s"), metadata=metadata))

    def explain_route(self, skill: str = "", inputs: Sequence[convert.RunInput] = (), **options: Unpack[RunOptions]) -> Results[Route]:
        """How each input would be routed, and why, without asking anybody. Takes what `run` takes."""
        return self._send(routing.explain(skill, inputs, dict(options)))

    def ensemble(
        self, skill: str, given: convert.RunInput, members: Sequence[str | Member], **options: Unpack[EnsembleOptions]
    ) -> EnsembleAnswer:
        """Runs a skill on one input by several members, "local:<model>" or "<provider>/<model>", whose answers become one."""
        return self._send(ensembles.run(skill, given, members, dict(options)))

    def feedback(
        self,
        interaction_id: str,
        *,
        rating: int | None = None,
        thumb: Literal["up", "down"] | None = None,
        correction: str | None = None,
        comment: str = "",
        metrics: Mapping[str, float] | None = None,
        user: str = "",
        **options: Unpack[CallOptions],
    ) -> str:
        """Says something of an answer; returns the feedback's id. `rating` is 1 to 5, `metrics` are measurements of your own."""
        said = Feedback(interaction_id, rating, thumb, correction, comment, metrics or {}, user)
        return self._send(feedback.create(said, dict(options)))

    def feedback_many(self, said: Iterable[Feedback], **options: Unpack[CallOptions]) -> list[str]:
        """Says something of many answers, in calls of 1,000; returns the feedback's ids. Each call is kept as a whole or not at all."""
        found: list[str] = []
        for part in feedback.in_parts(said):
            kept = self._send(feedback.create_many(part, dict(options)))
            found += kept
        return found

    def list_feedback(self, interaction_id: str, **options: Unpack[CallOptions]) -> list[Feedback]:
        """What was said of an answer, oldest first; what came in the last seconds may be missing."""
        found: list[Feedback] = []
        token = ""
        while True:
            page = self._send(feedback.list_page(interaction_id, token, dict(options)))
            found += page.items
            token = page.next_token
            if not token:
                return found

    def status(self, **options: Unpack[CallOptions]) -> Status:
        """How the server is doing."""
        return self._send(calls.status(dict(options)))

    def _send(self, prepared: Prepared[T]) -> T:
        end = time.monotonic() + (self._timeout_s if prepared.timeout_s is None else prepared.timeout_s)
        metadata = with_request_id(self._metadata, prepared.request_id)
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(prepared.method)
        attempt = 0
        while True:
            attempt += 1
            try:
                data: bytes = method(prepared.request, timeout=max(0.0, end - time.monotonic()), metadata=metadata)
            except grpc.RpcError as raised:
                error: UnderstudyError = from_rpc_error(raised)
            else:
                return prepared.read(data)
            delay = None if prepared.final(error) else self._retry.delay(error, attempt, end - time.monotonic())
            if delay is None or self._closed.wait(delay):
                raise error


class Models:
    """The server's local models."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, *, task: str = "", loaded_only: bool = False, **options: Unpack[CallOptions]) -> list[Model]:
        """All versions in the repository, by name and version."""
        found: list[Model] = []
        token = ""
        while True:
            page = self._client._send(calls.list_models(task, loaded_only, token, dict(options)))
            found += page.items
            token = page.next_token
            if not token:
                return found

    def get(self, name: str, version: str = "", **options: Unpack[CallOptions]) -> Model:
        """One version; the current one without `version`."""
        return self._client._send(calls.get_model(name, version, dict(options)))

    def load(self, name: str, version: str = "", *, replace: bool = False, **options: Unpack[CallOptions]) -> Model:
        """Verifies and loads a version (the newest without `version`) and makes it current; `replace` then unloads the others."""
        return self._client._send(calls.load_model(name, version, replace, dict(options)))

    def unload(self, name: str, version: str = "", *, grace_s: float | None = None, **options: Unpack[CallOptions]) -> Sequence[Model]:
        """Lets a version (all without `version`) finish what it has accepted and frees its memory."""
        return self._client._send(calls.unload_model(name, version, grace_s, dict(options)))

    def delete(self, name: str, version: str, **options: Unpack[CallOptions]) -> None:
        """Deletes a version that is not loaded."""
        self._client._send(calls.delete_model(name, version, dict(options)))


class Skills:
    """The skills that can be run."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, **options: Unpack[CallOptions]) -> list[Skill]:
        """All skills by name."""
        found: list[Skill] = []
        token = ""
        while True:
            page = self._client._send(calls.list_skills(token, dict(options)))
            found += page.items
            token = page.next_token
            if not token:
                return found

    def get(self, name: str, **options: Unpack[CallOptions]) -> Skill:
        """One skill."""
        return self._client._send(calls.get_skill(name, dict(options)))


__all__ = ["Client", "Feedback", "Member", "RetryPolicy", "RunReply", "RunRequest", "Tls"]
