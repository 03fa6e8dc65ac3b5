"""What a plan must know of a model: its layers, parameters, activations and FLOPs, found by building it in a process of
its own.

The planning process never imports torch. The answer is kept under `<storage>/cache/models`, keyed by everything that
decides it, so that the second plan of a model takes milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

import temper
from temper.config.schema import JobConfig
from temper.errors import JobError, Problem
from temper.files import read_json, write_json
from temper.plan.facts import DataFacts
from temper.plan.phases import fingerprint, library_versions
from temper.plan.targets import hash_targets, local_folders

PROBE_VERSION = 5
"""Raised when temper's probe or its own models change, so that answers kept from before are not used."""

_TIMEOUT_S = 600
_SOURCE_ROOT = Path(temper.__file__).parent.parent


@dataclass(frozen=True)
class Weights:
    """What of a model one rank holds: all parameters' elements, those of each trainable one, and the buffers' bytes."""

    num_parameters: int
    sizes: tuple[int, ...]
    buffer_bytes: int


def join_weights(weights: Sequence[Weights]) -> Weights:
    """What several layers hold together."""
    return Weights(
        num_parameters=sum(layer.num_parameters for layer in weights),
        sizes=tuple(size for layer in weights for size in layer.sizes),
        buffer_bytes=sum(layer.buffer_bytes for layer in weights),
    )


@dataclass(frozen=True)
class LayerFacts:
    """One layer of a model that is a sequence of layers, under its name in the model.

    `part` is what of `weights` the first tensor rank holds, None without tensor parallelism. The rest are for one
    example: FLOPs of the forward pass, bytes kept for the backward pass and bytes of the output, and the seconds of
    forward and backward together where they were measured.
    """

    name: str
    weights: Weights
    part: Weights | None
    forward_flops: int
    activation_bytes: int
    output_bytes: int
    seconds: float | None = None


@dataclass(frozen=True)
class PrunableWeight:
    """A weight that a sparse phase may prune: its name in the model, its shape, outputs first as torch has it, and what
    it belongs to: `convolution`, `linear`, `recurrent` or `other`; `transposed` is a layer that has its inputs first.
    """

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def module(self) -> str:
        """The name of the module that it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModuleOutput:
    """What a module gives in a forward pass: `shape` is that of one example, None where it is not one tensor of floats
    with the batch first. `kind` is the module's class, `calls` how often it is called. `last` is, of an nn.Sequential,
    the module that gives its output, however deep: a pipeline cuts a sequence, and that module is left.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    calls: int
    last: str | None = None

    @property
    def tap(self) -> str:
        """The module at which the output can be seen wherever the model is cut."""
        return self.last or self.name


@dataclass(frozen=True)
class ModelFacts:
    """A model as the plan sees it. Bytes are at fp32; a multiply-add counts as two FLOPs.

    `parameter_sizes` are the elements of each trainable parameter, in the model's order: ZeRO-3 cuts each one by
    itself, so their sum does not tell what a rank holds. `activation_bytes_per_example` is what autograd keeps for
    the backward pass. `output_shape` is that of one example's output, None where it is not one tensor. `layers` is
    empty where the model is not a sequence of layers. `splits` tells how the work of the modules named is split over
    the tensor ranks, and `part` what the first of them holds, which holds most; None without tensor parallelism.
    `prunable` are, in the model's order, the whole weights that are neither biases nor a norm's nor an embedding's.
    `outputs` are of the modules inside the model that a forward pass calls, in the order of their last outputs.
    `weight_shapes` are those of all parameters and persistent buffers, by each of their names.
    """

    num_parameters: int
    num_trainable: int
    parameter_sizes: tuple[int, ...]
    buffer_bytes: int
    activation_bytes_per_example: int
    forward_flops_per_example: int
    output_shape: tuple[int, ...] | None
    layers: tuple[LayerFacts, ...] = ()
    splits: Mapping[str, str] = field(default_factory=dict)
    part: Weights | None = None
    prunable: tuple[PrunableWeight, ...] = ()
    outputs: tuple[ModuleOutput, ...] = ()
    weight_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def weights(self) -> Weights:
        return Weights(self.num_parameters, self.parameter_sizes, self.buffer_bytes)


@dataclass(frozen=True)
class Timing:
    """How layers are timed: `examples` of them at once, in `dtype`, on a device with so many threads."""

    device: str
    threads: int
    dtype: str
    examples: int


_FACTS = TypeAdapter(ModelFacts)


def model_facts(job: JobConfig, data: DataFacts, job_folder: Path, timing: Timing | None = None) -> ModelFacts:
    """The facts of the job's model on examples of the data's shape, from the cache or from a new process.

    With `timing` the layers' seconds are measured on this machine; the cache keeps them, so that another plan on such a
    machine decides the same. Raises JobError where the model cannot be built, does not take such an example, or has
    no layer that `parallel.split` could split.
    """
    question = model_question(job, data, job_folder, timing)
    cached = _read(cache_file(job, question))
    if cached is not None:
        return cached
    facts = _FACTS.validate_python(_ask(question, job, job_folder))
    _write(cache_file(job, question), facts)
    return facts


def model_question(job: JobConfig, data: DataFacts, job_folder: Path, timing: Timing | None = None) -> dict[str, Any]:
    """Everything that decides a model's facts: what the probe is given, and versions of the code that answers."""
    parallel = job.parallel
    return {
        "probe": PROBE_VERSION,
        "model": job.model.model_dump(mode="json"),
        "shape": list(data.shape),
        "num_classes": data.num_classes,
        # The first pattern that matches counts, and a fingerprint does not see the order of a mapping.
        "tensor": {"size": parallel.tensor, "split": list(parallel.split.items())} if parallel.tensor > 1 else None,
        "timing": None if timing is None else {**asdict(timing), "machine": _machine()},
        "libraries": library_versions(job),
        "sources": {key: value for key, value in hash_targets(job, job_folder).items() if key == "model.target"},
    }


def _machine() -> list[str]:
    """The models of this machine's processors and GPUs. Not its name, which a container has only once."""
    described = [Path("/proc/cpuinfo"), *sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    lines = [line for file in described if file.is_file() for line in file.read_text().splitlines()]
    # "model name" once for each processor, "Model" for each GPU.
    models = [line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() in ("model name", "Model")]
    return models or [platform.processor(), str(os.cpu_count())]


def cache_file(job: JobConfig, question: dict[str, Any]) -> Path:
    """Where the answer to `question` is kept."""
    return job.storage_folder / "cache" / "models" / f"{fingerprint(question)}.json"


def _read(file: Path) -> ModelFacts | None:
    answer = read_json(file)
    try:
        return None if answer is None else _FACTS.validate_python(answer)
    except ValueError:
        return None  # of another version, or edited: the model is simply measured again


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
