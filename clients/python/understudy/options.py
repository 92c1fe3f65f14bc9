"""Keyword arguments that the two clients share."""

from __future__ import annotations

from typing import Literal, TypedDict

Priority = Literal["critical", "interactive", "bulk"]


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


class EmbedOptions(ModelOptions, total=False):
    """`truncate`: cut texts to the model's limit. `normalize`, `pooling`: what the model was trained for without them.

    `dimensions`: shorter vectors, for models trained to be cut. `input_type`: for models that want a prefix.
    """

    truncate: bool
    normalize: bool
    dimensions: int
    pooling: Literal["mean", "cls", "last"]
    input_type: Literal["query", "passage"]


class ClassifyOptions(ModelOptions, total=False):
    """`top_k`: most classes for each text, 0 for all. `candidate_labels`: choose from these instead of the model's own (zero-shot);

    then `multi_label` scores each by itself, and `hypothesis_template` is the sentence that carries the label at "{}".
    """

    top_k: int
    truncate: bool
    candidate_labels: list[str]
    multi_label: bool
    hypothesis_template: str


class RerankOptions(ModelOptions, total=False):
    """`top_n`: most documents to return, 0 for all. `return_documents`: their texts too."""

    top_n: int
    return_documents: bool
    truncate: bool


class EntityOptions(ModelOptions, total=False):
    """`aggregation`: how tokens become entities, "simple" without it. `truncate`: cut long texts instead of reading them in windows."""

    aggregation: Literal["none", "simple", "first", "average", "max"]
    truncate: bool


class AnswerOptions(ModelOptions, total=False):
    """`top_k`: most answers for each question, 1 without it. `max_answer_tokens`: 15 without it. `doc_stride`: tokens that windows share.

    `allow_no_answer`: an empty answer is one too.
    """

    top_k: int
    max_answer_tokens: int
    doc_stride: int
    allow_no_answer: bool


class RunOptions(CallOptions, total=False):
    """`preference`: who may answer, "local_first" without it. `max_cost_usd`: for each item. `user`: an opaque id, never a name."""

    preference: Literal["local_first", "local_only", "provider_only"]
    max_cost_usd: float
    priority: Priority
    user: str
    return_errors: bool
