"""A small problem, the plain single-process PyTorch loop that solves it, and the same through temper's engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from temper import checkpoint
from temper.checkpoint import CheckpointReader
from temper.config.schema import JobConfig
from temper.engine.base import EngineState, LossFunction, StepResult
from temper.engine.build import build_engine as engine_of
from temper.engine.deepspeed_engine import DeepSpeedEngine
from temper.engine.deepspeed_setup import prepare
from temper.parallel.groups import MeshGroups, build_groups
from temper.plan.deepspeed_config import deepspeed_config
from temper.plan.mesh import BatchPlan, MeshPlan, plan_batch
from temper.techniques.distill.features import FeatureTaps

STEPS = 20
BATCH = 32
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "adam": {"kind": "adam", "lr": 1e-3, "weight_decay": 1e-4},
    "adamw": {"kind": "adamw", "lr": 1e-3, "weight_decay": 0.01},
    "adagrad": {"kind": "adagrad", "lr": 1e-2},
}
TORCH = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}


@dataclass(frozen=True)
class Case:
    """One way to compute the same thing."""

    zero: int = 0
    offload: str = "none"
    dtype: str = "fp32"
    optimizer: str = "sgd"
    clip: float | None = None
    accumulation: int = 1
    scale: dict[str, Any] = field(default_factory=dict, compare=False)
    pipeline: int = 1
    tensor: int = 1
    cut: tuple[int, ...] = (0, 4)
    splits: dict[str, str] = field(default_factory=dict)

    def job(self, workers: int) -> JobConfig:
        return JobConfig.model_validate(
            {
                "name": "equal",
                "model": {"kind": "cnn"},
                "data": {"kind": "digits", "global_batch": BATCH},
                "optimizer": {**OPTIMIZERS[self.optimizer], "clip_norm": self.clip},
                "precision": {"dtype": self.dtype, **self.scale},
                "parallel": {
                    "workers": workers,
                    "zero": self.zero,
                    "offload": self.offload,
                    "pipeline": self.pipeline,
                    "tensor": self.tensor,
                    "split": self.splits,
                },
                "budget": {"steps": STEPS},
            }
        )

    def __str__(self) -> str:
        clip = f"-clip{self.clip}" if self.clip else ""
        offload = "-offload" if self.offload != "none" else ""
        mesh = f"-pipeline{self.pipeline}" if self.pipeline > 1 else ""
        mesh += f"-tensor{self.tensor}-{'-'.join(sorted(set(self.splits.values())))}" if self.tensor > 1 else ""
        return f"zero{self.zero}{offload}{mesh}-{self.dtype}-{self.optimizer}{clip}-acc{self.accumulation}"

    def mesh(self, workers: int) -> MeshPlan:
        cut = self.cut if self.pipeline > 1 else ()
        return MeshPlan(workers, self.pipeline, "cpu", self.tensor, cut, self.splits)


def build_net() -> nn.Module:
    """Convolutions, batch norms, a linear layer; no bias before a norm: its gradient is noise, which Adam amplifies."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 7, 3, padding=1, bias=False),
        nn.BatchNorm2d(7),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(7 * 64, 10),
    )


