"""RoBERTa and its multilingual and French relatives: positions start behind the padding id, and the head has its own dense layer.

The token type table has one row as a rule, which the writer folds into the positions.
"""

from __future__ import annotations

from server.runtime.graphs.architecture import BERT_TENSORS, TOKEN_HEADS, Architecture, HeadKind, HeadNames

ROBERTA = Architecture(
    model_types=("roberta", "xlm-roberta", "camembert"),
    prefix="roberta",
    tensors=BERT_TENSORS,
    heads={**TOKEN_HEADS, HeadKind.SEQUENCE: HeadNames((("classifier.dense", "tanh"), ("classifier.out_proj", "")))},
    position_offset="after-padding",
    token_types=True,
)
