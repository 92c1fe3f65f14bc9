"""Checkpoints of llama2.c (github.com/karpathy/llama2.c) as Hugging Face folders.

Format "v0": seven little-endian int32 (dim, hidden_dim, layers, heads, kv_heads, vocabulary, positions; a negative vocabulary means that
the head is a table of its own), then float32: embeddings, per kind of weight all layers one after the other, the last norm, two unused
tables of rotary values, the head. The tokenizer's file has the longest token's length, then per token a float32 score, a length and the
bytes. llama2.c turns neighbouring pairs of a head, everybody else its two halves: rows of q and k are put into that order here.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from server.errors import ModelRejected

EPSILON = 1e-5
BOS, EOS = 1, 2
_HEADER = struct.Struct("<7i")
_MOST = (32_768, 262_144, 512, 1024, 1024, 4_000_000, 1_000_000)
_NAMES = ("dim", "hidden_dim", "layers", "heads", "kv_heads", "vocabulary", "positions")


def convert(weights: Path, tokenizer: Path, folder: Path) -> None:
    """Writes config.json, model.safetensors, tokenizer.json and generation_config.json to `folder`, which must exist.

    Raises:
        ModelRejected: a file is no such checkpoint, is truncated, or the two do not belong together.
    """
    from safetensors.numpy import save_file

    sizes, tied = read_sizes(weights)
    save_file(_tensors(weights, sizes, tied), str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes["dim"],
        "intermediate_size": sizes["hidden_dim"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "vocab_size": sizes["vocabulary"],
        "max_position_embeddings": sizes["positions"],
        "rms_norm_eps": EPSILON,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": BOS, "eos_token_id": [BOS, EOS]}), encoding="utf-8")
    _tokenizer(tokenizer, sizes["vocabulary"]).save(str(folder / "tokenizer.json"))


def read_sizes(path: Path) -> tuple[dict[str, int], bool]:
    """The header's sizes, and whether embeddings are the head too; raises ModelRejected unless the file is as long as they say."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise _damaged(path, f"it has {len(head)} bytes")
    sizes = dict(zip(_NAMES, _HEADER.unpack(head), strict=True))
    tied = sizes["vocabulary"] > 0
    sizes["vocabulary"] = abs(sizes["vocabulary"])
    for (name, value), most in zip(sizes.items(), _MOST, strict=True):
        if not 0 < value <= most:
            raise _damaged(path, f"{name} is {value}")
    if sizes["dim"] % sizes["heads"] or sizes["heads"] % sizes["kv_heads"] or sizes["dim"] // sizes["heads"] % 2:
        raise _damaged(path, f"{sizes['dim']} dimensions do not make {sizes['heads']} heads over {sizes['kv_heads']}")
    wanted = _HEADER.size + 4 * sum(int(np.prod(shape)) for _, shape in _layout(sizes, tied))
    if path.stat().st_size != wanted:
        raise _damaged(path, f"it has {path.stat().st_size} bytes and its header leads to {wanted}")
    return sizes, tied


def _damaged(path: Path, what: str) -> ModelRejected:
    return ModelRejected(f"{path.name} is no float32 checkpoint of llama2.c: {what}. Download it again.", file=path.name)


def _layout(s: dict[str, int], tied: bool) -> list[tuple[str, tuple[int, ...]]]:
    size, layers = s["dim"] // s["heads"], s["layers"]
    d, kv, inner = s["dim"], s["kv_heads"] * size, s["hidden_dim"]
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("embed", (s["vocabulary"], d)),
        ("input_layernorm", (layers, d)),
        ("self_attn.q_proj", (layers, d, d)),
        ("self_attn.k_proj", (layers, kv, d)),
        ("self_attn.v_proj", (layers, kv, d)),
        ("self_attn.o_proj", (layers, d, d)),
        ("post_attention_layernorm", (layers, d)),
        ("mlp.gate_proj", (layers, inner, d)),
        ("mlp.down_proj", (layers, d, inner)),
        ("mlp.up_proj", (layers, inner, d)),
        ("norm", (d,)),
        ("", (s["positions"], size)),  # cosines and sines that nobody reads
    ]
    return shapes if tied else [*shapes, ("lm_head", (s["vocabulary"], d))]


def _tensors(path: Path, sizes: dict[str, int], tied: bool) -> dict[str, Any]:
    heads = {"self_attn.q_proj": sizes["heads"], "self_attn.k_proj": sizes["kv_heads"]}
    top = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "lm_head": "lm_head.weight"}
    tensors: dict[str, Any] = {}
    offset = _HEADER.size
    for name, shape in _layout(sizes, tied):
        values = np.memmap(path, dtype="<f4", mode="r", offset=offset, shape=shape)
        offset += values.nbytes
        if name in top:
            tensors[top[name]] = np.array(values)
        elif name:
            for i, one in enumerate(values):
                tensors[f"model.layers.{i}.{name}.weight"] = _halves(one, heads[name]) if name in heads else np.array(one)
    return tensors


def _halves(weight: Any, heads: int) -> Any:
    """Rows 2i and 2i + 1 of each head become rows i and i + half."""
    rows, columns = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, rows // heads // 2, 2, columns).transpose(0, 2, 1, 3)).reshape(rows, columns)


def _tokenizer(path: Path, vocabulary: int) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces, scores = _pieces(path, vocabulary)
    names = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
    if len(names) != len(pieces):
        raise ModelRejected(f"{path.name} has a token twice; take the tokenizer that belongs to these weights.", file=path.name)
    # llama2.c joins the two neighbours whose token has the best score; a list of merges in that order does the same.
    merges = []
    for piece in sorted((p for p in pieces[259:] if len(p) > 1), key=lambda p: (-scores[names[p]], names[p])):
        merges += [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in names and piece[i:] in names]
    tokenizer = Tokenizer(models.BPE(names, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return tokenizer


def _pieces(path: Path, vocabulary: int) -> tuple[list[str], list[float]]:
    raw = path.read_bytes() if path.is_file() and path.stat().st_size < 64 << 20 else b""
    pieces: list[str] = []
    scores: list[float] = []
    at = 4
    try:
        for _ in range(vocabulary):
            score, length = struct.unpack_from("<fi", raw, at)
            at += 8
            if not 0 <= length <= len(raw) - at:
                raise ValueError("a token's length")
            pieces.append(raw[at : at + length].decode("utf-8").replace(" ", "▁"))
            scores.append(score)
            at += length
    except (struct.error, ValueError) as error:
        raise ModelRejected(
            f"{path.name} is no tokenizer of llama2.c with {vocabulary} tokens ({error}); take the one that belongs to these weights.",
            file=path.name,
        ) from None
    # The file has them as they print.
    pieces[:3] = ["<unk>", "<s>", "</s>"][: len(pieces)]
    return pieces, scores
