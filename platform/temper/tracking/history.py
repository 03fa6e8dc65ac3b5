"""The histories of a job's phases: one record for each optimizer step, in files that survive any crash.

`<phase folder>/history.jsonl` holds one JSON object a line, in ascending order of steps:
`{"step": int, "time_ms": int, "metrics": {name: float}}`, with `"events": [str]` where something happened in the step
that numbers do not say. Steps are counted over the whole job, so they rise from phase to phase. A history is written by
one process, the Ray Train controller or the supervisor of a parameter server, and read by any other. Those of all
phases are also the queue from which the tracker delivers to MLflow, so an outage there costs no memory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NotRequired, TypedDict

from temper.run_folder import HISTORY

if TYPE_CHECKING:
    from temper.plan.build import Plan

log = logging.getLogger(__name__)

_SEARCHED_BYTES = 2**16  # of a file, at most so much is read before the record that is looked for
_EXTRACT = 1000  # records; MLflow's charts draw fewer
_EVALUATIONS = (b'"eval/', b'"test/')


class Record(TypedDict):
    """`step`: finished optimizer steps, from 1; `time_ms`: milliseconds since 1970; NaN and infinity are kept."""

    step: int
    time_ms: int
    metrics: dict[str, float]
    events: NotRequired[list[str]]


@dataclass(frozen=True)
class PhaseHistory:
    """Where the records of a phase lie. Its last step is always recorded, so the history is over with `last_step`."""

    name: str
    path: Path
    last_step: int


def phase_histories(plan: Plan) -> tuple[PhaseHistory, ...]:
    """The history of each phase, in the order of the phases."""
    return tuple(PhaseHistory(phase.name, plan.phase_folder(phase) / HISTORY, phase.last_step) for phase in plan.phases)


class History:
    """The writing end. Opening repairs the file: a line that a crash cut short is removed.

    No method raises on a full or failing disk: what cannot be written is kept in memory, said once in the log, and
    written with the next records that can be.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._unwritten: list[Record] = []
        self._lock = threading.Lock()
        self._failing = False
        self.last_step = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.last_step = _repair(self.path)
        except OSError as error:
            self._say_failure(error)

    def append(self, records: Sequence[Record]) -> list[Record]:
        """Store the records that are new, in the order of their steps, and return them.

        A step that is already stored is dropped: after a restart from an older checkpoint the same steps come again
        with the same values. When this returns without a warning in the log, the records are on the disk.
        """
        with self._lock:
            new = []
            for record in records:
                if record["step"] > self.last_step:
                    self.last_step = record["step"]
                    new.append(record)
            self._unwritten += new
            if self._unwritten:
                self._write()
        return new

    def unwritten(self) -> list[Record]:
        """Records that the disk has not taken yet; all later than those in the file."""
        with self._lock:
            return list(self._unwritten)

    def _write(self) -> None:
        lines = b"".join(_line(record) for record in self._unwritten)
        try:
            _append_durably(self.path, lines)
        except OSError as error:
            self._say_failure(error)
            return
        if self._failing:
            log.warning("%s can be written again; %d records were caught up", self.path, len(self._unwritten))
        self._failing = False
        self._unwritten = []

    def _say_failure(self, error: OSError) -> None:
        if not self._failing:
            log.error("%s cannot be written (%s); training goes on, its records are kept in memory", self.path, error)
        self._failing = True


class Histories:
    """The writing end of all phases' histories. Each is opened with the first report of its phase, so that those of
    phases which were computed elsewhere are left alone."""

    def __init__(self, phases: Sequence[PhaseHistory]) -> None:
        self.phases = tuple(phases)
        self._paths = {phase.name: phase.path for phase in phases}
        self._opened: dict[str, History] = {}

    def append(self, phase: str, records: Sequence[Record]) -> list[Record]:
        """Store the records of a phase that are new and return them. See :meth:`History.append`."""
        if phase not in self._opened:
            self._opened[phase] = History(self._paths[phase])
        new = self._opened[phase].append(records)
        for other in self._opened.values():
            other.append([])  # what a full disk kept out of it
        return new

    def unwritten(self, phase: str) -> list[Record]:
        """Records of a phase that the disk has not taken yet; all later than those in its file."""
        history = self._opened.get(phase)
        return [] if history is None else history.unwritten()


class HistoryTail:
    """The reading end for somebody who follows: each call of `poll` returns what has been added since the last one."""

    def __init__(self, path: str | os.PathLike[str], after_step: int = 0) -> None:
        self.path = Path(path)
        self.last_step = after_step
        self._offset: int | None = None

    def poll(self, limit: int | None = None) -> list[Record]:
        """Complete records after the last one returned, at most `limit`; none if the file does not exist (yet)."""
        records: list[Record] = []
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            if self._offset is None or os.fstat(file.fileno()).st_size < self._offset:
                # At first, and where somebody replaced the file by a shorter one; what is left before is skipped below.
                self._offset = _offset_before(file, self.last_step)
            file.seek(self._offset)
            while (limit is None or len(records) < limit) and (line := file.readline()).endswith(b"\n"):
                self._offset += len(line)
                record = parse_record(line)
                if record is None:
                    log.warning("%s holds a damaged line before byte %d; it is skipped", self.path, self._offset)
                elif record["step"] > self.last_step:
                    self.last_step = record["step"]
                    records.append(record)
        return records


