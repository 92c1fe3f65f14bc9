"""What a model is told when it is asked for a row's answer: by the code that asks it while serving."""

from __future__ import annotations

from server.core import Message, Work
from server.routing.candidates import Brief
from server.routing.prompting import messages_of
from server.routing.skills import Skill
from trainer.curate.rows import Row


def conversation(skill: Skill, row: Row) -> tuple[Message, ...]:
    """The whole conversation up to the answer: the skill's instruction, labels and examples, then what the caller sent."""
    work = Work(messages=tuple(Message(role, content) for role, content in row.messages)) if row.messages else Work(row.text)
    return messages_of(Brief(skill, skill.labels, dict(row.parameters), row.instruction), work)
