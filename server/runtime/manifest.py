"""`manifest.json`: what a model version is, what it takes and gives, and the SHA-256 of each of its files."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from server.core import Task

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")]
Version = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# One level of plain names: nothing that leaves the version's folder can be written down.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Part):
    """A file of the version's folder; `size` in bytes."""

    sha256: Sha256
    size: int = Field(ge=0)


class Source(_Part):
    """Where the weights came from. `kind`: hub, folder, package, starter, trainer."""

    kind: str
    id: str
    revision: str = ""


class Quantization(_Part):
    """How the int8 (or other) form was made.

    `weight_bits` is 7 where u8 x s8 products may saturate in 16 bits (x86 without VNNI), else 8. `layers` maps each matrix product's name
    to the form chosen for it by measured error: "static", "row", "fp32".
    """

    method: str
    weight_bits: int = Field(default=8, ge=2, le=8)
    layers: dict[str, str] = {}


class Manifest(_Part):
    """The whole file. Unknown keys are refused: a manifest from a newer release is not half-understood.

    `form` says how batches reach the graph:
    - "packed": our graphs. Inputs input_ids, position_ids (and token_type_ids if `token_types`) int64[T], cu_seqlens int32[S+1].
      position_ids count from 0 in each sequence, whatever the architecture.
    - "padded": input_ids, attention_mask (and token_type_ids, position_ids if the graph names them) int64[B, L].
    - "tensor": any ONNX graph, served raw.
    Packed and padded graphs have one output, by task: "hidden" float32[T, H] (packed) or [B, L, H] (padded) for feature-extraction;
    "logits" float32[S, labels] for text-classification, text-ranking and NLI; float32[T, labels] / [B, L, labels] for token-classification;
    float32[T, 2] / [B, L, 2] (start, end) for question-answering.
    """

    schema_version: Literal[1] = 1
    name: Name
    version: Version
    task: Task
    form: Literal["packed", "padded", "tensor"]
    architecture: str = ""
    dtype: Literal["float32", "float16", "int8", "int4", "other"] = "float32"
    quantization: Quantization | None = None
    hidden_size: int = Field(default=0, ge=0)
    max_tokens: int = Field(default=512, ge=1, le=1_000_000)
    token_types: bool = False
    pooling: Literal["mean", "cls", "last", "none"] = "none"
    normalize: bool = False
    dimensions: list[int] = []  # Matryoshka sizes that the model was trained for; empty: only hidden_size
    labels: list[str] = []
    multi_label: bool = False
    query_prefix: str = ""
    passage_prefix: str = ""
    license: str = ""
    source: Source | None = None
    created: str = ""  # RFC 3339
    parity: dict[str, float] = {}  # what the export's parity check measured
    extra: dict[str, Any] = {}
    files: dict[FileName, FileEntry]
