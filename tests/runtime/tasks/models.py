"""Small random models for the task tests: transformers' own, and the same as the server runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.parity_pipelines import OWN_QUESTIONS, OWN_SENTENCES, make_model, make_tokenizer, served
from server.core import Call, Task
from server.runtime.encoder import EncoderModel

CALL = Call("test")
TEXTS = OWN_SENTENCES
QUESTIONS = OWN_QUESTIONS


@dataclass(frozen=True)
class Reference:
    """A model of transformers with its tokenizer, and the folder that both were saved in."""

    model: Any
    tokenizer: Any
    folder: Path
    task: Task

    @asynccontextmanager
    async def served(self, **manifest_fields: Any) -> AsyncIterator[EncoderModel]:
        async with served(self.folder, self.folder / "onnx", self.task, **manifest_fields) as model:
            yield model


def reference(folder: Path, task: Task, labels: list[str], architecture: str = "bert") -> Reference:
    tokenizer = make_tokenizer(architecture, [*TEXTS, *(text for pair in QUESTIONS for text in pair)])
    return Reference(make_model(architecture, task, labels, tokenizer, folder), tokenizer, folder, task)
