"""understudy.v1.SkillService: the skills that callers can ask for, and their rollouts."""

from __future__ import annotations

from typing import Any

from server.api import calls
from server.api.paging import page_token, read_page
from server.api.wire import Context
from server.errors import InvalidArgument
from server.registry.rollouts import RolloutEvent
from server.routing.rollout_book import Report, RolloutBook
from server.routing.skills import SkillBook, Student
from understudy.v1 import rollout_pb2, skill_pb2
from understudy.v1 import skill_service_pb2 as pb

_PREFIX = "skills/"
MAX_REASON_BYTES = 4096


class SkillServicer:
    """Reads the book of skills."""

    def __init__(self, skills: SkillBook, rollouts: RolloutBook) -> None:
        self._skills = skills
        self._rollouts = rollouts

    async def GetSkill(self, request: pb.GetSkillRequest, _context: Context) -> pb.GetSkillResponse:
        """One skill."""
        return pb.GetSkillResponse(skill=self._message(_name(request.name)))

    async def ListSkills(self, request: pb.ListSkillsRequest, _context: Context) -> pb.ListSkillsResponse:
        """Skills by name, a page at a time."""
        size, after = read_page(request.page_size, request.page_token)
        names = [name for name in self._skills.names() if after is None or name > after[0]]
        more = page_token(names[size - 1], 0) if len(names) > size else ""
        return pb.ListSkillsResponse(skills=[self._message(name) for name in names[:size]], next_page_token=more)

    async def GetRollout(self, request: pb.GetRolloutRequest, _context: Context) -> pb.GetRolloutResponse:
        """Where a rollout is."""
        return pb.GetRolloutResponse(rollout=_rollout(self._rollouts.report(_name(request.name))))

    async def PromoteRollout(self, request: pb.PromoteRolloutRequest, _context: Context) -> pb.PromoteRolloutResponse:
        """The next stage, or a version to begin with."""
        return pb.PromoteRolloutResponse(rollout=await self._command(request, "promote", request.version))

    async def HoldRollout(self, request: pb.HoldRolloutRequest, _context: Context) -> pb.HoldRolloutResponse:
        """It stays where it is."""
        return pb.HoldRolloutResponse(rollout=await self._command(request, "hold"))

    async def ResumeRollout(self, request: pb.ResumeRolloutRequest, _context: Context) -> pb.ResumeRolloutResponse:
        """It goes on."""
        return pb.ResumeRolloutResponse(rollout=await self._command(request, "resume"))

    async def RollbackRollout(self, request: pb.RollbackRolloutRequest, _context: Context) -> pb.RollbackRolloutResponse:
        """The student goes."""
        return pb.RollbackRolloutResponse(rollout=await self._command(request, "rollback"))

    async def ListRolloutEvents(self, request: pb.ListRolloutEventsRequest, _context: Context) -> pb.ListRolloutEventsResponse:
        """The audit trail, newest first; a token is the time and the id of the last event that was seen."""
        name = _name(request.name)
        size, after = read_page(request.page_size, request.page_token)
        found = await self._rollouts.events(name, size + 1, None if after is None else (after[1], after[0]))
        more = page_token(found[size - 1].id, found[size - 1].time_ms) if len(found) > size else ""
        return pb.ListRolloutEventsResponse(events=[_event(one) for one in found[:size]], next_page_token=more)

    async def _command(self, request: Any, verb: str, version: str = "") -> rollout_pb2.Rollout:
        name = _name(request.name)
        if len(request.reason.encode()) > MAX_REASON_BYTES:
            message = f"reason has {len(request.reason.encode())} bytes; expected at most {MAX_REASON_BYTES}. Shorten it."
            raise InvalidArgument(message, field="reason", limit=MAX_REASON_BYTES)
        scope = calls.current()
        actor = scope.caller.name if scope.key is not None else "operator"
        return _rollout(await self._rollouts.command(name, verb, actor, request.reason.strip(), version))

    def _message(self, name: str) -> skill_pb2.Skill:
        skill, standing = self._skills.get(name), self._skills.standing(name)
        message = skill_pb2.Skill(
            name=_PREFIX + skill.name,
            task=skill.task,
            instruction=skill.instruction,
            labels=skill.labels,
            teacher=skill.teacher,
            base=skill.base,
            deliver_bar=skill.deliver_bar,
            second_try_bar=skill.second_try_bar,
            examples=[skill_pb2.SkillExample(input=given, output=wanted) for given, wanted in skill.examples],
            json_schema=skill.json_schema,
            fallbacks=skill.teachers[1:],
            student_model=skill.student_model,
            rollout_stage=standing.stage,
            rollout_percent=standing.percent,
            built_in=skill.built_in,
        )
        student = self._skills.student(name)
        if student is not None and not student.held:
            message.student.CopyFrom(_student(student))
        challenger = self._skills.student(name, standing.challenger) if standing.moves and standing.challenger else None
        if challenger is not None:
            message.challenger.CopyFrom(_student(challenger))
        return message


def _name(resource: str) -> str:
    name = resource.removeprefix(_PREFIX)
    if not resource.startswith(_PREFIX) or not name or "/" in name:
        raise InvalidArgument(f"name is {resource[:160]!r}; expected skills/<skill>.", field="name")
    return name


def _rollout(report: Report) -> rollout_pb2.Rollout:
    now, verdict = report.rollout, report.verdict
    return rollout_pb2.Rollout(
        skill=_PREFIX + report.skill,
        stage=now.stage,
        percent=now.percent,
        student=now.student,
        champion=now.champion,
        refused=now.refused,
        paused=now.paused,
        reason=verdict.reason or now.reason,
        target=now.target,
        tolerance=now.tolerance,
        compared=verdict.compared,
        agreed=verdict.agreed,
        lower=verdict.lower,
        upper=verdict.upper,
        stage_compared=report.seen.compared,
        teacher_share=report.teacher_share,
        frozen=report.frozen,
        alarms=report.alarms,
    )


def _event(event: RolloutEvent) -> rollout_pb2.RolloutEvent:
    found = rollout_pb2.RolloutEvent(
        actor=event.actor,
        from_stage=event.from_stage,
        to_stage=event.to_stage,
        student=event.student,
        reason=event.reason,
        evidence=event.evidence,
    )
    found.time.FromMilliseconds(event.time_ms)
    return found


def _student(student: Student) -> skill_pb2.Student:
    accuracy = student.metrics.get("accuracy", student.measured or 0.0)
    return skill_pb2.Student(adapter=student.skill, version=student.version, accuracy=accuracy)
