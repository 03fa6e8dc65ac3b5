"""Training by DeepSpeed: ZeRO 0–3, CPU offload, split layers, fp32, bf16 and fp16, accumulation, clipping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from temper.checkpoint import BUFFER, MASTER, CheckpointReader, Shard
from temper.config.schema import JobConfig
from temper.engine.base import EngineState, LossFunction, StepResult, Targets
from temper.engine.deepspeed_setup import device_of
from temper.engine.inputs import DTYPES, apply_seed, prepared
from temper.engine.masks import MasterMasks
from temper.engine.masters import (
    Fragment,
    forget_moments,
    inner_optimizer,
    master_fragments,
    optimizer_step,
    set_optimizer_step,
)
from temper.engine.model_parallel_unit import ModelParallelUnit
from temper.optim import build_optimizer
from temper.parallel.batch_norm import apply_global_batch_norm
from temper.parallel.blocks import join_blocks
from temper.parallel.cut import cut_of
from temper.parallel.groups import MeshGroups
from temper.parallel.split import apply_split
from temper.plan.distill import CONNECTORS
from temper.plan.mesh import BatchPlan, MeshPlan
from temper.precision.accumulation import arithmetic
from temper.precision.device import apply_product_precision
from temper.precision.masters import drop_master_weights
from temper.precision.scaling import is_exhausted, mend_scaler
from temper.precision.twin import build_twin, gathered_weights, skeleton_of
from temper.techniques.distill.features import FeatureTaps

SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class DeepSpeedEngine:
    """One rank of a ZeRO engine; see :class:`temper.engine.base.Engine`.

    The process group must exist and :func:`temper.engine.deepspeed_setup.prepare` must have run. Every rank is given
    the same whole `model`; where the mesh has tensor ranks, its layers are split here.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        job: JobConfig,
        batch: BatchPlan,
        mesh: MeshPlan,
        groups: MeshGroups,
        deepspeed_config: Mapping[str, Any],
        taps: FeatureTaps | None = None,
    ) -> None:
        self._loss, self._batch, self.groups, self._taps = loss, batch, groups, taps
        self._dtype = DTYPES[job.precision.dtype]
        self._fp16 = job.precision.dtype == "fp16"
        self._zero = deepspeed_config["zero_optimization"]["stage"]
        self.device = device_of(mesh.device)
        apply_product_precision(job.precision.dtype, self.device)
        self.arithmetic = arithmetic(self._dtype, self.device, job.precision.fp32_accumulation)
        self._shapes = _shapes(model)
        # Only where a rank has the whole model is there one to be looked at.
        self._skeleton = skeleton_of(model) if self._fp16 and groups.replica.size == 1 else None
        if mesh.world_size > 1 or job.precision.is_low:
            apply_global_batch_norm(model, groups.data)
        if mesh.splits:
            apply_split(model, mesh.splits, groups)
        names = {param: name for name, param in model.named_parameters()}
        if taps is not None:
            connectors = {f"{CONNECTORS}.{name}": param for name, param in taps.connectors.named_parameters()}
            names |= {param: name for name, param in connectors.items()}
            self._shapes |= {name: tuple(param.shape) for name, param in connectors.items()}
        model = self._local_part(model, mesh).to(self.device)
        optimizer = build_optimizer(job.optimizer, model.parameters())
        import deepspeed  # only now, after `prepare`

        # DeepSpeed keeps the mesh of the engine that a process built before.
        deepspeed.utils.groups.mpu = None
        # fp32 at stage 0 has no wrapper that keeps the norm from before clipping: `_clip_and_measure` does.
        own_clipping = {"gradient_clipping": 0.0} if self._zero == 0 else {}
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={**deepspeed_config, **own_clipping},
            dist_init_required=False,
            mpu=self._model_parallel_unit(mesh),
        )
        self._all_names = {param: names[param] for param in model.parameters()}
        self._names = {param: name for param, name in self._all_names.items() if param.requires_grad}
        self._grad_norm: Tensor | None = None
        self._inner = inner_optimizer(self._engine.optimizer)
        if self._inner is self._engine.optimizer:
            self._clip_norm = job.optimizer.clip_norm
            self._inner.register_step_pre_hook(self._clip_and_measure)
        self._masks = MasterMasks(self._inner)
        if not job.precision.master_weights:
            drop_master_weights(self._inner, self._dtype)
        if self._fp16:
            mend_scaler(self._engine.optimizer)

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the gradients: they would keep the engine for ever."""
        self._engine.destroy()

    def _local_part(self, model: nn.Module, mesh: MeshPlan) -> nn.Module:
        """What of the model this rank computes, and of the connectors."""
        join_blocks(model)
        if self._taps is None:
            return model
        return _Connected(model, self._taps.hook(dict(model.named_modules())))

    def _model_parallel_unit(self, mesh: MeshPlan) -> Any:
        """Tells DeepSpeed which ranks average gradients, where these are not all."""
        return ModelParallelUnit(self.groups) if mesh.tensor > 1 else None

    # ------------------------------------------------------------------------------------------------------- the step

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    @property
    def _model(self) -> nn.Module:
        """The model without connectors."""
        return self.module.model if isinstance(self.module, _Connected) else self.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer that steps the masters."""
        return self._inner

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters by their names in the whole model."""
        return ((name, param) for param, name in self._all_names.items())

    def step(self, inputs: Tensor, targets: Targets, *, lr: float, seed: int) -> StepResult:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self.seed(seed)
        scale, exhausted = self._loss_scale(), self._fp16 and is_exhausted(self._loss_scaler())
        # Of the module: DeepSpeed's engine hands `train` and `eval` on and keeps no mode of its own.
        if not self.module.training:
            self._engine.train()
        if self._taps is not None:
            self._taps.begin_step((scale or 1.0) / self._batch.accumulation)
        means = self._compute(self.micro_batches(inputs, targets))
        applied = self._engine.was_step_applied()
        return StepResult(
            loss=total(means),
            terms=means,
            grad_norm=self._last_grad_norm(),
            applied=applied,
            loss_scale=scale,
            at_min_scale=exhausted and not applied,
        )

    def _compute(self, micro_batches: Iterator[tuple[Tensor, Any]]) -> dict[str, Tensor]:
        """Forward, backward and the optimizer's step; the loss's terms, each a mean over the rank's part."""
        sums: dict[str, Tensor] = {}
        for inputs, targets in micro_batches:
            self._feed(targets)
            with self.arithmetic():
                terms = self._loss(self._engine(inputs), targets)
                self._engine.backward(total(terms))
            self._engine.step()
            add_terms(sums, terms)
            del inputs, targets  # before the next ones are made
        terms = self._taps.terms() if self._taps is not None else {}
        return {name: value / self._batch.accumulation for name, value in (*sums.items(), *terms.items())}

    def _feed(self, targets: Any) -> None:
        """Tells the taps what the teacher says of the next micro-batch."""
        if self._taps is not None:
            self._taps.feed(targets.signals.features)

    def seed(self, seed: int) -> None:
        """Sets the random numbers of a step, as its first micro-batch finds them."""
        apply_seed(seed, self.device)

    def micro_batches(self, inputs: Tensor, targets: Targets) -> Iterator[tuple[Tensor, Any]]:
        size = self._batch.micro_batch
        # Each moves when it comes: the signals of a teacher may be large.
        parts = (part.to(self.device, non_blocking=True) for part in targets.split(size))
        return zip(self._prepared(inputs).split(size), parts, strict=True)

    def twin(self, dtype: torch.dtype) -> nn.Module:
        """The model, plain and whole on this rank, with the weights that forward uses in `dtype`. Collective."""
        assert self._skeleton is not None, "an fp16 engine without stages and split layers has one"
        shapes = {name: self._shapes[name] for name in self._names.values()}
        gathered = gathered_weights(self.fragments(), shapes, self._dtype, self.device, self.groups.data.process_group)
        weights = {**gathered, **{name: param for name, param in self.named_parameters() if name not in gathered}}
        # Running statistics are in fp32 already.
        buffers = {
            name: value.to(dtype) if value.dtype == self._dtype else value
            for name, value in self._model.named_buffers()
        }
        twin = build_twin(self._skeleton, {name: value.to(dtype) for name, value in weights.items()}, buffers)
        return apply_global_batch_norm(twin, self.groups.data)

    def _prepared(self, inputs: Tensor) -> Tensor:
        return prepared(inputs, self._dtype, self.device)

    def _clip_and_measure(self, optimizer: torch.optim.Optimizer, *_unused: Any) -> None:
        """Runs just before the optimizer's step, when the gradients are reduced."""
        params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
        self._grad_norm = _global_norm(params, self.groups)
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
        data, tensor = self.groups.data, self.groups.tensor
        fragments = self.fragments()
        if self._zero == 0:
            # Every replica holds everything; each writes every size-th parameter.
            fragments = fragments[data.rank :: data.size]
        shards = [
            Shard(
                item.name, item.start, {MASTER: item.master, **item.moments(), **self._masks.shard_of(item)}, item.cut
            )
            for item in fragments
        ]
        if data.rank == 0:
            shards += [
                Shard(name, 0, {BUFFER: value.detach().reshape(-1)}, cut_of(value))
                for name, value in self._static_tensors().items()
            ]
        # What tensor ranks do not share out, each of them holds, and the first one writes.
        return [shard for shard in shards if tensor.rank == 0 or shard.cut is not None]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters and buffers of the whole model, in its order."""
        return self._shapes

    def _static_tensors(self) -> dict[str, Tensor]:
        """What is saved but not optimized: persistent buffers and frozen parameters."""
        parameters = set(self._all_names.values())
        buffers = {name: value for name, value in self._named_state().items() if name not in parameters}
        return {**buffers, **{name: param for param, name in self._all_names.items() if not param.requires_grad}}

    def _named_state(self) -> dict[str, Tensor]:
        """This rank's parameters and persistent buffers by their names in the whole model."""
        return self._model.state_dict(keep_vars=True)

    def state(self) -> EngineState:
        scaler = self._loss_scaler()
        values = {} if scaler is None else {key: getattr(scaler, key) for key in SCALER_FIELDS if hasattr(scaler, key)}
        return EngineState(optimizer_step=optimizer_step(self.fragments()), loss_scaler=values)

    @torch.no_grad()
    def load(self, reader: CheckpointReader, state: EngineState) -> None:
        fragments = self.fragments()
        moments = reader.moments()
        if not moments:  # a phase with a fresh optimizer, or a checkpoint from before the first applied step
            forget_moments(self._engine.optimizer, fragments)
        for item in fragments:
            item.master.copy_(reader.read(MASTER, item.name, item.start, item.numel, item.cut))
            for key in moments:
                item.moment(key).copy_(reader.read(key, item.name, item.start, item.numel, item.cut))
        if state.optimizer_step > 0:
            set_optimizer_step(fragments, state.optimizer_step)
        self._masks.load(fragments, reader)
        for name, value in self._static_tensors().items():
            value.copy_(reader.read(BUFFER, name, cut=cut_of(value)).view_as(value))
        self._refresh_model(reader)
        scaler = self._loss_scaler()
        for key, number in state.loss_scaler.items():
            setattr(scaler, key, number)

    def _refresh_model(self, reader: CheckpointReader) -> None:
        """Brings the weights that forward uses in line with masters that were just loaded."""
        if self._zero == 3:
            optimizer = self._engine.optimizer
            # What is gathered already would not be gathered again, and small parameters stay so between steps.
            optimizer._partition_all_parameters()
            for index in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
            return
        for param, name in self._names.items():
            param.data.copy_(reader.read(MASTER, name, cut=cut_of(param)).view_as(param))

    def _loss_scaler(self) -> Any:
        return self._engine.optimizer.loss_scaler if self._fp16 else None

    def _loss_scale(self) -> float | None:
        scaler = self._loss_scaler()
        return None if scaler is None else float(scaler.cur_scale)


