"""The MLflow run that belongs to a run folder, from its opening to its end and over all attempts.

`run.json` in the folder says which run it is, and how far: `{"uri", "run_id", "command", "storage_id", "open",
"status", "delivered"}`. One that is not delivered was not brought to its end by its command; see :mod:`reconcile`.
Before a run is created, its `token` is there, by which it is found where its id was not learnt.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from temper.claims import folder_id
from temper.config.load import job_to_yaml
from temper.files import read_json, write_json
from temper.launch.teacher_runs import teacher_tags
from temper.locks import awaited
from temper.plan.build import Plan
from temper.remote_store import publish_run
from temper.run_folder import ENVIRONMENT, GIT, HISTORY, PHASE_MANIFEST, RUN, TRACKING_LOCK
from temper.tracking.description import origin_files
from temper.tracking.mlflow_store import RunStatus, close_run, first_line, known_run, log_tags, open_run, persist
from temper.tracking.tree import RunTree

log = logging.getLogger(__name__)


@dataclass
class TrackedRun:
    """The run of `plan` in the store at `uri`; without a name, that of the job. `command` repeats it. A new run has the
    `tags`, and the `params` beside the job's. `run_id` is empty until it is open."""

    uri: str
    plan: Plan
    command: str
    name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    run_id: str = ""
    began_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    """It is opened later, beside the training."""
    _tree: RunTree | None = field(default=None, init=False)
    _marks: int = field(default=0, init=False)
    _held: ExitStack = field(default_factory=ExitStack, init=False)

    @property
    def record(self) -> Path:
        return self.plan.run_folder / RUN

    def open(self) -> None:
        """Opens a new run, or goes on with the one that an earlier attempt opened; waits for a process that brings that
        to its end. Raises RunError where the store cannot be used."""
        folder = self.plan.run_folder
        folder.mkdir(parents=True, exist_ok=True)
        self.let_go()
        self._held.enter_context(awaited(folder / TRACKING_LOCK, lambda: None))
        for name, text in origin_files().items():
            if name in (ENVIRONMENT, GIT):
                (folder / name).write_text(text)
        known = known_run(self.record, self.uri)
        token = None if known else self._token()
        if known is not None:
            self._note(known, open=False)
        self.run_id = open_run(
            self.uri,
            self.plan,
            run_id=known,
            job_yaml=job_to_yaml(self.plan.job),
            command=self.command,
            # At once: a command that is killed now would leave a run that nobody knows.
            created=lambda run_id: self._note(run_id, open=False),
            name=self.name,
            tags=self.tags,
            params=self.params,
            began_ms=self.began_ms,
            token=token,
        )
        self._tree = RunTree(self.uri, self.run_id, self.plan.to_dict(), self.plan.job.storage_folder)
        self._note(self.run_id, open=True)
        publish_run(folder, self.plan.job.storage_folder)
        log_tags(self.uri, self.run_id, teacher_tags(self.plan))
        self.grow()

    def _token(self) -> str:
        """Of the run that is about to be created, or that an attempt was about to create that broke off there."""
        known = read_json(self.record) or {}
        token = str(known["token"]) if known.get("uri") == self.uri and "token" in known else uuid.uuid4().hex
        write_json(self.record, {"uri": self.uri, "token": token})
        return token

    def has_grown(self) -> bool:
        """Whether a phase has begun or ended since the store was last told."""
        return self._count_marks() > self._marks

    def _count_marks(self) -> int:
        folders = map(self.plan.phase_folder, self.plan.phases)
        return sum((folder / mark).exists() for folder in folders for mark in (HISTORY, PHASE_MANIFEST))

    def grow(self) -> None:
        """Gives phases that have begun or ended their own runs; what the store does not take now it is given later."""
        marks = self._count_marks()
        try:
            if self._tree is not None:
                self._tree.grow()
                self._marks = marks
        except Exception as error:  # any error of any store
            log.warning("MLflow did not take the phases of the run: %s", first_line(error))

    def end(self, status: RunStatus, tags: Mapping[str, str] | None = None, timeout_s: float = 10.0) -> bool:
        """Says what came of the run, whose points the store has; false, with a line in the log, where the store does
        not take it in time."""
        tree = self._tree
        assert tree is not None, "only a run that is open can be ended"
        ended = persist(lambda: tree.end(status, tags or {}), "end of the run", timeout_s)
        ended = ended and close_run(self.uri, self.run_id, status, timeout_s)
        self._note(self.run_id, open=False, status=status, delivered=ended)
        publish_run(self.plan.run_folder, self.plan.job.storage_folder)
        if ended:
            self.let_go()
        return ended

    def let_go(self) -> None:
        """Leaves the run to whoever opens it next."""
        self._held.close()

    def note_status(self, status: RunStatus) -> None:
        """Writes down how the run ended, for whoever has to tell the store of it."""
        if self.run_id:
            self._note(self.run_id, open=True, status=status)

    def _note(self, run_id: str, **state: Any) -> None:
        storage_id = folder_id(self.plan.job.storage_folder)
        known = {"uri": self.uri, "run_id": run_id, "command": self.command, "storage_id": storage_id}
        write_json(self.record, {**known, **state})
