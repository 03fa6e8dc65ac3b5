"""Data-parallel training by DeepSpeed: ZeRO 0–3, CPU offload, fp32, bf16 and fp16, accumulation, clipping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from temper.checkpoint import BUFFER, MASTER, CheckpointReader, Shard
from temper.config.schema import JobConfig
from temper.engine.base import EngineState, LossFunction, StepResult
from temper.engine.deepspeed_setup import device_of
from temper.engine.masters import (
    Fragment,
    inner_optimizer,
    master_fragments,
    optimizer_step,
    set_optimizer_step,
)
from temper.optim import build_optimizer
from temper.parallel.batch_norm import apply_global_batch_norm
from temper.plan.mesh import BatchPlan, MeshPlan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class DeepSpeedEngine:
    """One rank of a ZeRO engine; see :class:`temper.engine.base.Engine`.

    The process group must exist and :func:`temper.engine.deepspeed_setup.prepare` must have run.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        job: JobConfig,
        batch: BatchPlan,
        mesh: MeshPlan,
        deepspeed_config: Mapping[str, Any],
    ) -> None:
        self._loss = loss
        self._batch = batch
        self._dtype = DTYPES[job.precision.dtype]
        self._fp16 = job.precision.dtype == "fp16"
        self._zero = deepspeed_config["zero_optimization"]["stage"]
        self.device = device_of(mesh.device)
        if mesh.data > 1 or self._dtype != torch.float32:
            apply_global_batch_norm(model)
        model = model.to(self.device)
        optimizer = build_optimizer(job.optimizer, model.parameters())
        import deepspeed  # only now, after `prepare`

        # fp32 at stage 0 has no wrapper that keeps the norm from before clipping: `_clip_and_measure` does.
        own_clipping = {"gradient_clipping": 0.0} if self._zero == 0 else {}
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={**deepspeed_config, **own_clipping},
            dist_init_required=False,
        )
        self._names = {param: name for name, param in model.named_parameters() if param.requires_grad}
        self._grad_norm: Tensor | None = None
        self._inner = inner_optimizer(self._engine.optimizer)
        if self._inner is self._engine.optimizer:
            self._clip_norm = job.optimizer.clip_norm
            self._inner.register_step_pre_hook(self._clip_and_measure)

    # ------------------------------------------------------------------------------------------------------- the step

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def step(self, inputs: Tensor, targets: Tensor, *, lr: float, seed: int) -> StepResult:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._seed(seed)
        scale = self._loss_scale()
        # Of the module: DeepSpeed's engine hands `train` and `eval` on and keeps no mode of its own.
        if not self.module.training:
            self._engine.train()
        sums: dict[str, Tensor] = {}
        for micro_inputs, micro_targets in self._micro_batches(inputs, targets):
            terms = self._loss(self._engine(micro_inputs), micro_targets)
            self._engine.backward(_total(terms))
            self._engine.step()
            for name, value in terms.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        means = {name: value / self._batch.accumulation for name, value in sums.items()}
        return StepResult(
            loss=_total(means),
            terms=means,
            grad_norm=self._last_grad_norm(),
            applied=self._engine.was_step_applied(),
            loss_scale=scale,
        )

    def _seed(self, seed: int) -> None:
        """As `torch.manual_seed`, which takes 130 µs where there is no CUDA: it notes a traceback for each call."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _micro_batches(self, inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = self._prepared(inputs), targets.to(self.device, non_blocking=True)
        return zip(inputs.split(self._batch.micro_batch), targets.split(self._batch.micro_batch), strict=True)

    def _prepared(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.device, non_blocking=True)
        if inputs.is_floating_point():
            inputs = inputs.to(self._dtype)
        # Convolutions are up to three times faster on images whose channels come last in memory, most of all in fp16.
        return inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs

    def _clip_and_measure(self, optimizer: torch.optim.Optimizer, *_unused: Any) -> None:
        """Runs just before the optimizer's step, when the gradients are reduced."""
        params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
        self._grad_norm = torch.nn.utils.get_total_norm([param.grad for param in params])
        if self._clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(params, self._clip_norm, self._grad_norm)

    def _last_grad_norm(self) -> float | Tensor | None:
        return self._grad_norm if self._grad_norm is not None else self._engine.get_global_grad_norm()

    def predict(self, inputs: Tensor) -> Any:
        if self.module.training:
            self._engine.eval()
        with torch.no_grad():
            return self._engine.module(self._prepared(inputs))

    # --------------------------------------------------------------------------------------------------------- state

    def fragments(self) -> list[Fragment]:
        """This rank's masters and moments, as views."""
        return master_fragments(self._engine.optimizer, self._names)

    def shards(self) -> list[Shard]:
        rank, size = self._engine.global_rank, self._engine.world_size
        fragments = self.fragments()
        if self._zero == 0:
            # Every rank holds everything; each writes every size-th parameter.
            fragments = fragments[rank::size]
        shards = [
            Shard(item.name, item.shape, item.start, {MASTER: item.master, **item.moments()}) for item in fragments
        ]
        if rank == 0:
            shards += [
                Shard(name, tuple(value.shape), 0, {BUFFER: value.detach().reshape(-1)})
                for name, value in self._static_tensors().items()
            ]
        return shards

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters and buffers, in the model's order."""
        shapes = {name: tuple(getattr(param, "ds_shape", param.shape)) for name, param in _named(self.module)}
        return {**shapes, **{name: tuple(value.shape) for name, value in self._static_tensors().items()}}

    def _static_tensors(self) -> dict[str, Tensor]:
        """What is saved but not optimized: persistent buffers and frozen parameters."""
        persistent = self.module.state_dict(keep_vars=True)
        trainable = set(self._names.values())
        parameters = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        buffers = {name: value for name, value in persistent.items() if name not in parameters}
        frozen = {name: param for name, param in self.module.named_parameters() if name not in trainable}
        return {**buffers, **{name: param.detach() for name, param in frozen.items()}}

    def state(self) -> EngineState:
        scaler = self._loss_scaler()
        values = {} if scaler is None else {key: getattr(scaler, key) for key in SCALER_FIELDS if hasattr(scaler, key)}
        return EngineState(optimizer_step=optimizer_step(self.fragments()), loss_scaler=values)

    @torch.no_grad()
    def load(self, reader: CheckpointReader, state: EngineState) -> None:
        fragments = self.fragments()
        moments = reader.moments()
        for fragment in fragments:
            fragment.master.copy_(reader.read(MASTER, fragment.name, fragment.start, fragment.numel))
            for key in moments:
                fragment.moment(key).copy_(reader.read(key, fragment.name, fragment.start, fragment.numel))
        if state.optimizer_step > 0:
            set_optimizer_step(fragments, state.optimizer_step)
        for name, value in self._static_tensors().items():
            value.copy_(reader.full(BUFFER, name))
        self._refresh_model(reader)
        scaler = self._loss_scaler()
        for key, number in state.loss_scaler.items():
            setattr(scaler, key, number)

    def _refresh_model(self, reader: CheckpointReader) -> None:
        """Brings the weights that forward uses in line with masters that were just loaded."""
        if self._zero == 3:
            optimizer = self._engine.optimizer
            for index in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
            return
        for param, name in self._names.items():
            param.data.copy_(reader.full(MASTER, name))

    def _loss_scaler(self) -> Any:
        return self._engine.optimizer.loss_scaler if self._fp16 else None

    def _loss_scale(self) -> float | None:
        scaler = self._loss_scaler()
        return None if scaler is None else float(scaler.cur_scale)


def _named(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, param) for name, param in module.named_parameters() if param.requires_grad)


def _total(terms: Mapping[str, Tensor]) -> Tensor:
    values = list(terms.values())
    return values[0] if len(values) == 1 else torch.stack(values).sum()
