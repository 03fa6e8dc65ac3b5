"""Makes DeepSpeed start fast, quietly and on any machine. Call :func:`prepare` before any other use of deepspeed."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist


def prepare(device: str) -> None:
    """Selects the accelerator, silences start-up chatter and avoids the compiler where nothing needs it.

    On a CPU, `init_distributed` would compile a shared-memory all-reduce for about 40 s; gloo does without. DeepSpeed
    says that a CPU has no fp16; torch's CPU kernels have it, so the capability check is overridden.
    """
    os.environ["DS_ACCELERATOR"] = device
    warnings.filterwarnings("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed = _import_deepspeed()
    deepspeed.utils.logger.setLevel(logging.ERROR)
    _import_muon()
    if device == "cpu":
        # By its full name: the attribute `deepspeed.comm.torch` is torch itself.
        importlib.import_module("deepspeed.comm.torch").__dict__["build_shm_op"] = lambda: None
        accelerator = importlib.import_module("deepspeed.accelerator.cpu_accelerator")
        accelerator.CPU_Accelerator.is_fp16_supported = lambda self: True


def _import_deepspeed() -> Any:
    """DeepSpeed's autotuner imports mlflow if it can, which is three quarters of DeepSpeed's import time."""
    hidden = {} if "mlflow" in sys.modules else {"mlflow": None}
    with mock.patch.dict(sys.modules, hidden):
        return importlib.import_module("deepspeed")


def _import_muon() -> None:
    """DeepSpeed imports its Muon optimizer, asked for or not, and that decorates functions with `torch.compile`.

    Decorating alone imports torch's compiler, for 2 s. temper has no Muon, so the decorator may do nothing.
    """
    with mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda wrapped: wrapped)):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


@contextmanager
def passing_engines() -> Iterator[None]:
    """DeepSpeed's engines of this block leave nothing behind: neither process groups, each of which has threads and
    connections, nor the modules that ZeRO-3 keeps for ever. Collective."""
    deepspeed = _import_deepspeed()
    deepspeed.init_distributed(dist_init_required=False)
    deepspeed.utils.groups._clone_world_group()  # of the first engine, and of all that come after it
    groups = dist.distributed_c10d._world.pg_map
    before = set(groups)
    try:
        yield
    finally:
        # No rank uses them any more: the last checkpoint was waited for.
        for group in set(groups) - before:
            dist.destroy_process_group(group)
        importlib.import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK.clear()
        coordinator = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
        method = coordinator.PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
        inspect.getclosurevars(method).nonlocals["func"].cache_clear()


def device_of(kind: str) -> torch.device:
    """This rank's device: the CPU, or the GPU that Ray assigned (the only one visible) or LOCAL_RANK names."""
    if kind == "cpu":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
