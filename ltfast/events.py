"""TensorBoard events, written by the thread that asks for it: torch's SummaryWriter writes in one of its own, whose failure on a
full disk is a traceback on the screen and not an error that a run could answer.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

VERSION = "brain.Event:2"


class Events:
    """One file of events in `folder`, which is made if it is not there.

    purge_step: readers drop what earlier files hold from this step on; a resumed run writes those steps again.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        folder.mkdir(exist_ok=True)
        # Readers go through the files in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{platform.node()}.{os.getpid()}"
        self._file = open(folder / name, "wb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._write(
            Event(file_version=VERSION), Event(session_log=SessionLog(status=SessionLog.START)), step=purge_step
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add numbers by name. OSError, after which the file is closed, if they cannot be written."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._write(Event(summary=summary), step=step)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, *events: Event, step: int) -> None:
        try:
            for event in events:
                event.step, event.wall_time = step, time.time()
                self._records.write(event.SerializeToString())
            self._file.flush()
        except OSError:
            with contextlib.suppress(OSError):  # what is buffered would be tried again
                self._file.close()
            raise
