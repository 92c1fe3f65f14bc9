"""How a decoder engine works: what fits into a step, into the pages and into the queue."""

from __future__ import annotations

from dataclasses import dataclass

from server.runtime.memory import available_bytes

MIB = 1 << 20
_MOST_KV_BYTES = 1024 * MIB
_LEAST_KV_BYTES = 64 * MIB
# What is free now is also wanted by weights that load later, and by the file cache.
_SHARE_OF_FREE = 0.25


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """All bounds of one engine; nothing grows beyond them.

    `max_sequences` answers run at once, and `token_budget` tokens (decode rows and pieces of prompts together) enter one step.
    `kv_cache_bytes` of pages hold K and V, 0: 1 GiB or a quarter of the free memory, whichever is less. `max_waiting` answers and
    `max_waiting_tokens` prompt tokens may wait; more are refused with the time after which trying again makes sense.

    `prompt_share`: while answers run, prompts may lengthen a step by this share of what it takes without them, times the number of
    prompts for each answer where prompts are more. `least_chunk` tokens go in at least.
    `ageing_s`: a request of low priority that has waited so long counts as one level higher.
    `message_rate`: from so many messages a second on, over all streams, tokens of several steps travel together.
    """

    max_sequences: int = 32
    token_budget: int = 512
    kv_cache_bytes: int = 0
    max_waiting: int = 256
    max_waiting_tokens: int = 1 << 20
    prefix_cache: bool = True
    prompt_share: float = 1.2
    least_chunk: int = 8
    ageing_s: float = 10.0
    message_rate: float = 300.0

    def pool_bytes(self) -> int:
        """Bytes for the pages, decided when the engine is made."""
        if self.kv_cache_bytes:
            return self.kv_cache_bytes
        free = available_bytes()
        if free is None:
            return _MOST_KV_BYTES
        return max(_LEAST_KV_BYTES, min(_MOST_KV_BYTES, int(free * _SHARE_OF_FREE)))
