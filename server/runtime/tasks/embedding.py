"""feature-extraction: one vector a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from server.core import Call, FloatArray, Results, Task
from server.errors import InvalidArgument
from server.runtime.engine import Pool
from server.runtime.tasks.stages import Account, Parts, check_count, check_items, run_items, tokenize

Pooling = Literal["mean", "cls", "last"]
POOLINGS = get_args(Pooling)
INPUT_KINDS = ("", "query", "passage")


@dataclass(slots=True, frozen=True)
class EmbedOptions:
    """None (and 0) stand for what the model was trained for. `kind` picks the prefix that the model wants before a text."""

    dimensions: int | None = None
    normalize: bool | None = None
    pooling: str | None = None
    truncate: bool = False
    kind: str = ""


def pool_of(parts: Parts, options: EmbedOptions) -> Pool:
    """The pooling that `options` ask of the model; raises InvalidArgument or TaskNotSupported."""
    manifest = parts.manifest
    if manifest.task != Task.FEATURE_EXTRACTION:
        raise parts.refuse_task("an embedding", "a model of the task feature-extraction")
    if options.kind not in INPUT_KINDS:
        raise InvalidArgument(f"input_type is {options.kind!r}; expected 'query', 'passage' or nothing.", field="input_type")
    kind = options.pooling or ("mean" if manifest.pooling == "none" else manifest.pooling)
    if kind not in POOLINGS:
        raise InvalidArgument(f"pooling is {kind!r}; expected one of mean, cls, last.", field="pooling")
    dimensions = options.dimensions or None
    if dimensions is not None:
        check_count(dimensions, "dimensions", 1)
        allowed = sorted({*manifest.dimensions, manifest.hidden_size})
        if dimensions not in allowed:
            raise InvalidArgument(
                f"dimensions is {dimensions}; model {manifest.name!r} gives vectors of {', '.join(map(str, allowed))}. "
                "A model keeps its meaning only at the sizes that it was trained for.",
                field="dimensions",
                limit=manifest.hidden_size,
            )
        dimensions = None if dimensions == manifest.hidden_size else dimensions
    normalize = manifest.normalize if options.normalize is None else options.normalize
    return Pool(kind=cast(Pooling, kind), normalize=normalize, dimensions=dimensions)


def prefixed(parts: Parts, texts: Sequence[str], kind: str) -> Sequence[str]:
    """`texts` as the model wants texts of this kind; blank ones stay what they are, and are refused as such."""
    prefix = {"": "", "query": parts.manifest.query_prefix, "passage": parts.manifest.passage_prefix}[kind]
    if not prefix:
        return texts
    return [prefix + text if isinstance(text, str) and text and not text.isspace() else text for text in texts]


async def vectors(
    parts: Parts, texts: Sequence[str], options: EmbedOptions, account: Account, *, call: Call, fields: Sequence[str]
) -> tuple[list[FloatArray | Exception], list[bool]]:
    """Each text's vector float32[D] or error, and whether it was cut; for the tasks that compare vectors too."""
    pool = pool_of(parts, options)
    inputs = prefixed(parts, texts, options.kind)
    tokens = await tokenize(parts, inputs, fields, account, call=call, cut="first" if options.truncate else "")
    rows, cut = await run_items(parts, tokens, account, call=call, pool=pool)
    return list(rows), cut


async def embed(parts: Parts, texts: Sequence[str], options: EmbedOptions, *, call: Call) -> Results[FloatArray]:
    check_items(texts, "texts")
    account = Account()
    fields = [f"texts[{i}]" for i in range(len(texts))]
    items, cut = await vectors(parts, texts, options, account, call=call, fields=fields)
    return parts.results(items, account, cut)
