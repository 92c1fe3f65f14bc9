"""The prefix cache: which pages hold what beginnings, as a tree whose edges are pages of token ids.

A page's K and V depend on all tokens before it, on the adapter, and on the form of the weights that computed it. So a place in the
tree is a path of tokens below an adapter's key, and a page is `pure` when the wide form alone computed it and everything before it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from server.core import IntArray
from server.runtime.decoder.pages import PagePool


class _Node:
    __slots__ = ("children", "name", "page", "parent", "pure", "starts")

    def __init__(self, parent: _Node | None, name: bytes, page: int, pure: bool) -> None:
        self.parent = parent
        self.name = name
        self.page = page
        self.pure = pure
        self.children: dict[bytes, _Node] = {}
        self.starts: dict[bytes, _Node] = {}  # by the first half of the child's tokens: pages that are worth copying in part


@dataclass(slots=True)
class Match:
    """What the cache has of a sequence. `pages` are held for the caller; `source`, held too, has `copied` more positions to copy."""

    pages: list[int] = field(default_factory=list)
    source: int = -1
    copied: int = 0
    pure: int = 0  # leading pages that are pure
    source_pure: bool = False


class PrefixCache:
    """Full pages of sequences that ran, shared by reference and evicted least recently used first.

    `base`: positions before the first token (a prefix adapter's), which are the same for all sequences of a key.
    """

    def __init__(self, pool: PagePool, page: int, *, enabled: bool = True) -> None:
        self._pool = pool
        self.page = page
        self.enabled = enabled
        self._roots: dict[str, _Node] = {}
        # Oldest first. A parent is always younger than its children, so that leaves come first.
        self._order: OrderedDict[_Node, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def match(self, key: str, ids: IntArray, base: int, positions: int, *, pure: bool) -> Match:
        """The longest cached beginning within the first `positions`; with `pure` only what the wide form computed.

        Pages that lie wholly before `base` are not the cache's: the caller has them.
        """
        found = Match()
        node = self._roots.get(key)
        if node is None:
            return found
        size = self.page
        index = base // size
        path: list[_Node] = []
        while (index + 1) * size <= positions:
            child = node.children.get(self._name(ids, base, index))
            if child is None or (pure and not child.pure):
                break
            self._pool.hold(child.page)
            found.pages.append(child.page)
            if child.pure and found.pure == len(path):
                found.pure += 1
            path.append(child)
            node, index = child, index + 1
        begin = index * size - base
        if begin >= 0:
            self._copy_in_part(node, ids[begin : begin + min(positions - index * size, size)], found, pure=pure)
        self._touch(path)
        return found

    def _copy_in_part(self, node: _Node, ids: IntArray, found: Match, *, pure: bool) -> None:
        """Finds a page below `node` that begins with at least half a page of `ids`."""
        half = self.page // 2
        child = node.starts.get(ids[:half].tobytes()) if len(ids) >= half else None
        if child is None or (pure and not child.pure):
            return
        mine, width = ids.tobytes(), ids.itemsize
        same = half
        while same < len(ids) and mine[same * width : (same + 1) * width] == child.name[same * width : (same + 1) * width]:
            same += 1
        self._pool.hold(child.page)
        found.source, found.copied, found.source_pure = child.page, same, child.pure

    def insert(self, key: str, ids: IntArray, base: int, pages: list[int], positions: int, pure: int) -> None:
        """Keeps the full pages of a sequence's first `positions`, of which the first `pure` positions are pure.

        Where the tree has a page already, it stays, unless it is not pure and the new one is.
        """
        if not self.enabled:
            return
        size = self.page
        node = self._roots.get(key)
        if node is None:
            if positions // size <= base // size:
                return
            node = self._roots[key] = _Node(None, b"", -1, True)
        path = []
        for index in range(base // size, positions // size):
            name = self._name(ids, base, index)
            child = node.children.get(name)
            clean = (index + 1) * size <= pure
            if child is None:
                child = self._grow(node, name, pages[index], clean, whole=index * size >= base)
                if child is None:
                    break
            elif clean and not child.pure and child.page != pages[index] and self._cacheable(pages[index]):
                self._pool.cache(pages[index])
                self._pool.forget(child.page)
                child.page, child.pure = pages[index], True
            path.append(child)
            node = child
        self._touch(path)

    def _grow(self, node: _Node, name: bytes, page: int, pure: bool, *, whole: bool) -> _Node | None:
        if not self._cacheable(page):
            return None
        self._pool.cache(page)
        child = node.children[name] = _Node(node, name, page, pure)
        if whole:
            node.starts[name[: len(name) // 2]] = child
        return child

    def _cacheable(self, page: int) -> bool:
        """A page has one place: a sequence whose beginning left the tree while it ran may hold pages that are still in it."""
        return not self._pool.cached(page)

    def evict(self) -> bool:
        """Frees the page that was not used for longest; False where sequences hold all of them."""
        inner: _Node | None = None
        for _ in range(len(self._order)):
            node = next(iter(self._order))
            if self._pool.holders(node.page) == 1:
                if not node.children:
                    self._remove(node)
                    return True
                inner = inner or node
            self._order.move_to_end(node)
        if inner is None:
            return False
        # A pure page took this place while a sequence that holds the former one went on below it.
        self._forget_below(inner)
        self._remove(inner)
        return True

    def drop(self, key: str) -> None:
        """Forgets all that is kept under a key; pages that sequences hold stay theirs."""
        root = self._roots.pop(key, None)
        if root is not None:
            self._forget_below(root)

    def clear(self) -> None:
        """Forgets everything."""
        for key in list(self._roots):
            self.drop(key)

    def _forget_below(self, top: _Node) -> None:
        stack = list(top.children.values())
        top.children, top.starts = {}, {}
        while stack:
            node = stack.pop()
            stack += node.children.values()
            del self._order[node]
            self._pool.forget(node.page)

    def _remove(self, node: _Node) -> None:
        parent = node.parent
        assert parent is not None, "roots are not in the order"
        del self._order[node]
        del parent.children[node.name]
        start = node.name[: len(node.name) // 2]
        if parent.starts.get(start) is node:
            del parent.starts[start]
        self._pool.forget(node.page)

    def _name(self, ids: IntArray, base: int, index: int) -> bytes:
        begin = index * self.page - base
        return ids[max(0, begin) : begin + self.page].tobytes()

    def _touch(self, path: list[_Node]) -> None:
        order = self._order
        for node in reversed(path):
            order[node] = None
            order.move_to_end(node)
