"""Small vocabularies that come out the same in every process.

The trainers of `tokenizers` for word pieces and unigrams walk hash maps of random order, so that two processes that train
on the same texts number, and even choose, their pieces differently: a random model over them is another model each time.
Byte pairs alone are stable.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any


def word_pieces(tokenizer: Any, texts: Iterable[str], special: Sequence[str], size: int) -> dict[str, int]:
    """Token -> id for a WordPiece model: `special` first, then pieces of `texts` that begin words, then the same as "##" pieces.

    `tokenizer` gives normalizer and pre-tokenizer and is left as it is; at most `size` tokens.
    """
    from tokenizers import Tokenizer, models, trainers

    pairs = Tokenizer(models.BPE())
    pairs.normalizer, pairs.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    pairs.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=(size - len(special)) // 2, show_progress=False))
    pieces = sorted(pairs.get_vocab())
    return {token: n for n, token in enumerate([*special, *pieces, *("##" + piece for piece in pieces)])}


def unigrams(tokenizer: Any, texts: Iterable[str], special: Sequence[str], size: int, unknown: str) -> tuple[list[tuple[str, float]], int]:
    """(token, log probability) pairs for a Unigram model, `special` first, and the unknown token's id; `tokenizer` as in `word_pieces`."""
    from tokenizers import Tokenizer, models, trainers

    trained = Tokenizer(models.Unigram())
    trained.normalizer, trained.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=list(special), unk_token=unknown, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    pieces = json.loads(trained.to_str())["model"]["vocab"][len(special) :]
    # Ties differ in the fourth digit, by the order in which the trainer met them.
    vocabulary = [(token, 0.0) for token in special] + sorted((token, round(score, 2)) for token, score in pieces)
    return vocabulary, list(special).index(unknown)
