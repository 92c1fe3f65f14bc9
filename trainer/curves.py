"""A job's curves as TensorBoard's event files, where tensorboard is installed. TensorFlow and torch are not needed for that."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from server.registry.jobs import Point


class Events:
    """Appends points to an event file that TensorBoard shows while the job runs. Without tensorboard it does nothing."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    @classmethod
    def open(cls, folder: Path, known: Sequence[Point] = ()) -> Events:
        """A new file that begins with the points of the attempts before; theirs are deleted, so that no step is shown twice."""
        if find_spec("tensorboard") is None:
            return cls(None)
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        shutil.rmtree(folder, ignore_errors=True)
        events = cls(EventFileWriter(str(folder), flush_secs=5))
        events.write(known)
        return events

    def write(self, points: Sequence[Point]) -> None:
        """Appends points. Never raises for a full disk: the registry has them too."""
        if self._writer is None or not points:
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        try:
            for point in points:
                summary = Summary(value=[Summary.Value(tag=point.name, simple_value=point.value)])
                self._writer.add_event(Event(wall_time=point.time_ms / 1000, step=point.step, summary=summary))
            self._writer.flush()
        except OSError:
            self._writer = None

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
