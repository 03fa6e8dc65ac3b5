"""Asks the teacher about the whole data set through Ray Data, once for all jobs that learn the same from it.

The result is the cache of :mod:`temper.techniques.distill.cache_files`. As many processes as are free ask, each with
the teacher whole; what they write does not depend on who wrote it. The storage must be reachable from every node: a
shared folder or a bucket.
"""

from __future__ import annotations

import json
import logging
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from temper.claims import remotely_awaited
from temper.console import quieten
from temper.errors import JobError, Problem, RunError, TemperError
from temper.locks import awaited
from temper.plan.build import Plan
from temper.plan.distill import CachePlan, DistillPlan
from temper.plan.memory import BYTES
from temper.remote_store import fetch
from temper.techniques.distill.cache_files import (
    MANIFEST,
    Cut,
    Piece,
    complete_cache,
    damaged_parts,
    fetch_cache,
    missing_pieces,
    open_manifest,
    plan_cut,
    publish_cache,
    remove_damaged,
)

if TYPE_CHECKING:
    from temper.launch.asker import Asker


Ask = Callable[[Sequence[Piece]], None]
"""Has processes write the files of these pieces, and waits for them."""


def make_cache(
    plan: Plan,
    import_folders: Sequence[str],
    say: Callable[[str], None] = lambda text: None,
    ask: Ask | None = None,
) -> int:
    """Completes the cache of the plan's teacher and returns of how many examples, counted once for each view, the
    teacher was asked now: 0 where all was there, or where the job caches nothing.

    Needs a Ray to be connected, and a teacher that is trained. `ask` does the asking, by default Ray Data with as many
    processes as find room. `import_folders` are searched for `kind: python` data;
    `say` is told what is done, for people. What an earlier command completed before it was stopped is kept. A cache
    that is there is read once: files that are damaged are computed anew. Another driver that makes the same is waited
    for. Raises RunError, or JobError where the job is wrong.
    """
    distill = plan.distill
    if distill is None or distill.cache is None:
        return 0
    folder, lock = distill.cache.folder, distill.cache.folder.with_suffix(".lock")
    fetch_cache(folder)
    if _is_sound(distill.cache):
        publish_cache(folder)
        return 0
    wait = partial(say, "waiting for another command that asks the same teacher")
    with awaited(lock, wait), remotely_awaited(lock, wait):
        # Only now: what was damaged before, another command may have mended meanwhile.
        for file in remove_damaged(folder):
            say(f"{file} is damaged and is computed anew")
        fetch_cache(folder)
        if _is_there(distill.cache):
            return 0
        cuts = _plan_cuts(plan, distill, distill.cache, import_folders)
        pieces = missing_pieces(folder, cuts)
        examples, whole = sum(piece.rows for piece in pieces), sum(cut.rows * cut.views for cut in cuts)
        if pieces:
            say(f"asking the teacher about {examples:,} of {whole:,} examples")
            (ask or partial(_ask, plan, import_folders))(pieces)
            for piece in pieces:
                fetch(piece.file(folder))  # which another node may have written
        complete_cache(distill.cache, cuts)
        publish_cache(folder)
    return examples


def _is_sound(cache: CachePlan) -> bool:
    """Whether the cache is there and nothing of it is damaged; only reads, so that it needs no lock."""
    return not damaged_parts(cache.folder) and _is_there(cache)


def _is_there(cache: CachePlan) -> bool:
    """Raises RunError where the cache is not what was planned."""
    if not (cache.folder / MANIFEST).is_file():
        return False
    open_manifest(cache)
    return True


def _plan_cuts(plan: Plan, distill: DistillPlan, cache: CachePlan, import_folders: Sequence[str]) -> list[Cut]:
    assert plan.job.distill is not None, "the plan is that of its section"
    number, shape = BYTES[plan.job.distill.signals], distill.facts[0].output_shape or ()
    logits = number * math.prod(shape)
    features = sum(number * math.prod(pair.teacher_shape) for pair in distill.pairs)
    # With top_k a logit has its class beside it, and each prediction one number more.
    kept = logits if cache.top_k is None else math.prod(shape[:-1]) * (cache.top_k * (number + 2) + 4)
    train = {"asked_bytes": logits + features, "kept_bytes": kept + features, "pass_rows": distill.rows}
    evaluated = {"asked_bytes": logits, "kept_bytes": logits, "pass_rows": distill.rows}
    held_out = [plan_cut("validation", plan.data.validation_examples, 1, **evaluated)]
    return [
        plan_cut("train", _train_rows(plan, import_folders), cache.views, **train),
        *(held_out if plan.data.validation_examples else []),
        plan_cut("test", plan.data.test_examples, 1, **evaluated),
    ]


