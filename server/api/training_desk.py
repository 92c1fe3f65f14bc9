"""What TrainingService does, without gRPC: messages in, messages out, blocking. For the servicer's threads and the command line."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, tzinfo

from server.api import training_messages as messages
from server.api.paging import page_token, read_page
from server.config import Config
from server.errors import InvalidArgument, SkillNotFound, Unavailable, near_names
from server.logs import get
from server.registry.job_requests import checked_spec, enough
from server.registry.jobs import JobStore
from server.registry.registry import Registry
from server.registry.schedules import ScheduleStore, parse
from understudy.v1 import training_service_pb2 as pb

MAX_REQUEST_ID_BYTES = 128
MOST_POINTS = 10_000
MOST_LINES = 1000
CountRows = Callable[[str], int | None]


class TrainingDesk:
    """Thread-safe. `count_rows` says how many rows of a skill may be learned from, or None where counting takes long."""

    def __init__(self, config: Config, registry: Registry, count_rows: CountRows | None = None) -> None:
        self._config = config
        self._registry = registry
        self._count_rows = count_rows
        self.jobs = JobStore(registry)
        self.schedules = ScheduleStore(registry, zone_of(config))

    def announce(self) -> None:
        """Writes down the skills and schedules of this process's configuration. Raises InvalidArgument for a schedule that is none."""
        for name, skill in self._config.skills.items():
            try:
                if skill.schedule:
                    parse(skill.schedule)
            except InvalidArgument as error:
                field = f"skills.{name}.schedule"
                raise InvalidArgument(f"{field}: {error.message}", field=field) from None
        skills = self._config.skills.items()
        try:
            self._registry.keep_skills({name: (skill.task, skill.model_dump(mode="json", exclude_unset=True)) for name, skill in skills})
            self.schedules.adopt({name: skill.schedule for name, skill in skills})
        except Unavailable as error:  # no reason not to answer; trainers do the same
            get("training").warning("skills were not written down", error=error.message)

    def CreateTrainingJob(self, request: pb.CreateTrainingJobRequest) -> pb.CreateTrainingJobResponse:
        """Queues a job."""
        job = request.training_job
        if len(request.request_id.encode()) > MAX_REQUEST_ID_BYTES:
            message = f"request_id has over {MAX_REQUEST_ID_BYTES} bytes; expected a short unique id."
            raise InvalidArgument(message, field="request_id", limit=MAX_REQUEST_ID_BYTES)
        skill = messages.skill_id(job.skill, "training_job.skill")
        kind = messages.kind_of(job.kind, "training_job.kind")
        spec = checked_spec(self._config, skill, kind, messages.spec_of(job))
        if kind == "train" and self._count_rows is not None:
            rows = self._count_rows(skill)
            if rows is not None:
                enough(self._config, skill, rows)
        made = self.jobs.create(skill, kind, spec, request_id=request.request_id)
        return pb.CreateTrainingJobResponse(training_job=messages.to_job(made))

    def GetTrainingJob(self, request: pb.GetTrainingJobRequest) -> pb.GetTrainingJobResponse:
        """One job."""
        return pb.GetTrainingJobResponse(training_job=messages.to_job(self.jobs.get(messages.job_id(request.name))))

    def ListTrainingJobs(self, request: pb.ListTrainingJobsRequest) -> pb.ListTrainingJobsResponse:
        """A page of jobs."""
        size, after = read_page(request.page_size, request.page_token)
        found = self.jobs.find(
            skill=messages.skill_id(request.skill) if request.skill else "",
            states=messages.states_of(list(request.states)),
            kind=messages.kind_of(request.kind, "kind") if request.kind else "",
            limit=size + 1,
            before=(after[1], after[0]) if after is not None else None,
        )
        more = page_token(found[size - 1].id, found[size - 1].create_ms) if len(found) > size else ""
        jobs = [messages.to_job(job, whole=False) for job in found[:size]]
        return pb.ListTrainingJobsResponse(training_jobs=jobs, next_page_token=more)

    def CancelTrainingJob(self, request: pb.CancelTrainingJobRequest) -> pb.CancelTrainingJobResponse:
        """Ends a job, or asks its trainer to."""
        return pb.CancelTrainingJobResponse(training_job=messages.to_job(self.jobs.cancel(messages.job_id(request.name))))

    def read_logs(self, request: pb.StreamTrainingJobLogsRequest) -> tuple[pb.StreamTrainingJobLogsResponse, bool]:
        """The next lines, and whether these were the last: no more will come, or no more are asked for."""
        if request.after < 0:
            raise InvalidArgument(f"after is {request.after}; expected 0 or the number of a line.", field="after")
        # The state first: what an ended job has said is all there when its lines are read.
        job = self.jobs.get(messages.job_id(request.name))
        lines = self.jobs.logs(job.id, after=request.after, limit=MOST_LINES)
        response = pb.StreamTrainingJobLogsResponse(lines=[messages.to_line(line) for line in lines], state=messages.STATE_OF[job.state])
        return response, (job.ended or request.no_follow) and len(lines) < MOST_LINES

    def ListTrainingJobMetrics(self, request: pb.ListTrainingJobMetricsRequest) -> pb.ListTrainingJobMetricsResponse:
        """A page of points."""
        job = self.jobs.get(messages.job_id(request.parent, "parent"))
        _, after = read_page(request.page_size, request.page_token)
        size = min(request.page_size or MOST_POINTS, MOST_POINTS)
        points = self.jobs.metrics(job.id, names=list(request.metrics), limit=size + 1, after=after)
        more = page_token(points[size - 1].name, points[size - 1].step) if len(points) > size else ""
        return pb.ListTrainingJobMetricsResponse(points=[messages.to_point(point) for point in points[:size]], next_page_token=more)

    def ListSchedules(self, _request: pb.ListSchedulesRequest) -> pb.ListSchedulesResponse:
        """All of them."""
        return pb.ListSchedulesResponse(schedules=[messages.to_schedule(one) for one in self.schedules.list()])

    def SetSchedule(self, request: pb.SetScheduleRequest) -> pb.SetScheduleResponse:
        """Over the configuration's."""
        skill = self._known(messages.skill_of_schedule(request.schedule.name, "schedule.name"))
        return pb.SetScheduleResponse(schedule=messages.to_schedule(self.schedules.set(skill, request.schedule.spec.strip())))

    def DeleteSchedule(self, request: pb.DeleteScheduleRequest) -> pb.DeleteScheduleResponse:
        """Back to the configuration's."""
        skill = messages.skill_of_schedule(request.name)
        settings = self._config.skills.get(skill)
        self.schedules.remove(skill, settings.schedule if settings is not None else "")
        return pb.DeleteScheduleResponse()

    def _known(self, skill: str) -> str:
        if skill not in self._config.skills:
            near = near_names(skill, list(self._config.skills))
            raise SkillNotFound(f"There is no skill {skill[:128]!r} in the configuration; {near}", skill=skill)
        return skill


def zone_of(config: Config) -> tzinfo:
    """The time zone of schedules, which is the budgets'."""
    from zoneinfo import ZoneInfo

    return UTC if config.budget.time_zone == "UTC" else ZoneInfo(config.budget.time_zone)
