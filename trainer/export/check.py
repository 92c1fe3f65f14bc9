"""How an exported graph's answers compare with torch's on real text. optimum only warns; this is what fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from server.core import Task
from server.runtime.graphs.calibrate import default_texts
from server.runtime.ort import import_ort

Figures = dict[str, float]
_TEXTS = 48
_TOKENS = 128
_PAIRS = (Task.TEXT_RANKING, Task.QUESTION_ANSWERING, Task.ZERO_SHOT_CLASSIFICATION)


def compare(source: Path, out: Path, task: Task) -> Figures:
    """How far the graph in `out` is from the model in `source`, padding left out.

    `error`: RMS of the differences over RMS of the values; `max_error`: the largest difference over the largest value.
    """
    import torch
    from transformers import AutoTokenizer

    texts = default_texts()
    texts = texts[:: max(1, len(texts) // _TEXTS)]
    tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    pairs = [texts[1:] + texts[:1]] if task in _PAIRS else []
    batch = tokenizer(texts, *pairs, padding=True, truncation=True, max_length=_TOKENS, return_tensors="np")
    feeds = {name: value.astype(np.int64) for name, value in batch.items()}
    options = import_ort().SessionOptions()
    options.log_severity_level = 3
    session = import_ort().InferenceSession(str(out / "model.onnx"), options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    got = session.run(None, {name: feeds[name] for name in names})[0]
    with torch.no_grad():
        answer = _model(source, task)(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    if task is Task.FEATURE_EXTRACTION:
        want = answer.last_hidden_state.numpy()
    elif task is Task.QUESTION_ANSWERING:
        want = torch.stack([answer.start_logits, answer.end_logits], dim=-1).numpy()
    else:
        want = answer.logits.numpy()
    if want.ndim == 3:
        kept = feeds["attention_mask"].astype(bool)
        got, want = got[kept], want[kept]
    difference = got.astype(np.float64) - want
    return {
        "error": float(np.sqrt(np.square(difference).mean()) / max(np.sqrt(np.square(want, dtype=np.float64).mean()), 1e-30)),
        "max_error": float(np.abs(difference).max() / max(np.abs(want).max(), 1e-30)),
    }


def _model(source: Path, task: Task) -> Any:
    import transformers

    classes = {
        Task.FEATURE_EXTRACTION: transformers.AutoModel,
        Task.TOKEN_CLASSIFICATION: transformers.AutoModelForTokenClassification,
        Task.QUESTION_ANSWERING: transformers.AutoModelForQuestionAnswering,
    }
    kind: Any = classes.get(task, transformers.AutoModelForSequenceClassification)
    return kind.from_pretrained(str(source), use_safetensors=True, local_files_only=True).eval()
