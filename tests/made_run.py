"""A finished run of dense-sparse-dense training as temper leaves it, made in a second and without Ray."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlp_facts
from temper import checkpoint
from temper.checkpoint import MASK, MASTER, Shard
from temper.config.load import build_job, job_to_yaml
from temper.data.batches import eval_batches
from temper.data.sources import load_split
from temper.models.build import build_model
from temper.plan import probe
from temper.plan.build import Plan, build_plan
from temper.plan.mesh import local_cluster
from temper.plan.phases import PhasePlan
from temper.techniques.dsd.masks import select_mask
from temper.techniques.dsd.summary import summarize, write_summary

RUN_ID = "0123456789abcdef0123456789abcdef"
START_MS = 1_700_000_000_000
Weights = Mapping[str, Tensor]


def save(folder: Path, step: int, weights: Weights, masks: Weights, records: Sequence[Any] = ()) -> Path:
    """A checkpoint of these weights and masks under the phase's `folder`."""
    path = checkpoint.checkpoint_folder(folder / "checkpoints", step)
    shards = [Shard(name, 0, {MASTER: weight.reshape(-1)}) for name, weight in weights.items()]
    shards += [Shard(name, 0, {MASK: mask.reshape(-1)}) for name, mask in masks.items()]
    checkpoint.write_shards(path, 0, shards)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    checkpoint.write_manifest(path, 1, {"step": step, "engine": {}}, shapes, records)
    return path


@dataclass(frozen=True)
class Made:
    """A finished run of dense-sparse-dense training, made without Ray; `phases` gives the folder of each."""

    plan: Plan
    folder: Path
    phases: dict[str, Path]


JOB: dict[str, Any] = {
    "name": "made",
    "model": {"kind": "mlp", "hidden": [32]},
    "data": {"kind": "digits", "global_batch": 64, "holdout": 100},
    "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
    "budget": {"steps": 20},
    "dsd": {"rounds": [{"sparsity": {"1": 0.75, "3": 0.5}, "sparse_steps": 20, "redense_steps": 10}]},
}
FACTS = replace(mlp_facts.FACTS, prunable=mlp_facts.PRUNABLE)


def make_once(folder: Path) -> Made:
    """:func:`make_run` of `JOB`, with what is known of its model, so that no process has to be started to probe it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "_ask", lambda *_: json.loads(json.dumps(asdict(FACTS))))
        return make_run(folder, JOB)


def make_run(folder: Path, values: dict[str, Any]) -> Made:
    """Trains the job's small net on the digits as its phases say, and writes what temper would."""
    job = build_job({**values, "storage": str(folder / "runs")})
    plan = build_plan(job, local_cluster(), folder)
    made = Made(plan, plan.run_folder, {phase.name: plan.phase_folder(phase) for phase in plan.phases})
    for place in (made.folder, *made.phases.values()):
        place.mkdir(parents=True)
        (place / "job.yaml").write_text(job_to_yaml(job))
        (place / "plan.json").write_text(json.dumps({**plan.to_dict(), "import_folders": [str(folder)]}))
    (made.folder / "run.json").write_text(json.dumps({"run_id": RUN_ID, "uri": "nowhere://x", "open": False}))
    model = build_model(job.model, plan.data, job.seed)
    before, layers = None, [weight.name for weight in FACTS.prunable]
    for phase in plan.phases:
        masks = train_phase(model, plan, phase)
        records = [record(plan, phase, step, model) for step in range(phase.first_step + 1, phase.last_step + 1)]
        place = made.phases[phase.name]
        (place / "history.jsonl").write_text("".join(json.dumps(item) + "\n" for item in records))
        end = save(place, phase.last_step, dict(model.named_parameters()), masks, records[-1:])
        if before is not None:
            write_summary(place, summarize(phase, layers, before, end))
        manifest = {"name": phase.name, "fingerprint": phase.fingerprint, "steps": phase.last_step, "seconds": 1.5}
        manifest |= {"checkpoint": str(end.relative_to(place)), "metrics": records[-1]["metrics"]}
        (place / "phase.json").write_text(json.dumps(manifest))
        before = end
    return made


def train_phase(model: nn.Module, plan: Plan, phase: PhasePlan) -> dict[str, Tensor]:
    """Trains on the training split, with pruned weights held at zero; gives the masks."""
    weights = dict(model.named_parameters())
    layers = phase.pruning.layers if phase.pruning else {}
    masks = {name: select_mask(name, weights[name], phase.pruning) for name in layers if phase.pruning}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    split = load_split(plan.job.data, "train", Path(plan.job.storage), plan.data)
    batches = eval_batches(plan.job.data, split, plan.data, rank=0, world_size=1, batch=128)
    for batch, _ in itertools.islice(itertools.cycle(list(batches)), phase.steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                weights[name] *= mask
    return masks


def record(plan: Plan, phase: PhasePlan, step: int, model: nn.Module) -> dict[str, Any]:
    metrics = {
        "train/loss": 2.0 / step,
        "train/loss/cross_entropy": 0.5 / step,
        "train/loss/soft_targets": 1.5 / step,
        "train/lr": phase.lr,
        "train/grad_norm": 3.0 / step,
        "phase": float(plan.phases.index(phase)),
        "precision/loss_scale": 65536.0 / 2 ** (step > 3),
        "precision/skipped_steps": float(step > 3),
        "time/step_s": 0.5,
        "time/examples_per_s": 128.0,
    }
    if step % 5 == 0:
        metrics |= {"eval/loss": 2.5 / step, "eval/accuracy": 1 - 1 / step, "eval/teacher_agreement": 1 - 2 / step}
        if phase.kind != "dense":
            metrics |= sparsities(model)
    if step == phase.last_step:
        metrics |= {"test/loss": 0.25, "test/accuracy": 0.875, "test/teacher_agreement": 0.9}
        metrics |= {f"test/class_accuracy/{digit}": 1 - digit / (step + 10) for digit in range(10)}
    return {"step": step, "time_ms": START_MS + 500 * step, "metrics": metrics}


def sparsities(model: nn.Module) -> dict[str, float]:
    zeros = {weight.name: int((model.get_parameter(weight.name) == 0).sum()) for weight in FACTS.prunable}
    sizes = {weight.name: math.prod(weight.shape) for weight in FACTS.prunable}
    shares = {f"sparsity/{name}": zeros[name] / sizes[name] for name in zeros}
    return {"sparsity": sum(zeros.values()) / sum(sizes.values()), **shares}
