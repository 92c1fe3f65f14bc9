"""understudy.v1.SkillService: the skills that callers can ask for."""

from __future__ import annotations

from server.api.paging import page_token, read_page
from server.api.wire import Context
from server.errors import InvalidArgument
from server.routing.skills import SkillBook
from understudy.v1 import skill_pb2
from understudy.v1 import skill_service_pb2 as pb

_PREFIX = "skills/"


class SkillServicer:
    """Reads the book of skills."""

    def __init__(self, skills: SkillBook) -> None:
        self._skills = skills

    async def GetSkill(self, request: pb.GetSkillRequest, _context: Context) -> pb.GetSkillResponse:
        """One skill."""
        name = request.name.removeprefix(_PREFIX)
        if not request.name.startswith(_PREFIX) or not name or "/" in name:
            raise InvalidArgument(f"name is {request.name[:160]!r}; expected skills/<skill>.", field="name")
        return pb.GetSkillResponse(skill=self._message(name))

    async def ListSkills(self, request: pb.ListSkillsRequest, _context: Context) -> pb.ListSkillsResponse:
        """Skills by name, a page at a time."""
        size, after = read_page(request.page_size, request.page_token)
        names = [name for name in self._skills.names() if after is None or name > after[0]]
        more = page_token(names[size - 1], 0) if len(names) > size else ""
        return pb.ListSkillsResponse(skills=[self._message(name) for name in names[:size]], next_page_token=more)

    def _message(self, name: str) -> skill_pb2.Skill:
        skill = self._skills.get(name)
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
            rollout_stage=self._skills.stage(name),
            rollout_percent=_percent(self._skills.stage(name), skill.rollout_percent),
            built_in=skill.built_in,
        )
        student = self._skills.student(name)
        if student is not None and student.calibration is not None:
            manifest = student.head.manifest
            message.student.adapter = manifest.name
            message.student.version = manifest.version
            message.student.accuracy = manifest.metrics.get("accuracy", 0.0)
        return message


def _percent(stage: str, canary: int) -> int:
    """Share of the requests that students may answer."""
    return {"full": 100, "canary": canary}.get(stage, 0)
