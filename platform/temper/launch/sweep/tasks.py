"""What a worker group is given to do, and what came of it: plain data between the coordinator and the workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from temper.plan.build import Plan
from temper.run_folder import WorkerSpec
from temper.techniques.distill.cache_files import Piece


@dataclass(frozen=True)
class TrainTask:
    """Phases to be trained. After `decisive` steps a report is answered before the training goes on."""

    spec: WorkerSpec
    decisive: frozenset[int] = frozenset()


@dataclass(frozen=True)
class AskTask:
    """Pieces of a teacher's cache; each rank takes its share."""

    plan: Plan
    pieces: tuple[Piece, ...]
    import_folders: tuple[str, ...]


Task = TrainTask | AskTask


@dataclass(frozen=True)
class Assignment:
    """A task for one incarnation of a group; `number` rises with every attempt at any task."""

    number: int
    task: Task


@dataclass(frozen=True)
class Outcome:
    """`interrupted`: a stop was asked for, and the state is saved. `lost`: the workers are gone, and nothing is wrong
    with the task that is known. `failed`: `reason` says why, and another attempt would fail alike."""

    kind: Literal["done", "interrupted", "lost", "failed"]
    reason: str = ""
