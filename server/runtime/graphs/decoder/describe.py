"""What else a folder says of its decoder: stop tokens, first token, chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from server.errors import ModelRejected
from server.runtime.graphs.config import read_json
from server.runtime.graphs.decoder.config import DecoderConfig

CHAT_TEMPLATE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 256 << 10
# Tokens that end a turn, by the names that model families give them; they stop an answer where the chat template writes them.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<|endofturn|>")


def describe_decoder(folder: Path, config: DecoderConfig) -> tuple[list[int], int | None, str]:
    """(tokens that end an answer, the token that begins a text or None, the chat template or "").

    Stop tokens: eos_token_id of generation_config.json, else of config.json, else the tokenizer's eos_token; and those that end a turn in
    the chat template.

    Raises:
        ModelRejected: a file is broken, or the template is too large.
    """
    tokenizer = _object(folder / "tokenizer_config.json")
    generation = _object(folder / "generation_config.json")
    ids = _added_tokens(folder / "tokenizer.json")
    stops = _ids(generation.get("eos_token_id"), config.vocabulary) or list(config.stop_token_ids)
    if not stops:
        stops = _ids(ids.get(_token(tokenizer, "eos_token")), config.vocabulary)
    template = chat_template(folder)
    stops += [ids[name] for name in _ENDS if name in ids and name in template]
    bos = config.bos_token_id
    if bos is None:
        bos = ids.get(_token(tokenizer, "bos_token"))
    return list(dict.fromkeys(stops)), bos, template


def chat_template(folder: Path) -> str:
    """The template of chat_template.jinja, chat_template.json or tokenizer_config.json, in this order; "" without one."""
    own = folder / CHAT_TEMPLATE
    if own.is_file():
        if own.stat().st_size > MAX_TEMPLATE_BYTES:
            raise _too_large(own.name, own.stat().st_size)
        try:
            return own.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ModelRejected(f"{own.name} is not UTF-8 text. Download it again.", file=own.name) from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        value = _object(folder / name).get("chat_template")
        if isinstance(value, list):  # several, by name
            named = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
            value = named.get("default")
        if isinstance(value, str) and value:
            if len(value.encode(errors="replace")) > MAX_TEMPLATE_BYTES:
                raise _too_large(name, len(value))
            return value
    return ""


def _too_large(name: str, size: int) -> ModelRejected:
    return ModelRejected(f"{name}: the chat template has {size} bytes; at most {MAX_TEMPLATE_BYTES} are read.", file=name)


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token(config: dict[str, Any], key: str) -> str:
    value = config.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _ids(value: object, vocabulary: int) -> list[int]:
    listed = value if isinstance(value, list) else [value]
    return [i for i in listed if type(i) is int and 0 <= i < vocabulary]


def _added_tokens(path: Path) -> dict[str, int]:
    """Ids of the tokenizer's added tokens by their text."""
    if not path.is_file() or path.stat().st_size > 128 << 20:
        return {}
    try:
        added = json.loads(path.read_bytes()).get("added_tokens")
    except (ValueError, AttributeError, RecursionError):
        raise ModelRejected("tokenizer.json is no JSON object. Download it again.", file="tokenizer.json") from None
    listed = added if isinstance(added, list) else []
    found = [one for one in listed if isinstance(one, dict) and isinstance(one.get("content"), str) and type(one.get("id")) is int]
    return {one["content"]: one["id"] for one in found}
