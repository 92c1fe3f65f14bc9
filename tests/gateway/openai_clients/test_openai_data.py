"""Completions, embeddings, models and reranking: by OpenAI's Python SDK where it has them."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests import generation_models as scripted
from understudy.client import Client

TOLD = "".join(scripted.STORY[1:])


def test_completions(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "scripted", "prompt": "tell", "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(**asked)
    assert (whole.object, whole.choices[0].text, whole.choices[0].finish_reason) == ("text_completion", TOLD, "length")
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **asked)) == TOLD
    assert client.completions.create(echo=True, **asked).choices[0].text == "tell" + TOLD
    assert "".join(c.choices[0].text for c in client.completions.create(stream=True, echo=True, **asked)) == "tell" + TOLD
    unbounded = client.completions.create(model="scripted", prompt="tell", temperature=0)
    assert unbounded.usage is not None and unbounded.usage.completion_tokens == 16  # OpenAI's default


def test_completions_of_several_prompts(client: openai.OpenAI) -> None:
    ids = scripted.make_tokenizer().encode("tell").ids
    asked: dict[str, Any] = {"model": "scripted", "max_tokens": 4, "temperature": 2.0, "n": 2, "seed": 1}
    whole = client.completions.create(prompt=["tell", "where is my card"], **asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    parts = ["", "", "", ""]
    for chunk in client.completions.create(prompt=["tell", "where is my card"], stream=True, **asked):
        for choice in chunk.choices:
            parts[choice.index] += choice.text
    assert parts == [choice.text for choice in whole.choices]
    assert whole.usage is not None and whole.usage.completion_tokens == 16
    by_ids = client.completions.create(prompt=[ids, ids], model="scripted", temperature=0, max_tokens=8)
    assert [choice.text for choice in by_ids.choices] == [TOLD, TOLD]


def test_completions_log_probabilities_and_best_of(client: openai.OpenAI) -> None:
    found = client.completions.create(model="scripted", prompt="tell", temperature=0, max_tokens=4, logprobs=2).choices[0]
    assert found.logprobs is not None and found.logprobs.tokens == scripted.STORY[1:5]
    assert found.logprobs.text_offset == [0, 3, 5, 9] and all(len(top) == 2 for top in found.logprobs.top_logprobs or ())
    best = client.completions.create(model="scripted", prompt="tell", temperature=2.0, max_tokens=4, best_of=4, seed=5)
    assert len(best.choices) == 1 and best.usage is not None and best.usage.completion_tokens == 16


def test_completions_of_skills(client: openai.OpenAI) -> None:
    assert client.completions.create(model="writer", prompt="hello").choices[0].text == "echo hello"
    assert client.completions.create(model="sorter", prompt="my card is lost").choices[0].text in ("card", "transfer", "password")


def test_embeddings_are_the_servers_own(client: openai.OpenAI, site: Any) -> None:
    texts = ["where is my card ?", "password reset"]
    with Client(site.server.address) as direct:
        wanted = direct.embed(texts, model="embedder")
    as_base64 = client.embeddings.create(model="embedder", input=texts)  # what the SDK asks for by itself
    as_floats = client.embeddings.create(model="embedder", input=texts, encoding_format="float")
    for found in (as_base64, as_floats):
        assert [one.index for one in found.data] == [0, 1]
        np.testing.assert_array_equal(np.array([one.embedding for one in found.data], np.float32), wanted)
        assert found.usage.prompt_tokens == found.usage.total_tokens > 0
    again = client.embeddings.create(model="local:embedder", input=texts[0]).data[0].embedding
    np.testing.assert_array_equal(np.array(again, np.float32), wanted[0])


def test_embeddings_on_the_wire(http: httpx.Client) -> None:
    body = {"model": "embedder", "input": "a card"}
    plain = http.post("/embeddings", json=body).json()["data"][0]["embedding"]
    packed = http.post("/embeddings", json={**body, "encoding_format": "base64"}).json()["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), np.array(plain, np.float32))
    whole = http.post("/embeddings", json={**body, "dimensions": 32})
    assert whole.json()["data"][0]["embedding"] == plain
    assert whole.headers["x-understudy-route"] == "local:embedder@1"


def test_embeddings_of_skills_and_providers(client: openai.OpenAI, site: Any) -> None:
    local = client.embeddings.create(model="embedder", input="a card").data[0].embedding
    assert client.embeddings.create(model="vectors", input=["a card"]).data[0].embedding == local
    vendors = client.embeddings.create(model="vendor/e-1", input=["a", "b"])
    assert [len(one.embedding) for one in vendors.data] == [8, 8]
    assert site.vendor.requests[-1]["model"] == "e-1"


def test_models(client: openai.OpenAI, site: Any) -> None:
    found = {one.id: one for one in client.models.list()}
    assert {"writer", "intent", "scribe", "sorter", "scripted", "embedder", "ranker", "vendor/m-1"} <= found.keys()
    assert found["vendor/m-1"].owned_by == "vendor" and found["scripted"].object == "model"
    assert "tagger" not in found  # no route here serves it
    for id in ("writer", "scripted", "vendor/m-1", "local:scripted"):
        assert client.models.retrieve(id).id == id
    with pytest.raises(openai.NotFoundError, match=r"no model .nope/m."):
        client.models.retrieve("nope/m")


def test_the_rest_api_shares_the_path_of_models(http: httpx.Client) -> None:
    both = http.get("/models").json()
    assert both["object"] == "list" and both["nextPageToken"] == ""
    assert {"models/scripted/versions/1"} <= {one["name"] for one in both["models"]}
    page = http.get("/models", params={"page_size": 2}).json()
    assert page.keys() == {"models", "nextPageToken"} and len(page["models"]) == 2 and page["nextPageToken"]
    assert http.get("/models/scripted/versions/1").json()["model"]["modelId"] == "scripted"
    assert "adapters" in http.get("/models/scripted/adapters").json()


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_rerank(site: Any, path: str) -> None:
    documents = ["where is my card", {"text": "password reset"}, "money transfer"]
    with httpx.Client(base_url=site.gateway.url, timeout=30) as http:
        whole = http.post(path, json={"model": "ranker", "query": "card", "documents": documents, "return_documents": True}).json()
        best = http.post(path, json={"model": "ranker", "query": "card", "documents": documents, "top_n": 1}).json()
        skill = http.post(path, json={"model": "relevance", "query": "card", "documents": documents, "top_n": 2}).json()
    scores = [one["relevance_score"] for one in whole["results"]]
    assert scores == sorted(scores, reverse=True) and len(scores) == 3
    texts = ["where is my card", "password reset", "money transfer"]
    assert all(one["document"]["text"] == texts[one["index"]] for one in whole["results"])
    assert best["results"] == [{"index": whole["results"][0]["index"], "relevance_score": scores[0]}]
    assert [one["index"] for one in skill["results"]] == [one["index"] for one in whole["results"][:2]]
    assert whole["usage"]["total_tokens"] > 0 and whole["id"] and whole["object"] == "list"
