"""Ray Train as temper uses it: one worker group that calls :func:`temper.worker.work`, and nothing beyond need.

Each process that Ray starts costs a second or two of an idle core, one after the other. Ray Train starts three that
are of use only to others: one serves Ray Datasets to the workers, and temper's workers read their own; one frees the
resources of a controller that died, and one asks a cluster's autoscaler for nodes, and an embedded Ray ends with the
command and has one node. Nor is torch imported in the driver and the controller, as `TorchTrainer` would: the workers
are told of each other here, and form their process group themselves.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.util
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from temper.plan.room import GroupShape, shape_of
from temper.run_folder import FAILURES, RUN, SYSTEM, TraceSpec, WorkerSpec
from temper.storage import shared_path
from temper.tracking.callback import TrackingCallback, TrackingTarget, build_callbacks
from temper.tracking.history import phase_histories
from temper.tracking.system_metrics import collected


class ProcessGroupBackend(Backend):
    """Tells each worker where rank 0 listens and which rank it is, in the variables that torch.distributed reads."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, _address_and_port)
        worker_group.execute(_set_rank_environment, address, port)


@dataclass
class ProcessGroupConfig(BackendConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return ProcessGroupBackend


def _address_and_port() -> tuple[str, int]:
    """An address of this node that the other workers reach, and a free port."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def _set_rank_environment(address: str, port: int) -> None:
    context = ray.train.get_context()
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        RANK=str(context.get_world_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        NODE_RANK=str(context.get_node_rank()),
    )


class LeanTrainer(DataParallelTrainer):
    """A data-parallel trainer without the actor for Ray Datasets."""

    unused: tuple[type, ...] = (DatasetsCallback,)

    def _create_default_callbacks(self) -> list[Any]:
        return [item for item in super()._create_default_callbacks() if not isinstance(item, self.unused)]


class EmbeddedTrainer(LeanTrainer):
    """For an embedded Ray: without the cleaner of placement groups and the autoscaler's coordinator."""

    unused = (DatasetsCallback, PlacementGroupCleanerCallback)

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["scaling_policy"] = UnscaledPolicy(self.scaling_config)
        return super()._initialize_and_run_controller(**arguments)


class UnscaledPolicy(FixedScalingPolicy):
    """As many workers as asked for, from the resources that are there."""

    def _send_resource_request(self) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...

    def _cancel_resource_request(self) -> None: ...


def build_trainer(spec: WorkerSpec, *, embedded: bool) -> DataParallelTrainer:
    """The trainer of the spec's phases; its `fit()` returns when they are complete or were asked to stop."""
    target = TrackingTarget(
        run_record=str(spec.run_folder / RUN),
        histories=phase_histories(spec.plan),
        failures_path=str(spec.run_folder / FAILURES),
        system_path=str(spec.run_folder / SYSTEM),
    )
    restarts = spec.plan.job.parallel.max_restarts
    return _trainer(_train_loop, spec, build_callbacks(target), restarts=restarts, embedded=embedded)


def build_tracer(spec: TraceSpec, *, embedded: bool) -> DataParallelTrainer:
    """The trainer that takes a few steps of plans of one mesh and writes down what they did."""
    target = TrackingTarget("", (), failures_path=str(spec.run_folder / FAILURES), system_path="")
    return _trainer(_trace_loop, spec, [TrackingCallback(target)], restarts=0, embedded=embedded)


def _trainer(
    loop: Callable[[dict[str, Any]], None],
    spec: WorkerSpec | TraceSpec,
    callbacks: list[Any],
    *,
    restarts: int,
    embedded: bool,
) -> DataParallelTrainer:
    shape = shape_of(spec.plan)
    return build_group(
        loop, {"spec": spec}, shape, spec.run_folder / "ray", callbacks, restarts=restarts, embedded=embedded
    )


def build_group(
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    shape: GroupShape,
    folder: Path,
    callbacks: list[Any],
    *,
    restarts: int,
    embedded: bool,
) -> DataParallelTrainer:
    """A worker group of this shape, whose ranks run `loop(config)`; Ray Train's own record of it goes to `folder`."""
    on_gpu = shape.gpus_per_rank > 0
    resources = {"CPU": shape.cpus_per_rank, **({"GPU": shape.gpus_per_rank} if on_gpu else {})}
    return (EmbeddedTrainer if embedded else LeanTrainer)(
        loop,
        train_loop_config=config,
        backend_config=ProcessGroupConfig(),
        scaling_config=ScalingConfig(num_workers=shape.ranks, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            # Ray's own record of an attempt; checkpoints are temper's, so that none is ever read from here.
            name=f"attempt-{time.time_ns()}",
            storage_path=str(folder) if embedded else shared_path(folder),
            failure_config=FailureConfig(max_failures=restarts),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=callbacks,
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _train_loop(config: dict[str, Any]) -> None:
    """What Ray Train runs in each worker."""
    from temper.loop import Interrupted
    from temper.worker import work

    def report(phase: str, records: list[dict[str, Any]]) -> None:
        ray.train.report({"records": records, "phase": phase, "system": take_samples()})

    plan = config["spec"].plan
    is_wanted = plan.job.tracking.system_metrics and os.environ["LOCAL_RANK"] == "0"
    try:
        with collected(is_wanted, is_only_node=plan.cluster.nodes == 1) as take_samples:
            work(config["spec"], report)
    except Interrupted:
        # The state is saved. To raise would make Ray start the workers again.
        return


def _trace_loop(config: dict[str, Any]) -> None:
    from temper.worker import trace_work

    trace_work(config["spec"])