def _offset_before(file: BinaryIO, step: int) -> int:
    """The offset of a line not far before the first record after `step`, by bisection: steps rise. Where the search
    comes upon damage it ends, and the line is farther before."""
    low, high = 0, os.fstat(file.fileno()).st_size
    while high - low > _SEARCHED_BYTES:
        middle = (low + high) // 2
        file.seek(middle)
        file.readline()
        begin = file.tell()
        record = parse_record(file.readline())
        if record is None or begin >= high:
            break
        low, high = (begin, high) if record["step"] <= step else (low, middle)
    return low


class HistoryExtract:
    """The reading end for somebody whom the course of a phase suffices: of a history that is over at most 1,000
    records, the last among them, and always the same ones.

    These are the evaluations, and as many of the others as there is room for, evenly spaced; of a short history it is
    all. There is none until the history is over.
    """

    def __init__(self, phase: PhaseHistory, after_step: int = 0) -> None:
        self._phase, self._after_step = phase, after_step
        self._left: list[Record] | None = None

    def poll(self, limit: int | None = None) -> list[Record]:
        """The next records, at most `limit`, as of :class:`HistoryTail`."""
        if self._left is None:
            records = _extract(self._phase.path)
            if not records or records[-1]["step"] < self._phase.last_step:
                return []
            self._left = [record for record in records if record["step"] > self._after_step]
        taken = self._left[:limit]
        del self._left[: len(taken)]
        return taken


def _extract(path: Path) -> list[Record]:
    """Only what is chosen is parsed: that takes much longer than reading."""
    evaluations: list[int] = []
    others: list[int] = []
    try:
        with path.open("rb") as file:
            begin = 0
            for line in file:
                if line.endswith(b"}\n"):
                    is_evaluation = any(name in line for name in _EVALUATIONS)
                    (evaluations if is_evaluation else others).append(begin)
                begin += len(line)
            last = max([*evaluations[-1:], *others[-1:]], default=0)
            chosen = {last, *_spread(evaluations, _EXTRACT - 1)}
            chosen |= {*_spread(others, _EXTRACT - len(chosen))}
            lines = [(file.seek(offset), file.readline())[1] for offset in sorted(chosen)]
    except OSError:
        return []
    return [record for line in lines if (record := parse_record(line)) is not None]


def _spread(items: Sequence[int], number: int) -> list[int]:
    """Of all items so many, evenly spaced."""
    if len(items) <= number:
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * number)] for index in range(number)]


def last_step(path: str | os.PathLike[str]) -> int:
    """The step of the last complete record; 0 where there is none."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return 0
    return _last_record(content)[1]


def read_history(path: str | os.PathLike[str], after_step: int = 0) -> list[Record]:
    """All complete records with a step greater than `after_step`; an empty list where there is no file."""
    return HistoryTail(path, after_step).poll()


def _line(record: Record) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def parse_record(line: bytes) -> Record | None:
    """The record in one line; None if the line is damaged. No strict prefix of a JSON object is one."""
    try:
        record = json.loads(line)
        step, time_ms, metrics = int(record["step"]), int(record["time_ms"]), record["metrics"]
        known: Record = {"step": step, "time_ms": time_ms, "metrics": {name: float(metrics[name]) for name in metrics}}
        if "events" in record:
            known["events"] = [str(event) for event in record["events"]]
        return known
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _append_durably(path: Path, data: bytes) -> None:
    """All of `data` at the end of `path` and on the disk, or nothing of it and OSError."""
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            written = 0
            while written < len(data):
                written += file.write(data[written:])
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def _repair(path: Path) -> int:
    """Make the file end with a complete record; return that record's step, 0 for an empty file."""
    if not path.exists() or path.stat().st_size == 0:
        return 0
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            size = len(content)
            end, step = _last_record(content)
            complete = end > 0 and content[end - 1 : end] == b"\n"
        if end < size:
            log.warning("%s ended in %d bytes of an unfinished record; they are removed", path, size - end)
            file.truncate(end)
        if end and not complete:
            file.seek(end)
            file.write(b"\n")
    return step


def _last_record(content: mmap.mmap | bytes) -> tuple[int, int]:
    """(offset of its end, step) of the last complete record; zeros where there is none."""
    complete_lines = ((end, r["step"]) for line, end in _lines_backwards(content) if (r := parse_record(line)))
    return next(complete_lines, (0, 0))


def _lines_backwards(content: mmap.mmap | bytes) -> Iterator[tuple[bytes, int]]:
    """(line, offset of its end) from the last line to the first; the end lies behind the newline where there is one."""
    end = len(content)
    while end > 0:
        begin = content.rfind(b"\n", 0, end - 1) + 1
        yield content[begin:end], end
        end = begin
