"""Keyword arguments that the two clients share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

Priority = Literal["critical", "interactive", "bulk"]
Preference = Literal["local_first", "local_only", "provider_only", "cheapest", "best", "fastest", "free_first"]


class CallOptions(TypedDict, total=False):
    """For every call.

    `timeout_s`: until when an answer is of use, all attempts together; the client's own timeout without it. `request_id`: at most 128 of
    A-Z a-z 0-9 . _ : / + = -, found again in the server's logs.
    """

    timeout_s: float
    request_id: str


class ModelOptions(CallOptions, total=False):
    """`model`, `version`: which local model; without them the server's default for the task. `priority`: "interactive" without it.

    `return_errors`: items that failed are left in the results instead of raising ItemErrors.
    """

    model: str
    version: str
    priority: Priority
    return_errors: bool


class EncoderOptions(ModelOptions, total=False):
    """`adapter`: "name" or "name@version" of one that is loaded on the model; without it the model as it is."""

    adapter: str


class EmbedOptions(EncoderOptions, total=False):
    """`truncate`: cut texts to the model's limit. `normalize`, `pooling`: what the model was trained for without them.

    `dimensions`: shorter vectors, for models trained to be cut. `input_type`: for models that want a prefix.
    """

    truncate: bool
    normalize: bool
    dimensions: int
    pooling: Literal["mean", "cls", "last"]
    input_type: Literal["query", "passage"]


class ClassifyOptions(EncoderOptions, total=False):
    """`top_k`: most classes for each text, 0 for all. `candidate_labels`: choose from these instead of the model's own (zero-shot);

    then `multi_label` scores each by itself, and `hypothesis_template` is the sentence that carries the label at "{}".
    """

    top_k: int
    truncate: bool
    candidate_labels: list[str]
    multi_label: bool
    hypothesis_template: str


class RerankOptions(EncoderOptions, total=False):
    """`top_n`: most documents to return, 0 for all. `return_documents`: their texts too."""

    top_n: int
    return_documents: bool
    truncate: bool


class EntityOptions(EncoderOptions, total=False):
    """`aggregation`: how tokens become entities, "simple" without it. `truncate`: cut long texts instead of reading them in windows."""

    aggregation: Literal["none", "simple", "first", "average", "max"]
    truncate: bool


class AnswerOptions(EncoderOptions, total=False):
    """`top_k`: most answers for each question, 1 without it. `max_answer_tokens`: 15 without it. `doc_stride`: tokens that windows share.

    `allow_no_answer`: an empty answer is one too.
    """

    top_k: int
    max_answer_tokens: int
    doc_stride: int
    allow_no_answer: bool


class RouteOptions(CallOptions, total=False):
    """`preference`: who may answer, and in which order; the skill's own without it. `max_cost_usd`: for each item; 0: nothing is paid.

    `user`: who asks, an opaque id, never a name.
    """

    preference: Preference
    max_cost_usd: float
    user: str


class RunOptions(RouteOptions, total=False):
    """`instruction`: what is to be done, in plain words, in place of a skill's name. `labels`: classes to choose from, where the skill has
    none of its own. `parameters`: the task's, for example {"target_language": "fr"}. `max_latency_s`: candidates that are expected to take
    longer are passed over. `model`: a provider's model, as "provider/model", that is to answer instead of the skill's own candidates.
    `return_errors`: items that failed are left in the results instead of raising ItemErrors.
    """

    instruction: str
    model: str
    labels: Sequence[str]
    parameters: Mapping[str, str]
    max_latency_s: float
    priority: Priority
    return_errors: bool


class GenerateOptions(RouteOptions, total=False):
    """`model`, `version`, `adapter` ("name" or "name@version"): who answers; without them the server's default, and no adapter.

    Sampling, by OpenAI's and Hugging Face's names: `temperature` (0 takes the likeliest token), `top_k`, `top_p`, `min_p`,
    `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `logit_bias` (token id to bias), `seed`, `n`, `best_of`. An answer ends
    at `max_tokens`, at a text of `stop`, at `stop_token_ids`, or at the model's own stop tokens unless `ignore_eos`.
    Its form is bound by one of `json_schema` (a dict, or JSON text), `json_object`, `regex`, `choice`, `grammar` (Lark).
    `tools`: functions as OpenAI describes them; `tool_choice`: "auto" (as without it), "none", "required", or the name of one that must be
    called. `return_token_ids`, `logprobs`, `top_logprobs`: tokens beside the text.
    `skill`: answers by its route instead of one model; takes a prompt or messages, and `max_tokens`, `temperature`, `tools`, `json_schema`.
    """

    skill: str
    model: str
    version: str
    adapter: str
    priority: Priority
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    n: int
    best_of: int
    max_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    json_schema: Mapping[str, Any] | str
    json_object: bool
    regex: str
    choice: Sequence[str]
    grammar: str
    return_token_ids: bool
    logprobs: bool
    top_logprobs: int


class SummarizeOptions(ModelOptions, total=False):
    """`num_beams`, `max_tokens`, `length_penalty`, `no_repeat_ngram_size`: the model's own without them. `truncate`: cut long texts."""

    num_beams: int
    max_tokens: int
    length_penalty: float
    no_repeat_ngram_size: int
    truncate: bool


class TranslateOptions(SummarizeOptions, total=False):
    """`source_language`, `target_language`: as the model names them, for models of several languages."""

    source_language: str
    target_language: str
