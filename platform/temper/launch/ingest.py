"""Brings a user's own files into the storage through Ray Data, once for all jobs that use them.

The result is `<storage>/data/<fingerprint>/<split>/part-….arrow` and, written last, `manifest.json`: without it the
data are not there. The data folder and the storage must be reachable from every node; the storage may be a bucket.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from temper.claims import remotely_awaited
from temper.config.schema import DataConfig, ImageFolderData, ParquetData, WebDatasetData
from temper.console import quieten
from temper.data.store import MANIFEST, fetch_stored, plan_parts, store_folder, stored_digests, write_part
from temper.errors import JobError, Problem
from temper.plan.facts import DataFacts
from temper.plan.user_files import SPLITS, FileData
from temper.remote_store import publish_parts

_SHOWN_PROBLEMS = 10


def ingest(config: DataConfig, facts: DataFacts, storage: Path, say: Callable[[str], None] = lambda text: None) -> None:
    """Ingest the job's data unless that has been done; built-in sets and a user's functions need none.

    `say` is told when it begins, for people.

    Needs a Ray to be connected. Another driver that ingests the same data is waited for. Raises JobError that names the
    examples that are no images or have no valid label.
    """
    if not isinstance(config, ImageFolderData | ParquetData | WebDatasetData):
        return
    folder = store_folder(storage, facts)
    fetch_stored(folder)
    if (folder / MANIFEST).is_file():
        return
    say(f"bringing {facts.folder} into the storage")
    folder.mkdir(parents=True, exist_ok=True)
    # The lock dies with its holder; parts that a killed driver left behind are written again.
    lock = folder.with_suffix(".lock")
    with FileLock(lock), remotely_awaited(lock, lambda: say("waiting for another machine that does the same")):
        fetch_stored(folder)
        if not (folder / MANIFEST).is_file():
            manifest = _write_manifest(folder, facts, _write_parts(config, facts, folder))
            publish_parts(folder / MANIFEST, stored_digests(manifest))


def _write_parts(config: FileData, facts: DataFacts, folder: Path) -> list[dict[str, Any]]:
    import ray.data

    parts = plan_parts(config, Path(facts.folder), folder.absolute())
    ray.data.DataContext.get_current().enable_progress_bars = False
    quieten("ray.data", logging.ERROR)
    work = ray.data.from_items([{"part": json.dumps(part)} for part in parts], override_num_blocks=len(parts))
    results: list[dict[str, Any]] = work.map(
        partial(_write, config=config, num_classes=facts.num_classes or 0)
    ).take_all()
    problems = sorted(result["problem"] for result in results if result["problem"])
    if problems:
        remedy = "mend or remove them"
        raise JobError([Problem("data.path", config.path, problem, remedy) for problem in problems[:_SHOWN_PROBLEMS]])
    # Ray returns parts in the order in which they were finished.
    return sorted(results, key=lambda result: (result["split"], result["name"]))


def _write(row: dict[str, Any], config: FileData, num_classes: int) -> dict[str, Any]:
    return write_part(json.loads(row["part"]), config, num_classes)


def _write_manifest(folder: Path, facts: DataFacts, results: list[dict[str, Any]]) -> dict[str, Any]:
    splits = {
        split: {
            "rows": sum(result["rows"] for result in results if result["split"] == split),
            "files": [
                {key: result[key] for key in ("name", "rows", "size", "sha256")}
                for result in results
                if result["split"] == split
            ],
        }
        for split in SPLITS
    }
    _check_rows(splits, facts)
    unfinished = folder / f".{MANIFEST}.{os.getpid()}"
    manifest = {"fingerprint": facts.fingerprint, "splits": splits}
    unfinished.write_text(json.dumps(manifest, indent=1))
    unfinished.replace(folder / MANIFEST)
    return manifest


def _check_rows(splits: dict[str, Any], facts: DataFacts) -> None:
    whole = facts.train_examples + facts.left_out_examples + facts.validation_examples
    planned = {"train": whole, "test": facts.test_examples}
    for split, count in planned.items():
        if splits[split]["rows"] != count:
            rule = (
                f"changed while it was read: {count} examples were planned in `{split}`, {splits[split]['rows']} found"
            )
            raise JobError([Problem("data.path", facts.folder, rule, "run the job again")])
