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


class LoraTarget(_Part):
    """A linear layer that adapters may change, by the base's own module path, e.g. "model.layers.0.self_attn.q_proj".

    `a` and `b`: where its rows of A [rank, inputs] and of B transposed [rank, outputs] begin in a row of the adapter bank (floats);
    `index`: its column in the bank's table of ranks.
    """

    name: str
    inputs: int = Field(ge=1)
    outputs: int = Field(ge=1)
    a: int = Field(ge=0)
    b: int = Field(ge=0)
    index: int = Field(ge=0)


class LoraLayout(_Part):
    """How a bank of adapters is laid out: float32 or bfloat16 bits [slots, rank, width], ranks int32[slots, len(targets)]."""

    dtype: Literal["float32", "bfloat16"]
    width: int = Field(ge=1)
    targets: list[LoraTarget]


class Decoder(_Part):
    """What the decoder engine needs of a graph of form "decoder"; inputs and outputs are stated in server/runtime/decoder/contract.py.

    `graphs` maps each form of the weights, "float32", "int8" (W8A8, wide steps) or "int4" (narrow steps), to its file; every form has the
    same inputs and outputs and works on the same pages. "cuda" beside them is a graph of another kind, whose pages are on the device: see
    server/runtime/graphs/decoder/cuda.py; no manifest has "float16" pages, which are its alone. `window`: positions a token sees, itself
    included, 0 for all (the least over layers; pages behind it are still kept where other layers need them). `kv_error`: KL divergence
    that each dtype of K and V costs.
    """

    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    page: int = Field(default=16, ge=1)  # positions a page holds
    page_bytes: int = Field(ge=1)  # of one page of one layer
    kv_dtype: Literal["float32", "bfloat16", "int8", "float16"]
    kv_error: dict[str, float] = {}
    window: int = Field(default=0, ge=0)
    graphs: dict[Literal["float32", "int8", "int4", "cuda"], FileName]
    bos_token_id: int | None = None
    stop_token_ids: list[int] = []
    lora: LoraLayout | None = None


class Seq2Seq(_Part):
    """An encoder-decoder: which file is which, how a text becomes its input, and what generation needs by default.

    The graphs' inputs and outputs are stated in server/runtime/seq2seq/graph.py. A source is `source_prefix`, the text's tokens,
    `source_suffix`; -1 in them stands for the source language's token, -2 for the target's. `target_by` says how the model is told the
    target language otherwise: "first", the first token of the answer; "start", instead of the start token; "" not at all.
    """

    encoder: FileName
    decoder: FileName
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    decoder_start_token_id: int
    eos_token_ids: list[int]
    pad_token_id: int
    max_output_tokens: int = Field(ge=1)
    generation: dict[str, Any] = {}  # num_beams, length_penalty, no_repeat_ngram_size, forced_bos_token_id, bad_words_ids, ...
    languages: dict[str, int] = {}  # language code -> its token, for models that are told the target language by a token
    prefixes: dict[str, str] = {}  # text before the input by "source-target" languages, "" for all: T5's "translate English to French: "
    source_prefix: list[int] = []
    source_suffix: list[int] = []
    target_by: Literal["", "first", "start"] = ""
    source_language: str = ""  # default codes, where a call gives none
    target_language: str = ""
    source_vocabulary: int = Field(default=0, ge=0)  # 0: `vocabulary`; ids from there on are pieces that the model does not know
    unknown_token_id: int = Field(default=0, ge=0)


class Manifest(_Part):
    """The whole file. Unknown keys are refused: a manifest from a newer release is not half-understood.

    `form` says how batches reach the graph:
    - "packed": our graphs. Inputs input_ids, position_ids (and token_type_ids if `token_types`) int64[T], cu_seqlens int32[S+1].
      position_ids count from 0 in each sequence, whatever the architecture.
    - "padded": input_ids, attention_mask (and token_type_ids, position_ids if the graph names them) int64[B, L].
    - "decoder": our decoder graphs over paged K and V; see `decoder`.
    - "seq2seq": an encoder and a decoder graph; see `seq2seq`.
    - "tensor": any ONNX graph, served raw.
    Packed and padded graphs have one output, by task: "hidden" float32[T, H] (packed) or [B, L, H] (padded) for feature-extraction;
    "logits" float32[S, labels] for text-classification, text-ranking and NLI; float32[T, labels] / [B, L, labels] for token-classification;
    float32[T, 2] / [B, L, 2] (start, end) for question-answering.
    """

    schema_version: Literal[1] = 1
    name: Name
    version: Version
    task: Task
    form: Literal["packed", "padded", "decoder", "seq2seq", "tensor"]
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
    decoder: Decoder | None = None
    seq2seq: Seq2Seq | None = None
    lora: LoraLayout | None = None  # of encoders that take adapters
    license: str = ""
    source: Source | None = None
    created: str = ""  # RFC 3339
    parity: dict[str, float] = {}  # what the export's parity check measured
    extra: dict[str, Any] = {}
    files: dict[FileName, FileEntry]