class _Connected(nn.Module):
    """A model beside its connectors, which its hooks call: DeepSpeed trains what is in one module."""

    def __init__(self, model: nn.Module, connectors: nn.Module) -> None:
        super().__init__()
        self.model, self.connectors = model, connectors

    def forward(self, inputs: Tensor) -> Any:
        return self.model(inputs)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters first, as the model has them; a tensor that has several names counts under the first."""
    names = [name for name, _ in model.named_parameters()]
    state = model.state_dict(keep_vars=True)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names += [name for name in state if name not in parameters]
    return {name: tuple(state[name].shape) for name in names}


def _global_norm(params: list[nn.Parameter], groups: MeshGroups) -> Tensor:
    """The norm of the whole model's gradient from each rank's part of it, after the average over the data group."""
    if groups.replica.size == 1:
        return torch.nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])
    # A parameter that tensor ranks do not share out counts once, on the first of them.
    counted = [param.grad for param in params if groups.tensor.rank == 0 or cut_of(param) is not None]
    norm = torch.nn.utils.get_total_norm([grad for grad in counted if grad is not None]) if counted else None
    square = params[0].new_zeros(()) if norm is None else norm.square()
    dist.all_reduce(square, group=groups.replica.process_group)
    return square.sqrt()


def add_terms(sums: dict[str, Tensor], terms: Mapping[str, Tensor]) -> None:
    """Adds one micro-batch's terms to the sums of the step."""
    for name, value in terms.items():
        sums[name] = sums[name] + value.detach() if name in sums else value.detach()


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The loss: the sum of its terms."""
    values = list(terms.values())
    return values[0] if len(values) == 1 else torch.stack(values).sum()
