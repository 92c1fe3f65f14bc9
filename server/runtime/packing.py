"""The two ways in which sequences reach a graph: tokens end to end, or rows padded to one length. Buffers are kept between batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from native import batch as native
from server.core import IntArray
from server.errors import ModelRejected
from server.runtime.sessions import Array, Session

Int32Array = npt.NDArray[np.int32]
_KNOWN = {
    "packed": ("input_ids", "position_ids", "token_type_ids", "cu_seqlens"),
    "padded": ("input_ids", "attention_mask", "token_type_ids", "position_ids"),
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenized sequence: `ids` int64[n], n >= 1, and `type_ids` int64[n] or None for zeros; `slot` of its adapter, -1 without."""

    ids: IntArray
    type_ids: IntArray | None = None
    slot: int = -1


@dataclass(slots=True)
class Packed:
    """Feeds for one run, valid until the packer's next batch; `begins`, `ends` int32[S] are each sequence's rows of the flat output."""

    feeds: dict[str, Array]
    begins: Int32Array
    ends: Int32Array
    tokens: int
    width: int  # padded: the length of every row; packed: 0


class Packer:
    """Packs batches for one graph. `capacity`: the most tokens of a batch, padding included; `max_sequences` a batch."""

    def __init__(self, session: Session, form: Literal["packed", "padded"], *, capacity: int, max_sequences: int, pad_id: int = 0) -> None:
        self._form = form
        self._pad_id = pad_id
        self._dtypes: dict[str, np.dtype[Any] | None] = {spec.name: spec.dtype for spec in session.inputs}
        self._check(session)
        self._ids = np.zeros(capacity, np.int64)
        self._other = np.zeros(capacity, np.int64)  # position_ids of the packed form, attention_mask of the padded one
        self._types = np.zeros(capacity, np.int64)
        self._cu = np.zeros(max_sequences + 1, np.int32)

    def _check(self, session: Session) -> None:
        known = _KNOWN[self._form]
        strange = [spec.name for spec in session.inputs if spec.name not in known]
        missing = [name for name in (known[0], known[3] if self._form == "packed" else known[1]) if name not in self._dtypes]
        if strange or missing:
            raise ModelRejected(
                f"the graph's inputs are {[spec.name for spec in session.inputs]}, expected those of the {self._form} form: {list(known)}; "
                'export it again, or give its manifest form "tensor"',
                inputs=",".join(self._dtypes),
            )

    def pack(self, sequences: Sequence[Encoded]) -> Packed:
        """Copies the sequences into the buffers. Raises ValueError when they are more than `capacity` or `max_sequences`."""
        ids = [s.ids for s in sequences]
        types = [s.type_ids for s in sequences]
        count = len(sequences)
        if self._form == "packed":
            tokens = native.pack(ids, types, self._ids, self._other, self._types, self._cu)
            cu = self._cu[: count + 1]
            feeds: dict[str, Array] = {
                "input_ids": self._ids[:tokens],
                "position_ids": self._other[:tokens],
                "token_type_ids": self._types[:tokens],
                "cu_seqlens": cu,
            }
            packed = Packed(self._named(feeds), cu[:-1], cu[1:], tokens, 0)
            if any(s.slot >= 0 for s in sequences):
                # Not among the session's inputs: it is a graph's with adapters, seen as one without (server/runtime/lora/session.py).
                packed.feeds["adapter_ids"] = np.repeat(np.fromiter((s.slot for s in sequences), np.int32, count), np.diff(cu))
            return packed
        width = native.pack_padded(ids, types, self._ids, self._other, self._types, self._pad_id)
        tokens = count * width
        feeds = {
            "input_ids": self._ids[:tokens].reshape(count, width),
            "attention_mask": self._other[:tokens].reshape(count, width),
            "token_type_ids": self._types[:tokens].reshape(count, width),
        }
        if "position_ids" in self._dtypes:
            feeds["position_ids"] = np.tile(np.arange(width), (count, 1))
        begins = np.arange(0, tokens, width, dtype=np.int32)
        lengths = np.fromiter((len(row) for row in ids), np.int32, count)
        return Packed(self._named(feeds), begins, begins + lengths, tokens, width)

    def _named(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Those that the graph names, in its integer type."""
        return {
            name: array if name == "cu_seqlens" or dtype == array.dtype or dtype is None else array.astype(dtype)
            for name, dtype in self._dtypes.items()
            for array in (feeds[name],)
        }
