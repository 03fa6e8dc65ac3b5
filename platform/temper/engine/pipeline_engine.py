"""Training of a model that is cut into pipeline stages, by DeepSpeed's 1F1B schedule (Narayanan et al. 2021).

DeepSpeed's `PipelineModule` holds the stage's layers and its `train_batch` does a whole step. What it lacks is here:
stages cut where the plan says, parameters under the model's own names, the loss's terms on every rank.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from temper.engine.deepspeed_engine import DeepSpeedEngine, add_terms, total
from temper.models.sequence import layer_sequence
from temper.outputs import logits_of
from temper.parallel.blocks import join_blocks, join_chain
from temper.plan.mesh import MeshPlan


class PipelineEngine(DeepSpeedEngine):
    """One rank of one pipeline stage; see :class:`temper.engine.base.Engine`.

    The plan lets only models through that :func:`layer_sequence` gives as layers, and ZeRO stages 0 and 1.
    """

    def _local_part(self, model: nn.Module, mesh: MeshPlan) -> nn.Module:
        layers = layer_sequence(model)
        assert layers is not None, "the plan cuts sequences only"
        first, end = (*mesh.cut, len(layers))[self.groups.pipeline.rank :][:2]
        own = [layer for _, layer in layers[first:end]]
        join_chain(own)
        for layer in own:
            join_blocks(layer)
        self._sums: dict[str, Tensor] = {}
        self._term_names: list[str] | None = None
        self._prefixes = {f"{index}.": f"{name}." for index, (name, _) in enumerate(layers)}
        # DeepSpeed keeps all layers that it is given, and those of other stages would stay in this rank's memory.
        listed = [*(nn.Identity() for _ in layers[:first]), *own, *(nn.Identity() for _ in layers[end:])]
        stage = _stage_module(listed, mesh, self._loss_of_micro_batch)
        if self._taps is not None:
            modules = {
                _join(name, inner): module
                for name, layer in layers[first:end]
                for inner, module in layer.named_modules()
            }
            stage.connectors = self._taps.hook(modules)
        return stage

    def _model_parallel_unit(self, mesh: MeshPlan) -> None:
        return None  # DeepSpeed's grid knows the groups

    @property
    def _is_last(self) -> bool:
        return self.groups.pipeline.rank == self.groups.pipeline.size - 1

    def seed(self, seed: int) -> None:
        # Stages draw different numbers, as the layers of one process do.
        super().seed((seed + 0x9E3779B97F4A7C15 * self.groups.pipeline.rank) % 2**63)

    def _named_state(self) -> dict[str, Tensor]:
        state = super()._named_state()
        return {self._own_name(name): value for name, value in state.items() if not name.startswith("connectors.")}

    def _own_name(self, name: str) -> str:
        """DeepSpeed numbers the layers; `3.weight` is the weight of layer 3."""
        index, dot, rest = name.partition(".")
        return self._prefixes[index + dot] + rest

    def _loss_of_micro_batch(self, outputs: Any, targets: Any) -> Tensor:
        terms = self._loss(outputs, targets)
        add_terms(self._sums, terms)
        return total(terms)

    def _compute(self, micro_batches: Iterator[tuple[Tensor, Any]]) -> dict[str, Tensor]:
        self._sums.clear()
        if self._taps is not None:
            # Stages take them at different times.
            listed = list(micro_batches)
            for _, targets in listed:
                self._feed(targets)
            micro_batches = iter(listed)
        # DeepSpeed would send round the loss alone; all terms follow below.
        self._engine._aggregate_total_loss = lambda: None
        with self.arithmetic():
            self._engine.train_batch(micro_batches)
        return self._share_terms()

    def _share_terms(self) -> dict[str, Tensor]:
        """The last stage's terms, on every stage."""
        group, last = self.groups.pipeline.process_group, self.groups.pipeline.size - 1
        if self._term_names is None:
            names = [list(self._sums)]
            dist.broadcast_object_list(names, group=group, group_src=last)
            self._term_names = names[0]
        if self._is_last:
            values = torch.stack([self._sums[name] for name in self._term_names]).float() / self._batch.accumulation
        else:
            values = torch.empty(len(self._term_names), device=self.device)
        dist.broadcast(values, group=group, group_src=last)
        return {**dict(zip(self._term_names, values, strict=True)), **self._share_features()}

    def _share_features(self) -> dict[str, Tensor]:
        """The terms of all stages' levels, on every stage."""
        if self._taps is None:
            return {}
        own, names = self._taps.terms(), self._taps.names
        values = torch.stack(
            [own[name].float() if name in own else torch.zeros((), device=self.device) for name in names]
        )
        dist.all_reduce(values, group=self.groups.pipeline.process_group)
        return dict(zip(names, values / self._batch.accumulation, strict=True))

    def predict(self, inputs: Tensor) -> Tensor:
        """The logits, on every stage: metrics are computed everywhere alike."""
        inputs = self._prepared(inputs)
        # Several micro-batches keep the stages busy at the same time; DeepSpeed wants them equally large.
        most = min(len(inputs), 2 * self.groups.pipeline.size)
        count = max(number for number in range(1, most + 1) if len(inputs) % number == 0)
        # Buffers are made for one shape; the training's micro-batches have another.
        self._engine.reset_activation_shape()
        # What DeepSpeed takes for losses are logits here, and it would add them to the training's.
        self._engine.total_loss = None
        outputs = self._engine.eval_batch(
            ((micro_batch, None) for micro_batch in inputs.chunk(count)),
            compute_loss=False,
            reduce_output=None,
            num_micro_batches=count,
        )
        self._engine.reset_activation_shape()
        return self._share_logits(torch.cat([logits_of(output) for output in outputs]) if self._is_last else None)

    def _share_logits(self, logits: Tensor | None) -> Tensor:
        group, last = self.groups.pipeline.process_group, self.groups.pipeline.size - 1
        kind = [(tuple(logits.shape), logits.dtype) if logits is not None else None]
        dist.broadcast_object_list(kind, group=group, group_src=last)
        assert kind[0] is not None
        logits = (
            torch.empty(kind[0][0], dtype=kind[0][1], device=self.device) if logits is None else logits.contiguous()
        )
        dist.broadcast(logits, group=group, group_src=last)
        return logits


def _join(name: str, inner: str) -> str:
    return f"{name}.{inner}" if inner else name


def _stage_module(layers: list[nn.Module], mesh: MeshPlan, loss: Any) -> nn.Module:
    """DeepSpeed's module of this rank's stage."""
    import deepspeed  # only now, after `prepare`

    deepspeed.init_distributed(dist_init_required=False)
    pipe = importlib.import_module("deepspeed.runtime.pipe.module")
    topology = importlib.import_module("deepspeed.runtime.pipe.topology")

    class Stage(pipe.PipelineModule):  # type: ignore[misc, name-defined]
        """Cut as planned. Activations travel in plain memory order, which gloo and NCCL need, and stages compute
        with channels last."""

        def _partition_layers(self, method: str = "") -> None:
            self.parts = [*mesh.cut, len(layers)]
            self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

        def forward(self, inputs: Any) -> Any:
            outputs = super().forward(_channels_last(inputs))
            return outputs.contiguous() if isinstance(outputs, Tensor) else outputs

    grid = topology.PipeModelDataParallelTopology(num_pp=mesh.pipeline, num_mp=mesh.tensor, num_dp=mesh.data)
    return Stage(layers=layers, topology=grid, loss_fn=loss)


def _channels_last(inputs: Any) -> Any:
    if isinstance(inputs, Tensor) and inputs.dim() == 4:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs
