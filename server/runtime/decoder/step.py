"""One run of a decoder graph: the inputs' buffers, the pages themselves, and bindings that are kept from step to step.

All memory is taken when it is made. A step writes the first elements of each buffer and gives the graph their new shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.core import FloatArray
from server.errors import ModelRejected
from server.runtime.decoder.kv import Bytes, KvLayout
from server.runtime.decoder.scheduler import Plan
from server.runtime.decoder.sequence import Candidate
from server.runtime.manifest import Decoder
from server.runtime.sessions import Array, Binding, Session

Int32 = npt.NDArray[np.int32]
_INPUTS = (
    "input_ids", "cu_seqlens", "past_lens", "block_table", "logit_rows", "kv_pool", "extra_rows", "adapter_ids", "lora_bank", "lora_ranks",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step: tokens, sequences, and positions of one sequence."""

    tokens: int
    sequences: int
    positions: int


class _Bound:
    """A form's binding, and the shapes that it has now."""

    def __init__(self, session: Session, inputs: Mapping[str, Array], logits: FloatArray) -> None:
        names = [spec.name for spec in session.inputs]
        unknown = sorted(set(names) - set(inputs))
        output = session.outputs[0].name if session.outputs else "nothing"
        if unknown or output != "logits":
            raise ModelRejected(
                f"{session.path.name} takes {', '.join(names)} and gives {output}; a decoder graph takes some of {', '.join(_INPUTS)} "
                "and gives logits. Export the model again.",
                file=session.path.name,
            )
        self.binding: Binding = session.bind([inputs[name] for name in names], {output: logits})
        self.places = {name: place for place, name in enumerate([*names, output])}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def shape(self, name: str, sizes: tuple[int, ...]) -> None:
        if self._shapes.get(name) != sizes and name in self.places:
            self.binding.shape(self.places[name], sizes)
            self._shapes[name] = sizes

    def put(self, name: str, array: Array) -> None:
        self.binding.put(self.places[name], array)
        self._shapes.pop(name, None)


