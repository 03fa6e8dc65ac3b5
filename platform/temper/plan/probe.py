"""What a plan must know of a model: its parameters, activations and FLOPs, found by building it in a process of its
own.

The planning process never imports torch. The answer is kept under `<storage>/cache/models`, keyed by everything that
decides it, so that the second plan of a model takes milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import temper
from temper.config.schema import JobConfig
from temper.errors import JobError, Problem
from temper.files import read_json, write_json
from temper.plan.facts import DataFacts
from temper.plan.phases import fingerprint, library_versions
from temper.plan.targets import hash_targets, local_folders

PROBE_VERSION = 1
"""Raised when temper's probe or its own models change, so that answers kept from before are not used."""

_TIMEOUT_S = 600
_SOURCE_ROOT = Path(temper.__file__).parent.parent


@dataclass(frozen=True)
class ModelFacts:
    """A model as the plan sees it. Bytes are at fp32; a multiply-add counts as two FLOPs.

    `parameter_sizes` are the elements of each trainable parameter, in the model's order: ZeRO-3 cuts each one by
    itself, so their sum does not tell what a rank holds. `activation_bytes_per_example` is what autograd keeps for
    the backward pass. `output_shape` is that of one example's output, None where it is not one tensor.
    """

    num_parameters: int
    num_trainable: int
    parameter_sizes: tuple[int, ...]
    buffer_bytes: int
    activation_bytes_per_example: int
    forward_flops_per_example: int
    output_shape: tuple[int, ...] | None


def model_facts(job: JobConfig, data: DataFacts, job_folder: Path) -> ModelFacts:
    """The facts of the job's model on examples of the data's shape, from the cache or from a new process.

    Raises JobError where the model cannot be built or does not take such an example.
    """
    question = model_question(job, data, job_folder)
    cached = _read(cache_file(job, question))
    if cached is not None:
        return cached
    facts = _facts(_ask(question, job, job_folder))
    _write(cache_file(job, question), facts)
    return facts


def model_question(job: JobConfig, data: DataFacts, job_folder: Path) -> dict[str, Any]:
    """Everything that decides a model's facts: what the probe is given, and versions of the code that answers."""
    return {
        "probe": PROBE_VERSION,
        "model": job.model.model_dump(mode="json"),
        "shape": list(data.shape),
        "num_classes": data.num_classes,
        "libraries": library_versions(job),
        "sources": {key: value for key, value in hash_targets(job, job_folder).items() if key == "model.target"},
    }


def cache_file(job: JobConfig, question: dict[str, Any]) -> Path:
    """Where the answer to `question` is kept."""
    return Path(job.storage) / "cache" / "models" / f"{fingerprint(question)}.json"


def _read(file: Path) -> ModelFacts | None:
    answer = read_json(file)
    try:
        return None if answer is None else _facts(answer)
    except (TypeError, KeyError):
        return None  # of another version, or edited: the model is simply measured again


def _facts(answer: dict[str, Any]) -> ModelFacts:
    shape = answer["output_shape"]
    return ModelFacts(
        **{
            **answer,
            "parameter_sizes": tuple(answer["parameter_sizes"]),
            "output_shape": None if shape is None else tuple(shape),
        }
    )


def _write(file: Path, facts: ModelFacts) -> None:
    # A cache that cannot be written costs time at the next plan, and nothing else.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(facts))


def _ask(question: dict[str, Any], job: JobConfig, job_folder: Path) -> dict[str, Any]:
    """Run `temper.models.probe` on the question; its last line of output is the answer."""
    path = [str(_SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # -P: a file of the user's in the working directory must not take the place of a library's.
    command = [sys.executable, "-P", "-m", "temper.models.probe", *local_folders(job_folder)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(question),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise JobError([_failure(job, f"was not built within {_TIMEOUT_S} s")]) from None
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise JobError([_failure(job, _crash(done))]) from None
    if "problems" in answer:
        raise JobError([Problem(**problem) for problem in answer["problems"]])
    return dict(answer["facts"])


def _crash(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    reason = f": {lines[-1]}" if lines else ""
    return f"ends the process that builds it (exit code {done.returncode}){reason}"


def _failure(job: JobConfig, rule: str) -> Problem:
    return Problem("model", getattr(job.model, "target", job.model.kind), rule)
