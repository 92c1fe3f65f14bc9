"""Curated rows as files that other trainers read, one JSON document a line.

- openai: {"messages"}, as OpenAI's fine-tuning takes chats;
- sharegpt: {"conversations": [{"from", "value"}]}, as Axolotl and LLaMA-Factory read ShareGPT;
- alpaca: {"instruction", "input", "output"}, with {"history"} where a conversation has more turns;
- kto: {"prompt", "completion", "label"} and dpo: {"prompt", "chosen", "rejected"}, TRL's conversational forms;
- jsonl: every field of a row.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from server.core import Message
from server.errors import FailedPrecondition, InvalidArgument
from server.routing.skills import Skill
from trainer.curate.asking import conversation
from trainer.curate.rows import Row

PARTS = ("train", "held_out", "all")
_SPEAKERS = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt", "tool": "tool"}

Line = dict[str, Any]


@dataclass(slots=True, frozen=True)
class Written:
    """What was written. `skipped`: rows that the format has no use for, such as rows without a rejected answer in DPO."""

    path: Path
    lines: int
    rows: int
    skipped: int


def write(path: Path, rows: Iterable[Row], skill: Skill, form: str, part: str = "train") -> Written:
    """Writes the part of the rows in the form, whole or not at all: a file of that name is replaced once all is on the disk.

    Raises:
        InvalidArgument: no such form or part.
        FailedPrecondition: no row fits the form, or the file cannot be written.
    """
    if form not in FORMS:
        raise InvalidArgument(f"There is no format {form!r}; expected one of {', '.join(FORMS)}.", field="format")
    if part not in PARTS:
        raise InvalidArgument(f"There is no part {part!r}; expected one of {', '.join(PARTS)}.", field="part")
    chosen = [row for row in rows if part == "all" or row.held_out == (part == "held_out")]
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    lines = used = 0
    try:
        with draft.open("w", encoding="utf-8") as file:
            for row in chosen:
                before = lines
                for line in FORMS[form](skill, row):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    lines += 1
                used += lines > before
            file.flush()
            os.fsync(file.fileno())
        if not lines:
            why = "none has both a wanted and a rejected answer" if form == "dpo" else "none is left of the lake's rows"
            raise FailedPrecondition(f"{len(chosen)} rows of part {part!r}, and {why}. `understudy curate` says why rows fell away.")
        draft.replace(path)
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be written: {error.strerror}. Give another --out.", place=str(path)) from None
    finally:
        draft.unlink(missing_ok=True)
    return Written(path, lines, used, len(chosen) - used)


def _openai(skill: Skill, row: Row) -> Iterator[Line]:
    if row.answer:
        yield {"messages": [*_plain(conversation(skill, row)), _answer(row.answer)]}


def _sharegpt(skill: Skill, row: Row) -> Iterator[Line]:
    if row.answer:
        turns = [*conversation(skill, row), Message("assistant", row.answer)]
        yield {"conversations": [{"from": _SPEAKERS[turn.role], "value": turn.content} for turn in turns]}


def _alpaca(skill: Skill, row: Row) -> Iterator[Line]:
    """The system's words are the instruction and the last user's the input; without the former, the latter are the instruction."""
    if not row.answer:
        return
    turns = conversation(skill, row)
    system = "\n\n".join(turn.content for turn in turns if turn.role in ("system", "developer"))
    rest = [turn for turn in turns if turn.role not in ("system", "developer")]
    given = rest[-1].content if rest else ""
    line: Line = {"instruction": system or given, "input": given if system else "", "output": row.answer}
    earlier = rest[:-1]
    if earlier:
        line["history"] = [[a.content, b.content] for a, b in zip(earlier[::2], earlier[1::2], strict=False)]
    yield line


def _kto(skill: Skill, row: Row) -> Iterator[Line]:
    prompt = _plain(conversation(skill, row))
    for answer, wanted in ((row.answer, True), (row.rejected, False)):
        if answer:
            yield {"prompt": prompt, "completion": [_answer(answer)], "label": wanted}


def _dpo(skill: Skill, row: Row) -> Iterator[Line]:
    if row.answer and row.rejected:
        prompt = _plain(conversation(skill, row))
        yield {"prompt": prompt, "chosen": [_answer(row.answer)], "rejected": [_answer(row.rejected)]}


def _jsonl(_skill: Skill, row: Row) -> Iterator[Line]:
    plain = asdict(row)
    plain["messages"] = [{"role": role, "content": content} for role, content in row.messages]
    yield {**plain, "parameters": dict(row.parameters), "time": row.time.isoformat()}


FORMS: dict[str, Callable[[Skill, Row], Iterator[Line]]] = {
    "openai": _openai,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "kto": _kto,
    "dpo": _dpo,
    "jsonl": _jsonl,
}


def _plain(turns: Iterable[Message]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _answer(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
