"""What the lake keeps of an interaction."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, fields
from typing import Any

from server.core import Call, Hop, Timings, Work
from server.errors import InternalError, UnderstudyError
from server.routing.candidates import Answer, Brief, Failure
from server.routing.items import Item

_MOST_LABELS = 8
_LOCAL = "local:"
_HOP = tuple(field.name for field in fields(Hop))  # asdict() copies deeply, which a hop needs not
_encode = json.JSONEncoder(ensure_ascii=False).encode


def row(brief: Brief, item: Item, call: Call, timings: Timings, started_ns: int, elapsed_s: float) -> dict[str, Any]:
    """The interaction as server.lake.schema describes it, without `user_hash`, which is the lake's to make."""
    skill, outcome, decision = brief.skill, item.outcome, item.outcome.decision
    teacher = next((item.answers[name] for name in skill.teachers if name in item.answers), None)
    name, student = local_answer(item)
    delivered = item.answers.get(decision.candidate)
    adapter, _, version = name.removeprefix("local:").partition("@")
    reply = outcome.reply
    return {
        "time_ns": started_ns,
        "interaction_id": outcome.interaction_id,
        "request_id": call.request_id,
        "skill": skill.name,
        "task": skill.task,
        "input_kind": item.work.kind,
        "input": shown(item.work),
        "instruction": brief.instruction or None,
        "parameters": _encode(dict(brief.parameters)) if brief.parameters else None,
        "detection": _encode(asdict(decision.detected)) if decision.detected else None,
        "preference": decision.preference.value,
        "difficulty": decision.difficulty,
        "hops": _encode([{name: getattr(hop, name) for name in _HOP} for hop in decision.hops]),
        "candidate": decision.candidate,
        "local": decision.local,
        "output_text": outcome.output_text,
        "labels": [label.name for label in reply.labels[:_MOST_LABELS]],
        "scores": [label.score for label in reply.labels[:_MOST_LABELS]],
        "tool_calls": _encode([asdict(one) for one in reply.tool_calls]) if reply.tool_calls else None,
        "finish_reason": reply.finish.value if reply.finish is not None else None,
        "findings": list(outcome.findings),
        "quality": outcome.quality,
        "error": _reason(outcome.error),
        "cost_micro_usd": outcome.cost_micro_usd,
        "input_tokens": item.input_tokens,
        "output_tokens": item.output_tokens,
        "queue_ms": timings.queue * 1e3,
        "tokenize_ms": timings.tokenize * 1e3,
        "run_ms": timings.run * 1e3,
        "post_ms": timings.post * 1e3,
        "provider_ms": item.provider_s * 1e3,
        "first_token_ms": item.first_token_s * 1e3 if item.first_token_s else None,
        "total_ms": elapsed_s * 1e3,
        "stream": item.stream,
        "teacher_label": _label(teacher),
        "student_label": _label(student),
        "teacher_text": teacher.reply.text if teacher else None,
        "teacher_tokens": _tokens(brief, teacher),
        "student_text": student.reply.text if student else None,
        "student_quality": student.quality if student else None,
        "student": adapter or None,
        "student_version": version or None,
        "source_model": delivered.source_model if delivered else None,
        "training_allowed": bool(teacher and teacher.training_allowed),
        "rollout_stage": decision.rollout_stage,
        "propensity": decision.propensity,
        "tenant": call.tenant or None,
    }


def local_answer(item: Item) -> tuple[str, Answer | None]:
    """The student whose answer the row tells: the one that was delivered, else the first that answered. Others are rows of shadows."""
    candidate = item.outcome.decision.candidate
    if candidate.startswith(_LOCAL) and candidate in item.answers:
        return candidate, item.answers[candidate]
    return next(((key, value) for key, value in item.answers.items() if key.startswith(_LOCAL)), ("", None))


def shadow_row(brief: Brief, item: Item, candidate: str, role: str, found: Answer | Failure, propensity: float) -> dict[str, Any]:
    """An answer that was asked for comparison and is no part of the interaction's row; as server.lake.schema describes it. `role`: student
    or teacher; `propensity`: the probability with which it was asked.
    """
    answer = found if isinstance(found, Answer) else None
    return {
        "time_ns": time.time_ns(),
        "interaction_id": item.outcome.interaction_id,
        "skill": brief.skill.name,
        "candidate": candidate,
        "role": role,
        "label": _label(answer),
        "text": answer.reply.text if answer else None,
        "quality": answer.quality if answer else None,
        "source_model": answer.source_model if answer else None,
        "training_allowed": bool(answer and answer.training_allowed),
        "cost_micro_usd": found.cost_micro_usd,
        "total_ms": found.elapsed_s * 1e3,
        "error": None if isinstance(found, Answer) else _reason(found.error),
        "propensity": propensity,
    }


def shown(work: Work) -> str:
    """An input as one string: a text as it is, pairs and conversations as JSON."""
    if work.kind == "text":
        return work.text
    if work.kind == "pair":
        return _encode({"text": work.text, "text_pair": work.text_pair})
    messages = [{"role": m.role, "content": m.content, **({"images": len(m.images)} if m.images else {})} for m in work.messages]
    return _encode(messages)


def _tokens(brief: Brief, teacher: Answer | None) -> str | None:
    """The teacher's tokens, where the skill keeps them: [text, logprob, [[text, logprob], ...]] of each."""
    if teacher is None or not brief.skill.teacher_logprobs or not teacher.reply.tokens:
        return None
    return _encode([(one.text, one.logprob, one.top) for one in teacher.reply.tokens])


def _label(answer: Answer | None) -> str | None:
    return answer.reply.labels[0].name if answer and answer.reply.labels else None


def _reason(error: Exception | None) -> str | None:
    return None if error is None else error.reason if isinstance(error, UnderstudyError) else InternalError.reason
