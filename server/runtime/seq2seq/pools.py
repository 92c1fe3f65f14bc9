"""Who has which rows of the two pools: runs of places for what the encoder gave, single slots for what was generated."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int32]


class Places:
    """Contiguous runs out of `size` places; first fit, neighbours joined when they are given back."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)]  # first, count; ascending

    def take(self, count: int) -> int | None:
        """The first place of a run, or None where none is long enough now."""
        for i, (first, free) in enumerate(self._free):
            if free >= count:
                self._free[i : i + 1] = [(first + count, free - count)] if free > count else []
                return first
        return None

    def give_back(self, first: int, count: int) -> None:
        runs = sorted([*self._free, (first, count)])
        joined = [runs[0]]
        for start, length in runs[1:]:
            before, size = joined[-1]
            assert before + size <= start, "a place was given back twice"
            if before + size == start:
                joined[-1] = (before, size + length)
            else:
                joined.append((start, length))
        self._free = joined


class SlotPool:
    """Single slots, each with an owner (a number from 0 on)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: Slots = np.arange(size - 1, -1, -1, dtype=np.int32)
        self._count = size
        self._owner = np.full(size, -1, np.int64)

    @property
    def free(self) -> int:
        return self._count

    def take(self, count: int, owner: int) -> Slots:
        """`count` slots, which must be free."""
        assert count <= self._count, (count, self._count)
        self._count -= count
        slots = self._free[self._count : self._count + count].copy()
        self._owner[slots] = owner
        return slots

    def keep(self, owner: int, used: Slots) -> None:
        """Gives back all of the owner's slots but those in `used`."""
        mine = self._owner == owner
        mine[used] = False
        slots = np.flatnonzero(mine)
        self._owner[slots] = -1
        self._free[self._count : self._count + len(slots)] = slots
        self._count += len(slots)
