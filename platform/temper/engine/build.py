"""The engine that a mesh asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from temper.config.schema import JobConfig
from temper.engine.base import LossFunction
from temper.engine.deepspeed_engine import DeepSpeedEngine
from temper.engine.pipeline_engine import PipelineEngine
from temper.parallel.groups import MeshGroups
from temper.plan.mesh import BatchPlan, MeshPlan
from temper.techniques.distill.features import FeatureTaps


def build_engine(
    model: nn.Module,
    loss: LossFunction,
    job: JobConfig,
    batch: BatchPlan,
    mesh: MeshPlan,
    groups: MeshGroups,
    deepspeed_config: Mapping[str, Any],
    taps: FeatureTaps | None = None,
) -> DeepSpeedEngine:
    """This rank's engine for the whole `model`, which is split and cut as `mesh` says; `taps` are hooked into it, and
    their connectors trained with it. Collective."""
    engine = PipelineEngine if mesh.pipeline > 1 else DeepSpeedEngine
    return engine(model, loss, job, batch, mesh, groups, deepspeed_config, taps)