def build_batches() -> list[tuple[Tensor, Tensor]]:
    """A teacher's answers to random images, so that there is something to learn: `(32, 1, 8, 8)` and `(32,)`."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS, BATCH, 1, 8, 8, generator=generator)
    teacher = torch.randn(64, 10, generator=generator)
    return [(x, (x.flatten(1) @ teacher).argmax(1)) for x in inputs]


def cross_entropy(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"cross_entropy": nn.functional.cross_entropy(outputs.float(), targets)}


def reference(optimizer: str, clip: float | None, accumulation: int, steps: int = STEPS) -> dict[str, Tensor]:
    """The plain loop; returns the state of the model after `steps`."""
    model = build_net()
    section = {key: value for key, value in OPTIMIZERS[optimizer].items() if key != "kind"}
    stepper = TORCH[optimizer](model.parameters(), **section)
    for inputs, targets in build_batches()[:steps]:
        stepper.zero_grad()
        for x, y in zip(inputs.chunk(accumulation), targets.chunk(accumulation), strict=True):
            (nn.functional.cross_entropy(model(x), y) / accumulation).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        stepper.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def build_engine(
    case: Case,
    groups: MeshGroups | None = None,
    model: nn.Module | None = None,
    loss: LossFunction = cross_entropy,
    taps: FeatureTaps | None = None,
) -> tuple[DeepSpeedEngine, BatchPlan]:
    """The case's engine over all ranks; `groups`, once made, serve for any case with the same mesh."""
    prepare("cpu")
    workers = dist.get_world_size() // (case.pipeline * case.tensor)
    job, mesh = case.job(workers), case.mesh(workers)
    batch = plan_batch(BATCH, workers, BATCH // workers // case.accumulation)
    model = build_net() if model is None else model
    groups = groups or build_groups(workers, case.pipeline, case.tensor)
    config = deepspeed_config(job, batch, mesh, sum(param.numel() for param in model.parameters()))
    return engine_of(model, loss, job, batch, mesh, groups, config, taps), batch


def rank_rows(engine: DeepSpeedEngine, batch: BatchPlan) -> Tensor:
    """The rows of a global batch that this rank takes, in its order."""
    chunk, rank = BATCH // batch.accumulation, engine.groups.data.rank
    return torch.cat(
        [
            torch.arange(chunk * index + rank * batch.micro_batch, chunk * index + (rank + 1) * batch.micro_batch)
            for index in range(batch.accumulation)
        ]
    )


def step(engine: DeepSpeedEngine, batch: BatchPlan, case: Case, number: int, *, lr_factor: float = 1.0) -> StepResult:
    """Step `number` (0-based) on this rank's rows, laid out as data.batches does."""
    inputs, targets = build_batches()[number]
    rows = rank_rows(engine, batch)
    lr = OPTIMIZERS[case.optimizer]["lr"] * lr_factor
    return engine.step(inputs[rows], targets[rows], lr=lr, seed=number)


def save(engine: DeepSpeedEngine, folder: Path, number: int) -> Path:
    """Saves as the worker does; collective."""
    folder = checkpoint.checkpoint_folder(folder, number)
    shapes = engine.shapes()
    checkpoint.write_shards(folder, dist.get_rank(), engine.shards())
    dist.barrier()
    if dist.get_rank() == 0:
        state = engine.state()
        scalars = {"optimizer_step": state.optimizer_step, "loss_scaler": dict(state.loss_scaler)}
        checkpoint.write_manifest(folder, dist.get_world_size(), {"step": number, "engine": scalars}, shapes)
    dist.barrier()
    return folder


def load(engine: DeepSpeedEngine, folder: Path) -> None:
    reader = CheckpointReader(folder)
    engine.load(reader, EngineState(**reader.state["engine"]))


def train_case(
    case: Case,
    folder: Path,
    first: int = 0,
    last: int = STEPS,
    resume: Path | None = None,
    groups: MeshGroups | None = None,
) -> dict[str, Any]:
    """Trains steps `first` … `last`, from `resume` where given; saves the end and says what each step gave."""
    engine, batch = build_engine(case, groups)
    if resume is not None:
        load(engine, resume)
    results = [step(engine, batch, case, number) for number in range(first, last)]
    saved = save(engine, folder / f"{case}-{first}-{last}-{dist.get_world_size()}", last)
    return {
        "checkpoint": saved,
        "logits": engine.predict(build_batches()[0][0][:30]).float(),
        "losses": [float(result.loss) for result in results],
        "norms": [float(result.grad_norm) for result in results if result.grad_norm is not None],
        "applied": [result.applied for result in results],
        "scales": [result.loss_scale for result in results],
    }
