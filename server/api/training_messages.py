"""Jobs, curves and schedules of the registry as messages, and back."""

from __future__ import annotations

import math
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from server.errors import InvalidArgument
from server.registry.jobs import KINDS, STATES, Job, LogLine, Point
from server.registry.schedules import Schedule
from understudy.v1 import training_pb2 as pb

JOBS, SKILLS, SCHEDULE = "trainingJobs/", "skills/", "/schedule"
STATE_OF: dict[str, pb.TrainingJobState] = {
    state: pb.TrainingJobState.Value(f"TRAINING_JOB_STATE_{state.upper()}")  # type: ignore[misc]
    for state in STATES
}
KIND_OF: dict[str, pb.TrainingJobKind] = {
    kind: pb.TrainingJobKind.Value(f"TRAINING_JOB_KIND_{kind.upper()}")  # type: ignore[misc]
    for kind in KINDS
}
_SPEC = ("method", "seed", "hub_repo", "provider", "model", "epochs")
_COST = "max_cost_usd"


def to_job(job: Job, *, whole: bool = True) -> pb.TrainingJob:
    """The message; without the report where not `whole`."""
    message = pb.TrainingJob(
        name=JOBS + job.id,
        skill=SKILLS + job.skill,
        kind=KIND_OF.get(job.kind, pb.TRAINING_JOB_KIND_TRAIN),
        state=STATE_OF[job.state],
        progress=[pb.StageProgress(stage=stage, done=done, total=total) for stage, (done, total) in job.progress.items()],
        attempt=job.attempt,
        cancel_requested=job.cancel,
        version=str(job.report.get("version", "")),
        rejection=str(job.report.get("reason", "")) if job.state == "rejected" else "",
        **{key: job.spec[key] for key in _SPEC if key in job.spec},
    )
    for field, value in (("create_time", job.create_ms), ("start_time", job.start_ms), ("end_time", job.end_ms)):
        if value is not None:
            getattr(message, field).CopyFrom(stamp(value))
    if _COST in job.spec:
        message.max_cost.micro_usd = round(job.spec[_COST] * 1e6)
    if job.error is not None:
        message.error.CopyFrom(pb.TrainingJobError(reason=job.error.reason, message=job.error.message, metadata=dict(job.error.metadata)))
    metrics = job.report.get("metrics")
    for name, value in metrics.items() if isinstance(metrics, dict) else ():
        if isinstance(value, int | float) and math.isfinite(value):
            message.metrics[str(name)] = value
    if whole and job.report:
        message.report.update(_finite(job.report))
    return message


def spec_of(message: pb.TrainingJob) -> dict[str, Any]:
    """What a job's message asks for, as its spec; what is not set is left out."""
    spec: dict[str, Any] = {key: getattr(message, key) for key in _SPEC if getattr(message, key)}
    if message.HasField("max_cost"):
        spec[_COST] = message.max_cost.micro_usd / 1e6
    return spec


def kind_of(value: int, field: str) -> str:
    """The kind's word. Raises InvalidArgument."""
    found: dict[int, str] = {number: kind for kind, number in KIND_OF.items()} | {0: "train"}
    if value not in found:
        raise InvalidArgument(f"{field} is {value}; expected a value of TrainingJobKind, 0 to {max(found)}.", field=field)
    return found[value]


def states_of(values: list[int]) -> list[str]:
    """The states' words. Raises InvalidArgument."""
    found: dict[int, str] = {number: state for state, number in STATE_OF.items()}
    for value in values:
        if value not in found:
            message = f"states holds {value}; expected values of TrainingJobState, 1 to {max(found)}."
            raise InvalidArgument(message, field="states")
    return [found[value] for value in values]


def to_line(line: LogLine) -> pb.TrainingJobLogLine:
    """The message."""
    return pb.TrainingJobLogLine(number=line.number, time=stamp(line.time_ms), text=line.text)


def to_point(point: Point) -> pb.TrainingJobMetric:
    """The message."""
    return pb.TrainingJobMetric(metric=point.name, step=point.step, value=point.value, time=stamp(point.time_ms))


def to_schedule(schedule: Schedule) -> pb.Schedule:
    """The message."""
    message = pb.Schedule(name=f"{SKILLS}{schedule.skill}{SCHEDULE}", spec=schedule.spec, origin=schedule.origin)
    if schedule.next_ms is not None:
        message.next_time.CopyFrom(stamp(schedule.next_ms))
    if schedule.last_ms is not None:
        message.last_time.CopyFrom(stamp(schedule.last_ms))
    return message


def job_id(name: str, field: str = "name") -> str:
    """The id in a job's name. Raises InvalidArgument."""
    return _between(name, JOBS, "", f"{JOBS}<job>", field)


def skill_id(name: str, field: str = "skill") -> str:
    """The skill in a skill's name. Raises InvalidArgument."""
    return _between(name, SKILLS, "", f"{SKILLS}<skill>", field)


def skill_of_schedule(name: str, field: str = "name") -> str:
    """The skill in a schedule's name. Raises InvalidArgument."""
    return _between(name, SKILLS, SCHEDULE, f"{SKILLS}<skill>{SCHEDULE}", field)


def stamp(ms: int) -> Timestamp:
    """Milliseconds since 1970 as a Timestamp."""
    made = Timestamp()
    made.FromMilliseconds(ms)
    return made


def _between(name: str, prefix: str, suffix: str, form: str, field: str) -> str:
    found = name.removeprefix(prefix).removesuffix(suffix) if name.startswith(prefix) and name.endswith(suffix) else ""
    if not found or "/" in found:
        raise InvalidArgument(f"{field} is {name[:160]!r}; expected {form}.", field=field)
    return found


def _finite(value: Any) -> Any:
    """JSON values that a Struct takes: no number that is none, no value of another kind."""
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
