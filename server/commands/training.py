"""Where the commands on jobs and schedules turn to: a running server with --server, else the configured registry itself.

Both take and give the messages of TrainingService, so that a command is written once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.api.training_desk import TrainingDesk
from server.api.training_messages import JOBS
from server.commands.shared import open_channel
from server.errors import InvalidArgument, UnderstudyError
from understudy.v1 import training_pb2
from understudy.v1 import training_service_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp

ServerOption = Annotated[str, typer.Option("--server", help="Address of a running server, without TLS; else the configured registry.")]
ConfigOption = Annotated[str | None, typer.Option("--config", "-c", help="TOML file; else UNDERSTUDY_CONFIG, else understudy.toml here.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Any setting, e.g. --set registry.url=...; repeatable.")]
FOLLOW_S = 0.5
STATES = {
    value.number: name.removeprefix("TRAINING_JOB_STATE_").lower()
    for name, value in training_pb2.TrainingJobState.DESCRIPTOR.values_by_name.items()
}
KINDS = {
    value.number: name.removeprefix("TRAINING_JOB_KIND_").lower()
    for name, value in training_pb2.TrainingJobKind.DESCRIPTOR.values_by_name.items()
}


class _Local(TrainingDesk):
    """The registry, without a server."""

    def StreamTrainingJobLogs(self, request: pb.StreamTrainingJobLogsRequest) -> Iterator[pb.StreamTrainingJobLogsResponse]:
        """As the service does it."""
        while True:
            response, last = self.read_logs(request)
            yield response
            if last:
                return
            if response.lines:
                request.after = response.lines[-1].number
            time.sleep(FOLLOW_S)


@contextmanager
def training(server: str, config: str | None, settings: list[str] | None) -> Iterator[Any]:
    """A TrainingServiceStub, or what does the same here. Errors of a server come out as UnderstudyError."""
    if not server:
        from server.config import load_config
        from server.registry.registry import Registry

        loaded = load_config(config, flags=flags(settings))
        registry = Registry(loaded.registry)
        try:
            yield _Local(loaded, registry)
        finally:
            registry.close()
        return
    import grpc

    from understudy.v1.training_service_pb2_grpc import TrainingServiceStub

    with open_channel(server) as channel:
        try:
            yield TrainingServiceStub(channel)  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            raise UnderstudyError(f"{error.details()} ({error.code().name})") from None


def flags(settings: list[str] | None) -> dict[str, str]:
    """The values of --set."""
    found: dict[str, str] = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"{setting!r} has no value; expected section.key=value", param_hint="--set")
        found[key.strip()] = value
    return found


def name_of(desk: Any, given: str) -> str:
    """A job's resource name, from it, its id, or the beginning of one. Raises InvalidArgument where that fits several."""
    wanted = given.removeprefix(JOBS)
    if len(wanted) >= 32:
        return JOBS + wanted
    recent = desk.ListTrainingJobs(pb.ListTrainingJobsRequest(page_size=1000)).training_jobs
    fit = [job.name for job in recent if job.name.startswith(JOBS + wanted)]
    if len(fit) > 1:
        raise InvalidArgument(f"{len(fit)} jobs begin with {wanted!r}; give more of the id.", field="job")
    return fit[0] if fit else JOBS + wanted


def as_json(message: Message) -> str:
    """A message as JSON, with the fields' own names."""
    from google.protobuf.json_format import MessageToDict

    return json.dumps(MessageToDict(message, preserving_proto_field_name=True), indent=1, ensure_ascii=False)


def when(stamp: Timestamp) -> str:
    """A time for people, in UTC; "" for none."""
    return datetime.fromtimestamp(stamp.seconds, UTC).strftime("%Y-%m-%d %H:%M:%S") if stamp.seconds else ""
