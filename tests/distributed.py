"""Runs a function on several gloo ranks, each a process of its own, and gives back what each returned.

The ranks are forked from one process that has imported what they need.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`function(rank, *args)` on each rank; raises what the first failing rank raised, with its traceback."""
    start_server()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, folder, function, args)
        mp.start_processes(_rank, args=arguments, nprocs=world_size, join=True, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def start_server() -> None:
    """Starts the process that ranks are forked from; does nothing the second time. Python 3.11 does not tell it where
    modules are looked for."""
    forkserver.set_forkserver_preload(["preloaded"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
    )
    torch.set_num_threads(1)
    # A file, because a port that is free now may be taken when rank 0 listens.
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        result = function(rank, *args)
    except Exception:
        raise RuntimeError(f"rank {rank}:\n{traceback.format_exc()}") from None
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
