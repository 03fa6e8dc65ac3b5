"""What a process does that asks the teacher for the cache: see :mod:`temper.launch.teacher_cache`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from temper.data.augment import build_transforms
from temper.data.batches import eval_batches, view_batch
from temper.data.sources import PartSplit, SplitName, labelling_of, load_splits
from temper.engine.deepspeed_setup import device_of
from temper.plan.build import Plan
from temper.remote_store import publish
from temper.targets import apply_target_folders
from temper.techniques.distill.cache import write_piece
from temper.techniques.distill.cache_files import Piece
from temper.techniques.distill.teacher import LiveTeacher, build_teacher


class Asker:
    """The plan's data, loaded, and its teacher, whole, on the device and with the threads that a worker has: so that it
    says the same here as it would there."""

    def __init__(self, plan: Plan, import_folders: Sequence[str]) -> None:
        assert plan.distill is not None and plan.distill.cache is not None, "it is asked for a cache"
        self.plan, self.distill, self.cache = plan, plan.distill, plan.distill.cache
        apply_target_folders([Path(folder) for folder in import_folders])
        self.splits = load_splits(plan.job.data, plan.job.storage_folder, plan.data, labelling_of(plan.job))
        self.augmentation = build_transforms(plan.job.data.augment)

    def train_rows(self) -> int:
        return len(self.splits["train"])

    def write(self, piece: Piece) -> dict[str, Any]:
        """Asks about `piece` and writes its file."""
        is_train = piece.split == "train"
        write_piece(
            piece.file(self.cache.folder),
            torch.arange(piece.first, piece.first + piece.rows),
            partial(self._view, piece.view) if is_train else partial(self._evaluated, piece.split),
            self.teacher.ask,
            pass_rows=self.distill.rows,
            top_k=self.cache.top_k if is_train else None,
            features=self.cache.features and is_train,
        )
        if self.plan.cluster.nodes > 1:
            publish([piece.file(self.cache.folder)])
        return {"rows": piece.rows}

    @cached_property
    def teacher(self) -> LiveTeacher:
        job = self.plan.job
        assert job.distill is not None, "the plan is that of its section"
        torch.set_num_threads(max(1, int(job.parallel.cpus_per_worker)))
        device = device_of(self.plan.mesh.device)
        return build_teacher(self.distill, self.plan.data, signals=job.distill.signals, device=device)

    def _view(self, view: int, rows: Tensor) -> Tensor:
        """As the student sees `rows` of the training split in this view."""
        numbers, views = rows.numpy(), np.full(len(rows), view)
        seed = self.plan.job.seed
        return view_batch(self.splits["train"], self.plan.data, self.augmentation, seed, numbers, views).inputs

    def _evaluated(self, name: str, rows: Tensor) -> Tensor:
        """As the student is evaluated on `rows` of the split."""
        split = PartSplit(self.splits[cast(SplitName, name)], rows)
        batches = eval_batches(self.plan.job.data, split, self.plan.data, rank=0, world_size=1, batch=len(rows))
        return next(batches)[0].inputs
