"""Curated rows as the lines that vendors fine-tune on: the very words that the model will be asked with, and the wanted answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from server.core import Message
from server.errors import InvalidArgument
from server.routing.skills import CLASSIFYING, read_skill
from server.settings import SkillConfig
from trainer.curate.asking import conversation

if TYPE_CHECKING:
    from trainer.curate.rows import Row

# The others work on pairs, or answer with more than words.
TASKS = (*CLASSIFYING, "text-generation", "summarization", "translation")


@dataclass(slots=True, frozen=True)
class TrainingFile:
    """What was written: its SHA-256, and what it costs is counted from."""

    path: Path
    sha256: str
    examples: int
    messages: int
    content_bytes: int


def write_chat(path: Path, name: str, config: SkillConfig, rows: Sequence[Row]) -> TrainingFile:
    """One line a row, {"messages": [...]}, in UTF-8; the last message is the answer.

    Raises InvalidArgument for tasks whose rows cannot be asked again in the same words.
    """
    if config.task not in TASKS:
        message = f"Skills of the task {config.task} are not fine-tuned at a vendor; those of {', '.join(TASKS)} are."
        raise InvalidArgument(message, field="skill", task=config.task)
    skill = read_skill(name, config)
    digest = hashlib.sha256()
    counted = size = 0
    with path.open("wb") as file:
        for row in rows:
            talk = [*conversation(skill, row), Message("assistant", row.label or row.answer)]
            line = json.dumps({"messages": [{"role": m.role, "content": m.content} for m in talk]}, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            digest.update(line)
            counted += len(talk)
            size += sum(len(m.content.encode()) for m in talk)
    return TrainingFile(path, digest.hexdigest(), len(rows), counted, size)