def _train_rows(plan: Plan, import_folders: Sequence[str]) -> int:
    """The plan does not know how many examples are of `data.omit_classes`, so that they are counted where data are
    loaded."""
    import ray

    if not plan.job.data.omit_classes:
        return plan.data.train_examples
    # It takes a moment, and workers that wait for the cache may hold every CPU.
    counted = ray.remote(_count_rows).options(num_cpus=0)
    result = ray.get(counted.remote(plan, tuple(import_folders)))
    _raise_problems([result])
    return int(result["rows"])


def _count_rows(plan: Plan, import_folders: tuple[str, ...]) -> dict[str, Any]:
    return _caught(lambda: {"rows": _Process(plan, import_folders).asker.train_rows()})


# --------------------------------------------------------------------------------------------------------------- asking


def _ask(plan: Plan, import_folders: Sequence[str], pieces: Sequence[Piece]) -> None:
    import ray.data
    from ray.exceptions import RayError

    ray.data.DataContext.get_current().enable_progress_bars = False
    quieten("ray.data", logging.ERROR)
    on_gpu = plan.mesh.device == "cuda"
    work = ray.data.from_items([asdict(piece) for piece in pieces], override_num_blocks=len(pieces))
    askers = ray.data.ActorPoolStrategy(min_size=1, max_size=min(_free_places(plan), len(pieces)))
    try:
        results: list[dict[str, Any]] = work.map(
            _process_of(plan, tuple(import_folders)),
            compute=askers,
            num_cpus=plan.job.parallel.cpus_per_worker,
            num_gpus=plan.job.parallel.gpus_per_worker if on_gpu else None,
        ).take_all()
    except RayError as error:
        raise RunError(f"a process that asked the teacher was lost: {error}; run the job again") from error
    _raise_problems(results)


def _free_places(plan: Plan) -> int:
    """How many processes find room now; 1 where none does, which then waits."""
    import ray

    free = ray.available_resources()
    parallel = plan.job.parallel
    places = free.get("CPU", 0.0) / parallel.cpus_per_worker
    if plan.mesh.device == "cuda":
        places = min(places, free.get("GPU", 0.0) / parallel.gpus_per_worker)
    return max(int(places), 1)


def _process_of(plan: Plan, import_folders: tuple[str, ...]) -> type:
    """The class of the actors. It holds what they need: Ray complains, on the console, of arguments as large as a
    plan."""

    class Asking(_Process):
        def __init__(self) -> None:
            super().__init__(plan, import_folders)

    return Asking


class _Process:
    """Asks about one piece after the other; data and teacher are loaded before the first."""

    def __init__(self, plan: Plan, import_folders: tuple[str, ...]) -> None:
        self.plan, self.import_folders = plan, import_folders
        self.failed: dict[str, Any] = {}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        # Where one piece failed the cache does, and the others need not be tried.
        result = self.failed or _caught(lambda: self.asker.write(Piece(**row)))
        if _has_failed(result):
            self.failed = result
        return result

    @cached_property
    def asker(self) -> Asker:
        # Torch is imported where the teacher runs, and not by the driver.
        from temper.launch.asker import Asker

        return Asker(self.plan, self.import_folders)


# ------------------------------------------------------------------------------------------------------------- problems


def _caught(work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What `work` returns, and what went wrong: returned and not raised because it crosses processes."""
    told: dict[str, Any] = {"problems": "[]", "failure": ""}
    try:
        return {**told, **work()}
    except JobError as error:
        return {**told, "problems": json.dumps([asdict(problem) for problem in error.problems], default=str)}
    except TemperError as error:
        return {**told, "failure": str(error)}
    except Exception:
        # The user's network and data may fail in any way.
        return {**told, "failure": f"asking the teacher failed:\n{traceback.format_exc()}"}


def _has_failed(result: Mapping[str, Any]) -> bool:
    return result["problems"] != "[]" or result["failure"] != ""


def _raise_problems(results: Sequence[dict[str, Any]]) -> None:
    problems = [Problem(**problem) for result in results for problem in json.loads(result["problems"])]
    if problems:
        raise JobError(list(dict.fromkeys(problems)))
    failure = next((result["failure"] for result in results if result["failure"]), None)
    if failure is not None:
        raise RunError(failure)
