"""Who taught a run, and who taught its teachers: what a registered model says of where its knowledge came from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from temper.files import read_json
from temper.products import computing_run
from temper.run_folder import PLAN
from temper.tracking.registry import version_tags

TEACHER = "temper.teacher"
"""The tag of a version of a registered model with the lineage as JSON."""

_LENGTH = 5000  # of a tag in older stores


def lineage_text(plan: Mapping[str, Any], uri: str) -> str:
    """:func:`teacher_lineage` as JSON; without the teachers of teachers where it would be too long for a tag."""
    lineage = teacher_lineage(plan, uri)
    text = json.dumps(lineage)
    if len(text) <= _LENGTH:
        return text
    return json.dumps([{key: value for key, value in each.items() if key != "teachers"} for each in lineage])[:_LENGTH]


def teacher_lineage(plan: Mapping[str, Any], uri: str) -> list[dict[str, Any]]:
    """The teachers in a run's plan (as JSON has it): of each the name, the fingerprint, where it is known the MLflow
    run or the version of a registered model in the store `uri`, and, if it was taught itself, its `teachers`."""
    taught_by = (plan.get("distill") or {}).get("teachers", [])
    return [{"name": each["name"], "fingerprint": each["fingerprint"], **_origin(each, uri)} for each in taught_by]


def _origin(teacher: Mapping[str, Any], uri: str) -> dict[str, Any]:
    place = Path(teacher["place"])
    if teacher["kind"] != "weights":
        phase_folder = place if teacher["kind"] == "phase" else place.parent.parent
        teachers = teacher_lineage(read_json(phase_folder / PLAN) or {}, uri)
        return _known(run_id=computing_run(phase_folder).get("run_id"), teachers=teachers)
    if teacher["source"].startswith("models:/"):
        name, _, version = teacher["name"].rpartition("/")
        tags = version_tags(uri, name, version) or {}
        teachers = json.loads(tags.get(TEACHER, "[]"))
        return _known(version=f"models:/{name}/{version}", run_id=tags.get("temper.run_id"), teachers=teachers)
    run = re.fullmatch(r"(?:runs:/)?([0-9a-f]{32})", teacher["source"])
    return _known(run_id=run and run[1])


def _known(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value}
