"""Tokenizers of encoder-decoders as tokenizer.json, without a template: what stands around a text is written down in the manifest instead.

Fast tokenizers are taken as they are, slow ones that transformers can convert are converted. Marian and M2M100 have neither: their
vocabulary (vocab.json) numbers the pieces otherwise than their sentencepiece model does, so a Unigram model is made of both.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.errors import ModelRejected
from server.runtime.graphs.config import read_json

TARGET_TOKENIZER = "target_tokenizer.json"
_LANGUAGE = {
    "nllb": re.compile(r"[a-z]{3}_[A-Z][a-z]{3}"),
    "mbart": re.compile(r"[a-z]{2}_[A-Z]{2}"),
    "m2m": re.compile(r"__([a-z]{2,3})__"),
    "marian": re.compile(r">>([A-Za-z_]{2,20})<<"),
}
SOURCE, TARGET = -1, -2


@dataclass
class Converted:
    """`prefix`, `suffix`: around a text's tokens, with SOURCE and TARGET for languages. `unknown`: id of what is not known.

    `pieces`: size of the vocabulary that texts are split by; ids beyond the model's own are not known to it.
    """

    prefix: list[int]
    suffix: list[int]
    unknown: int
    pieces: int
    languages: dict[str, int] = field(default_factory=dict)
    target_by: str = ""
    source_language: str = ""
    target_language: str = ""


def convert(folder: Path, out: Path, model_type: str) -> Converted:
    """Writes tokenizer.json, and target_tokenizer.json where answers are read with other pieces, to `out`; raises ModelRejected."""
    tokenizer = load_tokenizer(folder)
    if model_type == "marian":
        return _marian(tokenizer, folder, out)
    if not getattr(tokenizer, "is_fast", False):
        if model_type != "m2m_100":
            raise ModelRejected(
                f"the model's tokenizer ({type(tokenizer).__name__}) cannot be converted to tokenizer.json; save a fast one."
            )
        return _m2m(tokenizer, folder, out)
    return _fast(tokenizer, out)


def load_tokenizer(folder: Path) -> Any:
    """Transformers' own tokenizer, its advice left out; raises ModelRejected."""
    from transformers import AutoTokenizer

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises whatever its files lead to
        raise ModelRejected(f"transformers cannot load the model's tokenizer: {type(error).__name__}: {str(error)[:300]}") from error


