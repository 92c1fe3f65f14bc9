"""Regular expressions out of adapter_config.json. Python's engine may take ages over a hostile one, so only tame ones are run.

Tame: at most `MAX_REPEATS` repetitions, none of them around a group, no back references and no looking around. Over a module path of at
most `MAX_PATH` characters the engine then backtracks a bounded number of times.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from server.errors import ModelRejected

MAX_PATTERN, MAX_PATH, MAX_REPEATS = 4096, 128, 5
_PLAIN = re.compile(r"[A-Za-z0-9_.\-]*")
Pattern = Callable[[str], bool]


def pattern(text: str, key: str, *, suffix: bool = False) -> Pattern:
    """Whether a module path fits `text`, as a whole or (`suffix`) from some part of it to its end, as PEFT's get_pattern_key does.

    Raises ModelRejected for what is no tame expression; metadata `field` is `key`.
    """
    if not isinstance(text, str) or len(text) > MAX_PATTERN:
        raise _wild(text, key)
    if suffix and _PLAIN.fullmatch(text) and "." not in text:
        return lambda module: module == text or module.endswith(f".{text}")
    # PEFT puts "(.*\.)?" before a suffix; the end of the path may be marked in the expression itself.
    wrapped = rf"(.*\.)?({text})$" if suffix else text
    repeats = len(re.findall(r"[*+{]", _without_classes(text)))
    if repeats > MAX_REPEATS or re.search(r"\)[*+{]|\\[1-9]|\(\?[^:P]|\(\?P=", text):
        raise _wild(text, key)
    try:
        compiled = re.compile(wrapped)
    except (re.error, RecursionError, OverflowError):
        raise _wild(text, key) from None
    if suffix:
        return lambda module: len(module) <= MAX_PATH and compiled.match(module) is not None
    return lambda module: len(module) <= MAX_PATH and compiled.fullmatch(module) is not None


def _without_classes(text: str) -> str:
    """The expression without escaped characters and without what stands between brackets."""
    return re.sub(r"\[[^\]]*\]", "", re.sub(r"\\.", "", text))


def _wild(text: object, key: str) -> ModelRejected:
    return ModelRejected(
        f"adapter_config.json: {key} has the pattern {str(text)[:100]!r}; expected an expression with at most {MAX_REPEATS} repetitions, "
        "none of them around a group. Name the modules one by one instead.",
        field=key,
    )
