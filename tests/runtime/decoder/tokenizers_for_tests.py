"""Tokenizers of every kind of decoder: real vocabularies where they are at hand, and small ones that are made here."""

from __future__ import annotations

import functools
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

SHARED = Path(os.environ.get("UNDERSTUDY_SHARED", Path(__file__).resolve().parents[4] / "shared")) / "data"


def shared(path: str) -> Path:
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{found} is not at hand")
    return found


@functools.cache
def load(name: str) -> Any:
    """One of NAMES; skips the test where its files are absent."""
    return MAKERS[name]()


def _gpt2() -> Any:
    folder = shared("tokenizers/gpt2")
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_tokens([AddedToken("naïve token", normalized=False)])
    return tokenizer


def _bert() -> Any:
    tokenizer = Tokenizer(models.WordPiece.from_file(str(shared("tokenizers/bert-base-uncased") / "vocab.txt"), unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tokenizer


def _phi() -> Any:
    return Tokenizer.from_file(str(shared("tokenizers/phi-3-mini") / "tokenizer.json"))


def _stories() -> Any:
    """llama2.c's vocabulary of 512: specials, bytes, pieces."""
    raw = shared("tiny_weights/stories260K/tok512.bin").read_bytes()
    at, vocabulary = 4, {}
    while at < len(raw):
        _, length = struct.unpack_from("<fi", raw, at)
        at += 8
        piece = raw[at : at + length].decode().strip("\n") if len(vocabulary) < 3 else raw[at : at + length].decode()
        vocabulary[piece.replace(" ", "▁")] = len(vocabulary)
        at += length
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


PIECES = [
    "<unk>",
    "▁",
    "▁a",
    "▁the",
    "b",
    "c",
    "##d",
    "ing",
    ".",
    ",",
    "▁n't",
    "é",
    "日本",
    "<0xE6>",
    "<0x97>",
    "<0xA5>",
    "<0x41>",
    "</w>",
    "x</w>",
]


def _small(decoder: Any) -> Any:
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<unk>"))
    tokenizer.decoder = decoder
    return tokenizer


MAKERS = {
    "gpt2": _gpt2,
    "bert": _bert,
    "phi-3": _phi,
    "stories260K": _stories,
    "metaspace": lambda: _small(decoders.Metaspace()),
    "metaspace, never": lambda: _small(decoders.Metaspace(prepend_scheme="never")),
    "gemma": lambda: _small(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])),
    "word pieces, as they are": lambda: _small(decoders.WordPiece(cleanup=False)),
    "one step": lambda: _small(decoders.Sequence([decoders.ByteLevel()])),
    "none": lambda: _small_without(),
}
NAMES = list(MAKERS)


def _small_without() -> Any:
    return Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<unk>"))


def ends_of_words() -> Any:
    """A decoder that text.py does not know by name."""
    return _small(decoders.BPEDecoder(suffix="</w>"))