class StepRunner:
    """The forms of one decoder over one pool of pages. Used by one thread.

    `bank`: the arrays of the inputs lora_bank and lora_ranks, which others write to; without them the graph gets an empty bank.
    Raises ModelRejected where a graph has other inputs.
    """

    def __init__(
        self, decoder: Decoder, sessions: Mapping[str, Session], pages: int, limits: StepLimits, bank: Mapping[str, Array] | None = None
    ) -> None:
        self.limits = limits
        self.kv = KvLayout(decoder)
        width = -(-limits.positions // decoder.page)
        self.page = decoder.page
        self._vocabulary = decoder.vocabulary
        self.pool = self._make_pool(pages)
        self._tables: Int32 = np.full((limits.sequences, width), -1, np.int32)
        self._ids = np.zeros(limits.tokens, np.int64)
        self._cu = np.zeros(limits.sequences + 1, np.int32)
        self._past = np.zeros(limits.sequences, np.int32)
        self._table = np.zeros(limits.sequences * width, np.int32)
        self._logit_rows = np.zeros(limits.sequences, np.int64)
        self._adapters = np.full(limits.tokens, -1, np.int32)
        self._adapters_used = False
        self._logits = np.zeros(limits.sequences * decoder.vocabulary, np.float32)
        self._logits_rows = self._logits.reshape(limits.sequences, decoder.vocabulary)
        self.hidden = _hidden_size(sessions)
        self._no_rows = np.zeros((1, self.hidden), np.float32)
        inputs: dict[str, Array] = {
            "input_ids": self._ids,
            "cu_seqlens": self._cu,
            "past_lens": self._past,
            "block_table": self._table,
            "logit_rows": self._logit_rows,
            "kv_pool": self.pool,
            "extra_rows": self._no_rows,
            "adapter_ids": self._adapters,
            **(_empty_bank(decoder) if bank is None else bank),
        }
        self._forms = {form: _Bound(session, inputs, self._logits) for form, session in sessions.items()}
        for bound in self._forms.values():
            bound.shape("extra_rows", (0, self.hidden))
        self._loaded = next(iter(self._forms.values()))
        self._wanted = 0

    def load(self, form: str, plan: Plan, places: Sequence[int]) -> None:
        """Fills the buffers for a step by this form, with logits of the rows at `places`."""
        rows, counts = plan.rows, plan.counts
        sequences = len(rows)
        self._fill_ids(plan)
        cu = self._cu
        np.cumsum(counts, out=cu[1 : sequences + 1])
        self._past[:sequences] = [c.computed for c in rows]
        decoding = plan.decoding
        wanted = len(places)
        ends = self._logit_rows
        if wanted:
            np.subtract(cu[1:][places], 1, out=ends[:wanted])
        width = self._fill_table(rows)
        self._fill_adapters(rows, counts, plan.tokens, decoding)
        self._shape(form, plan.tokens, sequences, width, wanted)

    def run(self) -> FloatArray:
        """Runs what was loaded; returns the logits float32[len(places), vocabulary], valid until the next run. The GIL is free."""
        self._loaded.binding.run()
        return self._logits_rows[: self._wanted]

    def run_embeddings(self, form: str, pages: Sequence[int], rows: FloatArray) -> None:
        """Runs embeddings float32[n, hidden] in place of tokens, as one sequence from position 0, into its pages."""
        bound = self._forms[form]
        rows = np.ascontiguousarray(rows, np.float32)
        self._adapters.fill(-1)
        self._table[: len(pages)] = pages
        bound.put("extra_rows", rows)
        try:
            for begin in range(0, len(rows), self.limits.tokens):
                count = min(self.limits.tokens, len(rows) - begin)
                self._ids[:count] = np.arange(self._vocabulary + begin, self._vocabulary + begin + count)
                self._cu[:2] = 0, count
                self._past[0] = begin
                self._logit_rows[0] = count - 1
                self._shape(form, count, 1, len(pages), 1)
                self.run()
        finally:
            bound.put("extra_rows", self._no_rows)
            bound.shape("extra_rows", (0, self.hidden))

    def probe(self, form: str, rows: int, tokens: int) -> None:
        """Runs `rows` sequences of `tokens` tokens each, in the first pages: for measuring, before anything is in them."""
        each = -(-tokens // self.page)
        total = rows * tokens
        self._ids[:total] = 0
        self._cu[: rows + 1] = np.arange(rows + 1) * tokens
        self._past[:rows] = 0
        self._table[: rows * each] = np.arange(rows * each) % len(self.pool[0])
        self._logit_rows[:rows] = self._cu[1 : rows + 1] - 1
        self._shape(form, total, rows, each, rows)
        self.run()

    def write_prefix(self, pages: Sequence[int], keys: FloatArray, values: FloatArray) -> None:
        """Writes K and V [layers, kv_heads, positions, head_dim] into pages, from the first one's first position on."""
        self.kv.write(self.pool, pages, keys, values)

    def copy_page(self, source: int, target: int) -> None:
        """Copies a page in all layers."""
        self.pool[:, target] = self.pool[:, source]

    def _make_pool(self, pages: int) -> Bytes:
        return self.kv.allocate(pages)

    def _shape(self, form: str, tokens: int, sequences: int, width: int, wanted: int) -> None:
        bound = self._loaded = self._forms[form]
        self._wanted = wanted
        bound.shape("input_ids", (tokens,))
        bound.shape("cu_seqlens", (sequences + 1,))
        bound.shape("past_lens", (sequences,))
        bound.shape("block_table", (sequences, width))
        # A graph is not asked for no row at all: every product behind would have to do without rows.
        asked = max(1, wanted)
        if not wanted:
            self._logit_rows[0] = 0
        bound.shape("logit_rows", (asked,))
        bound.shape("adapter_ids", (tokens,))
        bound.shape("logits", (asked, self._vocabulary))

    def _fill_ids(self, plan: Plan) -> None:
        ids, decoding = self._ids, plan.decoding
        ids[:decoding] = [c.ids[c.length - 1] for c in plan.rows[:decoding]]
        place = decoding
        for candidate, count in zip(plan.rows[decoding:], plan.counts[decoding:], strict=True):
            begin = candidate.computed - candidate.base
            ids[place : place + count] = candidate.ids[begin : begin + count]
            place += count

    def _fill_table(self, rows: Sequence[Candidate]) -> int:
        tables = self._tables
        width = 1
        for candidate in rows:
            have = len(candidate.pages)
            if have > width:
                width = have
            shown = candidate.shown_pages
            if shown != have:
                if shown == 0:
                    tables[candidate.slot] = -1
                tables[candidate.slot, shown:have] = candidate.pages[shown:]
                candidate.shown_pages = have
        count = len(rows)
        table = self._table[: count * width].reshape(count, width)
        table[:] = tables[[c.slot for c in rows], :width]
        return width

    def _fill_adapters(self, rows: Sequence[Candidate], counts: Sequence[int], tokens: int, decoding: int) -> None:
        slots = [c.adapter_slot for c in rows]
        if max(slots) < 0:
            if self._adapters_used:
                self._adapters.fill(-1)
                self._adapters_used = False
            return
        self._adapters_used = True
        if decoding == len(rows):
            self._adapters[:tokens] = slots
        else:
            self._adapters[:tokens] = np.repeat(slots, counts)


def _hidden_size(sessions: Mapping[str, Session]) -> int:
    for session in sessions.values():
        for spec in session.inputs:
            if spec.name == "extra_rows" and spec.shape and isinstance(spec.shape[-1], int):
                return spec.shape[-1]
    return 1


def _empty_bank(decoder: Decoder) -> dict[str, Array]:
    """A bank of one slot that no token names."""
    layout = decoder.lora
    width = layout.width if layout is not None else 1
    targets = len(layout.targets) if layout is not None else 1
    dtype = np.uint16 if layout is not None and layout.dtype == "bfloat16" else np.float32
    return {"lora_bank": np.zeros((1, 1, width), dtype), "lora_ranks": np.zeros((1, targets), np.int32)}
