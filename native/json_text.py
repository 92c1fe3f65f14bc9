"""Whether a stretch of characters is one JSON value (RFC 8259), without building it: the twin of the compiled scorer's check."""

from __future__ import annotations

from collections.abc import Sequence

DEEPEST = 256
_WHITE = (0x20, 0x09, 0x0A, 0x0D)
_LITERALS = (tuple(map(ord, "true")), tuple(map(ord, "false")), tuple(map(ord, "null")))


def is_json(text: Sequence[int], begin: int, end: int) -> bool:
    """For code points; nesting deeper than 256 counts as invalid. No recursion."""
    stack: list[int] = []  # 1: in an object, 0: in an array
    i = begin
    expect = "value"  # value, first (value or the end of an empty container), after
    while True:
        while i < end and text[i] in _WHITE:
            i += 1
        if i >= end:
            return expect == "after" and not stack
        c = text[i]
        if expect == "after":
            if not stack:
                return False
            if c == (0x7D if stack[-1] else 0x5D):
                stack.pop()
                i += 1
                continue
            if c != 0x2C:
                return False
            i = _key(text, i + 1, end) if stack[-1] else i + 1
            expect = "value"
        elif c in (0x7B, 0x5B):
            stack.append(int(c == 0x7B))
            if len(stack) > DEEPEST:
                return False
            i += 1
            while i < end and text[i] in _WHITE:
                i += 1
            if i < end and text[i] == c + 2:
                stack.pop()
                i += 1
                expect = "after"
            elif c == 0x7B:
                i = _key(text, i, end)
        else:
            i = _string(text, i, end) if c == 0x22 else _scalar(text, i, end)
            expect = "after"
        if i < 0:
            return False


def _key(text: Sequence[int], i: int, end: int) -> int:
    """Past a member's name and colon, or -1."""
    while i < end and text[i] in _WHITE:
        i += 1
    if i >= end or text[i] != 0x22:
        return -1
    i = _string(text, i, end)
    while 0 <= i < end and text[i] in _WHITE:
        i += 1
    return i + 1 if 0 <= i < end and text[i] == 0x3A else -1


def _string(text: Sequence[int], i: int, end: int) -> int:
    i += 1
    while i < end:
        c = text[i]
        if c == 0x22:
            return i + 1
        if c < 0x20:
            return -1
        if c == 0x5C:
            i += 1
            if i >= end or chr(text[i]) not in '"\\/bfnrtu':
                return -1
            if text[i] == 0x75:
                if i + 4 >= end or any(chr(h) not in "0123456789abcdefABCDEF" for h in text[i + 1 : i + 5]):
                    return -1
                i += 4
        i += 1
    return -1


def _scalar(text: Sequence[int], i: int, end: int) -> int:
    for literal in _LITERALS:
        if tuple(text[i : min(i + len(literal), end)]) == literal:
            return i + len(literal)
    if i < end and text[i] == 0x2D:
        i += 1
    start = i
    i = _digits(text, i, end)
    if i == start or (text[start] == 0x30 and i > start + 1):
        return -1
    if i < end and text[i] == 0x2E:
        fraction = _digits(text, i + 1, end)
        if fraction == i + 1:
            return -1
        i = fraction
    if i < end and text[i] in (0x65, 0x45):
        i += 1
        if i < end and text[i] in (0x2B, 0x2D):
            i += 1
        power = _digits(text, i, end)
        if power == i:
            return -1
        i = power
    return i


def _digits(text: Sequence[int], i: int, end: int) -> int:
    while i < end and 0x30 <= text[i] <= 0x39:
        i += 1
    return i
