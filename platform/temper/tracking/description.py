"""What describes a run in MLflow: parameters, tags, files, data set; within MLflow's limits and without secrets."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import temper
from temper.claims import folder_id
from temper.products import run_name
from temper.run_folder import ENVIRONMENT, GIT, JOB, PLAN
from temper.tracking.provenance import GitState, environment_text, git_state
from temper.tracking.redact import redact_text, redact_values

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

    from temper.plan.build import Plan

# MLflow's limits on the length of names and values.
_KEY_LENGTH = 250
_PARAM_LENGTH = 6000
TAG_LENGTH = 8000
_DIGEST_LENGTH = 36

PHASES_TAG = "temper.phases"
"""The tag with what is known of a run's phases, as a JSON list, so that many runs can be read at once. What is too long
for one tag goes on in `temper.phases.1`, …"""


def parameters(plan: Plan) -> dict[str, str]:
    """The job flattened to dotted keys, as in an override, and what the plan derived from it under `plan.`.

    Values are written as in YAML; lists stay whole. Within MLflow's limits on length, and without secrets.
    """
    batch = plan.batch
    derived = {"steps": plan.steps, "micro_batch": batch.micro_batch, "accumulation": batch.accumulation}
    values = redact_values({**plan.job.model_dump(mode="json"), "plan": derived})
    return safe_params({key: value_text(value) for key, value in _flatten(values)})


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def value_text(value: Any) -> str:
    """A value of a job as a parameter: JSON, but a text as it is."""
    return value if isinstance(value, str) else json.dumps(value)


def run_tags(plan: Plan, command: str) -> dict[str, str]:
    """What a run is, where it came from, and the command that repeats it."""
    tags = {
        "temper.job": plan.job.name,
        "temper.fingerprint": plan.fingerprint,
        "temper.storage": plan.job.storage,
        "temper.run_folder": run_name(plan.to_dict()),
        "temper.storage.id": folder_id(plan.job.storage_folder),
    }
    return origin_tags(command) | safe_tags(tags)


def origin_tags(command: str) -> dict[str, str]:
    """Where a run came from: the command that repeats it, and the code."""
    git = _git()
    tags = {
        "mlflow.source.name": "temper",
        "mlflow.source.type": "LOCAL",
        "temper.command": command,
        "temper.version": temper.__version__,
    }
    if git is not None:
        tags["mlflow.source.git.commit"] = git.commit
        tags["mlflow.source.git.branch"] = git.branch
        tags["temper.git.dirty"] = str(git.dirty).lower()
    return safe_tags(tags)


def safe_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags as they may be logged: no secret, and no longer than MLflow takes them."""
    return {key: redact_text(value)[:TAG_LENGTH] for key, value in tags.items()}


def phases_tags(phases: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The tags that tell of these phases."""
    lists: list[list[str]] = [[]]
    for text in (json.dumps(phase, separators=(",", ":")) for phase in phases):
        if sum(map(len, lists[-1])) + len(lists[-1]) + len(text) + 2 > TAG_LENGTH:
            lists.append([])
        lists[-1].append(text)
    return {_phases_tag(index): f"[{','.join(texts)}]" for index, texts in enumerate(lists)}


def told_phases(tags: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the tags of a run tell of its phases."""
    found: list[dict[str, Any]] = []
    for index in itertools.count():
        text = tags.get(_phases_tag(index))
        if text is None:
            return found
        found += json.loads(text)
    return found


def _phases_tag(index: int) -> str:
    return f"{PHASES_TAG}.{index}" if index else PHASES_TAG


def safe_params(params: Mapping[str, str]) -> dict[str, str]:
    """Parameters as they may be logged: no secret, and within MLflow's limits."""
    return {metric_name(key): redact_text(value)[:_PARAM_LENGTH] for key, value in params.items()}


def run_files(plan: Plan, job_yaml: str) -> dict[str, str]:
    """The files of a run, by their names: the job, the plan, and where it came from."""
    job, decided = redact_yaml(job_yaml), json.dumps(redact_values(plan.to_dict()), indent=2)
    return {JOB: job, PLAN: f"{decided}\n", **origin_files()}


def origin_files() -> dict[str, str]:
    """The environment and the state of git, by the names of the files."""
    files = {ENVIRONMENT: _environment()}
    git = _git()
    if git is not None:
        files[GIT] = json.dumps(git.to_dict(), indent=2) + "\n"
    if git is not None and git.diff:
        files["git.diff"] = redact_text(git.diff)
    return files


def dataset_input(plan: Plan) -> DatasetInput:
    """The data set that a run is trained on: the data's fingerprint, and what the job makes of them.

    MLflow keeps one data set for each name and digest in an experiment, so that the digest is over all that is said.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data, facts = plan.job.data, plan.data
    source = redact_values(data.model_dump(mode="json", exclude_defaults=True))
    features = {"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, *facts.shape]}}
    labels = {"type": "tensor", "tensor-spec": {"dtype": "int64", "shape": [-1]}}
    schema = {"mlflow_tensorspec": {"features": json.dumps([features]), "targets": json.dumps([labels])}}
    counts = {
        "fingerprint": facts.fingerprint,
        "num_classes": facts.num_classes,
        "train_examples": facts.train_examples,
        "validation_examples": facts.validation_examples,
        "test_examples": facts.test_examples,
    }
    said = [json.dumps(each) for each in (source, schema, counts)]
    dataset = Dataset(
        name=Path(facts.folder).name or data.kind,
        digest=hashlib.sha256("".join(said).encode()).hexdigest()[:_DIGEST_LENGTH],
        source_type=data.kind,
        source=said[0],
        schema=said[1],
        profile=said[2],
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _git() -> GitState | None:
    return _git_of(Path.cwd())


@cache
def _git_of(folder: Path) -> GitState | None:
    """As it was when this process first asked: the code that runs is that of its start."""
    return git_state(folder)


@cache
def _environment() -> str:
    """Packages do not change while a process runs."""
    return environment_text()


def redact_yaml(text: str) -> str:
    """The file as it was written where that is safe; otherwise, as for a secret over several lines, written anew."""
    values = yaml.safe_load(text)
    redacted = redact_values(values)
    return redact_text(text if redacted == values else yaml.safe_dump(redacted, sort_keys=False))


def metric_name(name: str) -> str:
    """`name` with what MLflow does not allow in names of metrics and parameters replaced, at most 250 characters."""
    parts = [part for part in re.sub(r"[^\w\-./ :]", "_", name).split("/") if part.strip(".")]
    return "/".join(parts)[:_KEY_LENGTH].rstrip("/") or "_"