def _fast(tokenizer: Any, out: Path) -> Converted:
    prefix, suffix = _around(tokenizer)
    languages, target_by = _languages_of(tokenizer)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content |= {"post_processor": None, "truncation": None, "padding": None}
    (out / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    source = next((code for code, token in languages.items() if token in (*prefix, *suffix)), "")
    mark = languages.get(source)
    return Converted(
        prefix=[SOURCE if token == mark else token for token in prefix],
        suffix=[SOURCE if token == mark else token for token in suffix],
        unknown=int(tokenizer.unk_token_id or 0),
        pieces=len(tokenizer),
        languages=languages,
        target_by=target_by,
        source_language=source,
        target_language=str(getattr(tokenizer, "tgt_lang", None) or ""),
    )


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text."""
    text = "a text of a few words"
    bare, full = tokenizer(text, add_special_tokens=False).input_ids, tokenizer(text).input_ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise ModelRejected("the tokenizer changes a text's tokens when it adds special ones; such a model cannot be served.")


def _languages_of(tokenizer: Any) -> tuple[dict[str, int], str]:
    """Languages by code, and how the target is told: NLLB, mBART-50 and M2M100 by the first token, mBART-25 by the start token."""
    name = type(tokenizer).__name__
    kind = "nllb" if name.startswith("Nllb") else "mbart" if name.startswith("MBart") else ""
    if not kind:
        return {}, ""
    found = {
        token: int(tokenizer.convert_tokens_to_ids(token)) for token in tokenizer.get_added_vocab() if _LANGUAGE[kind].fullmatch(token)
    }
    return found, "start" if name in ("MBartTokenizer", "MBartTokenizerFast") else "first"


def _marian(tokenizer: Any, folder: Path, out: Path) -> Converted:
    vocabulary = _vocabulary(folder / "vocab.json")
    separate = (folder / "target_vocab.json").is_file()
    target = _vocabulary(folder / "target_vocab.json") if separate else vocabulary
    extra = _write_unigram(vocabulary, folder / "source.spm", out / "tokenizer.json")
    specials = {str(tokenizer.eos_token), str(tokenizer.pad_token), str(tokenizer.unk_token)}
    specials |= {piece for piece in target if _LANGUAGE["marian"].fullmatch(piece)}
    _write_reader(target, specials, out / TARGET_TOKENIZER)
    languages = {match[1]: token for piece, token in vocabulary.items() if (match := _LANGUAGE["marian"].fullmatch(piece))}
    return Converted(
        prefix=[TARGET] if languages else [],
        suffix=[int(tokenizer.eos_token_id)],
        unknown=vocabulary[str(tokenizer.unk_token)],
        pieces=len(vocabulary) + extra,
        languages=languages,
        source_language=str(tokenizer.source_lang or ""),
        target_language=(next(iter(languages)) if len(languages) == 1 else "") if languages else str(tokenizer.target_lang or ""),
    )


def _m2m(tokenizer: Any, folder: Path, out: Path) -> Converted:
    vocabulary = _vocabulary(folder / "vocab.json")
    languages = {str(code): int(token) for code, token in tokenizer.lang_code_to_id.items()}
    extra = _write_unigram(vocabulary, folder / "sentencepiece.bpe.model", out / "tokenizer.json")
    named = {**vocabulary, **{f"__{code}__": token for code, token in languages.items()}}
    specials = {str(token) for token in tokenizer.all_special_tokens} & named.keys() | {f"__{code}__" for code in languages}
    _write_reader(named, specials, out / TARGET_TOKENIZER)
    return Converted(
        prefix=[SOURCE],
        suffix=[int(tokenizer.eos_token_id)],
        unknown=vocabulary[str(tokenizer.unk_token)],
        pieces=len(vocabulary) + extra,
        languages=languages,
        target_by="first",
        source_language=str(tokenizer.src_lang or ""),
        target_language=str(tokenizer.tgt_lang or ""),
    )


def _vocabulary(path: Path) -> dict[str, int]:
    if not path.is_file():
        raise ModelRejected(f"the model has no {path.name}, which its tokenizer needs.", file=path.name)
    content = read_json(path)
    if sorted(content.values()) != list(range(len(content))):
        raise ModelRejected(f"{path.name} does not number its pieces from 0 on without a gap.", file=path.name)
    return {str(piece): int(number) for piece, number in content.items()}


def _write_unigram(vocabulary: Mapping[str, int], model: Path, target: Path) -> int:
    """A tokenizer that splits as the sentencepiece model does and numbers as the vocabulary does.

    Returns how many pieces only the former has.

    A piece that is only the vocabulary's gets a name that no text has; one that is only the model's a number beyond the vocabulary.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto = _read_sentencepiece(model)
    if proto.trainer_spec.model_type not in (1, 2):
        raise ModelRejected(f"{model.name} is neither a Unigram nor a BPE model.", file=model.name)
    normal = {piece.piece: float(piece.score) for piece in proto.pieces if piece.type in (1, 4)}
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    unknown = vocabulary.get("<unk>", 0)
    # U+FDD0 is for internal use: no text has it (Unicode 23.7), and where one does it becomes a token like any other.
    named = [piece if piece in normal else f"\ufdd0{number}" for number, piece in enumerate(ordered)]
    extra = [piece for piece in normal if piece not in vocabulary]
    if proto.trainer_spec.model_type == 1:
        pieces = [(piece, normal.get(piece, 0.0)) for piece in (*named, *extra)]
        core: Any = models.Unigram(pieces, unk_id=unknown, byte_fallback=False)
    else:
        numbers = {piece: number for number, piece in enumerate((*named, *extra))}
        core = models.BPE(numbers, _merges(normal), unk_token=named[unknown], fuse_unk=True)
    tokenizer = Tokenizer(core)
    charsmap = proto.normalizer_spec.precompiled_charsmap
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=proto.trainer_spec.model_type == 1)
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.save(str(target), pretty=False)
    return len(extra)


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges of a sentencepiece BPE model: every way to split a piece in two, best pieces first."""
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((score, left, right))
    merges.sort(key=lambda one: (-one[0], len(one[1]), len(one[2])))
    return [(left, right) for _, left, right in merges]


def _write_reader(vocabulary: Mapping[str, int], specials: set[str], target: Path) -> None:
    """A tokenizer that turns numbers into text; `specials` are left out of texts."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    size = vocabulary[ordered[-1]] + 1
    pieces = [f"\ufdd0{number}" for number in range(size)]
    for piece, number in vocabulary.items():
        pieces[number] = piece
    tokenizer = Tokenizer(models.Unigram([(piece, 0.0) for piece in pieces], unk_id=vocabulary.get("<unk>", 0), byte_fallback=False))
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in sorted(specials)])
    tokenizer.save(str(target), pretty=False)


def _read_sentencepiece(path: Path) -> Any:
    from transformers.convert_slow_tokenizer import import_protobuf

    if not path.is_file():
        raise ModelRejected(f"the model has no {path.name}, which its tokenizer needs.", file=path.name)
    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's own class differs by implementation
        raise ModelRejected(f"{path.name} is no sentencepiece model: {str(error)[:200]}", file=path.name) from error
    return proto
