"""Pages of K and V: a fixed number, counted references, and how many could be had back from the prefix cache. Integers alone."""

from __future__ import annotations


class PagePool:
    """Page numbers 0..count-1. Who takes or holds a page releases it once; a page without holders is free again.

    The prefix cache's own reference is marked, so that `evictable` counts the pages that nobody else holds.
    """

    def __init__(self, count: int) -> None:
        assert count > 0, "an engine needs pages"
        self.count = count
        self.evictable = 0
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._cached = bytearray(count)

    @property
    def free(self) -> int:
        """Pages that nobody holds, the cache neither."""
        return len(self._free)

    @property
    def available(self) -> int:
        """Pages that can be had: the free ones, and those that only the cache holds."""
        return len(self._free) + self.evictable

    @property
    def used(self) -> int:
        """Pages that sequences or stored prefixes hold."""
        return self.count - self.available

    def holders(self, page: int) -> int:
        """How many hold a page, the cache included."""
        return self._holders[page]

    def cached(self, page: int) -> bool:
        """Whether the cache is among a page's holders."""
        return bool(self._cached[page])

    def take(self) -> int | None:
        """A free page with one holder, or None."""
        if not self._free:
            return None
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more holder of a page that has some."""
        holders = self._holders[page]
        assert holders > 0, "a free page cannot be held"
        if holders == 1 and self._cached[page]:
            self.evictable -= 1
        self._holders[page] = holders + 1

    def release(self, page: int) -> None:
        """One holder less; the last one frees the page."""
        holders = self._holders[page] - 1
        assert holders >= 0, "a page was released twice"
        self._holders[page] = holders
        if holders == 0:
            assert not self._cached[page], "the cache gives its pages back by `forget`"
            self._free.append(page)
        elif holders == 1 and self._cached[page]:
            self.evictable += 1

    def cache(self, page: int) -> None:
        """The prefix cache becomes a holder."""
        assert not self._cached[page], "a page is in the cache once"
        self.hold(page)
        self._cached[page] = 1

    def forget(self, page: int) -> None:
        """The prefix cache lets go."""
        assert self._cached[page], "not in the cache"
        if self._holders[page] == 1:
            self.evictable -= 1
        self._cached[page] = 0
        self.release(page)
