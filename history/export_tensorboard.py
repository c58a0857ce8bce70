"""Exports to TensorBoard: event files below a folder, one folder a run, through tensorboard's own writer.

A record is one event, which a file holds whole or not at all: so what is there is read from the files themselves, and
each export adds a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .export import PREFIX, Attempt, Note, Record, missing_extra

try:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
except ModuleNotFoundError:
    raise missing_extra("tensorboard") from None

_MARK = f"{PREFIX}/finite/"
_ALERTS = f"{PREFIX}/alerts/"


class TensorBoard:
    """Opens the folder of each run."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._folder = folder

    def open(self, attempt: Attempt) -> EventFiles:
        return EventFiles(self._folder / attempt.name)


class EventFiles:
    """The event files of one attempt."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def exported(self) -> set[tuple[str, int]]:
        return {key for path in self._folder.glob("events.out.tfevents.*") for key in _keys(path)}

    def write(self, records: list[Record], notes: list[Note]) -> None:
        if self._writer is None:
            self._writer = EventFileWriter(str(self._folder))
        for record in records:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in record.points]
            self._add(record.step, record.time, values)
        for note in notes:
            self._add(note.step, note.time, [_text(f"{PREFIX}/{note.key[0]}", note.text)])

    def commit(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, step: int, time: float, values: list[Any]) -> None:
        self._writer.add_event(Event(step=step, wall_time=time, summary=Summary(value=values)))


def _keys(path: Path) -> Iterator[tuple[str, int]]:
    """Of every whole event in a file; a torn one at its end is none."""
    for data in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(data)
        for value in event.summary.value:
            if value.tag.startswith(_MARK):
                yield value.tag.removeprefix(_MARK), event.step
            elif value.tag.startswith(_ALERTS):
                yield value.tag.removeprefix(f"{PREFIX}/"), event.step


def _text(tag: str, text: str) -> Any:
    plugin = SummaryMetadata.PluginData(plugin_name="text", content=TextPluginData(version=0).SerializeToString())
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)
