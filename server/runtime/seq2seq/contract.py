"""What translation and summarization promise to the edge: the options of a call, its answers, and the model that gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from server.core import Call, FinishReason, Results
from server.runtime.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Seq2SeqOptions:
    """How a call's texts are answered; 0, "" and None mean what the model's own configuration says.

    Languages are the model's own codes ("fr_XX", "fra_Latn", "fr"); see `Seq2SeqModel.source_languages` and `target_languages`.
    `max_tokens`: generated tokens at most, the end token included. `num_beams`: 1 is greedy. `length_penalty`: the sum of
    log-probabilities is divided by the length to this power. `truncate`: cut texts that are longer than the model takes, instead of
    refusing them.
    """

    source_language: str = ""
    target_language: str = ""
    max_tokens: int = 0
    num_beams: int = 0
    length_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    truncate: bool = False


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer. `tokens`: ids after the start token, special ones and the end token included.

    `score`: the sum of the tokens' log-probabilities over length ** length_penalty, as beam search ranks it. `finish`: STOP at an end
    token, LENGTH at `max_tokens`.
    """

    text: str
    tokens: Sequence[int]
    score: float
    finish: FinishReason = FinishReason.STOP


class Seq2SeqModel(Protocol):
    """A loaded encoder-decoder. Made and used on the event loop; runs on a thread of its own. See server/runtime/seq2seq/model.py."""

    manifest: Manifest

    @property
    def source_languages(self) -> list[str]:
        """Codes that `source_language` may be, sorted; empty where the model reads one language or finds out by itself."""

    @property
    def target_languages(self) -> list[str]:
        """Codes that `target_language` may be, sorted; empty where the model writes one language."""

    async def generate(self, texts: Sequence[str], call: Call, options: Seq2SeqOptions = Seq2SeqOptions()) -> Results[Generated]:
        """One answer a text, or its own error (InputTooLong, InvalidArgument, with `field` "texts[i]").

        Cancelling the task, or `call.cancelled`, ends its texts between two steps. Raises what concerns the whole call: InvalidArgument
        (an option, an unknown language: lists the known ones), Overloaded, RequestTooLarge, Draining, DeadlineExceeded, Cancelled.
        """

    async def close(self, *, drain: bool) -> None:
        """Finishes accepted calls if `drain`, else fails them with Draining; returns once thread and graphs are gone."""
